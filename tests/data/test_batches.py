"""Batches: a pure function of (seed, step), every record once an epoch, nothing cut."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from goldens import FIXTURES, goldens
from PIL import Image

from mllm_align.batch import Group, HostPrefix, Pixels, Shape
from mllm_align.data.batches import Batches
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.data.records import parse_record
from mllm_align.errors import InputError
from mllm_align.models.processor import load_processor


class Stub:
    """Stands for an encoder: all that a group holds is its record's index."""

    def group(self, encoded, features=None, draw=(0, 0)):
        prefix, tiles = encoded.shape.prefix, encoded.shape.tiles
        prompt = HostPrefix.causal(
            np.full(prefix, encoded.index, np.int32),
            np.full(prefix, -1, np.int32),
            Pixels(np.full((tiles, 4, 3), encoded.index, np.float32), np.zeros((tiles, 4, 2), np.int16)),
        )
        return Group((prompt,), encoded.responses)


def some(count, seed=0, responses=2):
    """Encoded records of random lengths."""
    rng = np.random.default_rng(seed)
    out = []
    for index in range(count):
        lengths = rng.integers(1, 40, responses)
        answers = tuple(np.full(n, index, np.int32) for n in lengths)
        prefix, tiles = int(rng.integers(1, 200)), int(rng.integers(0, 6))
        shape = Shape(prefix, int(lengths.max()), tiles)
        out.append(Encoded(None, np.zeros(prefix, np.int32), answers, (), shape, index))
    return out


def batches(records, size=4, **options):
    return Batches(records, Stub(), size=size, **options)


def equal(a, b):
    """Whether two host batches are the same to the last number."""
    leaves = zip(jax.tree.leaves(a.group), jax.tree.leaves(b.group), strict=True)
    return (a.step, a.records) == (b.step, b.records) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves
    )


