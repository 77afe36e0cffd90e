"""Model folders with one thing changed in one of their JSON files, and what opening them comes to."""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from mllm_align.config import DataConfig
from mllm_align.data.readers import records_from
from mllm_align.errors import InputError
from mllm_align.models.bundle import Bundle
from mllm_align.models.export import export_adapter
from mllm_align.models.huggingface import INDEX, load_params, open_folder
from mllm_align.models.lora import init_lora
from mllm_align.models.processor import load_processor
from mllm_align.models.sources import open_model
from mllm_align.prepare import make_encoder
from mllm_align.testbed.demo import make_model

SECONDS = 10  # in which a folder is opened or refused
KINDS = ("llava", "llava_next")


def make_folders(out: Path) -> list[Path]:
    """LLaVA 1.5 and 1.6, each with the side files of newer and of older versions of transformers, and an
    adapter of the first."""
    folders = []
    for kind in KINDS:
        make_model(out / kind, kind)
        folders += [out / kind, older(out / kind, out / f"{kind}-older")]
    base, targets = open_folder(folders[0]), ("q", "down")
    terms = jax.tree.map(np.asarray, init_lora(base.config.decoder, 2, targets, jax.random.key(0)))
    export_adapter(base, out / "adapter", {"lora": terms}, 2, 4.0, targets)
    return [*folders, out / "adapter"]


def older(folder: Path, out: Path) -> Path:
    """The same model as it was saved before processors had one file: more files, weights in two."""
    shutil.copytree(folder, out)
    processor = json.loads((out / "processor_config.json").read_text())
    images = processor.pop("image_processor")
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
    template = {"chat_template": (out / "chat_template.jinja").read_text()}
    with safe_open(out / "model.safetensors", "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    names, files = sorted(tensors), {}
    for i in range(2):
        part = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, out / part)
        files |= dict.fromkeys(names[i::2], part)
    for name in ("chat_template.jinja", "model.safetensors"):
        (out / name).unlink()
    for name, content in (
        ("processor_config.json", processor),
        ("preprocessor_config.json", images),
        ("added_tokens.json", added),
        ("special_tokens_map.json", named),
        ("chat_template.json", template),
        (INDEX, {"metadata": {"total_size": 1}, "weight_map": files}),
    ):
        (out / name).write_text(json.dumps(content))
    return out


def nested(levels: int) -> Any:
    value: Any = 1
    for i in range(levels):
        value = [value] if i % 2 else {"a": value}
    return value


