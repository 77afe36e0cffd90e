"""K scored samples for each prompt: handed over, saved, restored, and made into batches by consumers."""

import json
from dataclasses import asdict, replace

import jax.numpy as jnp
import numpy as np
import pytest
import votes
from contexts import batch_of, context
from runs import compiling

from mllm_align import InputError, OnlinePairs, SamplingConfig, Scorer
from mllm_align.annotate.verdict import Question, Verdict
from mllm_align.generation.rollout import Rollout
from mllm_align.sizes import binary_fraction
from mllm_align.training.online import rollouts
from mllm_align.training.online.maker import MakerState
from mllm_align.training.online.rollouts import BestAgainstWorst, Rollouts, Samples

assert compiling  # a fixture
LONGEST = 8
ONLINE = OnlinePairs(Scorer("votes:hashed"), samples=3, sampling=SamplingConfig(max_tokens=LONGEST))


class Program:
    """Stands for the compiled rollout: tokens follow from the keys alone; `broken` rows are not finite."""

    def __init__(self, eos):
        self.eos, self.broken, self.calls = eos, set(), []

    def __call__(self, params, trained, batch, keys, stops):
        keys = np.asarray(keys)
        self.calls.append(keys.shape)
        shape = *keys.shape[:3], LONGEST
        tokens, logps = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        lengths, finite = np.zeros(shape[:3], np.int32), np.ones(shape[:3], bool)
        for at in np.ndindex(*shape[:3]):
            rng = np.random.default_rng(keys[at])
            n = int(rng.integers(1, LONGEST + 1))
            tokens[*at, :n] = rng.integers(40, 90, n)
            if n < LONGEST:
                tokens[*at, n - 1] = self.eos
            logps[*at, :n], lengths[at] = -rng.random(n), n
        for row in self.broken:
            finite.reshape(-1, shape[2])[row, 0] = False
        return Rollout(*map(jnp.asarray, (tokens, lengths, logps, finite)))


@pytest.fixture
def program(monkeypatch):
    made = Program(int(np.flatnonzero(context().eos_mask)[0]))
    monkeypatch.setattr(rollouts, "rollout_program", lambda *settings: made)
    return made


def begun(maker, step=0):
    batch, group = batch_of(maker.context, step)
    return maker.begin(batch, group, {}, step)


def open_source(kind=BestAgainstWorst, online=ONLINE, **fields):
    return kind(context(online, **fields), online)


def test_samples_are_handed_over_with_their_scores(program):
    maker = open_source()
    pending = begun(maker)
    samples = maker.samples(pending)
    keys = np.stack([[maker.context.key(i, 0, k) for k in range(3)] for i in pending.batch.records])
    wanted = program({}, {}, None, keys[None], None)
    for name in ("tokens", "lengths", "logps", "finite"):
        assert np.array_equal(getattr(samples, name), np.asarray(getattr(wanted, name))[0]), name
    assert samples.sampled.all() and samples.usable == [0, 1, 2, 3] and samples.broken == []
    text = maker.context.encoder.text
    for row, verdict in enumerate(samples.verdicts):
        responses = samples.responses(row)
        assert [len(r.ids) for r in responses] == samples.lengths[row].tolist()
        texts = tuple(text(r.ids).strip() for r in responses)
        if verdict.outcome == "ranked":
            record = maker.context.records[pending.batch.records[row]].record
            assert list(verdict.scores) == votes.hashed([Question(record, texts)])[0]
    assert any(v.outcome == "ranked" for v in samples.verdicts)


