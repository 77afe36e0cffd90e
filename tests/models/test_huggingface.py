"""Folders as they are published, and every refusal of one that can't be used."""

import itertools
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from goldens import FIXTURES, goldens
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from refusals import assert_refusal
from safetensors.numpy import load_file, save_file

from mllm_align.errors import InputError
from mllm_align.models.config import DecoderConfig
from mllm_align.models.families.llava.vision import ClipConfig
from mllm_align.models.families.registry import parse_config
from mllm_align.models.huggingface import INDEX, load_params, open_folder
from mllm_align.models.processor import load_processor

# As llava-hf published them: text_config and vision_config hold little, the classes fill in the rest.
VISION = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
VICUNA = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
YI = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000000.0,
    "vocab_size": 64064,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def published(text, kind="llava", **changes):
    config = {
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": kind,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": VISION,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": text.get("vocab_size", 32064),
    }
    if kind == "llava_next":
        config |= {"image_grid_pinpoints": PINPOINTS, "use_image_newline_parameter": True}
    return config | changes


def read(config, tmp_path):
    return parse_config(tmp_path, config)


def derive(path, name="llavanext", config=None, weights=None, rename=None):
    """A copy of a golden folder with its configuration and weights changed."""
    path.mkdir(exist_ok=True)
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    tensors = load_file(FIXTURES / name / "model.safetensors")
    if config:
        config(raw)
    if weights:
        weights(tensors)
    if rename:
        tensors = {rename(name): tensor for name, tensor in tensors.items()}
    (path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, path / "model.safetensors")
    return path


