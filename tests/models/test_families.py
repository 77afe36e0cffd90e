"""A family defined here goes all the way, from its folder to an exported model, and no file of the package
knows it."""

import jax
import numpy as np
import pytest
from runs import compiling
from safetensors.numpy import load_file
from toy_family import Toy, make_toy

import mllm_align
from mllm_align import Config, LoraConfig, SamplingConfig
from mllm_align.batch import pad
from mllm_align.config import DataConfig, MeshConfig
from mllm_align.data.inspect import describe
from mllm_align.errors import InputError
from mllm_align.generation.respond import generate
from mllm_align.models.bundle import make_model
from mllm_align.models.families.registry import FAMILIES, read_config
from mllm_align.models.huggingface import open_folder
from mllm_align.plan.targets import sizes
from mllm_align.prepare import prepare
from mllm_align.sharding import make_mesh
from mllm_align.testbed.demo import make_pairs
from mllm_align.training.flops import forward_flops

assert compiling  # a fixture
LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module", autouse=True)
def registered():
    FAMILIES.register("toy")(Toy())
    yield
    del FAMILIES._parts["toy"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy(folder / "model")
    make_pairs(folder / "data", count=4, held_out=1)
    return folder


@pytest.fixture(scope="module")
def bundle(work):
    return mllm_align.load(work / "model", "float32", make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def prepared(work, bundle):
    encoder, records, _ = prepare(bundle, work / "data" / "pairs.jsonl", Config().data, 2)
    return encoder, records


def test_every_strip_is_a_run_between_texts(prepared):
    encoder, records = prepared
    for record in records:
        group, ((width, height),) = encoder.group(record), record.sizes
        strips, patches = encoder.layout.tiles(height, width, 1)
        assert (record.prefix == encoder.image_token).sum() == strips
        assert group.prefix.patches.shape == (strips, patches, 192) and group.shape == record.shape
        prefix = encoder.prefix(record)
        tokens, image = prefix.tokens, prefix.image
        assert image[image >= 0].tolist() == list(range(1, 1 + 4 * strips))
        ends = np.flatnonzero(np.diff((image >= 0).astype(int)))
        assert len(ends) == 2 * strips, "text stands before, between and after the runs"
        text = encoder.tokenizer.decode(tokens[: ends[0] + 1])
        assert text.rstrip().endswith("row 0:")
        assert np.array_equal(group.prefix.place[0, [0, 1, 4]], [[0, 0], [0, 1], [1, 0]])
    assert len({len(encoder.pixels(record).patches) for record in records}) > 1


def test_several_images_are_laid_out_otherwise_than_one(prepared, work, bundle):
    encoder, records = prepared
    images = [str(record.record.images[0].path) for record in records[:2]]
    row = {"images": images, "prompt": "Which?", "chosen": "The first.", "rejected": "None."}
    _, (two,), _ = prepare(bundle, [row], Config().data, 2)
    group = encoder.group(two)
    assert (
        two.shape.tiles == len(group.prefix.patches) == 2 and (two.prefix == encoder.image_token).sum() == 2
    )
    assert group.prefix.image[group.prefix.image >= 0].tolist() == list(range(1, 9))
    alone = encoder.group(records[0]).prefix.patches
    if len(alone) > 1:
        assert not np.array_equal(group.prefix.patches[0], alone[0])


def test_a_text_that_reads_like_a_mark_or_an_image_token_is_text(prepared, bundle):
    encoder, records = prepared
    image = str(records[0].record.images[0].path)
    row = {"images": [image], "prompt": "Is <pad> or <image> there?", "chosen": "<pad>", "rejected": "No."}
    _, (one,), _ = prepare(bundle, [row], Config().data, 2)
    strips, _ = encoder.layout.tiles(*one.sizes[0][::-1], 1)
    assert (one.prefix == encoder.image_token).sum() == strips
    assert encoder.tokenizer.pad_token_id not in [*one.prefix, *one.responses[0]]


def test_a_template_without_marks_is_refused(bundle, prepared, tmp_path):
    _, records = prepared
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}")
    config = DataConfig(chat_template=tmp_path / "plain.jinja")
    tall = next(record for record in records if record.shape.tiles > 1)
    row = {"images": [str(tall.record.images[0].path)], "prompt": "A?", "chosen": "B.", "rejected": "C."}
    with pytest.raises(InputError, match=f"0 image places for the {tall.shape.tiles} of 1 images"):
        prepare(bundle, [row], config, 2)


def test_embeddings_by_hand(prepared, bundle):
    encoder, records = prepared
    group = encoder.group(records[0])
    batch = pad([group], group.shape, 1)
    model = make_model(bundle.config)
    variables = {"params": bundle.params}
    features = model.apply(variables, batch.prefix.pixels, method="features")
    states, _ = model.apply(variables, features, batch.prefix, method="embed")
    found = np.asarray(states)[0]
    stored = load_file(bundle.folder.path / "model.safetensors")
    seen = group.prefix.patches @ stored["model.eye.patch.weight"].T + stored["model.eye.patch.bias"]
    seen = seen * (group.prefix.place[..., :1] + 1)
    seen = seen.reshape(len(seen), 2, 2, 2, -1).mean(3).reshape(-1, seen.shape[-1])
    seen = seen / np.sqrt((seen**2).mean(-1, keepdims=True) + 1e-6) * stored["model.bridge.norm.weight"]
    wanted = stored["model.text.embed_tokens.weight"][group.prefix.tokens]
    wanted[group.prefix.image > 0] = seen @ stored["model.bridge.linear.weight"].T
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_from_its_folder_to_an_exported_model(work, bundle):
    data = work / "data" / "pairs.jsonl"
    before = mllm_align.score(bundle, data)
    config = Config(lora=LORA, batch_size=4, steps=1)
    trained = mllm_align.train(config, bundle, data, work / "run")
    after = mllm_align.score(trained, data)
    assert set(trained.trained["params"]) == {"projector"}
    assert [row["chosen_logp"] for row in before] != [row["chosen_logp"] for row in after]
    mllm_align.export(work / "run", work / "merged")
    mllm_align.export(work / "run", work / "adapter", adapter=True)
    for folder in (work / "merged", work / "adapter"):
        again = mllm_align.score(mllm_align.load(folder, "float32", bundle.mesh), data)
        for one, other in zip(after, again, strict=True):
            assert one["chosen_logp"] == pytest.approx(other["chosen_logp"], abs=1e-3)
    old, new = (load_file(work / name / "model.safetensors") for name in ("model", "merged"))
    assert set(old) == set(new)
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert all(name.startswith(("model.text.layers", "model.bridge")) for name in changed) and changed
    assert np.array_equal(old["model.eye.patch.weight"], new["model.eye.patch.weight"])


@pytest.mark.slow
def test_full_training_has_the_parts_of_the_family(work, bundle):
    config = Config(lora=None, freeze=(), batch_size=4, steps=1)
    trained = mllm_align.train(config, bundle, work / "data" / "pairs.jsonl", work / "full").trained
    assert set(trained["params"]) == {"vision_tower", "projector", "decoder"}
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), trained["params"], dict(bundle.params))
    assert min(max(jax.tree.leaves(part)) for part in moved.values()) > 0


