"""One preference record: the prompt, its responses and images, validated when parsed."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_align.data.images import ImageSource, StoredBytes
from mllm_align.data.inline import image_bytes, is_data_uri, is_image_text
from mllm_align.data.roots import Roots
from mllm_align.errors import InputError, one_line, quoted, refusal

REJECTED = ("rejected_images", "rejected_image", "retrieved_image")
"""Names of a row's rejected images: a list, or one image. The last is that of Re-Align's published file."""
NEIGHBOURS = "neighbour_images"
OTHERS = (REJECTED[0], NEIGHBOURS)
"""Fields of a row with images beside its own, as they are written."""
_ROLES = ("system", "user", "assistant")
# An image placeholder in LLaVA's texts. Templates add their own newline, so one newline of the text is
# dropped.
_MARK = re.compile(r"<image>\r?\n|\r?\n<image>(?!\r?\n)|<image>")
_INLINE_KEYS = frozenset(("image", "image_url", "url", "path", "bytes", "base64", "data"))


@dataclass(frozen=True)
class Part:
    """One part of a message: a text, or an image placeholder (`text` is None).

    `inline`, during parsing only: an image given in the message itself, and its location for errors.
    """

    text: str | None = None
    inline: tuple[Any, str] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: tuple[Part, ...]

    def chat(self) -> dict[str, Any]:
        """Return the message in the format of Hugging Face's chat templates."""
        content = [
            {"type": "image"} if part.text is None else {"type": "text", "text": part.text}
            for part in self.content
        ]
        return {"role": self.role, "content": content}

    @property
    def places(self) -> int:
        """The number of image placeholders in this message."""
        return sum(part.text is None for part in self.content)

    @property
    def text(self) -> str:
        """The message without its images."""
        return "".join(part.text or "" for part in self.content)


@dataclass(frozen=True)
class Record:
    """One prompt with its responses.

    `messages` end with a user turn; `responses` are chosen, rejected, then any further ones; of an unpaired
    record the one that is not there is an empty text;
    `images` are in the order of their placeholders in `messages`; `where` is for error messages.
    `source`: the data set's name, where several are mixed. `preferences`: what the prompt asks of every
    answer (see data/preferences.py); `messages` are without them. `rejected_images`: what objectives on
    images compare `images` with, one for each; `neighbour_images`: candidates for them, the nearest first,
    each as many images as there are `images`.
    """

    id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    images: tuple[ImageSource, ...]
    where: str
    source: str = ""
    preferences: tuple[tuple[str, str], ...] = ()
    rejected_images: tuple[ImageSource, ...] = ()
    neighbour_images: tuple[ImageSource, ...] = ()


def parse_record(
    row: Mapping[str, Any],
    *,
    index: int,
    where: str,
    root: Path | Roots | None,
    allow_outside: bool = False,
    responses: int = 2,
    unpaired: bool = False,
) -> Record:
    """Return the checked record of one row in TRL's vision preference format.

    `row`: `images` or `image`; `prompt` or `messages` (or neither, if `chosen` and `rejected` contain the
    whole conversation); `chosen`, `rejected`, `responses`, `id`; one of REJECTED; `neighbour_images`. Other
    keys are ignored. `where` and `index` name the row in errors, such as `pairs.jsonl record` and 3. Image
    paths are relative to `root` and may leave it only with `allow_outside`; with `root` None they are
    relative to the current folder and unrestricted; a `Roots` gives both for many records. `responses`: the
    minimum number of responses; with 1, `completion` or a final assistant turn of `messages` may replace
    `chosen`. `unpaired`: a `completion` with a `label`, true or false, may stand for a chosen or a rejected
    response without the other one. Raises `InputError` for anything missing, of a wrong type or
    contradictory.
    """
    at = f"{_short(where)} {index}"
    check_object(row, at)
    label = row.get("label") if row.get("completion") is not None and responses > 1 else None
    if label is None or not unpaired:
        _check_paired(row, at, label)
        messages, prompt_at, answers = _conversation(row, at, responses)
        answers += _further(row.get("responses"), f"{at}, responses")
        _check_answers(answers, at, responses)
    else:
        _check_unpaired(row, at, label)
        messages, prompt_at, answers = _conversation(row, at, 1)
        _check_answers(answers, at, 1)
        answers = [*answers, ("", "")] if label else [("", ""), *answers]
    roots = root if isinstance(root, Roots) else Roots(() if root is None else (root,), allow_outside)
    _check_no_video(row, at)
    rejected = {name: row[name] for name in REJECTED if _given(row.get(name))}
    images = _with_inline(messages, _images(row, at, roots, ("images", "image")), at, roots)
    return Record(
        id=record_id(row.get("id"), index, f"{at}, id"),
        messages=_with_places(messages, len(images), at, prompt_at),
        responses=tuple(text for _, text in answers),
        images=images,
        where=at,
        rejected_images=_others(rejected, len(images), at, roots, REJECTED),
        neighbour_images=_others(row, len(images), at, roots, (NEIGHBOURS,)),
    )