def shard(path):
    """The folder's weights in two files with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (path / INDEX).write_text(json.dumps(index))
    return path


def assert_same_params(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs), jax.tree_util.keystr(path)


# ---- configuration ---------------------------------------------------------------------------------

CLIP_L = ClipConfig(
    hidden=1024, mlp=4096, layers=23, heads=16, image_size=336, patch_size=14, activation="quick_gelu"
)
VICUNA_7B = DecoderConfig(
    vocab=32064,
    hidden=4096,
    mlp=11008,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    rope_theta=10000.0,
    norm_eps=1e-5,
    max_length=4096,
)
MISTRAL_7B = DecoderConfig(
    vocab=32064,
    hidden=4096,
    mlp=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    norm_eps=1e-5,
    max_length=32768,
)
YI_34B = DecoderConfig(
    vocab=64064,
    hidden=7168,
    mlp=20480,
    layers=60,
    heads=56,
    kv_heads=8,
    head_dim=128,
    rope_theta=5e6,
    norm_eps=1e-5,
    max_length=4096,
)


@pytest.mark.parametrize(
    "text, kind, decoder",
    [
        (VICUNA, "llava", VICUNA_7B),
        (MISTRAL, "llava_next", MISTRAL_7B),
        (YI, "llava_next", YI_34B),
    ],
    ids=["vicuna 7b", "mistral 7b", "yi 34b"],
)
def test_partial_sub_configurations(text, kind, decoder, tmp_path):
    config = read(published(text, kind), tmp_path)
    assert config.decoder == decoder
    assert config.vision == CLIP_L and config.vision.tokens == 576
    assert config.image_token == 32000
    assert config.projector_activation == "gelu" and config.projector_bias
    assert config.pinpoints == (tuple(map(tuple, PINPOINTS)) if kind == "llava_next" else ())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 12345.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
        {"rope_theta": 12345.0, "rope_scaling": None},
    ],
)
def test_rotary_base_old_and_new(rope, tmp_path):
    assert read(published(VICUNA | rope), tmp_path).decoder.rope_theta == 12345.0


def test_head_dim_and_sliding_window(tmp_path):
    config = read(published(MISTRAL | {"head_dim": 96, "sliding_window": 4096}), tmp_path)
    assert config.decoder.head_dim == 96 and config.decoder.max_length == 4096
    unnamed = {k: v for k, v in MISTRAL.items() if k != "sliding_window"}
    assert read(published(unnamed), tmp_path).decoder.max_length == 4096  # the class's default


@pytest.mark.parametrize("layer, run", [(-1, 24), (-2, 23), (-24, 1), (22, 22), (24, 24)])
def test_feature_layer_counts_the_blocks_to_run(layer, run, tmp_path):
    config = read(published(VICUNA, vision_feature_layer=layer), tmp_path)
    assert config.vision.layers == run


def test_class_token_is_kept_where_the_strategy_says_so(tmp_path):
    config = read(published(VICUNA, vision_feature_select_strategy="full"), tmp_path)
    assert config.vision.keep_class_token and config.vision.tokens == 577


@pytest.mark.parametrize(
    "config, words",
    [
        (published(VICUNA | {"model_type": "gemma"}), ["text_config.model_type", "gemma"]),
        (published(VICUNA | {"hidden_act": "gelu"}), ["text_config.hidden_act", "gelu"]),
        (published(VICUNA, projector_hidden_act="relu"), ["projector_hidden_act", "relu"]),
        (published(VICUNA, vision_feature_layer=[-2, -5]), ["vision_feature_layer", "[-2, -5]"]),
        (published(VICUNA, vision_feature_layer=0), ["vision_feature_layer", "24", "is 0"]),
        (published(VICUNA, vision_feature_layer=-26), ["vision_feature_layer", "-26"]),
        (published(VICUNA, vision_feature_layer=25), ["vision_feature_layer", "is 25"]),
        (
            published(VICUNA, vision_config=VISION | {"model_type": "siglip_vision_model"}),
            ["vision_config.model_type", "siglip_vision_model"],
        ),
        (
            published(VICUNA | {"rope_scaling": {"type": "linear", "factor": 2.0}}),
            ["rope_scaling.type", "linear"],
        ),
        (
            published(MISTRAL, "llava_next", vision_feature_select_strategy="full"),
            ["vision_feature_select_strategy", "full"],
        ),
        (published(VICUNA, vision_feature_select_strategy="middle"), ["middle"]),
        (published(VICUNA | {"vocab_size": "many"}), ["vocab_size", "'many'"]),
        (published(VICUNA, "paligemma"), ["paligemma", "'llava'"]),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_what_is_not_computed_is_refused(config, words, tmp_path):
    with pytest.raises(InputError) as caught:
        read(config, tmp_path)
    assert_one_line(caught.value, "config.json", *words)


# ---- weights ---------------------------------------------------------------------------------------


def to_4_52(name):
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def to_old(name):
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("name", ["llava15", "llavanext"])
@pytest.mark.parametrize("rename", [str, to_old, to_4_52, lambda n: to_4_52(to_old(n))])
def test_key_layouts(name, rename, tmp_path):
    folder = open_folder(derive(tmp_path, name, rename=rename))
    assert_same_params(load_params(folder, np.float32), goldens(name).base)


def test_sharded_weights(tmp_path):
    folder = open_folder(shard(derive(tmp_path)))
    assert len(set(folder.files.values())) == 2
    assert_same_params(load_params(folder, np.float32), goldens("llavanext").base)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_and_loaded_dtypes(dtype, tmp_path):
    def narrow(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(dtype)

    folder = open_folder(derive(tmp_path, weights=narrow))
    stored = jax.tree.map(lambda x: np.asarray(x).astype(dtype), goldens("llavanext").base)
    for wanted in (np.float32, ml_dtypes.bfloat16):
        expected = jax.tree.map(lambda x, wanted=wanted: x.astype(wanted), stored)
        assert_same_params(load_params(folder, wanted), expected)


def test_stacked_and_transposed_leaves_are_the_stored_numbers():
    stored = load_file(FIXTURES / "llavanext" / "model.safetensors")
    params = goldens("llavanext").base
    decoder = params["decoder"]  # the last block stands alone
    for i, kernel in enumerate((decoder["layers"]["q"]["kernel"][0], decoder["last"]["q"]["kernel"])):
        name = f"language_model.model.layers.{i}.self_attn.q_proj.weight"
        assert np.array_equal(kernel, stored[name].T)
    embedding = stored["language_model.model.embed_tokens.weight"]
    assert np.array_equal(params["decoder"]["embedding"], embedding)
    kernel = params["vision_tower"]["patch_embedding"]["kernel"].reshape(14, 14, 3, 32)
    patch = stored["vision_tower.embeddings.patch_embedding.weight"]
    assert np.array_equal(kernel.transpose(3, 2, 0, 1), patch)


def test_only_some_leaves():
    folder = goldens("llavanext").folder
    found = load_params(folder, np.float32, only=lambda path: path[0] == "projector")
    expected = goldens("llavanext").base["projector"]
    assert_same_params(found, {"projector": expected})


def test_spread_over_devices(tmp_path):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("layer", "model"))
    spread = PartitionSpec("layer", None, "model")

    def sharding(path):
        stacked = path[:2] == ("vision_tower", "layers") and path[-1] == "kernel"
        last = {"embedding": PartitionSpec("model"), "head": PartitionSpec(None, "model")}
        return NamedSharding(mesh, spread if stacked else last.get(path[-1], PartitionSpec()))

    folder = open_folder(shard(derive(tmp_path)))
    found = load_params(folder, np.float32, sharding)
    kernel = found["vision_tower"]["layers"]["q"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 32, 8)}
    assert_same_params(found, goldens("llavanext").base)


def test_vocabulary_padded_past_the_tokenizer():
    folder = goldens("llavanext").folder
    assert len(load_processor(folder.path).tokenizer) == 320
    assert folder.config.decoder.vocab == 384
    assert goldens("llavanext").base["decoder"]["embedding"].shape[0] == 384


def test_tied_embeddings_need_no_head(tmp_path):
    def tie(raw):
        raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = True

    def drop(tensors):
        del tensors["language_model.lm_head.weight"]

    folder = open_folder(derive(tmp_path, config=tie, weights=drop))
    assert folder.config.decoder.tied
    assert "head" not in load_params(folder, np.float32)["decoder"]


FLAGS = (True, False, None)


@pytest.mark.parametrize("head", ["own", "equal", "absent"])
@pytest.mark.parametrize("name", ["llava15", "llavanext"])
def test_stored_head_wins_over_the_flags(name, head, tmp_path):
    """As transformers 5 decides (tests/oracle/test_heads_live.py): a flag ties what is equal or absent."""
    stored = goldens(name).base["decoder"]

    def change(tensors):
        if head == "equal":
            tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
        if head == "absent":
            del tensors["language_model.lm_head.weight"]

    derive(tmp_path, name, weights=change)
    raw = json.loads((tmp_path / "config.json").read_text())
    for whole, text in itertools.product(FLAGS, FLAGS):
        for part, flag in ((raw, whole), (raw["text_config"], text)):
            part.pop("tie_word_embeddings", None)
            part.update({} if flag is None else {"tie_word_embeddings": flag})
        (tmp_path / "config.json").write_text(json.dumps(raw))
        flagged = whole is True or (text is True and name == "llava15")
        if head == "absent" and not flagged:
            assert_refused(tmp_path, "lm_head.weight", "missing")
            continue
        folder = open_folder(tmp_path)
        assert folder.config.decoder.tied == (flagged and head != "own"), (whole, text)
        params = load_params(folder, np.float32)["decoder"]
        unembedding = params["embedding"].T if folder.config.decoder.tied else params["head"]
        expected = stored["head"] if head == "own" else stored["embedding"].T
        assert np.array_equal(unembedding, expected), (whole, text)


def test_head_that_differs_in_its_last_row_alone(tmp_path):
    def change(tensors):
        head = tensors["language_model.model.embed_tokens.weight"].copy()
        head[-1, -1] += 1
        tensors["language_model.lm_head.weight"] = head

    folder = derive(tmp_path, config=lambda raw: raw.update(tie_word_embeddings=True), weights=change)
    assert not open_folder(folder).config.decoder.tied


def test_tied_head_of_another_shape(tmp_path):
    def change(tensors):
        tensors["language_model.lm_head.weight"] = np.zeros((7, 32), np.float32)

    derive(tmp_path, config=lambda raw: raw.update(tie_word_embeddings=True), weights=change)
    assert_refused(tmp_path, "lm_head.weight", "[7, 32]", "[384, 32]")


def test_unused_tensors_do_no_harm(tmp_path):
    def add(tensors):
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8)

    assert open_folder(derive(tmp_path, weights=add)).config == goldens("llavanext").config


def test_fingerprint_follows_weights_and_configuration(tmp_path):
    def nudge(tensors):
        tensors["image_newline"][0] += 1

    def note(raw):
        raw["note"] = "other"

    prints = [
        open_folder(derive(tmp_path / str(i), **changes)).fingerprint
        for i, changes in enumerate([{}, {}, {"weights": nudge}, {"config": note}])
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    assert re.fullmatch("[0-9a-f]{16}", prints[0])


# ---- refusals --------------------------------------------------------------------------------------


def assert_one_line(error, *words):
    message = str(error)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message, message


def assert_refused(path, *words):
    assert_refusal(lambda: open_folder(path), str(path), *words)


def test_original_layout_by_its_configuration(tmp_path):
    raw = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_refused(tmp_path, "liuhaotian", "convert_llava_weights_to_hf.py", "llava-hf")


def test_original_layout_by_its_weights(tmp_path):
    def rename(name):
        return name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")

    derive(tmp_path, rename=rename)
    assert_refused(tmp_path, "original LLaVA", "convert_llava_next_weights_to_hf.py", "llava-hf")


def test_not_a_llava(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert_refused(tmp_path, "'llama'", "'llava' or 'llava_next'")


def test_no_folder_and_no_configuration(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        assert_refused(path, "config.json", "no Hugging Face model folder", "llava-hf")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}"])
def test_broken_configuration(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert_refused(tmp_path, "config.json", "llava-hf")


def test_pickled_weights(tmp_path):
    derive(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, "safetensors only", "safe_serialization=True")


def test_no_weights(tmp_path):
    derive(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert_refused(tmp_path, "no model.safetensors", INDEX, "copy")


@pytest.mark.parametrize("count", [1, 3])
def test_missing_tensors(count, tmp_path):
    def drop(tensors):
        names = [n for n in tensors if n.startswith("language_model.model.layers.1.mlp")]
        for name in names[:count]:
            del tensors[name]

    derive(tmp_path, weights=drop)
    more = "and 2 more" if count == 3 else "'"
    assert_refused(tmp_path, "language_model.layers.1.mlp.", more, "copy")


def test_misshapen_tensor(tmp_path):
    def cut(tensors):
        name = "language_model.lm_head.weight"
        tensors[name] = np.ascontiguousarray(tensors[name][:320])

    derive(tmp_path, weights=cut)
    assert_refused(tmp_path, "language_model.lm_head.weight", "[320, 32]", "[384, 32]", "copy")


def test_quantised_tensor(tmp_path):
    def quantise(tensors):
        tensors["image_newline"] = tensors["image_newline"].astype(np.int8)

    derive(tmp_path, weights=quantise)
    assert_refused(tmp_path, "image_newline", "I8", "BF16")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("size", [0, 5, 1000, 100_000])
def test_truncated_weights(sharded, size, tmp_path):
    derive(tmp_path)
    file = tmp_path / "model.safetensors"
    if sharded:
        shard(tmp_path)
        file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert_refused(tmp_path, file.name, "copy it again")


def change_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_index_that_names_an_absent_file(tmp_path):
    shard(derive(tmp_path))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert_refused(tmp_path, "model-00002-of-00002.safetensors", "copy")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", 7, ["a"], None])
def test_index_that_names_no_file_of_the_folder(name, tmp_path):
    shard(derive(tmp_path / "folder"))
    shutil.copy(FIXTURES / "llavanext" / "model.safetensors", tmp_path)
    change_index(tmp_path / "folder", lambda where: where.update(image_newline=name))
    assert_refused(tmp_path / "folder", INDEX, "copy")


def test_index_that_names_an_absent_tensor(tmp_path):
    shard(derive(tmp_path))
    change_index(tmp_path, lambda where: where.update(extra="model-00001-of-00002.safetensors"))
    assert_refused(tmp_path, "model-00001-of-00002.safetensors", "'extra'", "copy")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_broken_index(content, tmp_path):
    derive(tmp_path)
    (tmp_path / INDEX).write_text(content)
    assert_refused(tmp_path, INDEX, "copy")


def test_no_processor(tmp_path):
    folder = open_folder(derive(tmp_path))
    with pytest.raises(InputError) as caught:
        load_processor(folder.path)
    assert_one_line(caught.value, str(tmp_path), "copy the processor files")
