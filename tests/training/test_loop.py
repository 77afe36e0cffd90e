"""Whole runs on a tiny model: what they compute, write, continue and refuse."""

import json
import re
import shutil
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (
    FULL,
    MODEL,
    PAIRS,
    TINY,
    EachStep,
    bundle,
    compiling,
    events,
    flat,
    losses,
    nan_for_one,
    one_device,
    rows,
    same,
    write_pairs,
)

from mllm_align import (
    IPO,
    SFT,
    DataConfig,
    InputError,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    load,
    load_run,
    score,
    train,
)
from mllm_align.batch import PromptGroup
from mllm_align.data import encode
from mllm_align.errors import Interrupted, NotFinite, Preempted
from mllm_align.locks import alone
from mllm_align.sharding import make_mesh
from mllm_align.training import fitting, loop, metrics, run_folder
from mllm_align.training.run_model import open_run

assert compiling  # a fixture


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 4 steps that nothing disturbed, evaluated on 7 records: (model, folder, fetches a step)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    fetch, fetched, steps = jax.device_get, [], []

    def counting(tree):
        fetched.append(len(steps))
        return fetch(tree)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.jax, "device_get", counting)
        config = replace(TINY, log_every=2, eval_every=2)
        model = train(config, bundle(), PAIRS, out, rows_at_home(7), callbacks=[EachStep(steps.append)])
    return model, out, steps, fetched


def rows_at_home(count):
    """Rows in memory, which may name pictures anywhere."""
    return [{**row, "images": [str(PAIRS.parent / row["images"][0])]} for row in rows(count)]


# ---- what is written -------------------------------------------------------------------------------


def test_run_folder(whole):
    _, out, _, _ = whole
    assert {p.name for p in out.iterdir()} == {"config.json", "run.json", "log.jsonl", "checkpoints"}
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"2", "4"}, "each evaluated best so far"
    facts = json.loads((out / "run.json").read_text())
    assert facts["model"] == str(MODEL) and facts["data"] == str(PAIRS)
    assert facts["model_fingerprint"] == bundle().folder.fingerprint
    assert facts["eval_data"] == "rows given in memory"


def test_events(whole):
    _, out, steps, _ = whole
    seen = [(e["event"], e["step"]) for e in events(out)]
    trained = [("train", 1), ("train", 2), ("eval", 2), ("save", 2), ("train", 4), ("eval", 4)]
    assert seen == [("start", 0), *trained, ("save", 4), ("done", 4)]
    start = events(out, "start")[0]
    assert (start["records"], start["eval_records"], start["steps"]) == (8, 7, 4)
    assert start["trained_parameters"] == sum(x.size for x in flat(whole[0].trained).values())
    logged = events(out, "train")
    assert steps == [{k: v for k, v in line.items() if k not in ("event", "time")} for line in logged]
    assert logged[0]["loss"] == pytest.approx(np.log(2), abs=1e-5), "policy = reference at the start"
    assert logged[-1]["loss"] < 0.6 and logged[-1]["grad_norm"] > 0
    assert logged[-1]["learning_rate"] == pytest.approx(1e-2)
    assert 0 < logged[-1]["padding"] < 1 and logged[-1]["pairs_per_second"] > 0


@pytest.mark.slow
def test_control_tokens_in_responses_are_learnt_as_text(tmp_path):
    """The gradient was 0 where an end of sequence in both texts cut them to the same tokens."""
    texts = {"chosen": "The tag </s> closes it, the dog is red.", "rejected": "The tag </s> opens it."}
    data = [{**row, **texts} for row in rows_at_home(4)]
    train(replace(TINY, steps=2), bundle(), data, tmp_path / "run")
    first, second = events(tmp_path / "run", "train")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5) and first["grad_norm"] > 0.01
    assert second["loss"] < first["loss"] - 0.01


@pytest.mark.slow
def test_identical_records_are_left_out_and_logged(tmp_path, capsys):
    data = rows_at_home(5)
    data[1]["rejected"] = data[1]["chosen"]
    data[3]["id"], data[3]["chosen"] = "long", data[3]["chosen"] * 20
    skip = DataConfig(shapes=1, identical="skip", over_long="skip", max_length=120)
    config = replace(TINY, steps=1, data=skip)
    train(config, bundle(), data, tmp_path / "run", rows_at_home(2))
    (start,) = events(tmp_path / "run", "start")
    assert (start["records"], start["skipped"], start["eval_skipped"]) == (3, ["1", "long"], [])
    assert "1 identical and 1 over-long training records left out" in capsys.readouterr().err