def rows(batch):
    """The batch as one, micro-batches joined."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.group)


# ---- shapes ------------------------------------------------------------------------------------------


def test_a_ladder_pads_less_than_one_shape():
    records = some(200)
    padded = {
        shapes: sum(batch.group.prefix.tokens.size for batch in map(made, range(made.per_epoch)))
        for shapes in (1, 4)
        for made in [batches(records, shuffle=True, shapes=shapes)]
    }
    assert padded[4] < 0.8 * padded[1]


# ---- responses of other records ----------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2])
def test_responses_of_the_next_record_follow_those_of_a_record(micro):
    """Whatever the micro-batches, and rows that other processes make; a record alone borrows nothing."""
    records = some(5)
    made, part = (
        batches(records, 4, micro=micro, shuffle=True, borrowed=2, local_rows=rows) for rows in (None, [0])
    )
    sizes = []
    for step in (0, 1):
        batch = made(step)
        group, here = rows(batch), batch.records
        assert group.views == ((0, 1, 2, 3),)
        sizes.append(len(here))
        for row, own in enumerate(here):
            others = records[here[(row + 1) % len(here)]].responses
            if len(here) == 1:
                others = (np.zeros(0, np.int32),) * 2
            for k, each in enumerate((*records[own].responses, *others)):
                assert group.responses.mask[row, k].sum() == len(each)
                assert np.array_equal(group.responses.tokens[row, k, : len(each)], each)
        both = (x.group.responses.tokens[:, 0] for x in (part(step), batch))
        assert np.array_equal(*both)
    assert sorted(sizes) == [1, 4]


# ---- every record once -------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_every_record_once_an_epoch(shuffle, seed):
    for count in (1, 2, 3, 7, 8, 9, 50):
        for size in (1, 2, 4, 8, 64):
            made = batches(some(count, seed), size, seed=seed, shuffle=shuffle)
            assert made.per_epoch == -(-count // size)
            for epoch in (0, 1, 5):
                plans = [made.plan(epoch * made.per_epoch + i) for i in range(made.per_epoch)]
                parts = [records for _, records in plans]
                assert sorted(sum(parts, ())) == list(range(count))
                # at most one batch is not full
                assert sorted(map(len, parts))[1:] == [size] * (made.per_epoch - 1)
                for shape, records in plans:
                    assert shape in made.ladder
                    assert all(shape.holds(made.records[r].shape) for r in records)


def test_without_shuffle_batches_follow_the_file():
    made = batches(some(10), 4)
    assert [made.plan(t)[1] for t in range(4)] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9), (0, 1, 2, 3)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_are_the_records_and_what_is_left_over_weighs_nothing(shuffle):
    records = some(10)
    made = batches(records, 4, shuffle=shuffle, seed=3)
    sizes = []
    for step in range(made.per_epoch):
        batch = made(step)
        shape, planned = made.plan(step)
        group, count = rows(batch), len(batch.records)
        assert batch.records == planned and batch.step == step
        assert batch.group.prefix.tokens.shape == (1, 4, shape.prefix) and group.shape == shape
        assert group.responses.weight.tolist() == [1.0] * count + [0.0] * (4 - count)
        for row, index in enumerate(batch.records):
            shape = records[index].shape
            assert group.prefix.length[row] == shape.prefix
            assert set(group.prefix.tokens[row, : shape.prefix]) == {index}
            assert (group.prefix.patches[row, : shape.tiles] == index).all()
            for k, answer in enumerate(records[index].responses):
                mask = group.responses.mask[row, k]
                assert np.array_equal(group.responses.tokens[row, k][mask], answer)
        # filling rows are real ones over again, so every number of theirs is finite
        assert all(group.prefix.tokens[row, 0] == batch.records[0] for row in range(count, 4))
        sizes.append(count)
    assert sorted(sizes) == [2, 4, 4]


# ---- a pure function of seed and step ----------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_depends_on_seed_and_step_alone(shuffle):
    def fresh():
        return batches(some(23), 4, seed=7, shuffle=shuffle, micro=2)

    made = fresh()
    steps = range(2 * made.per_epoch + 1)
    wanted = [made(t) for t in steps]
    # in no order, each from an object of its own
    for t in (11, 0, 6, 5, 12):
        assert equal(fresh()(t), wanted[t])
    # asked back and forth, and by several threads at once
    for t in (0, 12, 1, 6, 0, 12):
        assert equal(made(t), wanted[t])
    with ThreadPoolExecutor(4) as pool:
        assert all(map(equal, pool.map(fresh(), steps), wanted))


@pytest.mark.parametrize("threads, prefetch", [(1, 1), (4, 4), (4, 1), (2, 8)])
def test_iterating_from_any_position_goes_on_as_the_whole_run(threads, prefetch, caplog):
    made = batches(some(23), 4, seed=7, shuffle=True)
    stop = 2 * made.per_epoch + 2
    for start in (0, 1, made.per_epoch, stop - 1, stop):
        seen = list(made.iterate(range(start, stop), threads, prefetch))
        assert [batch.step for batch in seen] == list(range(start, stop))
        assert all(equal(batch, made(batch.step)) for batch in seen)
    assert not caplog.records


def test_epochs_differ_in_order_and_seeds_differ():
    def order(made, epoch):
        return [made.plan(epoch * made.per_epoch + i)[1] for i in range(made.per_epoch)]

    first, again, other = (batches(some(40), seed=s, shuffle=True) for s in (1, 1, 2))
    assert order(first, 0) == order(again, 0) and order(first, 3) == order(again, 3)
    orders = [order(first, 0), order(first, 1), order(first, 2), order(other, 0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_a_mixture_has_of_each_set_its_share_and_tells_the_rows_sets():
    names = ["many"] * 30 + ["few"] * 6
    records = [
        replace(each, record=SimpleNamespace(source=name))
        for each, name in zip(some(36), names, strict=True)
    ]
    weights = {"few": 2.0, "many": 1.0}

    def fresh():
        return batches(records, 8, seed=7, shuffle=True, micro=2, weights=weights)

    made = fresh()
    for epoch in range(3):
        steps = range(epoch * made.per_epoch, (epoch + 1) * made.per_epoch)
        drawn = [index for t in steps for index in made.plan(t)[1]]
        assert [names[i] for i in drawn].count("few") == 24 and len(drawn) == 36
    for t in (13, 0, 6):
        batch = fresh()(t)
        assert equal(batch, made(t))
        own = [list(weights).index(names[i]) for i in batch.records]
        assert rows(batch).source.tolist() == own + [0] * (8 - len(own))
    assert batches(records, 8, shuffle=True)(0).group.source is None


@pytest.mark.parametrize("size", [1, 4, 8])
def test_records_share_batches_of_the_least_shape_that_holds_them(size):
    """Long prompts with short responses pad none of the reverse; what is left over takes a longer shape."""
    records = some(400)
    made = batches(records, size, shuffle=True)
    assert len(made.ladder) > 4 and not all(map(Shape.holds, made.ladder[1:], made.ladder))
    longer = 0
    for t in range(made.per_epoch):
        shape, planned = made.plan(t)
        least = [next(s for s in made.ladder if s.holds(records[r].shape)) for r in planned]
        assert all(shape.holds(each) for each in least)
        longer += sum(each != shape for each in least)
    assert longer < size * len(made.ladder) * 2


def test_batches_of_a_mixture_fit_what_it_draws():
    """The large set's long records are drawn seldom: the short ones get the shapes."""
    kinds = [("rare", 40 * (i % 8 + 10)) for i in range(300)] + [
        ("often", i % 2 * 40 + 8) for i in range(20)
    ]
    records = [
        replace(each, record=SimpleNamespace(source=name), shape=replace(each.shape, prefix=prefix))
        for each, (name, prefix) in zip(some(320), kinds, strict=True)
    ]
    of_sets = {"rare": 1.0, "often": 19.0}
    made = batches(records, 4, shuffle=True, shapes=2, weights=of_sets)
    assert made.ladder[0].prefix == 64 and made.ladder[1].prefix >= 680
    assert batches(records, 4, shuffle=True, shapes=2).ladder[0].prefix > 64


