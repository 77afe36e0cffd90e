"""Merged folders keep bit for bit what was not trained; adapters are laid out as PEFT does it."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import FIXTURES, NAMES
from refusals import refusal
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mllm_align.errors import InputError, NotFinite
from mllm_align.models import export
from mllm_align.models.export import DTYPES, export_adapter, export_merged
from mllm_align.models.families.llava.family import Llava
from mllm_align.models.huggingface import INDEX, load_params, open_folder
from mllm_align.models.lora import init_lora
from mllm_align.models.names import decoder_linears

RANK, ALPHA = 4, 8
SCALE = ALPHA / RANK
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
LAYOUTS = ("fixture", "llava-hf", "4.52")


def renamed(name, layout):
    """The fixtures have llava-hf's names, but for `vision_model`."""
    if layout == "fixture":
        return name
    name = name.replace("vision_tower.", "vision_tower.vision_model.")
    if layout == "llava-hf":
        return name
    name = name.replace("language_model.model.", "language_model.")
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


def derive(
    path, dtype="float32", layout="fixture", shards=1, name="llava15", change=lambda tensors: None, **config
):
    """A fixture's folder in another dtype, layout and number of files, with tensors that nothing reads."""
    path.mkdir()
    for file in (FIXTURES / name).iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    if config:
        raw = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(raw | config))
    tensors = {
        renamed(key, layout): value.astype(DTYPES[dtype])
        for key, value in load_file(FIXTURES / name / "model.safetensors").items()
    }
    prefix = "model.language_model" if layout == "4.52" else "language_model.model"
    inv_freq = np.array([np.nan, -0.0, 1e-40, np.inf], np.float32)
    tensors[f"{prefix}.layers.0.self_attn.rotary_emb.inv_freq"] = inv_freq
    tensors["vision_tower.embeddings.position_ids"] = np.arange(17)[None]
    tensors["scalar"] = np.array(3.5, DTYPES[dtype])
    change(tensors)
    write_weights(path, tensors, shards)
    return open_folder(path)


def write_weights(path, tensors, shards):
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return
    names, files = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, path / file, {"format": "pt"})
        files |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (path / INDEX).write_text(json.dumps(index))


def stored(path):
    """File name -> tensor name -> (dtype, shape, bytes), and each file's metadata."""
    content = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "numpy") as handle:
            tensors = {name: handle.get_tensor(name) for name in list(handle.keys())}
            content[file.name] = {n: (t.dtype, t.shape, t.tobytes()) for n, t in tensors.items()}
            content[file.name]["metadata"] = handle.metadata()
    return content


def weights(path):
    """Canonical name -> tensor."""
    return {
        Llava().canonical(name): tensor
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def others(path):
    return {f.name: f.read_bytes() for f in path.iterdir() if f.suffix != ".safetensors"}


def random_lora(config, targets=LINEARS, scale=0.05):
    shapes = jax.eval_shape(lambda: init_lora(config.decoder, RANK, targets, jax.random.key(0)))
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda x: (scale * draw(x.shape)).astype(np.float32), shapes)


def random_projector(folder):
    base = load_params(folder, np.float32, only=lambda path: path[0] == "projector")
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.05, x.shape).astype(np.float32), base["projector"])


def terms_of(lora, target, layer):
    """The low-rank terms of a map in block 0 or 1 of 2; the last block stands alone."""
    stack = lora["decoder"]["last" if layer else "layers"]
    return (
        stack.get(target) if layer or target not in stack else {t: x[0] for t, x in stack[target].items()}
    )


def by_hand(folder, lora, dtype=None):
    """Canonical name -> (before, exact), both float64, of every map that the low-rank terms change."""
    before, out = weights(folder.path), {}
    for ours, (theirs, _, _) in decoder_linears(folder.config.decoder).items():
        for i in range(folder.config.decoder.layers):
            if terms := terms_of(lora, ours, i):
                name = f"language_model.layers.{i}.{theirs}.weight"
                a, b = (terms[t].astype(np.float64) for t in "ab")
                old = before[name].astype(np.float64)
                out[name] = (old, old + SCALE * (a @ b).T)
    return out


