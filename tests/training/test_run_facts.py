"""What run.json says."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest

from mllm_align import (
    Config,
    DataConfig,
    Endpoint,
    InputError,
    JudgeModel,
    LoraConfig,
    MeshConfig,
    OnlineBDHS,
    OnlinePairs,
)
from mllm_align.training import run_folder


def test_a_checkout_that_is_not_installed_can_train(monkeypatch):
    def version(name):
        if name == "mllm-align":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(run_folder, "version", version)
    assert run_folder._version("mllm-align") == "not installed"
    assert run_folder._version("jax") == "1.2"


ENDPOINT = Config(online=OnlinePairs(annotator=Endpoint(url="http://one", retries=1), samples=4))


@pytest.mark.parametrize(
    "saved, now",
    [
        (Config(), Config(log_every=3, mesh=MeshConfig(2, 2), micro_batches=4, steps=9, keep=5)),
        (Config(), Config(data=DataConfig(threads=9, prefetch=1))),
        (Config(online=OnlineBDHS()), Config(online=OnlineBDHS(mesh=MeshConfig(tensor=2)))),
        (
            ENDPOINT,
            Config(
                online=OnlinePairs(
                    annotator=Endpoint(url="http://two", budget=3), samples=4, mesh=MeshConfig()
                )
            ),
        ),
    ],
)
def test_a_run_may_go_on_with_what_moves_no_number(saved, now):
    assert saved != now
    run_folder._check_config("run", saved, now)


@pytest.mark.parametrize(
    "now, named",
    [
        (replace(ENDPOINT, seed=1, batch_size=16), "batch_size, seed"),
        (replace(ENDPOINT, data=DataConfig(multiple=8)), "data.multiple"),
        (replace(ENDPOINT, lora=LoraConfig(rank=2)), "lora.rank"),
        (Config(online=OnlinePairs(annotator=Endpoint(), samples=2)), "online.samples"),
        (Config(online=OnlinePairs(annotator=Endpoint(model="x"), samples=4)), "online.annotator.model"),
        (Config(online=OnlinePairs(annotator=JudgeModel(), samples=4)), "online.annotator.kind"),
    ],
)
def test_a_run_does_not_go_on_with_what_does(now, named):
    with pytest.raises(InputError, match=rf"another configuration \(.*{named}.* differ\)"):
        run_folder._check_config("run", ENDPOINT, now)