def test_metrics_are_fetched_at_log_and_eval_steps_only(whole):
    """The loop runs under a transfer guard besides: nothing else crosses by accident."""
    *_, fetched = whole
    trained, evaluated = [0, 1, 2], [2, 3]  # lines of the log that were there: of steps 1, 2 and 4
    assert fetched == sorted(trained + evaluated)


def test_implicit_transfers_are_refused(tmp_path, monkeypatch):
    """The guard is on: a batch left on the host stops the run."""
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *to: x if isinstance(x, PromptGroup) else put(x, *to))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(TINY, bundle(), PAIRS, tmp_path / "run")


@pytest.mark.slow
def test_text_alone_trains_a_model_whose_tower_is_not_frozen(tmp_path):
    """No picture in the whole data set: there is nothing for the tower to look at, or to learn from."""
    text = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(8)]
    config = replace(FULL, objective=SFT(), freeze=(), steps=2)
    before = flat({"params": bundle().params})
    trained = flat(train(config, bundle(), text, tmp_path / "run").trained)
    moved = {name for name, value in trained.items() if (value != before[name]).any()}
    assert moved and all("decoder" in name for name in moved)
    assert any("vision_tower" in name for name in trained)


# ---- going on --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that saved steps 1 and 2 and fell over at its second report."""
    out = tmp_path_factory.mktemp("interrupted") / "run"

    def stop(values):
        if values["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(replace(TINY, save_every=1), bundle(), PAIRS, out, callbacks=[EachStep(stop)])
    return out


@pytest.fixture
def begun(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "begun")


def test_a_run_that_was_stopped_ends_like_one_that_was_not(whole, begun):
    model, out, _, _ = whole
    again = train(replace(TINY, save_every=1), bundle(), PAIRS, begun)
    assert same(again.trained, model.trained)
    assert losses(begun)[:2] == losses(out)[:2]
    assert sum(losses(begun)[-2:]) / 2 == pytest.approx(losses(out)[-1], abs=1e-6)
    assert [e["step"] for e in events(begun, "start")] == [0, 2]
    assert [e["step"] for e in events(begun, "train")] == [1, 2, 3, 3, 4]
    assert {p.name for p in (begun / "checkpoints").iterdir()} == {"3", "4"}, "config.keep"


def test_a_run_that_is_done_stays_as_it_is(whole, tmp_path):
    model, out, _, _ = whole
    copy = shutil.copytree(out, tmp_path / "run")
    again = train(replace(TINY, log_every=3), bundle(), PAIRS, copy)
    assert same(again.trained, model.trained)
    assert [e["event"] for e in events(copy)[-2:]] == ["start", "done"]


def test_another_run_gives_the_start_and_the_base_stays_the_reference(whole, tmp_path, capsys):
    model, first, _, _ = whole
    out, config = tmp_path / "run", replace(TINY, optim=replace(TINY.optim, learning_rate=0.0), steps=1)
    begun = train(config, bundle(), PAIRS, out, init_from=first)
    assert same(begun.trained, model.trained), "nothing is learned at a rate of 0"
    line = events(out, "train")[0]
    assert line["rewards/margin"] > 0.1 and line["loss"] < 0.6, "against the base"
    train(config, bundle(), PAIRS, out, init_from=first)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"was started with --init-from .*run; give that"):
        train(config, bundle(), PAIRS, out)


@pytest.mark.parametrize("lora", [LoraConfig(rank=3), None], ids=str)
def test_a_run_that_trained_something_else_is_no_start(whole, tmp_path, lora):
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"has LoraConfig.*give the same --lora options"):
        train(replace(TINY, lora=lora), bundle(), PAIRS, out, init_from=whole[1])
    assert not out.exists()


def test_a_run_from_another_base_is_no_start(whole, tmp_path):
    other = replace(bundle().folder, path=shutil.copytree(MODEL, tmp_path / "model"))
    (other.path / "config.json").write_text((other.path / "config.json").read_text() + "\n")
    with pytest.raises(InputError, match=r"was trained from .*, another model; give --model that one"):
        train(TINY, replace(bundle(), folder=other), PAIRS, tmp_path / "run", init_from=whole[1])


