"""A folder's tokenizer, image processor and generation settings: read by transformers, tried once.

What a side file has wrong often shows only when it is used, so that each is used here, on a word and on a
small picture, before anything is built on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.errors import InputError, one_line, quoted, refusal
from mllm_align.files import read_json
from mllm_align.models.config import ModelConfig
from mllm_align.models.families.registry import family_of, read_config
from mllm_align.models.ranges import COLOURS, Between, Listed, Maybe, Whole, check

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "generation_config.json",
)
COPY = "copy the processor files of the model it came from into the folder"
GENERATION = "generation_config.json"

SAMPLE = "A picture of 2 dogs."


@dataclass
class Processor:
    """A folder's tokenizer and image processor (of transformers, Pillow backend) and chat template.

    transformers' own processors join the same three, but those of many families need torch.
    chat_template: Jinja text, or several by name. image_token: what the template writes for an image, where
    the folder names it.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str | dict[str, str] | None = None
    image_token: str | None = None


def load_processor(path: Path) -> Processor:
    """What a folder's texts and images are read with.

    Raises InputError where one of them can't be read, or can't be used with the folder's model.
    """
    config = read_config(path)
    for name in SIDE_FILES:
        if (path / name).exists():
            read_json(path / name, COPY)
    with explained(f"{path}: tokenizer or image processor can't be read", COPY):
        from transformers import AutoImageProcessor, AutoTokenizer

        local = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(path, **local)
        images = AutoImageProcessor.from_pretrained(path, **local)
        template, token = _chat_template(path), getattr(tokenizer, "image_token", None)
    processor = Processor(tokenizer, images, template, token or _settings(path).get("image_token"))
    _check_images(path, processor, config)
    check_tokenizer(path, tokenizer, config.decoder.vocab)
    return processor


def _settings(path: Path) -> dict[str, Any]:
    file = path / "processor_config.json"
    return read_json(file, COPY) if file.exists() else {}


def _chat_template(path: Path) -> str | dict[str, str] | None:
    """Where transformers has kept it, in its own order; None where only the tokenizer has one."""
    if (named := _settings(path).get("chat_template")) is not None:
        return named
    if (path / "chat_template.json").exists():
        return read_json(path / "chat_template.json", COPY)["chat_template"]
    files = [path / "chat_template.jinja", *sorted((path / "additional_chat_templates").glob("*.jinja"))]
    found = {file.stem: file.read_text(encoding="utf-8") for file in files if file.is_file()}
    if "chat_template" in found:
        found["default"] = found.pop("chat_template")
    return found["default"] if list(found) == ["default"] else found or None


@contextmanager
def explained(problem: str, remedy: str) -> Iterator[None]:
    """Whatever a library raises on a folder's files is an InputError, in one line."""
    try:
        with _silent():
            yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # a panic of the tokenizers library is no Exception; an interrupt is none of ours
        said = one_line(error, 160) or type(error).__name__
        raise InputError(one_line(f"{problem} ({said}); {remedy}", 2000)) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches stderr: a panic of the tokenizers library writes there before it is raised."""
    try:
        kept = os.dup(2)
    except OSError:  # a process may have none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def check_tokenizer(at: Path, tokenizer: Any, vocab: int) -> None:
    """Raises InputError for a tokenizer that can't be used, or writes ids that the embedding table of
    `vocab` rows has not."""
    with explained(f"{at}: the tokenizer can't be used", COPY):
        ids = list(tokenizer(SAMPLE, return_offsets_mapping=True)["input_ids"])
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        known = tokenizer.get_vocab()
        special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
        token, last = max(known.items(), key=lambda item: item[1], default=("", -1))
        last = max([last, *ids])
    if not ids:
        raise refusal(str(at), "the tokenizer makes no token of a text", COPY)
    for name, token_of_it in special.items():  # for one that it does not know, a tokenizer writes another
        if token_of_it is not None and token_of_it not in known:
            raise refusal(
                str(at), f"{name} {quoted(token_of_it)} is not in the tokenizer's vocabulary", COPY
            )
    if last >= vocab:
        name = token if known.get(token) == last else f"of {SAMPLE!r}"
        problem = f"the tokenizer's token {quoted(name)} is id {last}, the embedding table has {vocab} rows"
        remedy = "resize the table (resize_token_embeddings), or take the tokenizer of this model"
        raise refusal(str(at), problem, remedy)


def end_tokens(path: Path, vocab: int) -> frozenset[int]:
    """Ids that end a sequence by the folder's generation settings, beside the tokenizer's own.

    Raises InputError for settings that are no ids of a vocabulary of `vocab`.
    """
    file = path / GENERATION
    if not file.exists():
        return frozenset()
    settings = read_json(file, COPY)
    an_id = Whole(0, vocab - 1)
    check(str(file), "bos_token_id", settings.get("bos_token_id"), Maybe(an_id), COPY)
    check(str(file), "pad_token_id", settings.get("pad_token_id"), Maybe(Whole(-1, vocab - 1)), COPY)
    ends = settings.get("eos_token_id")
    if isinstance(ends, list):
        check(str(file), "eos_token_id", ends, Listed(Whole(0, 1024), an_id), COPY)
        return frozenset(ends)
    check(str(file), "eos_token_id", ends, Maybe(an_id), COPY)
    return frozenset() if ends is None else frozenset((ends,))


def _check_images(path: Path, processor: Processor, config: ModelConfig) -> None:
    """The image processor's numbers, and that it makes patches as the model's layout has them."""
    at, images, family = f"{path}: image processor", processor.image_processor, family_of(config)
    with explained(f"{at} can't be used", COPY):
        values = {name: _setting(images, name) for name in family.image_settings}
    for name, allowed in family.image_settings.items():
        check(at, name, values[name], allowed, COPY)
    if values["do_normalize"] and values["do_rescale"] and values["rescale_factor"]:
        white = 255 * values["rescale_factor"]
        for name, low in (("image_mean", -white), ("image_std", 0)):
            check(at, name, values[name], Maybe(Listed(COLOURS, Between(low, 1.001 * white))), COPY)
    with explained(f"{at} can't be used", COPY):
        family.check_processor(at, images, config)
    from PIL import Image

    with explained(f"{at} can't be used", "take it and config.json from one folder"):
        layout = family.layout(config, processor)
        made = layout.pixels(images, Image.new("RGB", (24, 16), "gray"), 1)
        if not np.isfinite(made.patches).all():
            raise ValueError("it gives numbers that are not finite")


def _setting(images: Any, name: str) -> Any:
    """name: "resample", or "size.height"."""
    field, _, key = name.partition(".")
    value = getattr(images, field, None)
    return dict(value or {}).get(key) if key else value
