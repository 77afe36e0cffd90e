"""The demo's folder and pairs: whole, the same by seed, and not to be told apart by text alone."""

import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import LlavaNextProcessor, LlavaProcessor

from mllm_align.data.images import load_rgb
from mllm_align.data.readers import records_from
from mllm_align.errors import InputError
from mllm_align.models.huggingface import Reader, load_params, open_folder
from mllm_align.models.processor import load_processor
from mllm_align.testbed import demo


@pytest.fixture(scope="module", params=["llava_next", "llava"])
def model(request, tmp_path_factory) -> Path:
    return demo.make_model(tmp_path_factory.mktemp("demo") / "model", request.param)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return demo.make_pairs(tmp_path_factory.mktemp("demo") / "pairs", 20)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_same_bytes_by_seed(model, pairs, tmp_path):
    kind = "llava_next" if open_folder(model).config.newline else "llava"
    assert contents(demo.make_model(tmp_path / "m", kind)) == contents(model)
    assert contents(demo.make_pairs(tmp_path / "p", 20).parent) == contents(pairs.parent)
    other = contents(demo.make_model(tmp_path / "m1", kind, seed=1))
    changed = {name for name, data in contents(model).items() if data != other[name]}
    assert changed == {"model.safetensors"}
    first, second = pairs.read_text(), demo.make_pairs(tmp_path / "p1", 20, seed=1).read_text()
    assert first != second


def test_model_is_read(model):
    folder = open_folder(model)
    params = load_params(folder, np.float32)
    assert ("image_newline" in params) == folder.config.newline
    assert all(np.isfinite(leaf).all() and leaf.std() > 0 for leaf in jax.tree.leaves(params))


def test_holds_what_is_never_read(model):
    reader = Reader(open_folder(model))
    for name in ("post_layernorm.weight", "encoder.layers.2.mlp.fc1.weight"):
        assert f"vision_tower.vision_model.{name}" in reader.folder.files
        assert reader(f"vision_tower.{name}").std() > 0


def test_sizes_are_taken(tmp_path):
    out = demo.make_model(tmp_path, vision_layers=2, layers=1, head_dim=8, vocab=400)
    config = open_folder(out).config
    assert (config.vision.layers, config.decoder.layers) == (1, 1)
    assert (config.decoder.head_dim, config.decoder.vocab) == (8, 400)


def test_processor_and_tokenizer(model, pairs):
    config = open_folder(model).config
    tokenizer = load_processor(model).tokenizer
    processor = (LlavaNextProcessor if config.newline else LlavaProcessor).from_pretrained(model)
    assert tokenizer.convert_tokens_to_ids("<image>") == config.image_token
    assert len(tokenizer) <= config.decoder.vocab
    for text in ("Two orange stars and a green square.", "Ångström, 猫 and\n🙂"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids[1:]) == text

    record = records_from(pairs)[0]
    user = [message.chat() for message in record.messages]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A star."}]}
    prompt = processor.apply_chat_template(user, add_generation_prompt=True)
    question = record.messages[-1].text
    assert prompt == f"USER: <image>\n{question} ASSISTANT:"
    assert processor.apply_chat_template([*user, answer]) == f"{prompt} A star.</s>"

    batch = processor(images=load_rgb(record.images[0]), text=prompt, return_tensors="np")
    ids = batch["input_ids"][0]
    assert batch["pixel_values"].shape[-3:] == (3, 56, 56)
    assert (ids == config.image_token).sum() >= config.vision.tokens
    assert ids[0] == tokenizer.bos_token_id and ids.max() < config.decoder.vocab


def test_pairs_are_read(pairs):
    train, held_out = records_from(pairs), records_from(pairs.parent / "held_out.jsonl")
    assert (len(train), len(held_out)) == (20, 16)
    pictures = [load_rgb(record.images[0]) for record in train + held_out]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert len({picture.width / picture.height for picture in pictures}) > 2
    assert {record.images[0].path.suffix for record in train} == {".png", ".jpg"}
    for record in train + held_out:
        chosen, rejected = (text.replace(" an ", " a ") for text in record.responses)
        assert chosen != rejected
        assert [message.places for message in record.messages] == [1]
        singular = [re.sub(r"(circle|square|triangle|star)s", r"\1", t) for t in (chosen, rejected)]
        differ = [a != b for a, b in zip(*(t.split(" ") for t in singular), strict=True)]
        assert sum(differ) == 1  # one colour, one shape or one number


def test_text_alone_tells_nothing():
    rng = np.random.default_rng(0)
    true, wrong = Counter(), Counter()
    for _ in range(20_000):
        scene = demo._scene(rng)
        false = demo._misdescribed(scene, rng)
        assert false != scene and len(false) == len(scene)
        if len(scene) == 1:  # 72 scenes: each about as often true as wrong
            true.update(scene)
            wrong.update(false)
        else:
            assert false[0].colour != false[1].colour and false[0].shape != false[1].shape
    assert len(true) == len(wrong) == 72
    both = np.array([(true[group], wrong[group]) for group in true])
    assert (abs(both[:, 0] - both[:, 1]) < 5 * np.sqrt(both.sum(1))).all()


def test_picture_shows_the_scene():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = demo._scene(rng)
        pixels = np.asarray(demo._draw(scene, "white", rng)).reshape(-1, 3)
        seen = {tuple(map(int, colour)) for colour in np.unique(pixels, axis=0)}
        wanted = {demo.COLOURS[group.colour] for group in scene} | {demo.GROUNDS["white"]}
        assert seen == wanted


@pytest.mark.parametrize("make", [demo.make_model, demo.make_pairs])
def test_refusals(make, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out, word in ((tmp_path, "not empty"), (tmp_path / "file" / "new", "cannot be written")):
        with pytest.raises(InputError, match=word) as caught:
            make(out)
        assert str(caught.value).isprintable()
    assert contents(tmp_path) == {"file": b"kept"}


def test_refuses_senseless_values(tmp_path):
    with pytest.raises(InputError, match="count"):
        demo.make_pairs(tmp_path / "new", 0)
    with pytest.raises(InputError, match="held_out"):
        demo.make_pairs(tmp_path / "new", held_out=0)
    with pytest.raises(InputError, match="kind"):
        demo.make_model(tmp_path / "new", "llava_onevision")
    assert not (tmp_path / "new").exists()