def names_in(tree):
    return sorted(p.name for p in tree.iterdir())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_untrained_folder_comes_back_bit_for_bit(tmp_path, dtype, layout, shards):
    folder = derive(tmp_path / "in", dtype, layout, shards)
    told = export_merged(folder, tmp_path / "out", {}, 1.0)
    assert stored(tmp_path / "out") == stored(tmp_path / "in")
    assert others(tmp_path / "out") == others(tmp_path / "in")
    assert (told["merged"], told["replaced"], told["copied"]) == (0, 0, len(folder.files))
    assert told["rounding"] == {"max_abs": 0.0, "max_relative_to_update": 0.0}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loaded_parameters_written_back_change_no_bit(tmp_path, dtype, name):
    """Every leaf replaced by itself: orientation, stacking and names are each other's inverse."""
    folder = derive(tmp_path / "in", dtype, "llava-hf", 2, name)
    trained = {"params": load_params(folder, np.float32)}
    told = export_merged(folder, tmp_path / "out", trained, 1.0)
    assert stored(tmp_path / "out") == stored(tmp_path / "in")
    assert told["replaced"] + told["copied"] == len(folder.files) and told["replaced"] > 50


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_the_float64_sum_rounded_once(tmp_path, dtype, layout):
    folder = derive(tmp_path / "in", dtype, layout, 2)
    lora = random_lora(folder.config)
    told = export_merged(folder, tmp_path / "out", {"lora": lora}, SCALE)
    before, after, wanted = weights(tmp_path / "in"), weights(tmp_path / "out"), by_hand(folder, lora)
    for name, tensor in after.items():
        expected = wanted[name][1].astype(DTYPES[dtype]) if name in wanted else before[name]
        assert tensor.dtype == before[name].dtype
        assert tensor.tobytes() == np.ascontiguousarray(expected).tobytes(), name
    assert told["merged"] == len(wanted) == 14
    assert told["copied"] == len(before) - 14

    errors = {n: after[n].astype(np.float64) - exact for n, (_, exact) in wanted.items()}
    shares = [np.std(errors[n]) / np.std(exact - old) for n, (old, exact) in wanted.items()]
    rounding = told["rounding"]
    assert rounding["max_abs"] == max(np.abs(e).max() for e in errors.values())
    assert rounding["max_relative_to_update"] == pytest.approx(max(shares), rel=0.05)
    low, high = {"float32": (0, 1e-6), "float16": (1e-4, 1e-2), "bfloat16": (1e-3, 0.1)}[dtype]
    assert low < rounding["max_relative_to_update"] < high


def test_update_below_the_stored_precision_is_reported_as_lost(tmp_path):
    folder = derive(tmp_path / "in", "bfloat16")
    lora = random_lora(folder.config, scale=1e-5)
    told = export_merged(folder, tmp_path / "out", {"lora": lora}, SCALE)
    assert 0.5 < told["rounding"]["max_relative_to_update"] <= 1


def test_zero_terms_change_nothing(tmp_path):
    folder = derive(tmp_path / "in", "float16")
    lora = random_lora(folder.config)
    for stack in lora["decoder"].values():
        for terms in stack.values():
            terms["b"][:] = 0
    told = export_merged(folder, tmp_path / "out", {"params": {}, "lora": lora}, SCALE)
    assert stored(tmp_path / "out") == stored(tmp_path / "in")
    assert told["rounding"] == {"max_abs": 0.0, "max_relative_to_update": 0.0}


def test_projector_is_replaced_and_lora_lies_on_replaced_maps(tmp_path):
    folder = derive(tmp_path / "in", name="llavanext")
    projector, lora = random_projector(folder), random_lora(folder.config, ("q",))
    q = np.random.default_rng(2).standard_normal((32, 64)).astype(np.float32)
    params = {"projector": projector, "decoder": {"last": {"q": {"kernel": q}}}}
    trained = jax.tree.map(jnp.asarray, {"params": params, "lora": lora})
    told = export_merged(folder, tmp_path / "out", trained, SCALE)
    after, terms = weights(tmp_path / "out"), terms_of(lora, "q", 1)
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        stored_ = after[f"multi_modal_projector.linear_2.{theirs}"]
        assert np.array_equal(stored_, projector["linear_2"][ours].T)
    exact = q.astype(np.float64) + SCALE * terms["a"].astype(np.float64) @ terms["b"]
    assert np.array_equal(
        after["language_model.layers.1.self_attn.q_proj.weight"], exact.T.astype(np.float32)
    )
    assert (told["merged"], told["replaced"], told["dtype"]) == (2, 4, "float32")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_recasts_every_floating_tensor_and_says_so(tmp_path, key, shards):
    folder = derive(tmp_path / "in", "float32", "llava-hf", shards)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config[key] = config["text_config"][key] = "float32"
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    told = export_merged(folder, tmp_path / "out", {}, 1.0, dtype="bfloat16")
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    for name, tensor in before.items():
        kind = tensor.dtype if tensor.dtype.kind == "i" else DTYPES["bfloat16"]
        assert after[name].tobytes() == tensor.astype(kind).tobytes() and after[name].dtype == kind
    assert told["dtype"] == "bfloat16"

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written[key] == written["text_config"][key] == "bfloat16"
    assert key not in written["vision_config"]
    written[key] = written["text_config"][key] = config["dtype"] = written["dtype"] = "float32"
    assert written == config
    if shards > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
        assert index["weight_map"] == json.loads((tmp_path / "in" / INDEX).read_text())["weight_map"]
    export_merged(open_folder(tmp_path / "out"), tmp_path / "again", {}, 1.0)