def test_one_shape_mixes_all_lengths():
    made = batches(some(40), 4, seed=3, shuffle=True, shapes=1)
    drawn = [made.plan(t)[1] for t in range(made.per_epoch)]
    order = np.random.default_rng((3, 0)).permutation(40).tolist()
    assert len(made.ladder) == 1 and set(drawn) == {tuple(order[i : i + 4]) for i in range(0, 40, 4)}


def test_short_and_long_batches_come_mixed():
    made = batches(some(400), shuffle=True)
    levels = [made.ladder.index(made.plan(t)[0]) for t in range(made.per_epoch)]
    assert set(levels) == set(range(len(made.ladder)))
    assert levels != sorted(levels) and levels != sorted(levels, reverse=True)


# ---- micro-batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 5, 8, 19])
def test_micro_batches_joined_are_the_batch(micro, count):
    """Also where the last batch leaves whole micro-batches without a record."""
    records = some(count)
    reference = [tuple(answer + np.float32(0.5) for answer in r.responses) for r in records]
    split, whole = (
        batches(records, 8, seed=1, shuffle=True, micro=m, reference=[reference]) for m in (micro, 1)
    )
    for step in range(split.per_epoch):
        a, b = split(step), whole(step)
        assert a.records == b.records and a.group.responses.weight.shape == (micro, 8 // micro)
        assert np.array_equal(rows(a).responses.weight, rows(b).responses.weight)
        for ours, theirs in zip(jax.tree.leaves(rows(a)), jax.tree.leaves(rows(b)), strict=True):
            assert np.array_equal(ours[: len(a.records)], theirs[: len(a.records)])
        # the rest repeats records of the batch
        assert set(rows(a).prefix.tokens[:, 0]) == set(a.records)
        assert (rows(a).prefix.length > 0).all() and rows(a).responses.mask.any(-1).all()


def test_reference_values_stand_with_their_records():
    records = some(11, responses=3)
    rng = np.random.default_rng(0)
    reference = [
        tuple(rng.standard_normal(len(answer), np.float32) for answer in r.responses) for r in records
    ]
    others = [tuple(values - 1 for values in each) for each in reference]
    further = [reference, others]
    made = batches(records, 4, micro=2, shuffle=True, reference=[reference], references=further)
    for step in range(made.per_epoch):
        batch = made(step)
        group = rows(batch)
        (found,) = group.responses.reference
        first, second = group.responses.references.swapaxes(0, 1)
        assert np.array_equal(first, found)
        assert np.array_equal(second, np.where(found == 0, 0, found - 1))
        assert found.shape == group.responses.tokens.shape
        assert found.dtype == np.float32
        for row, index in enumerate(batch.records):
            for k, values in enumerate(reference[index]):
                stored = found[row, k]
                assert np.array_equal(stored[group.responses.mask[row, k]], values)
                assert not stored[len(values) :].any()
        assert not found[len(batch.records) :].any()


def test_no_reference_values_unless_given():
    made = batches(some(3))(0).group.responses
    assert made.reference is None and made.references is None


# ---- from files --------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """An encoder, and records whose pictures lie in a folder of the test's own."""
    golden = goldens("llavanext")
    encoder = Encoder(load_processor(golden.folder.path), golden.layout, golden.config.image_token)
    records = []
    for index, line in enumerate((FIXTURES / "pairs.jsonl").read_text().splitlines()):
        file = tmp_path / f"{index}.png"
        row = {**json.loads(line), "images": [file.name]}
        with Image.open(FIXTURES / json.loads(line)["images"][0]) as picture:
            picture.convert("RGB").save(file)
        record = parse_record(row, index=index, where="pairs.jsonl record", root=tmp_path)
        records.append(encoder.encode(record, 2, index))
    return encoder, records


def test_batches_of_pictures_hold_what_the_encoder_reads(pictures):
    encoder, records = pictures
    made = Batches(records, encoder, size=3, shuffle=True)
    for batch in made.iterate(range(made.per_epoch), 2, 2):
        group = rows(batch)
        for row, index in enumerate(batch.records):
            one = encoder.group(records[index])
            length, tiles = one.shape.prefix, one.shape.tiles
            assert np.array_equal(group.prefix.tokens[row, :length], one.prefix.tokens)
            assert np.array_equal(group.prefix.image[row, :length], one.prefix.image)
            assert np.array_equal(group.prefix.patches[row, :tiles], one.prefix.patches)
            assert (
                not group.prefix.patches[row, tiles:].any()
                and (group.prefix.image[row, length:] == -1).all()
            )


@pytest.mark.parametrize("threads", [1, 3])
def test_a_picture_that_cannot_be_decoded_is_an_input_error_of_one_line(pictures, threads):
    """What was whole when lengths were read may be cut short when its turn comes."""
    encoder, records = pictures
    file = records[5].record.images[0].path
    file.write_bytes(file.read_bytes()[:200])
    seen = []
    with pytest.raises(InputError) as error:
        seen.extend(batch.step for batch in Batches(records, encoder, size=2).iterate(range(4), threads, 3))
    message = str(error.value)
    assert "\n" not in message and "pairs.jsonl record 5, images[0]" in message
    assert "5.png" in message and "cut short" in message


def test_batches_before_a_damaged_picture_still_come(pictures):
    encoder, records = pictures
    records[5].record.images[0].path.unlink()
    ahead = Batches(records, encoder, size=2).iterate(range(4), 2, 2)
    assert [next(ahead).step, next(ahead).step] == [0, 1]
    with pytest.raises(InputError, match=r"pairs.jsonl record 5, images\[0\].*no such file"):
        next(ahead)


# ---- several processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [([0, 1], [2, 3]), ([0], [1], [2], [3]), ([1, 3], [0, 2])])
def test_processes_make_the_rows_that_they_hold(parts):
    """Together they make every batch, the last one with its missing rows included; none reads more."""
    records = some(11)
    options = {"size": 8, "micro": 2, "seed": 3, "shuffle": True, "reference": None}
    whole, shares = batches(records, **options), [batches(records, local_rows=p, **options) for p in parts]
    for step in range(2 * whole.per_epoch):
        expected, found = whole(step), [share(step) for share in shares]
        assert {(b.step, b.records, b.shape) for b in found} == {(step, expected.records, expected.shape)}
        for held, batch in zip(parts, found, strict=True):
            real = expected.group.responses.weight[:, held] > 0
            assert np.array_equal(batch.group.responses.weight > 0, real)
            for mine, all_ in zip(
                jax.tree.leaves(batch.group), jax.tree.leaves(expected.group), strict=True
            ):
                assert np.array_equal(mine[real], all_[:, held][real])


def test_the_digest_names_records_and_their_order():
    records = some(11)
    first = batches(records, shuffle=True, seed=1)
    assert len({first.digest(step) for step in range(9)}) == 9
    assert first.digest(7) == batches(records, shuffle=True, seed=1, micro=2).digest(7)
    assert first.digest(7) != batches(records, shuffle=True, seed=2).digest(7)
    assert first.digest(7) != batches(records, shuffle=True, seed=1, size=3).digest(7)