@pytest.mark.slow
def test_a_run_that_froze_something_else_is_no_start(tmp_path):
    train(replace(FULL, steps=1), bundle(), PAIRS, tmp_path / "first")
    config = replace(FULL, freeze=("vision_tower", "projector"))
    with pytest.raises(InputError, match="projector: trained by one run alone; give the same --freeze"):
        train(config, bundle(), PAIRS, tmp_path / "run", init_from=tmp_path / "first")


def everything(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"batch_size": 8, "seed": 1}, "batch_size, seed differ"),
        ({"objective": IPO()}, "objective.kind"),
        ({"lora": None}, "lora"),
        ({"optim": replace(TINY.optim, learning_rate=1e-3)}, "optim.learning_rate differ"),
        ({"data": replace(TINY.data, shuffle=False)}, "data.shuffle"),
    ],
    ids=str,
)
def test_another_config_is_refused(interrupted, change, named):
    before = everything(interrupted)
    with pytest.raises(InputError, match=named):
        train(replace(TINY, **change), bundle(), PAIRS, interrupted)
    assert everything(interrupted) == before


def test_another_model_or_data_is_refused(interrupted, tmp_path):
    before = everything(interrupted)
    other = replace(bundle().folder, path=shutil.copytree(MODEL, tmp_path / "model"))
    text = (other.path / "config.json").read_text()
    (other.path / "config.json").write_text(text + "\n")
    with pytest.raises(InputError, match=f"from another model.*{bundle().folder.fingerprint}"):
        train(TINY, replace(bundle(), folder=other), PAIRS, interrupted)
    with pytest.raises(InputError, match=r"on other data.*pairs\.jsonl"):
        train(TINY, bundle(), write_pairs(tmp_path, rows(7)), interrupted)
    assert everything(interrupted) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match="holds other files"):
        train(TINY, bundle(), PAIRS, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "harm", ["altered", *(pytest.param(h, marks=pytest.mark.slow) for h in ("cut", "missing", "unsealed"))]
)
def test_the_checkpoint_before_a_damaged_one_is_used(begun, whole, harm, capsys):
    newest = begun / "checkpoints" / "2"
    part = max((newest / "trained" / "d").iterdir(), key=lambda p: p.stat().st_size)
    held = part.read_bytes()
    if harm == "cut":
        part.write_bytes(held[:100])
    if harm == "altered":
        middle = len(held) // 2
        part.write_bytes(held[:middle] + bytes([held[middle] ^ 1]) + held[middle + 1 :])
    if harm == "missing":
        part.unlink()
    if harm == "unsealed":
        (newest / "digests.json").unlink()
    said = r"checkpoints/2 is damaged \(" + ("digests" if harm == "unsealed" else "trained")
    load_run(begun, mesh=one_device())
    assert re.search(said, capsys.readouterr().err)
    assert newest.exists(), "reading changes nothing"
    model = train(replace(TINY, save_every=1), bundle(), PAIRS, begun)
    assert re.search(said, capsys.readouterr().err)
    assert events(begun, "start")[-1]["step"] == 1
    assert {p.name for p in (begun / "checkpoints").iterdir()} == {"3", "4", "damaged-2"}
    assert same(model.trained, whole[0].trained)


