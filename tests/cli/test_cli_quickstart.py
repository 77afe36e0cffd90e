"""`mllm-align quickstart`: its options reach the experiment."""

from pathlib import Path

from mllm_align.testbed.quickstart.phases import Recipe


def test_options_reach_the_experiment(run, monkeypatch):
    called = []
    monkeypatch.setattr("mllm_align.testbed.quickstart.experiment.run", lambda *given: called.append(given))
    assert run("quickstart") == (0, "", "")
    assert run("quickstart", "--out", "there", "--seeds", 3, "--mask-rate", 0)[0] == 0
    assert called == [
        (Path("runs/quickstart"), 1, Recipe(mask_rate=0.99)),
        (Path("there"), 3, Recipe(mask_rate=0.0)),
    ]


def test_what_is_refused(refused, tmp_path):
    out = ("--out", tmp_path / "quick")
    assert "--seeds is 0; it must be 1 or more" in refused("quickstart", *out, "--seeds", 0)
    assert "--mask-rate is 1.5; it must be from 0 to 1" in refused("quickstart", *out, "--mask-rate", 1.5)