@lru_cache(64)
def _short(where: str) -> str:
    return one_line(where, 200)


def check_object(row: object, at: str) -> None:
    """Raise `InputError` unless `row` is a mapping."""
    if not isinstance(row, Mapping):
        raise _wrong_type(at, row, "an object with named fields")


def check_text(value: object, at: str) -> str:
    """Return `value` if it is a str that UTF-8 can encode; raise `InputError` otherwise."""
    if not isinstance(value, str):
        raise _wrong_type(at, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is a lone surrogate"
        raise refusal(at, problem, "write the text as valid UTF-8") from error
    return value


def _wrong_type(at: str, value: object, wanted: str) -> InputError:
    found = "null" if value is None else type(value).__name__
    return refusal(at, f"found {found}", f"give {wanted}")


# --- the conversation and its answers -----------------------------------------------------------

_Answers = list[tuple[str, str]]  # (location, text)


def _conversation(row: Mapping, at: str, wanted: int) -> tuple[list[Message], str, _Answers]:
    """Return the prompt's messages, their location, and the chosen and rejected answers."""
    prompt = _one_of(row, ("prompt", "messages"), at)
    chosen = _one_of(row, ("chosen", "completion") if wanted == 1 else ("chosen",), at)
    fields = [name for name in (chosen, "rejected") if row.get(name) is not None]
    if row.get(prompt) is None:
        _check_present(row, [chosen, "rejected"][:wanted], at)
        if not fields:
            raise refusal(f"{at}, prompt", "is missing", "give the user's text or a message list")
        messages, answers = _implicit_prompt(row, fields, at)
        prompt_at = f"{at}, {fields[0]}"
        _check_turns(messages, prompt_at)
        return messages, prompt_at, answers
    prompt_at = f"{at}, {prompt}"
    messages = _messages(row[prompt], prompt_at)
    ends_in_answer = prompt == "messages" and messages[-1].role == "assistant"
    if wanted == 1 and not fields and ends_in_answer:
        answers = [(f"{prompt_at}[{len(messages) - 1}]", messages.pop().text)]
    else:
        _check_present(row, [chosen, "rejected"][:wanted], at)
        answers = [(f"{at}, {name}", _answer(row[name], f"{at}, {name}")) for name in fields]
    _check_turns(messages, prompt_at)
    return messages, prompt_at, answers


def _check_paired(row: Mapping, at: str, label: object) -> None:
    if label is not None and row.get("chosen") is None:
        problem = "holds one response and a label, and a chosen and a rejected one are needed"
        raise refusal(at, problem, "pair them, or train with --objective kto")


def _check_unpaired(row: Mapping, at: str, label: object) -> None:
    if not isinstance(label, bool):
        raise _wrong_type(f"{at}, label", label, "true or false")
    for name in ("chosen", "rejected", "responses"):
        if row.get(name) is not None:
            raise refusal(at, f"has both completion and {name}", "keep one of them")


def _one_of(row: Mapping, names: tuple[str, ...], at: str) -> str:
    """Return which of `names` the row has; the first if it has none."""
    present = [name for name in names if row.get(name) is not None]
    if len(present) > 1:
        raise refusal(at, f"has both {' and '.join(present)}", "keep one of them")
    return present[0] if present else names[0]


def _check_present(row: Mapping, names: list[str], at: str) -> None:
    for name in names:
        if row.get(name) is None:
            raise refusal(f"{at}, {name}", "is missing", "give the text of the response")


def _implicit_prompt(row: Mapping, fields: list[str], at: str) -> tuple[list[Message], _Answers]:
    """Split whole conversations into the shared prompt and the last assistant turn of each."""
    prompt: list[Message] | None = None
    answers: _Answers = []
    for name in fields:
        here = f"{at}, {name}"
        if isinstance(row[name], str):
            raise refusal(f"{at}, prompt", "is missing", "give the user's text or a message list")
        messages = _messages(row[name], here)
        last = messages.pop()
        if last.role != "assistant":
            problem = f"the conversation ends with a {last.role} turn"
            raise refusal(here, problem, "end it with the assistant's response")
        if not messages:
            raise refusal(f"{at}, prompt", "is missing", "give the user's text or a message list")
        if prompt is not None and (messages != prompt or not _same_inline(messages, prompt)):
            problem = f"differs from {fields[0]} before the last message"
            raise refusal(here, problem, "let only the last assistant turn differ")
        prompt = messages
        answers.append((f"{here}[{len(messages)}]", last.text))
    return prompt or [], answers


def _answer(value: object, at: str) -> str:
    """Return the text of a response given as a string or as a list of one assistant message."""
    if isinstance(value, str):
        return _plain(value, at, "a response")
    messages = _messages(value, at)
    if len(messages) != 1 or messages[0].role != "assistant":
        problem = f"holds the turns {quoted(', '.join(message.role for message in messages))}"
        raise refusal(at, problem, "give a string or one assistant message")
    return messages[0].text


def _further(value: object, at: str) -> _Answers:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise _wrong_type(at, value, "a list of strings")
    return [
        (f"{at}[{i}]", _plain(check_text(text, f"{at}[{i}]"), f"{at}[{i}]", "a response"))
        for i, text in enumerate(value)
    ]


def _check_answers(answers: _Answers, at: str, wanted: int) -> None:
    for place, text in answers:
        if not text.strip():
            raise refusal(place, "the response is empty", "give its text or drop the record")
    if len(answers) < wanted:
        problem = f"the record has {len(answers)} responses, {wanted} are needed"
        raise refusal(f"{at}, responses", problem, "list further ones there")


# --- messages -----------------------------------------------------------------------------------


def _messages(value: object, at: str) -> list[Message]:
    if isinstance(value, str):
        return [Message("user", tuple(_parts(value, "user", at)))]
    if not isinstance(value, list | tuple):
        raise _wrong_type(at, value, "a string or a list of messages")
    if not value:
        raise refusal(at, "is an empty list", "give at least one message")
    return [_message(item, f"{at}[{i}]") for i, item in enumerate(value)]


def _message(value: object, at: str) -> Message:
    if not isinstance(value, Mapping):
        raise _wrong_type(at, value, "a message with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise refusal(f"{at}.role", f"found {quoted(role)}", f"give one of {', '.join(_ROLES)}")
    at = f"{at}.content"
    content = value.get("content")
    if isinstance(content, str):
        return Message(role, tuple(_parts(content, role, at)))
    if not isinstance(content, list | tuple):
        raise _wrong_type(at, content, "a string or a list of parts")
    pieces = (_listed_part(part, role, f"{at}[{i}]") for i, part in enumerate(content))
    return Message(role, tuple(part for piece in pieces for part in piece))


def _listed_part(part: object, role: str, at: str) -> Iterable[Part]:
    if not isinstance(part, Mapping):
        raise _wrong_type(at, part, "a part such as {'type': 'text', 'text': ...}")
    kind = part.get("type") if isinstance(part.get("type"), str) else None
    # In Arrow files, keys that only other parts have are null.
    inline = {key: value for key, value in part.items() if key in _INLINE_KEYS and _given(value)}
    if kind == "text":
        if inline:
            raise refusal(at, f"a text part with {quoted(next(iter(inline)))}", "make it {'type': 'image'}")
        return _parts(check_text(part.get("text"), f"{at}.text"), role, f"{at}.text")
    if kind not in ("image", "image_url"):
        raise refusal(f"{at}.type", f"found {quoted(part.get('type'))}", "give 'image' or 'text'")
    if role != "user":
        raise refusal(at, f"an image in a {role} turn", "put it in a user turn")
    if kind == "image_url" and "image_url" not in inline:
        raise refusal(f"{at}.image_url", "is missing", "give {'url': ...} or a plain {'type': 'image'}")
    return [Part(inline=_inline(inline, at))]


def _given(value: object) -> bool:
    """Whether a value is present. In Arrow files, an absent {'bytes', 'path'} consists of two nulls."""
    if isinstance(value, Mapping):
        return any(each is not None for each in value.values())
    return value is not None


def _inline(given: dict[str, Any], at: str) -> tuple[Any, str] | None:
    """Return the image in a message part, and its location; None for a placeholder alone."""
    if not given:
        return None
    if given.keys() <= {"bytes", "path"}:
        return given, at
    if len(given) > 1:
        raise refusal(at, f"has both {' and '.join(given)}", "keep one of them")
    ((name, value),) = given.items()
    at = f"{at}.{name}"
    if isinstance(value, Mapping) and "url" in value:
        value, at = value["url"], f"{at}.url"
    if isinstance(value, str) and name in ("base64", "data"):
        value = {"bytes": value}
    return value, at


def _same_inline(left: list[Message], right: list[Message]) -> bool:
    pairs = zip(*([part.inline for m in side for part in m.content] for side in (left, right)), strict=True)
    return all((a is None) == (b is None) and (a is None or _equal(a[0], b[0])) for a, b in pairs)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return np.array_equal(left, right)
    return type(left) is type(right) and left == right


def _parts(text: str, role: str, at: str) -> list[Part]:
    """Split a user's text at each `<image>`; other roles' texts may have none."""
    if role != "user":
        return [Part(_plain(text, at, f"a {role} turn"))]
    parts: list[Part] = []
    for i, piece in enumerate(_MARK.split(check_text(text, at))):
        parts += [Part()] if i else []
        parts += [Part(piece)] if piece else []
    return parts


def _plain(text: str, at: str, kind: str) -> str:
    if "<image>" in check_text(text, at):
        raise refusal(at, f"<image> in {kind}", "move it to a user turn or remove it")
    return text


def _check_turns(messages: list[Message], at: str) -> None:
    """Require an optional system turn, then alternating user and assistant turns, a user turn last."""
    start = 1 if messages and messages[0].role == "system" else 0
    for i, message in enumerate(messages[start:]):
        wanted = ("user", "assistant")[i % 2]
        if message.role != wanted:
            problem = f"a {message.role} turn where a {wanted} turn belongs"
            remedy = "let user and assistant alternate after at most one system turn"
            raise refusal(f"{at}[{start + i}]", problem, remedy)
    if not messages or messages[-1].role != "user":
        raise refusal(at, "the prompt does not end with a user turn", "end it with one")


def _with_places(messages: list[Message], images: int, at: str, prompt_at: str) -> tuple[Message, ...]:
    """Match images and placeholders; without placeholders, images go before the first user turn's text."""
    places = sum(message.places for message in messages)
    if places == 0 and images:
        first = next(i for i, message in enumerate(messages) if message.role == "user")
        content = (Part(),) * images + messages[first].content
        messages = [*messages[:first], Message("user", content), *messages[first + 1 :]]
    elif places != images:
        problem = f"the prompt has {places} image places but the record has {images} images"
        raise refusal(f"{at}, images", problem, "make the two numbers equal")
    for i, message in enumerate(messages):
        if message.role != "system" and not message.places and not message.text.strip():
            problem = f"the {message.role} turn is empty"
            raise refusal(f"{prompt_at}[{i}]", problem, "give its text")
    return tuple(messages)


# --- images and id ------------------------------------------------------------------------------


def _check_no_video(row: Mapping, at: str) -> None:
    for name in ("video", "videos"):
        value = row.get(name)
        if _given(value) and not (isinstance(value, list | tuple) and not value):
            raise refusal(f"{at}, {name}", "videos are not read", "leave such records out, or give images")


def _images(row: Mapping, at: str, roots: Roots, names: tuple[str, ...]) -> tuple[ImageSource, ...]:
    """The images of one of these fields: a list, and but for the first field also a single one."""
    name = _one_of(row, names, at)
    value = row.get(name)
    if value is None:  # an array has no truth value
        return ()
    if isinstance(value, list | tuple):
        return tuple(_image(each, f"{at}, {name}[{i}]", roots) for i, each in enumerate(value))
    if name == names[0]:
        raise _wrong_type(f"{at}, {name}", value, "a list of images")
    return (_image(value, f"{at}, {name}", roots),)


def _others(
    row: Mapping, images: int, at: str, roots: Roots, names: tuple[str, ...]
) -> tuple[ImageSource, ...]:
    """Images that stand in the place of a record's `images`: as many, or of neighbours a multiple."""
    found = _images(row, at, roots, names)
    fits = images and not len(found) % images and (names == (NEIGHBOURS,) or len(found) == images)
    if found and not fits:
        problem = f"has {len(found)} images, and the record has {images}"
        raise refusal(
            f"{at}, {_one_of(row, names, at)}", problem, "give one for each of the record's images"
        )
    return found


def _with_inline(
    messages: list[Message], images: tuple[ImageSource, ...], at: str, roots: Roots
) -> tuple[ImageSource, ...]:
    """Merge the images given in the messages with the others, in the order of the placeholders."""
    places = [part.inline for message in messages for part in message.content if part.text is None]
    if not any(places):
        return images
    if places.count(None) != len(images):
        problem = f"the prompt has {places.count(None)} places without an inline image"
        remedy = f"the record's images are {len(images)}: make the two numbers equal"
        raise refusal(f"{at}, images", problem, remedy)
    for i, message in enumerate(messages):
        messages[i] = Message(message.role, tuple(Part(part.text) for part in message.content))
    others = iter(images)
    return tuple(next(others) if place is None else _image(*place, roots) for place in places)


def _image(value: object, at: str, roots: Roots) -> ImageSource:
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if data is None and path is None:
            raise refusal(at, "has neither bytes nor path", "give one of them")
        if isinstance(data, str):
            return ImageSource(data=image_bytes(data, f"{at}.bytes"), where=at)
        if data is not None and not isinstance(data, bytes | bytearray | StoredBytes):
            raise _wrong_type(f"{at}.bytes", data, "the bytes of an image file, or a path")
        value = path if data is None else data
    if isinstance(value, StoredBytes):
        return ImageSource(stored=value, where=at)
    if isinstance(value, str) and (is_data_uri(value) or is_image_text(value)):
        return ImageSource(data=image_bytes(value, at), where=at)
    if isinstance(value, Image.Image | np.ndarray):
        return ImageSource.from_memory(value, at)
    if isinstance(value, bytes | bytearray):
        return ImageSource(data=bytes(value), where=at)
    if isinstance(value, str | os.PathLike):
        return ImageSource(path=roots.find(os.fsdecode(value), at), where=at)
    raise _wrong_type(at, value, "a path, {'bytes': ..., 'path': ...}, a PIL image or an array")


def record_id(value: object, index: int, at: str) -> str:
    """Return the id `value` as text, `index` for None; raise `InputError` for other types."""
    if value is None:
        return str(index)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _wrong_type(at, value, "a string or an integer")
    if not value.strip():
        raise refusal(at, "is empty", "give an id or leave it out")
    return check_text(value, at)