@pytest.mark.slow
def test_the_best_checkpoint_stays_besides_the_last_ones(tmp_path, monkeypatch):
    """Held-out losses as written here: step 2 evaluates best, and step 4 is the last."""
    said = iter([0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr(loop._Run, "_evaluate", lambda *_: next(said))
    train(
        replace(TINY, eval_every=1, save_every=1, keep=1),
        bundle(),
        PAIRS,
        tmp_path / "run",
        rows_at_home(4),
    )
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"2", "4"}
    steps = [open_run(tmp_path / "run", step)[3] for step in ("best", "last", 2)]
    assert steps == [2, 4, 2]
    with pytest.raises(InputError, match="no checkpoint 3: it has 2, 4"):
        open_run(tmp_path / "run", 3)
    before, best = (load_run(tmp_path / "run", mesh=one_device(), step=s) for s in ("last", "best"))
    assert not same(before.trained, best.trained)


def test_a_run_without_evaluation_has_no_best_checkpoint(interrupted):
    with pytest.raises(InputError, match="no checkpoint best: no step was evaluated"):
        open_run(interrupted, "best")


def test_notice_of_preemption_saves_and_the_run_goes_on(whole, tmp_path):
    def notice(values):
        if values["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="step 3 of 4 is saved"):
        train(TINY, bundle(), PAIRS, tmp_path / "run", callbacks=[EachStep(notice)])
    assert signal.getsignal(signal.SIGTERM) is before
    assert [e["event"] for e in events(tmp_path / "run")[-2:]] == ["save", "preempted"]
    again = train(TINY, bundle(), PAIRS, tmp_path / "run")
    assert same(again.trained, whole[0].trained)


def test_ctrl_c_saves_and_the_run_goes_on(whole, tmp_path, capsys):
    def interrupt(values):
        if values["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="interrupted; step 3 of 4 is saved"):
        train(TINY, bundle(), PAIRS, tmp_path / "run", callbacks=[EachStep(interrupt)])
    assert signal.getsignal(signal.SIGINT) is before
    assert [e["event"] for e in events(tmp_path / "run")[-2:]] == ["save", "interrupted"]
    said = capsys.readouterr()
    assert "starting" in said.out and "Ctrl-C again ends at once" in said.err
    again = train(TINY, bundle(), PAIRS, tmp_path / "run")
    assert same(again.trained, whole[0].trained)
    assert f"resuming {tmp_path / 'run'}: 3 of 4 steps are done" in capsys.readouterr().out
    train(TINY, bundle(), PAIRS, tmp_path / "run")
    assert f"{tmp_path / 'run'} is finished: all 4 steps" in capsys.readouterr().out


def test_a_second_ctrl_c_tells_what_is_saved(tmp_path, capsys):
    def twice(values):
        if values["step"] == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    longer = replace(TINY, steps=6, save_every=2)
    with pytest.raises(Interrupted, match="interrupted; step 2 of 6 is saved"):
        train(longer, bundle(), PAIRS, tmp_path / "run", callbacks=[EachStep(twice)])


@pytest.mark.slow
def test_the_rematerialisation_that_fits_stays_that_of_the_run(tmp_path, monkeypatch):
    """On a device with room for less than all: found once, noted, and taken again at a resume."""
    sizes, tried = {"dots": 400, "gate": 300, "qkv": 200, "attention": 100}, []
    monkeypatch.setattr(fitting, "needs", lambda program, batch: sizes[tried[-1]])
    monkeypatch.setattr(fitting, "free", lambda devices, held: 240)
    make = loop.train_program

    def counted(config, **sizes):
        tried.append(config.remat)
        return make(replace(config, remat="none"), **sizes)  # compiled for other tests already

    monkeypatch.setattr(loop, "train_program", counted)
    config = replace(TINY, remat="auto", steps=1)
    train(config, bundle(), PAIRS, tmp_path)
    assert tried == ["auto", "qkv", "gate", "qkv"]
    noted = json.loads((tmp_path / "run.json").read_text())["remat"]
    assert noted["policy"] == "qkv" and noted["needed"] == {"qkv": 200, "gate": 300}
    assert events(tmp_path, "start")[0]["remat"] == noted
    assert run_folder.read_config(tmp_path).remat == "auto"
    monkeypatch.setattr(fitting, "free", lambda devices, held: 10**9)
    tried.clear()
    train(replace(config, steps=2), bundle(), PAIRS, tmp_path)
    assert tried == ["auto", "qkv"] and len(losses(tmp_path)) == 2


@pytest.mark.slow
def test_another_mesh_may_continue(whole, begun):
    """And other numbers of micro-batches: the same records, and the same numbers up to rounding."""
    model, out, _, _ = whole
    config = replace(TINY, micro_batches=2, mesh=MeshConfig(data=2), remat="full")
    spread = load(MODEL, "float32", make_mesh(config.mesh, jax.devices()[:2]))
    again = train(config, spread, PAIRS, begun)
    for name, value in flat(model.trained).items():
        np.testing.assert_allclose(flat(again.trained)[name], value, atol=2e-3, err_msg=name)
    assert sum(losses(begun)[-2:]) / 2 == pytest.approx(losses(out)[-1], abs=1e-4)


def test_a_checkpoint_of_another_run_is_refused(begun, tmp_path):
    """Checkpoints may lie elsewhere, without their run folder: they say themselves what they are of."""
    place = {"checkpoints": str(begun / "checkpoints")}
    other = replace(TINY, seed=1, **place)
    with pytest.raises(InputError, match=r"checkpoints/2 was started with another configuration \(seed"):
        train(other, bundle(), PAIRS, tmp_path / "other")
    with pytest.raises(InputError, match="checkpoints/2 was started on other data"):
        train(replace(TINY, **place), bundle(), write_pairs(tmp_path, rows(7)), tmp_path / "more")
    train(replace(TINY, **place), bundle(), PAIRS, tmp_path / "moved")
    assert events(tmp_path / "moved", "start")[0]["step"] == 2
    assert load_run(tmp_path / "moved", mesh=one_device()).trained


def test_other_records_at_the_same_steps_are_refused(begun, monkeypatch):
    monkeypatch.setattr(loop.Batches, "digest", lambda self, step: "other")
    with pytest.raises(InputError, match="the batches of the first 2 steps were of other records"):
        train(TINY, bundle(), PAIRS, begun)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_record(tmp_path):
    broken, culprit = nan_for_one(2)
    config = replace(TINY, save_every=1)
    with pytest.raises(NotFinite, match=f"not finite, with records {culprit};.*--nonfinite skip"):
        train(config, broken, PAIRS, tmp_path / "run")
    (event,) = events(tmp_path / "run", "nonfinite")
    assert event["records"] == [culprit] and event["policy"] == "stop"
    saved = [e["step"] for e in events(tmp_path / "run", "save")]
    assert saved == list(range(1, event["step"])), "none that stands on the step"


def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path, capsys):
    broken, culprit = nan_for_one(2)
    config = replace(TINY, nonfinite="skip", log_every=2)
    model = train(config, broken, PAIRS, tmp_path / "run")
    assert all(np.isfinite(x).all() for x in flat(model.trained).values())
    named = events(tmp_path / "run", "nonfinite")
    assert [e["records"] for e in named] == [[culprit]] * 2, "once in each of two epochs"
    assert capsys.readouterr().err.count("the step is left out") == 2
    logged = events(tmp_path / "run", "train")
    assert sum(e["skipped"] * n for e, n in zip(logged, (1, 1, 2), strict=True)) == 2
    assert any(e["loss"] is not None for e in logged)


@pytest.fixture
def unfit(tmp_path):
    """(a model, data on which its numbers are finite, the id of a record in PAIRS where they are not)."""
    broken, culprit = nan_for_one(2)
    good = [row for i, row in enumerate(rows()) if str(i) != culprit]
    return broken, write_pairs(tmp_path, good), culprit


def test_held_out_figures_that_are_not_finite_end_the_run(tmp_path, unfit):
    broken, data, culprit = unfit
    with pytest.raises(NotFinite, match=f"evaluation at step 1: figures are not finite, .* {culprit};"):
        train(replace(TINY, steps=1), broken, data, tmp_path / "run", PAIRS)
    assert not events(tmp_path / "run", "eval") and not events(tmp_path / "run", "done")
    (event,) = events(tmp_path / "run", "nonfinite")
    assert (event["records"], event["during"]) == ([culprit], "evaluation")


@pytest.mark.slow
def test_held_out_batches_that_are_not_finite_are_left_out_on_demand(tmp_path, unfit, capsys):
    broken, data, culprit = unfit
    config = replace(TINY, steps=1, nonfinite="skip")
    train(config, broken, data, tmp_path / "run", PAIRS)
    (line,) = events(tmp_path / "run", "eval")
    assert np.isfinite(line["loss"]) and "the batch is left out" in capsys.readouterr().err
    alone = write_pairs(tmp_path, [rows()[int(culprit)]], "alone.jsonl")
    with pytest.raises(NotFinite, match="no held-out batch has finite figures"):
        train(config, broken, data, tmp_path / "none", alone)


def test_stored_references_that_are_not_finite_are_not_stored(tmp_path):
    broken, culprit = nan_for_one(2)
    config = replace(TINY, reference="stored", steps=2)
    said = f"reference log-probs are not finite for 1 of 8 records: {culprit};"
    with pytest.raises(NotFinite, match=said):
        train(config, broken, PAIRS, tmp_path / "run")
    assert not (tmp_path / "run" / "reference.npz").exists()


@pytest.mark.slow
def test_steps_with_references_that_are_not_finite_are_left_out_on_demand(tmp_path):
    broken, culprit = nan_for_one(2)
    config = replace(TINY, reference="stored", steps=2, nonfinite="skip")
    train(config, broken, PAIRS, tmp_path / "run")
    assert events(tmp_path / "run", "nonfinite")[0]["records"] == [culprit]
    assert not (tmp_path / "run" / "reference.npz").exists()


@pytest.mark.slow
def test_debug_nans_names_the_operation(tmp_path):
    broken, _ = nan_for_one(2)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan") as caught:
        train(TINY, broken, PAIRS, tmp_path / "run")
    files = {str(entry.path) for entry in caught.traceback}
    assert any(name.endswith("models/decoder.py") for name in files), files


@pytest.mark.slow
def test_an_image_that_goes_away_while_training_stops_the_run(tmp_path):
    data = write_pairs(tmp_path, rows(8))

    def lose(values):
        for picture in (tmp_path / "images").iterdir():
            picture.unlink()

    config = replace(TINY, batch_size=1, steps=16, data=replace(TINY.data, threads=1, prefetch=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "KEPT_BYTES", 0)
        with pytest.raises(InputError, match="images/"):
            train(config, bundle(), data, tmp_path / "run", callbacks=[EachStep(lose)])


def test_a_run_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="file"):
            train(TINY, bundle(), PAIRS, out)
    config = replace(TINY, checkpoints=str(tmp_path / "file" / "checkpoints"))
    with pytest.raises(InputError, match=r"can't write .*/file/checkpoints: "):
        train(config, bundle(), PAIRS, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_trace_of_some_steps(tmp_path):
    train(replace(TINY, steps=3), bundle(), PAIRS, tmp_path / "run", profile=1)
    kinds = {p.suffix for p in (tmp_path / "run" / "profile").rglob("*") if p.is_file()}
    assert {".pb", ".gz"} <= kinds


def test_a_run_without_a_checkpoint_has_no_model(tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        load_run(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        load_run(tmp_path)


# ---- what is computed ------------------------------------------------------------------------------


def test_eval_is_the_loss_of_what_score_says(whole):
    """7 records in batches of 4: the last batch has a filler row, which must not count."""
    model, out, _, _ = whole
    held_out = rows_at_home(7)
    config = DataConfig(shapes=1)
    policy, reference = (score(m, held_out, config=config) for m in (model, bundle()))
    h = [
        (p["chosen_logp"] - r["chosen_logp"]) - (p["rejected_logp"] - r["rejected_logp"])
        for p, r in zip(policy, reference, strict=True)
    ]
    margins = TINY.objective.beta * np.array(h)
    seen = events(out, "eval")[-1]
    assert seen["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    assert seen["rewards/margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert seen["rewards/accuracy"] == pytest.approx((margins > 0).mean())
    assert seen["logps/chosen"] == pytest.approx(np.mean([p["chosen_logp"] for p in policy]), abs=1e-3)


@pytest.mark.slow
def test_micro_batches_change_numbers_by_rounding_alone(whole, tmp_path):
    model, out, _, _ = whole
    split = train(replace(TINY, micro_batches=2), bundle(), PAIRS, tmp_path / "run")
    seen = {e["step"]: e["loss"] for e in events(tmp_path / "run", "train")}
    assert seen[1] == pytest.approx(losses(out)[0], abs=1e-6)
    assert seen[2] == pytest.approx(losses(out)[1], abs=1e-5)
    assert (seen[3] + seen[4]) / 2 == pytest.approx(losses(out)[2], abs=1e-4)
    theirs = flat(model.trained)
    assert all(np.allclose(x, theirs[name], atol=1e-3) for name, x in flat(split.trained).items())


@pytest.mark.slow
def test_stored_reference(whole, tmp_path, monkeypatch):
    _, out, _, _ = whole
    config, run = replace(TINY, reference="stored", log_every=2, eval_every=2), tmp_path / "run"
    data = write_pairs(tmp_path, rows())
    train(config, bundle(), data, run, rows_at_home(7))
    assert losses(run) == pytest.approx(losses(out), abs=1e-5)
    ours, live = ([e["loss"] for e in events(o, "eval")] for o in (run, out))
    assert ours == pytest.approx(live, abs=1e-5)
    assert {p.name for p in run.glob("*.npz")} == {"reference.npz", "reference_eval.npz"}

    stored = everything(run)
    shutil.rmtree(run / "checkpoints")
    monkeypatch.setattr("mllm_align.training.score.response_logps", None)  # read, not computed again
    train(config, bundle(), data, run, rows_at_home(7))
    assert losses(run)[3:] == losses(run)[:3]
    assert (run / "reference.npz").read_bytes() == stored[run / "reference.npz"]

    shutil.copy(data.parent / "images" / "1_P.png", data.parent / "images" / "0_L.png")
    with pytest.raises(InputError, match=r"reference\.npz belongs to .*delete it"):
        train(config, bundle(), data, run, rows_at_home(7))
    (run / "reference.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="holds no reference log-probs"):
        train(config, bundle(), data, run, rows_at_home(7))


@pytest.mark.slow
def test_sft_trains_on_single_responses(tmp_path):
    data = [{k: v for k, v in row.items() if k != "rejected"} for row in rows_at_home(8)]
    out = tmp_path / "run"
    model = train(replace(TINY, objective=SFT()), bundle(), data, out)
    lines = events(out, "train")
    assert lines[-1]["loss"] < lines[0]["loss"] and "rewards/margin" not in lines[0]
    before, after = (score(m, PAIRS, config=TINY.data) for m in (bundle(), model))
    told = [sum(s["chosen_logp"] for s in scores) for scores in (before, after)]
    assert told[1] > told[0] + 1


@pytest.mark.slow
def test_frozen_parts_stay_bit_equal_in_full_fine_tuning(tmp_path):
    config = replace(FULL, freeze=("vision_tower", "projector"), steps=2)
    model = train(config, bundle(), PAIRS, tmp_path / "run")
    assert set(model.trained) == {"params"} and set(model.trained["params"]) == {"decoder"}
    base, moved = flat(bundle().params["decoder"]), flat(model.trained["params"]["decoder"])
    assert all(np.any(moved[name] != base[name]) for name in base)


def test_nothing_to_train_is_refused(tmp_path):
    """LLaVA 1.5 has no image_newline, and the config alone can't know."""
    config = replace(FULL, freeze=("vision_tower", "projector", "decoder"))
    with pytest.raises(InputError, match="nothing is left to train"):
        train(config, bundle(), PAIRS, tmp_path / "run")
    frozen = OptimConfig(projector_learning_rate=0.0)
    config = replace(FULL, freeze=("vision_tower", "image_newline", "decoder"), optim=frozen)
    with pytest.raises(InputError, match=r"projector_learning_rate 0\.0"):
        train(config, bundle(), PAIRS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batches_that_devices_cannot_share_are_refused(tmp_path):
    config = replace(TINY, batch_size=12)
    with pytest.raises(InputError, match="batch_size / micro_batches is 12; it must be a multiple of 8"):
        train(config, MODEL, PAIRS, tmp_path / "run")
    with pytest.raises(InputError, match="data 3 x fsdp 1 x tensor 1 does not make 8 devices"):
        train(replace(TINY, mesh=MeshConfig(data=3)), MODEL, PAIRS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mesh_gives_the_same_losses(tmp_path):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    config = replace(TINY, batch_size=8, mesh=mesh)
    train(config, load(MODEL, "float32", mesh), PAIRS, tmp_path / "many")
    train(config, bundle(), PAIRS, tmp_path / "one")
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.slow
def test_ipo_with_its_own_reduction_learns(tmp_path):
    objective = IPO(length_normalised=False)
    train(replace(TINY, objective=objective, batch_size=8), bundle(), PAIRS, tmp_path / "run")
    first, *_, last = events(tmp_path / "run", "train")
    assert last["loss"] < first["loss"]
    assert last["rewards/margin"] > first["rewards/margin"]


@pytest.mark.slow
def test_projector_rate_0_leaves_it_out(tmp_path):
    optim = replace(TINY.optim, projector_learning_rate=0.0)
    model = train(replace(TINY, optim=optim, steps=1), bundle(), PAIRS, tmp_path / "run")
    assert set(model.trained) == {"lora"}


@pytest.mark.slow
@pytest.mark.parametrize("config", [TINY, FULL], ids=["lora", "full"])
def test_bfloat16_trains_float32_parameters(tmp_path, config):
    model = load(MODEL, "bfloat16", one_device())
    done = train(replace(config, dtype="bfloat16", batch_size=8), model, PAIRS, tmp_path / "run")
    assert {x.dtype for x in flat(done.trained).values()} == {np.dtype(np.float32)}
    assert {x.dtype for x in jax.tree.leaves(done.params)} == {jnp.dtype(jnp.bfloat16)}
    seen = losses(tmp_path / "run")
    assert seen[0] == pytest.approx(np.log(2), abs=0.02) and seen[-1] < 0.6


@pytest.mark.slow
def test_full_fine_tuning_trains_a_head_of_its_own_under_a_flag_that_ties_it(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(raw))
    flagged = train(FULL, load(folder, "float32", one_device()), PAIRS, tmp_path / "flagged").trained
    plain = train(FULL, bundle(), PAIRS, tmp_path / "plain").trained
    assert "head" in flagged["params"]["decoder"] and same(flagged, plain)


@pytest.mark.slow
def test_a_trained_tower_runs_apart_from_the_reference(tmp_path):
    train(replace(FULL, freeze=(), batch_size=8), bundle(), PAIRS, tmp_path / "run")
    seen = losses(tmp_path / "run")
    assert seen[0] == pytest.approx(np.log(2), abs=1e-4) and seen[-1] < 0.5


# ---- starts that fail, and two at once ---------------------------------------------------------------


class OutOfMemory(RuntimeError):
    """As the compiler or the allocator raises it."""


FAILURES = {
    "state": ("mllm_align.training.loop.init_trained", OutOfMemory),
    "compiling": ("mllm_align.training.window.Window.add", OutOfMemory),
    "interrupt": ("mllm_align.training.window.Window.add", KeyboardInterrupt),
    "data": ("mllm_align.training.loop._Run.put", InputError),
    "log": ("mllm_align.training.loop._Run.metadata", OSError),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch, where):
    place, error = FAILURES[where]

    def fails(*_, **__):
        raise error("no room")

    out = tmp_path / "a" / "b" / "run"
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(place, fails)
        train(TINY, bundle(), PAIRS, out)
    assert not list(tmp_path.iterdir()), "nor the parents that it made"


def test_a_start_that_was_killed_is_no_run_yet(tmp_path):
    """Nothing could be tidied up: the mended command finds a config that nobody has taken a step by."""
    out = tmp_path / "run"
    run_folder.start(out, replace(TINY, batch_size=8, seed=3), {"model": "m", "model_fingerprint": "f"}, 0)
    (out / "log.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "st')
    (out / "checkpoints").mkdir()
    (out / "reference.npz").write_text("dear")
    train(replace(TINY, steps=1), bundle(), PAIRS, out)
    assert run_folder.read_config(out) == replace(TINY, steps=1)
    assert json.loads((out / "run.json").read_text())["model"] == str(MODEL)
    assert (out / "reference.npz").read_text() == "dear"


def test_a_step_that_was_taken_keeps_the_run(interrupted, tmp_path):
    copy = shutil.copytree(interrupted, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    before = everything(copy)
    with pytest.raises(InputError, match="seed differ"):
        train(replace(TINY, seed=1), bundle(), PAIRS, copy)
    assert everything(copy) == before


def test_sizes_that_can_not_be_meant_are_refused(tmp_path):
    width = bundle().config.decoder.hidden
    lora = replace(TINY.lora, rank=width + 1)
    for config, said in (
        (replace(TINY, lora=lora), f"lora.rank is {width + 1}, and the model's decoder {width} wide"),
        (replace(TINY, batch_size=65536), "batch_size is 65536, and the data have 8 records"),
        (replace(TINY, steps=None, epochs=1e9), "epochs is 1e.09, which makes 2000000000 steps"),
    ):
        with pytest.raises(InputError, match=said):
            train(config, bundle(), PAIRS, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_nobody_else_trains_into_a_folder_meanwhile(interrupted, tmp_path):
    config = replace(TINY, checkpoints=str(tmp_path / "checkpoints"))
    said = "is in use by process"
    with alone(tmp_path / "checkpoints"), pytest.raises(InputError, match=f"checkpoints: {said}"):
        train(config, bundle(), PAIRS, tmp_path / "run")
    before = everything(interrupted)
    with alone(interrupted), pytest.raises(InputError, match=said):
        train(TINY, bundle(), PAIRS, interrupted)
    assert everything(interrupted) == before and not list(tmp_path.iterdir())
