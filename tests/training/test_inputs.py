"""What a run reads before it starts: the model, data, and what is stored of them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from runs import MODEL, PAIRS, bundle, one_device, rows
from runs import TINY as SMALL

from mllm_align import DPO, IPO, MDPO, InputError, LoraConfig, Mixture
from mllm_align.training import inputs
from mllm_align.training.inputs import open_batches, open_bundle, open_data

TINY = replace(SMALL, data=replace(SMALL.data, image_root=PAIRS.parent))


def test_a_model_is_opened_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "make_mesh", one_device)
    found = open_bundle(TINY, MODEL, tmp_path / "run")
    assert found.lora == TINY.lora and not found.trained and found.folder.path == MODEL


@pytest.mark.parametrize(
    "config, said",
    [
        (replace(TINY, lora=LoraConfig(rank=4096)), "lora.rank is 4096"),
        (
            replace(TINY, lora=None, freeze=("vision_tower", "projector", "decoder")),
            "nothing is left to train",
        ),
    ],
)
def test_models_that_a_config_cannot_train(tmp_path, config, said):
    with pytest.raises(InputError, match=said):
        open_bundle(config, bundle(), tmp_path / "run")


def test_data_and_what_is_left_out(capsys):
    config = replace(TINY, data=replace(TINY.data, identical="skip"))
    same = rows(1)[0] | {"chosen": "A cup.", "rejected": "A cup."}
    found = open_data(config, bundle(), [*rows(3), same], rows(2))
    assert found.counts() == {
        "records": 3,
        "skipped": [found.left_out[0].id],
        "left_out": {},
        "eval_records": 2,
        "eval_skipped": [],
    }
    assert "1 identical training records left out" in capsys.readouterr().err
    assert replace(found, dropped=Counter(yes_no=2, twice=0)).counts()["left_out"] == {"yes_no": 2}


def test_sets_that_are_drawn_by_weight_have_no_order():
    config = replace(TINY, data=replace(TINY.data, shuffle=False))
    with pytest.raises(InputError, match=r"data.shuffle is False.*drawn by weight"):
        open_data(config, bundle(), Mixture({PAIRS: 1.0}))


@pytest.mark.parametrize("objective", [DPO(), IPO(), MDPO()])
def test_batches_with_the_stored_reference_of_each_view(tmp_path, monkeypatch, objective):
    """The files that are asked for, of training and held-out data apart."""
    asked = []

    def stored(file, bundle, encoder, records, config):
        asked.append((file.relative_to(tmp_path).as_posix(), len(records)))
        return [tuple(np.zeros(len(each), np.float32) for each in e.responses) for e in records]

    monkeypatch.setattr(inputs, "stored_logps", stored)
    config = replace(TINY, objective=objective, reference="stored")
    data = open_data(config, bundle(), rows(4), rows(2))
    training, held_out = open_batches(config, bundle(), data, (), tmp_path)
    views = ["", "_second"] if len(objective.views) > 1 else [""]
    expected = [(f"reference{of}{view}.npz", n) for of, n in (("", 4), ("_eval", 2)) for view in views]
    assert asked == expected
    assert len(training(0).group.responses.reference) == len(views)
    assert held_out(0).records == (0, 1)


def test_without_held_out_data_there_are_no_batches_of_them(tmp_path):
    data = open_data(TINY, bundle(), rows(4))
    training, held_out = open_batches(TINY, bundle(), data, (), tmp_path)
    assert held_out is None and training.per_epoch == 1 and not list(tmp_path.iterdir())