# What stands where another type, or another number, belongs.
VALUES: list[Callable[[Any], Any]] = [
    *(
        lambda _, value=value: value
        for value in (
            *(None, True, False, "", "text", "</s>", "<image>", "\x00", [], {}, [[]], [None], {"a": 1}),
            *(0, 1, -1, -4, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 2**64, 10**400, -(10**9), -(10**400)),
            *(0.0, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
            *([1, 2], [0.5], ["a", "b"], [2, [2]], [[56, 56]], nested(60), nested(300)),
        )
    ),
    str,
    lambda value: [value],
    lambda value: {"value": value},
    lambda value: [value] * 3,
    lambda value: -value if isinstance(value, int | float) else [],
    lambda value: value * 1000 if isinstance(value, int | float) else str(value)[:20] * 1000,
    lambda value: value[:-1] if isinstance(value, list | str) else 1,
    lambda value: dict(list(value.items())[1:]) if isinstance(value, dict) else "1",
]
# What stands for the whole text of a file.
TEXTS: list[Callable[[bytes], bytes]] = [
    lambda text: text[: len(text) // 2],
    lambda text: b"",
    lambda text: b"null",
    lambda text: b"[]",
    lambda text: b"{}",
    lambda text: b"7",
    lambda text: b'"text"',
    lambda text: b"[" * 2000 + b"]" * 2000,
    lambda text: b'{"a":' * 5000 + b"1" + b"}" * 5000,
    lambda text: b"\xff\xfe" + text,
    lambda text: b"\xef\xbb\xbf" + text,
    lambda text: text.replace(b"e", b"\xe9", 3),
    lambda text: text.replace(b": 1", b": " + b"9" * 5000),
    lambda text: text + b"}",
]


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The way to every value inside a value; of a long list or object, to a few."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = []
    for key, inside in items if len(items) <= 40 else items[:3] + items[-3:]:
        found.append((*at, key))
        if isinstance(inside, dict | list):
            found += places(inside, (*at, key))
    return found


def mutate(text: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A JSON text with one thing changed, and what it was."""
    if draw.random() < 0.08:
        number = draw.randrange(len(TEXTS))
        return TEXTS[number](text), f"text {number}"
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2))):
        where = draw.choice(places(value) or [()])
        if not where:
            break
        holder = value
        for key in where[:-1]:
            holder = holder[key]
        if isinstance(holder, dict) and draw.random() < 0.2:
            del holder[where[-1]]
            said = f"{where} dropped"
            continue
        number = draw.randrange(len(VALUES))
        holder[where[-1]] = copy.deepcopy(VALUES[number](holder[where[-1]]))
        said = f"{where} value {number}"
    return json.dumps(value).encode(), said


def mutate_weights(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A safetensors file with its header, or its length, changed."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    number = draw.randrange(10)
    if number == 0:
        return content[: draw.randrange(len(content))], "cut"
    if number == 1:
        return draw.randrange(1 << 64).to_bytes(8, "little") + header + data, "length of the header"
    if number == 2:
        bad = bytearray(header)
        for _ in range(3):
            bad[draw.randrange(size)] = draw.randrange(256)
        return content[:8] + bytes(bad) + data, "bytes of the header"
    if number == 3:
        return b"", "empty"
    value = json.loads(header)
    name = draw.choice([name for name in value if name != "__metadata__"])
    if number == 4:
        value[name]["dtype"] = draw.choice(("I32", "F8_E4M3", "BOOL", "F64", "X", "U8", 7))
    elif number == 5:
        value[name]["shape"] = draw.choice(([], [0], [0, 0], [1 << 62, 4], [-1], "x", [1, 1]))
    elif number == 6:
        value[name]["data_offsets"] = draw.choice(([0, 0], [5, 1], [0, 1 << 62], [0], "x"))
    elif number == 7:
        del value[name]
    elif number == 8:
        value[draw.choice(("a", "\u0000", "x" * 5000))] = value.pop(name)
    else:
        value["__metadata__"] = draw.choice(({"a": nested(300)}, {"a": 1}, [], "x"))
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + data, f"{name} {number}"


class Hang(BaseException):
    """A folder was neither opened nor refused in time."""


def open_and_use(folder: Path, records: list[Any]) -> None:
    """What a verb does with a folder before it computes: weights, a record's tokens, tiles and text."""
    opened = open_model(folder)
    bundle = Bundle(opened, load_processor(opened.path), None, np.float32, {})  # type: ignore[arg-type]
    encoder = make_encoder(bundle, DataConfig())
    for record in records:
        encoded = encoder.encode(record, 2)
        group = encoder.group(encoded)
        assert (
            np.isfinite(group.prefix.patches).all()
            and max(group.prefix.tokens) < opened.config.decoder.vocab
        )
        encoder.text(encoded.responses[0], encoded.prefix)
        encoder.eos_mask(opened.config.decoder.vocab)
    load_params(opened, np.float32)


def campaign(
    folders: list[Path], out: Path, count: int, seed: int, suffix: str = ".json"
) -> tuple[Counter, list[str]]:
    """`count` mutations of files of one kind: how many folders were taken and refused, and a line for each
    that was neither."""
    draw, counts, faults = random.Random(seed), Counter(), []
    image = Image.new("RGB", (90, 60), "red")
    row = {"images": [image], "prompt": "What is it?", "chosen": "It is red.", "rejected": "Two dogs."}
    records = records_from([row], responses=2)

    def late(*_: Any) -> None:
        raise Hang

    change = mutate if suffix == ".json" else mutate_weights
    before = signal.signal(signal.SIGALRM, late)
    for number in range(count):
        folder, place = draw.choice(folders), out / f"{seed}-{number}"
        place.mkdir()
        files = sorted(folder.iterdir())
        texts = [file for file in files if file.suffix == suffix]
        chosen = draw.choice(texts)
        for file in files:
            if file != chosen:
                (place / file.name).symlink_to(file)
        text, said = change(chosen.read_bytes(), draw)
        (place / chosen.name).write_bytes(text)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        began = time.monotonic()
        try:
            open_and_use(place, records)
            counts["taken"] += 1
        except InputError as error:
            counts["refused"] += 1
            if not str(error).isprintable():
                faults.append(f"{folder.name}/{chosen.name} {said}: not one line: {error!r}")
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            last = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{Path(last.filename).name}:{last.lineno}"
            faults.append(
                f"{folder.name}/{chosen.name} {said}: {type(error).__name__} {str(error)[:200]} {at}"
            )
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if time.monotonic() - began > SECONDS:
            faults.append(f"{folder.name}/{chosen.name} {said}: {time.monotonic() - began:.0f} s")
        shutil.rmtree(place)
    signal.signal(signal.SIGALRM, before)
    return counts, faults