def test_generation_description_and_counts(work, bundle, prepared):
    encoder, records = prepared
    rows = generate(bundle, work / "data" / "pairs.jsonl", SamplingConfig(max_tokens=3))
    assert len(rows) == len(records)
    told = describe(encoder, records[0])
    assert told["images"][0]["embeddings"] == 4 * told["images"][0]["tiles"]
    assert sum(entry["text"].startswith("tile ") for entry in told["prefix"]) == told["images"][0]["tiles"]
    tower, _ = forward_flops(bundle.config, records[0])
    assert tower == 2 * records[0].shape.tiles * 8 * 192 * 16
    planned = sizes(Config(), bundle.config)
    assert planned.shape.tiles == 3


def test_what_its_configuration_refuses(work, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "toy", "image_token_id": -1}')
    with pytest.raises(InputError, match="image_token_id is -1"):
        read_config(tmp_path)
    known = "'llava' or 'llava_next' or 'llava_onevision' or 'idefics3' or 'smolvlm' or "
    known += "'qwen2_5_vl' or 'qwen3_vl' or 'gemma3' or 'internvl' or 'toy'"
    with pytest.raises(InputError, match=known):
        (tmp_path / "config.json").write_text('{"model_type": "else"}')
        read_config(tmp_path)
    assert open_folder(work / "model").family is FAMILIES["toy"]