def test_the_best_is_chosen_and_the_worst_rejected(program):
    maker = open_source()
    pending = begun(maker)
    samples, made = maker.samples(pending), maker.finish(pending)
    tokens = np.asarray(made.group.responses.tokens)[0]
    for row, verdict in enumerate(samples.verdicts):
        weight = float(made.group.responses.weight[0, row])
        assert weight == (verdict.outcome == "ranked")
        for k, which in enumerate((np.argmax, np.argmin) if weight else ()):
            best = samples.responses(row)[which(verdict.scores)]
            assert tokens[row, k, : len(best.ids)].tolist() == best.ids.tolist()
            sampler = np.asarray(made.group.responses.sampler)[0, row, k]
            assert sampler[: len(best.ids)].tolist() == best.logps.tolist()
    assert made.group.responses.weight.sum() > 0
    limit, longest = max(LONGEST, pending.batch.shape.response), made.group.responses.mask.sum(-1).max()
    assert tokens.shape[2] == binary_fraction(int(longest), limit), "few sizes: few programs"


class ScoredSamples(Rollouts):
    """A consumer as RLOO and GRPO are: all K samples, their score against the mean of the others."""

    def finish(self, pending):
        samples = self.samples(pending)
        made = [samples.responses(row) for row in range(len(pending.batch.records))]
        self.advantages = {
            row: [s - (sum(v.scores) - s) / (len(v.scores) - 1) for s in v.scores]
            for row, v in enumerate(samples.verdicts)
            if v.outcome == "ranked"
        }
        batch, metrics = pending.batch, self.metrics(pending)
        return self.context.train_batch(
            batch, pending.group, made, lambda n: n, metrics, self.example(pending), sampler=True
        )


def test_a_consumer_may_take_all_samples(program, monkeypatch):
    maker = open_source(ScoredSamples)
    monkeypatch.setattr(type(maker.context.config.objective), "responses", 3)
    pending = begun(maker)
    samples, made = maker.samples(pending), maker.finish(pending)
    lengths = np.asarray(made.group.responses.mask)[0].sum(2)
    assert lengths.tolist() == samples.lengths.tolist() and made.group.views == ((0, 1, 2),)
    for row in range(4):
        for k in range(3):
            n = lengths[row, k]
            ours = np.asarray(made.group.responses.tokens)[0, row, k, :n]
            assert ours.tolist() == samples.tokens[row, k, :n].tolist()
            seen = np.asarray(made.group.responses.sampler)[0, row, k, :n]
            assert seen.tolist() == samples.logps[row, k, :n].tolist()
    assert maker.advantages and all(abs(sum(each)) < 1e-3 for each in maker.advantages.values())


def test_figures_of_a_step(program):
    program.broken = {2}
    maker = open_source(nonfinite="skip")
    pending = begun(maker, step=1)
    samples, figures = maker.samples(pending), maker.metrics(pending)
    assert samples.broken == [2] and samples.usable == [0, 1, 3] and samples.verdicts[2] is None
    lengths = [n for row in samples.usable for n in samples.lengths[row]]
    assert figures["rollout/tokens"] == (sum(lengths), 9)
    assert figures["rollout/unfinished"] == (sum(n == LONGEST for n in lengths), 9)
    assert figures["rollout/nonfinite"] == (1.0, 4.0) and figures["online_share"] == (4, 4)
    assert figures["annotate/ranked"][1] == 3 and figures["staleness"] == (0, 1.0)
    shown = maker.example(pending)
    assert shown["id"] == maker.context.records[pending.batch.records[0]].record.id
    assert len(shown["responses"]) == 3 and shown["outcome"] == samples.verdicts[0].outcome
    assert np.asarray(maker.finish(pending).group.responses.weight)[0, 2] == 0


def test_a_part_of_the_examples_keeps_its_pair(program):
    online = replace(ONLINE, offline_share=0.5)
    maker, kept, rolled = open_source(online=online), 0, 0
    for step in range(4):
        pending = begun(maker, step)
        samples, made = maker.samples(pending), maker.finish(pending)
        for row, index in enumerate(pending.batch.records):
            record = maker.context.records[index]
            if samples.sampled[row]:
                rolled += 1
                continue
            kept += 1
            ours = made.records[row].responses
            assert all(np.array_equal(a, b) for a, b in zip(ours, record.responses, strict=True))
            assert not np.asarray(made.group.responses.sampler)[0, row].any()
            assert not samples.tokens[row].any() and samples.verdicts[row] is None
    assert kept and rolled
    assert all(rows <= 4 for _, rows, _, _ in program.calls), "only those that need it are rolled out"