def test_trained_tensors_that_are_not_finite_are_not_written(tmp_path):
    """The report would else say that rounding costs nothing."""
    folder = derive(tmp_path / "in")
    lora = {"lora": random_lora(folder.config, ("q",), scale=np.float32("nan"))}
    with pytest.raises(NotFinite, match=r"tensor \S*q_proj\S* is not finite with what was trained"):
        export_merged(folder, tmp_path / "out", lora, SCALE)
    assert names_in(tmp_path) == ["in"]


def test_overflow_names_the_tensor_and_the_remedy(tmp_path):
    """Where float16 is asked for, and where it is the stored dtype and the update is too large."""
    folder = derive(tmp_path / "wide", change=lambda tensors: tensors["scalar"].fill(7e4))
    message = refusal(export_merged, folder, tmp_path / "out", {}, 1.0, "float16")
    assert "scalar" in message and "--dtype bfloat16 or float32" in message
    folder = derive(tmp_path / "half", "float16")
    lora = {"lora": random_lora(folder.config, ("q",), scale=1e3)}
    message = refusal(export_merged, folder, tmp_path / "out", lora, SCALE)
    assert "q_proj" in message and "--dtype bfloat16 or float32" in message
    assert names_in(tmp_path) == ["half", "wide"]
    export_merged(folder, tmp_path / "out", lora, SCALE, "bfloat16")


def test_tied_head_that_is_stored_all_the_same_follows_the_embedding(tmp_path):
    def same(tensors):
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]

    folder = derive(tmp_path / "in", change=same, tie_word_embeddings=True)
    embedding = np.random.default_rng(0).standard_normal((384, 32)).astype(np.float32)
    trained = {"params": {"decoder": {"embedding": embedding}}}
    assert export_merged(folder, tmp_path / "out", trained, 1.0)["replaced"] == 2
    after = weights(tmp_path / "out")
    assert np.array_equal(after["lm_head.weight"], embedding)
    assert np.array_equal(after["language_model.embed_tokens.weight"], embedding)


def test_head_of_its_own_stays_its_own_whatever_the_flag_says(tmp_path):
    folder = derive(tmp_path / "in", tie_word_embeddings=True)
    rng = np.random.default_rng(0)
    embedding, head = (rng.standard_normal(shape).astype(np.float32) for shape in ((384, 32), (32, 384)))
    trained = {"params": {"decoder": {"embedding": embedding, "head": head}}}
    export_merged(folder, tmp_path / "out", trained, 1.0)
    after = weights(tmp_path / "out")
    assert np.array_equal(after["language_model.embed_tokens.weight"], embedding)
    assert np.array_equal(after["lm_head.weight"], head.T)
    params = load_params(open_folder(tmp_path / "out"), np.float32)["decoder"]
    assert np.array_equal(params["embedding"], embedding) and np.array_equal(params["head"], head)


def test_tied_head_that_is_not_stored_stays_absent(tmp_path):
    def drop(tensors):
        del tensors["language_model.lm_head.weight"]

    folder = derive(tmp_path / "in", change=drop, tie_word_embeddings=True)
    trained = {"params": {"decoder": {"embedding": np.ones((384, 32), np.float32)}}}
    assert export_merged(folder, tmp_path / "out", trained, 1.0)["replaced"] == 1
    assert "lm_head.weight" not in weights(tmp_path / "out")


def test_other_files_come_along_but_for_stale_weights(tmp_path):
    folder = derive(tmp_path / "in", shards=2)
    (tmp_path / "in" / "tokenizer.model").write_bytes(b"\0\xff")
    for name in ("pytorch_model.bin", "old.pth", "model.safetensors", ".hidden"):
        (tmp_path / "in" / name).write_text("stale")
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "blob.json").write_text("linked")
    (tmp_path / "in" / "special.json").symlink_to(tmp_path / "blob.json")
    export_merged(folder, tmp_path / "out", {}, 1.0)
    left = set(names_in(tmp_path / "in")) - set(names_in(tmp_path / "out"))
    assert left == {"pytorch_model.bin", "old.pth", "model.safetensors", ".hidden", "sub"}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"\0\xff"
    assert not (tmp_path / "out" / "special.json").is_symlink()


def test_refused_places(tmp_path):
    folder = derive(tmp_path / "in")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    lora = {"lora": random_lora(folder.config)}
    for place in ("in", "in/out", "link/deep/out", "file", "file/out"):
        assert str(tmp_path / place) in refusal(export_merged, folder, tmp_path / place, {}, 1.0)
        out = tmp_path / place
        assert str(out) in refusal(export_adapter, folder, out, lora, RANK, ALPHA, LINEARS)
    assert names_in(tmp_path) == ["file", "in", "link"]
    open_folder(tmp_path / "in")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, error):
    folder = derive(tmp_path / "in", shards=2)
    real, calls = export.save_file, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        real(*args)

    monkeypatch.setattr(export, "save_file", failing)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        export_merged(folder, tmp_path / "out", {}, 1.0)
    assert len(calls) == 2 and names_in(tmp_path) == ["in"]


