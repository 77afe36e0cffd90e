"""What run.json says."""

from importlib.metadata import PackageNotFoundError

from mllm_align.training import run_folder


def test_a_checkout_that_is_not_installed_can_train(monkeypatch):
    def version(name):
        if name == "mllm-align":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(run_folder, "version", version)
    assert run_folder._version("mllm-align") == "not installed"
    assert run_folder._version("jax") == "1.2"