def same_samples(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in rollouts.ARRAYS) and (
        (one.verdicts, one.seconds) == (other.verdicts, other.seconds)
    )


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_batch_begun_ahead_is_saved_and_restored(program, share):
    program.broken = {0}
    maker = open_source(online=replace(ONLINE, stale=True, offline_share=share), nonfinite="skip")
    pending = begun(maker, step=2)
    state = maker.saved([pending])
    assert all(array.size for array in state.arrays.values()), "orbax takes no empty array"
    state = MakerState(json.loads(json.dumps(state.metadata)), dict(state.arrays))
    (again,) = maker.restored(state, [(pending.batch, pending.group)])
    assert same_samples(maker.samples(again), maker.samples(pending))
    assert (again.made_at, again.batch) == (2, pending.batch)
    left, right = maker.finish(pending), maker.finish(again)
    assert left.metrics == right.metrics and left.example == right.example
    assert np.array_equal(left.group.responses.tokens, right.group.responses.tokens)
    assert maker.saved([]) is None
    maker.close()


def test_a_checkpoint_of_before_with_lists_is_restored(program):
    """As it was written when samples were JSON: of the rows with finite logits alone."""
    program.broken = {1}
    maker = open_source(nonfinite="skip")
    pending = begun(maker)
    samples = maker.samples(pending)
    lists = {
        "step": 0,
        "made_at": 0,
        "rows": samples.usable,
        "broken": samples.broken,
        "samples": [
            [[r.ids.tolist(), r.logps.tolist()] for r in samples.responses(row)] for row in samples.usable
        ],
        "verdicts": [asdict(samples.verdicts[row]) for row in samples.usable],
        "seconds": [1.5, 0.5],
    }
    state = MakerState(json.loads(json.dumps(lists)))
    (again,) = maker.restored(state, [(pending.batch, pending.group)])
    assert maker.samples(again).seconds == (1.5, 0.5)
    left, right = maker.finish(pending), maker.finish(again)
    for name in ("tokens", "mask", "weight", "sampler"):
        assert np.array_equal(getattr(left.group.responses, name), getattr(right.group.responses, name))
    for name in left.metrics:
        if "second" not in name:
            assert left.metrics[name] == right.metrics[name], name


def test_verdicts_of_all_processes_are_merged(program, monkeypatch):
    """Each process asks about its own share of the rows."""
    maker = open_source()
    everything = maker.samples(begun(maker)).verdicts
    shares = []
    for index in range(2):
        monkeypatch.setattr(rollouts.jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(rollouts.jax, "process_count", lambda: 2)
        shares.append(begun(maker).local().verdicts)
    assert [[v is not None for v in share] for share in shares] == [[True, False] * 2, [False, True] * 2]

    def gathered(verdicts):
        return [verdicts(), rollouts._verdicts_to_json(shares[0])]

    monkeypatch.setattr(rollouts.processes, "gathered", gathered)
    assert maker.samples(begun(maker)).verdicts == everything


def test_a_fault_of_the_annotator_is_raised_where_the_samples_are_wanted(program):
    online = replace(ONLINE, stale=True)
    maker = open_source(online=online)

    def fails(questions):
        raise InputError("the scorer is away")

    fails.everywhere = False
    maker.annotator = fails
    pending = begun(maker)
    with pytest.raises(InputError, match="the scorer is away"):
        maker.finish(pending)
    maker.close()


def test_no_samples():
    samples = Samples.none(2, 3, 4)
    assert samples.usable == samples.broken == [] and samples.verdicts == (None, None)
    assert samples.tokens.shape == samples.logps.shape == (2, 3, 4) and samples.lengths.shape == (2, 3)
    assert isinstance(Verdict.from_json(asdict(Verdict("ranked", (1.0, 2.0)))).scores, tuple)
