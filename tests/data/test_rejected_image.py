"""Records with a second prefix: what it shows, how long it is, what batches make of it, what is refused."""

import json
from functools import cache

import jax
import numpy as np
import pytest
from goldens import FIXTURES, goldens
from refusals import refusal

from mllm_align.config import DataConfig
from mllm_align.curation.items import read_items
from mllm_align.curation.writing import write
from mllm_align.data.batches import Batches
from mllm_align.data.distortion import NOISE_STEPS, signal_share
from mllm_align.data.encode import Encoder, fingerprint
from mllm_align.data.readers import records_from
from mllm_align.data.table import encode_all
from mllm_align.models.processor import load_processor

ROWS = [json.loads(line) for line in (FIXTURES / "pairs.jsonl").read_text().splitlines()][:4]
FAMILIES = ("llavanext", "onevision", "qwen3_vl")


@cache
def encoder(family="llavanext"):
    golden = goldens(family)
    return Encoder(load_processor(golden.folder.path), golden.layout, golden.config.image_token)


def named(**others):
    """The rows, each with the next one's picture as its rejected image."""
    following = [*ROWS[1:], ROWS[0]]
    return [
        row | {"rejected_images": next_["images"]} | others
        for row, next_ in zip(ROWS, following, strict=True)
    ]


def records(rows):
    return records_from([{**row} for row in rows], image_root=FIXTURES)


def encoded(kind, rows=None, family="llavanext", **options):
    settings = {"responses": 2, "max_length": 9999, "rejected_image": kind} | options
    return encode_all(records(rows or named()), encoder(family), **settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["crop", "noise", "record"])
def test_a_group_has_the_prompt_twice_each_time_with_an_image(kind, family):
    kept, _ = encoded(kind, family=family)
    coder = encoder(family)
    for number, one in enumerate(kept):
        group = coder.group(one, draw=(3, 1))
        own, other = group.prefixes
        assert group.views == ((0, 1), (0,)) and group.shape == one.shape
        assert np.array_equal(one.second.responses[0], one.responses[0]) and len(one.second.responses) == 1
        text = [prefix.tokens[prefix.tokens != coder.image_token] for prefix in (own, other)]
        if kind == "record":
            neighbour = kept[(number + 1) % len(kept)]
            assert np.array_equal(other.patches, coder.pixels(neighbour).patches)
            assert one.second.sizes == neighbour.sizes
        else:
            assert np.array_equal(own.tokens, other.tokens) and np.array_equal(own.image, other.image)
            assert np.array_equal(own.place, other.place) and not np.allclose(own.patches, other.patches)
        if coder.layout.token == coder.layout.mark:
            assert np.array_equal(*text)
    lengths = {(len(own.tokens), *one.shape.others[0]) for one in kept for own in [coder.prefix(one)]}
    differ = any(first != second for first, second, _ in lengths)
    assert differ == (kind == "record"), "AnyRes and Qwen have as many embeddings as the image is large"


def test_noise_is_that_of_so_many_steps_of_diffusion():
    (one, *_), _ = encoded("noise")
    own, other = encoder().group(one).prefixes
    left = signal_share(NOISE_STEPS)
    noise = (other.patches - np.sqrt(left) * own.patches) / np.sqrt(1 - left)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


@pytest.mark.parametrize("kind", ["crop", "noise"])
def test_batches_draw_by_seed_record_and_epoch_alone(kind):
    kept, _ = encoded(kind)

    def made(step, **options):
        settings = {"size": 2, "shuffle": True, "seed": 1} | options
        batch = Batches(kept, encoder(), **settings)(step)
        patches = batch.group.prefixes[1].patches.reshape(-1, *batch.group.prefixes[1].patches.shape[2:])
        return {
            record: patches[row][: kept[record].shape.tiles] for row, record in enumerate(batch.records)
        }

    def epoch(number, **options):
        steps = 4 // options.get("size", 2)
        return {k: v for step in range(steps) for k, v in made(number * steps + step, **options).items()}

    first, again, next_ = epoch(0), epoch(0, size=4, micro=2), epoch(1)
    other, still = epoch(0, seed=2), epoch(1, redraw=False)
    for record, patches in first.items():
        assert np.array_equal(patches, again[record]) and np.array_equal(patches, still[record])
        assert not np.allclose(patches, next_[record]) and not np.allclose(patches, other[record])