def test_trees_of_another_model_are_refused(tmp_path):
    folder = derive(tmp_path / "in")
    other = {"projector": {"linear_3": {"kernel": np.zeros((32, 32))}}}
    wide = {"projector": {"linear_1": {"kernel": np.zeros((32, 33))}}}
    short = {"vision_tower": {"patch_embedding": {"kernel": np.zeros((27, 32))}}}
    for params, name in ((other, "linear_3"), (wide, "linear_1"), (short, "patch_embedding")):
        assert name in refusal(export_merged, folder, tmp_path / "out", {"params": params}, 1.0)
    assert "float8" in refusal(export_merged, folder, tmp_path / "out", {}, 1.0, "float8")
    assert names_in(tmp_path) == ["in"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_adapter_has_pefts_keys_and_shapes(tmp_path, name, dtype):
    folder = derive(tmp_path / "in", "float16", "llava-hf", name=name)
    targets, projector = ("q", "down"), random_projector(folder)
    lora = random_lora(folder.config, targets)
    trained = {"lora": lora, "params": {"projector": {"linear_1": projector["linear_1"]}}}
    told = export_adapter(folder, tmp_path / "out", trained, RANK, ALPHA, targets, dtype)
    assert names_in(tmp_path / "out") == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kind, root = DTYPES[dtype or "float32"], "base_model.model.model."
    linears, wanted = decoder_linears(folder.config.decoder), {}
    for ours in targets:
        theirs, (out, inner), _ = linears[ours]
        for i in range(2):
            stem = f"{root}language_model.layers.{i}.{theirs}"
            wanted[f"{stem}.lora_A.weight"] = terms_of(lora, ours, i)["a"].T
            wanted[f"{stem}.lora_B.weight"] = terms_of(lora, ours, i)["b"].T
            assert wanted[f"{stem}.lora_A.weight"].shape == (RANK, inner)
            assert wanted[f"{stem}.lora_B.weight"].shape == (out, RANK)
    stem, before = f"{root}multi_modal_projector", weights(tmp_path / "in")
    wanted[f"{stem}.linear_1.weight"] = projector["linear_1"]["kernel"].T
    wanted[f"{stem}.linear_1.bias"] = projector["linear_1"]["bias"]
    for part in ("weight", "bias"):  # not trained here, but the module is stored whole
        wanted[f"{stem}.linear_2.{part}"] = before[f"multi_modal_projector.linear_2.{part}"]
    assert tensors.keys() == wanted.keys() and told["tensors"] == len(wanted)
    for key, value in wanted.items():
        assert tensors[key].dtype == kind and np.array_equal(tensors[key], value.astype(kind)), key


def test_adapter_config_hits_the_decoder_only(tmp_path):
    folder = derive(tmp_path / "in")
    lora = {"lora": random_lora(folder.config, ("q", "v"))}
    export_adapter(folder, tmp_path / "out", lora, RANK, ALPHA, ("q", "v"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert config["modules_to_save"] is None and config["inference_mode"] is True
    assert config["base_model_name_or_path"] == str(tmp_path / "in")
    modules = {
        "model.language_model.layers.0.self_attn.q_proj": True,
        "model.language_model.layers.11.self_attn.v_proj": True,
        "model.language_model.layers.0.self_attn.k_proj": False,
        "model.vision_tower.encoder.layers.0.self_attn.q_proj": False,
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.v_proj": False,
        "model.language_model.layers.0.self_attn": False,
    }
    for name, hit in modules.items():
        assert bool(re.fullmatch(config["target_modules"], name)) == hit, name


def test_what_no_adapter_can_carry_is_refused(tmp_path):
    folder = derive(tmp_path / "in")
    lora, params = random_lora(folder.config), load_params(folder, np.float32)
    tower = {"lora": lora, "params": {"vision_tower": params["vision_tower"]}}

    def adapter(trained, rank=RANK, targets=LINEARS):
        return export_adapter(folder, tmp_path / "out", trained, rank, ALPHA, targets)

    for trained, word in (({}, "LoRA"), ({"params": params}, "LoRA"), (tower, "vision_tower")):
        message = refusal(adapter, trained)
        assert word in message and "merged" in message
    for wrong in ({"rank": 8}, {"targets": ("q",)}):
        with pytest.raises(ValueError, match="told"):
            adapter({"lora": lora}, **wrong)
    assert names_in(tmp_path) == ["in"]
