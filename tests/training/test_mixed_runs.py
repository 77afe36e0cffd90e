"""Runs on several data sets by weight: shares, going on, what is refused."""

from dataclasses import replace

import pytest
from runs import PAIRS, TINY, bundle, compiling, events, rows, write_pairs

from mllm_align import DataConfig, InputError, Mixture, train
from mllm_align.training.run_folder import read_metadata

assert compiling  # a fixture
pytestmark = pytest.mark.slow  # its parts are tested apart
CONFIG = replace(TINY, save_every=2)  # TINY's steps, so that its programs are there already


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """8 pairs, and 4 that have the ids of others and twice the weight."""
    few = write_pairs(tmp_path_factory.mktemp("few"), rows(4), "few.jsonl")
    return Mixture({PAIRS: 1, few: 2})


@pytest.fixture(scope="module")
def whole(mixed, tmp_path_factory):
    """(model, folder) of a run of an epoch and a step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(CONFIG, bundle(), mixed, out), out


def test_the_log_has_shares_and_the_run_its_weights(whole, mixed):
    lines = events(whole[1], "train")
    few = [line["source/few.jsonl/share"] for line in lines]
    others = [line["source/pairs.jsonl/share"] for line in lines]
    assert [one + other for one, other in zip(few, others, strict=True)] == pytest.approx([1] * 4)
    assert sum(few[:3]) == 2, "8 of the 12 records of an epoch"
    for line, share in zip(lines, few, strict=True):
        for figure in ("loss", "margin"):
            own = [line[f"source/{name}/{figure}"] for name in ("few.jsonl", "pairs.jsonl")]
            of_all = line["loss" if figure == "loss" else "rewards/margin"]
            parts = [(value or 0) * part for value, part in zip(own, (share, 1 - share), strict=True)]
            assert sum(parts) == pytest.approx(of_all, abs=1e-6)
            assert (own[0] is None, own[1] is None) == (share == 0, share == 1)
    described = read_metadata(whole[1])
    assert described["data_weights"] == {"pairs.jsonl": 1.0, "few.jsonl": 2.0}
    assert described["data"] == str(mixed)


def test_what_is_refused(whole, mixed, tmp_path):
    _, out = whole
    other = Mixture(dict.fromkeys(mixed.weights, 1))
    with pytest.raises(InputError, match=r"with the weights pairs\.jsonl 1, few\.jsonl 2; give --data so"):
        train(CONFIG, bundle(), other, out)
    with pytest.raises(InputError, match="on other data"):
        train(CONFIG, bundle(), PAIRS, out)
    ordered = replace(CONFIG, data=DataConfig(shuffle=False))
    with pytest.raises(InputError, match=r"data\.shuffle is False"):
        train(ordered, bundle(), mixed, tmp_path / "run")
    with pytest.raises(InputError, match=r"few\.jsonl has less than one of the 12 records"):
        train(CONFIG, bundle(), Mixture(dict(zip(mixed.weights, (99, 1), strict=True))), tmp_path / "run")
    assert not (tmp_path / "run").exists()