def test_batches_pad_each_prefix_to_its_own_length_and_place_references_by_view():
    kept, _ = encoded("record")
    rng = np.random.default_rng(0)
    of_views = [
        [tuple(rng.random(len(r), np.float32) for r in part.responses) for part in parts]
        for parts in (kept, [one.second for one in kept])
    ]
    made = Batches(kept, encoder(), size=4, micro=2, multiple=8, reference=of_views)
    batch = made(0)
    shape = made.ladder[-1]
    assert shape.others[0][0] == -(-max(one.shape.others[0][0] for one in kept) // 8) * 8
    assert batch.group.views == ((0, 1), (0,)) and batch.shape == shape
    assert [x.tokens.shape[-1] for x in batch.group.prefixes] == [n for n, _ in shape.prefixes]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.group)
    for view, count in enumerate((2, 1)):
        stored = flat.responses.reference[view]
        assert stored.shape[:2] == (4, count)
        for row, record in enumerate(batch.records):
            for k in range(count):
                mask = flat.responses.mask[row, k]
                assert np.array_equal(stored[row, k][mask], of_views[view][record][k])


def test_fingerprints_tell_what_is_drawn():
    prints = {
        kind: fingerprint([one.second for one in encoded(kind)[0]]) for kind in ("crop", "noise", "record")
    }
    own = [one.alone for one in encoded("crop")[0]]
    assert len(set(prints.values())) == 3 and all(not one.identity and one.second is None for one in own)
    assert fingerprint(own) == fingerprint(
        encode_all(records(ROWS), encoder(), responses=2, max_length=9999)[0]
    )


def test_a_second_prompt_that_is_too_long_counts(tmp_path):
    lengths = [one.shape.others[0][0] + one.shape.response for one in encoded("record")[0]]
    own = [one.length for one in encoded("record")[0]]
    limit = max(own)
    longer = [n for n, mine in zip(lengths, own, strict=True) if max(n, mine) > limit]
    kept, left_out = encoded("record", max_length=max(lengths) - 1, over_long="skip")
    assert len(left_out) >= 1 and len(kept) + len(left_out) == 4 and len(longer) <= len(left_out)


# ---- the field of a record ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rejected_images", "rejected_image", "retrieved_image"])
def test_names_of_the_field(name):
    value = ROWS[1]["images"] if name == "rejected_images" else ROWS[1]["images"][0]
    (record,) = records([ROWS[0] | {name: value}])
    assert [each.path for each in record.rejected_images] == [FIXTURES / ROWS[1]["images"][0]]
    (record,) = records([ROWS[0] | {name: {"bytes": None, "path": None}}])
    assert record.rejected_images == ()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_data_tools_keep_it(tmp_path, suffix):
    data = tmp_path / "pairs.jsonl"
    (tmp_path / "images").symlink_to(FIXTURES / "images")
    data.write_text("".join(json.dumps(row) + "\n" for row in [*named()[:2], ROWS[2]]))
    settings = DataConfig(allow_outside=True)
    write(list(read_items(data, "pairs", settings)), tmp_path / f"out.{suffix}")
    found = records_from(tmp_path / f"out.{suffix}", allow_outside=True)
    assert [len(record.rejected_images) for record in found] == [1, 1, 0]
    for row, record in zip(named(), found[:2], strict=False):
        assert record.rejected_images[0].read() == (FIXTURES / row["rejected_images"][0]).read_bytes()


def test_what_is_refused():
    text = {key: value for key, value in ROWS[0].items() if key != "images"}
    both = ROWS[0] | {"rejected_images": ROWS[1]["images"], "retrieved_image": ROWS[1]["images"][0]}
    two = ROWS[0] | {"rejected_images": ROWS[1]["images"] * 2}
    for kind, row, said in (
        ("crop", text, "record 0: has no image, and the objective compares images"),
        ("record", text, "record 0: has no image"),
        ("record", ROWS[0], "record 0, rejected_images: is missing"),
        ("record", two, "rejected_images: has 2 images, and the record has 1"),
        ("record", both, "has both rejected_images and retrieved_image"),
        (
            "record",
            ROWS[0] | {"rejected_images": "a.png"},
            "rejected_images: found str; give a list of images",
        ),
        ("record", ROWS[0] | {"rejected_image": "none.png"}, "no such file"),
    ):
        assert said in refusal(lambda kind=kind, row=row: encoded(kind, [row])), said
