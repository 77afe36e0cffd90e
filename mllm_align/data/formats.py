"""Rows of the published preference sets to rows as `parse_record` takes them."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from typing import Any, Literal

from mllm_align.data.files import Row
from mllm_align.data.records import check_object, check_text, record_id
from mllm_align.errors import one_line, quoted, refusal
from mllm_align.files import parse_json

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_HIGHEST = 1000.0  # no rating is beyond

Pairs = Literal["best-worst", "all"]


@dataclass
class Taking:
    """How rows are taken: which pairs of rated responses, and what is left out, by its reason."""

    pairs: Pairs = "best-worst"
    dropped: Counter[str] = field(default_factory=Counter)


def format_of(row: Mapping) -> str:
    """Return the format that the fields of a row tell; the first that fits."""

    def has(*names: str) -> bool:
        return all(row.get(name) is not None for name in names)

    answered, asked = has("chosen", "rejected"), has("prompt") or has("messages")
    if "rejected_conversations" in row:
        return "povid"
    if "output_1" in row and "output_2" in row and not answered:
        return "llavarlhf"
    if "completions" in row and not answered:
        return "vlfeedback"
    if "text" in row and ("origin_dataset" in row or "ds_name" in row) and not answered:
        return "rlhfv"
    if not asked and has("question") and all(isinstance(row.get(n), str) for n in ("chosen", "rejected")):
        return "rlaifv"
    if not asked and "conversations" in row:
        return "sharegpt"
    return "trl"


def convert(row: Row, number: int, format: str, taking: Taking) -> list[dict]:
    """Return what `parse_record` takes, for each record of a row; `id_is_ours` where the id may change.

    number: of the row in the whole data. Pairs of a published set whose responses are the same are left
    out and counted. Raises `InputError` for a row that is not of the format.
    """
    plain = FORMATS[format](row, number, taking)
    if format == "trl":
        return plain
    usable = [record for record in plain if not _identical(record)]
    taking.dropped["identical pair"] += len(plain) - len(usable)
    return usable


def _identical(record: dict) -> bool:
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return chosen.strip() == rejected.strip()
    return False


# --- formats of one pair a row ------------------------------------------------------------------


def _trl(row: Row, number: int, taking: Taking) -> list[dict]:
    """TRL's vision preference format: what `parse_record` takes."""
    return [{**row.value, **_identity(row, "id", number)}]


def _rlhfv(row: Row, number: int, taking: Taking) -> list[dict]:
    """RLHF-V: one question with both answers, often as JSON in a string."""
    at = f"{row.at}, text"
    text = row.value.get("text")
    if isinstance(text, str):
        try:
            text = parse_json(text)
        except ValueError as error:
            raise refusal(at, f"is not JSON ({one_line(error)})", "mend it") from error
    check_object(text, at)
    return [_asked(text, row, number, at)]


def _rlaifv(row: Row, number: int, taking: Taking) -> list[dict]:
    """RLAIF-V: the same, in fields of their own."""
    return [_asked(row.value, row, number, row.at)]


def _asked(fields: Mapping, row: Row, number: int, at: str) -> dict:
    dot = ", " if fields is row.value else "."
    question, chosen, rejected = (
        check_text(fields.get(name), f"{at}{dot}{name}") for name in ("question", "chosen", "rejected")
    )
    plain = {"image": _image(row, "image", "image_path"), "prompt": question}
    return {**plain, "chosen": chosen, "rejected": rejected, **_published(row, "idx", number)}


def _llavarlhf(row: Row, number: int, taking: Taking) -> list[dict]:
    """LLaVA-RLHF: a conversation, two further answers, and which is preferred."""
    outputs = [_value(row.value.get(name), f"{row.at}, {name}") for name in ("output_1", "output_2")]
    preference = row.value.get("preference")
    known = isinstance(preference, int | float | str | None) and not isinstance(preference, bool)
    if known and preference in (None, 0, "0"):
        taking.dropped["tie"] += 1
        return []
    if not known or preference not in (1, 2, "1", "2"):
        raise refusal(f"{row.at}, preference", f"found {quoted(preference)}", "give 1 or 2")
    history = _messages(row.value.get("conversations"), f"{row.at}, conversations")
    chosen, rejected = outputs if int(preference) == 1 else reversed(outputs)
    answers = {"prompt": history, "chosen": chosen, "rejected": rejected}
    return [{**answers, "image": _image(row, "image"), **_published(row, "id", number)}]


# --- conversations ------------------------------------------------------------------------------


def _povid(row: Row, number: int, taking: Taking) -> list[dict]:
    """POVID: two conversations, a record for each answer in which they differ."""
    chosen, rejected = (
        _messages(row.value.get(name), f"{row.at}, {name}")
        for name in ("conversations", "rejected_conversations")
    )
    if [turn["role"] for turn in chosen] != [turn["role"] for turn in rejected]:
        problem = "its turns are not those of conversations"
        raise refusal(f"{row.at}, rejected_conversations", problem, "give the same turns in both")
    differing = []
    for i, (good, bad) in enumerate(zip(chosen, rejected, strict=True)):
        if good["content"].strip() == bad["content"].strip():
            continue
        if good["role"] != "assistant":
            problem = "the human turn differs from that of conversations"
            remedy = "let only gpt turns differ"
            raise refusal(f"{row.at}, rejected_conversations[{i}].value", problem, remedy)
        differing.append((i, good["content"], bad["content"]))
    if not differing:
        taking.dropped["identical pair"] += 1
        return []
    common = {**_images(row), **_published(row, "id", number)}
    plain = [
        {**common, "prompt": chosen[:i], "chosen": good, "rejected": bad} for i, good, bad in differing
    ]
    return _numbered(plain)


def _sharegpt(row: Row, number: int, taking: Taking) -> list[dict]:
    """ShareGPT's and LLaVA's conversations: with `chosen` and `rejected`, or for SFT on the last answer."""
    at = f"{row.at}, conversations"
    messages = _messages(row.value.get("conversations"), at)
    system = row.value.get("system")
    if system is not None and check_text(system, f"{row.at}, system").strip():
        messages.insert(0, {"role": "system", "content": system})
    plain: dict[str, Any] = {**_images(row), **_published(row, "id", number)}
    answers = [name for name in ("chosen", "rejected") if row.value.get(name) is not None]
    if answers:
        plain |= {name: _value(row.value[name], f"{row.at}, {name}") for name in answers}
        return [{**plain, "prompt": messages}]
    last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=None)
    if last is None:
        return [{**plain, "prompt": messages}]
    return [{**plain, "prompt": messages[:last], "chosen": messages[last]["content"]}]


def _messages(turns: Any, at: str) -> list[dict[str, str]]:
    """Return the turns of a LLaVA or ShareGPT conversation as messages."""
    if not isinstance(turns, list | tuple) or not turns:
        found = "an empty list" if isinstance(turns, list | tuple) else _type(turns)
        raise refusal(at, f"found {found}", "give a list of turns with from and value")
    return [_message(turn, f"{at}[{i}]") for i, turn in enumerate(turns)]


def _message(turn: Any, at: str) -> dict[str, str]:
    check_object(turn, at)
    role = _ROLES.get(turn.get("from")) if isinstance(turn.get("from"), str) else None
    if role is None:
        given = "human, gpt or system"
        raise refusal(f"{at}.from", f"found {quoted(turn.get('from'))}", f"give {given}")
    return {"role": role, "content": check_text(turn.get("value"), f"{at}.value")}


def _value(turn: Any, at: str) -> str:
    """Return the text of an answer that is given as a turn, or as it is."""
    if isinstance(turn, str):
        return check_text(turn, at)
    check_object(turn, at)
    role = turn.get("from")
    if role is not None and isinstance(role, str) and _ROLES.get(role, "assistant") != "assistant":
        raise refusal(f"{at}.from", f"found {quoted(role)}", "give an answer, from gpt")
    return check_text(turn.get("value"), f"{at}.value")


# --- rated responses ----------------------------------------------------------------------------


def _vlfeedback(row: Row, number: int, taking: Taking) -> list[dict]:
    """VLFeedback: one prompt, several responses with ratings, of which pairs are made."""
    prompt = check_text(row.value.get("prompt"), f"{row.at}, prompt")
    rated = []
    for i, completion in enumerate(_completions(row.value.get("completions"), f"{row.at}, completions")):
        at = f"{row.at}, completions[{i}]"
        check_object(completion, at)
        rating = _rating(completion.get("annotations"))
        response = completion.get("response")
        if response is None or not check_text(response, f"{at}.response").strip():
            taking.dropped["empty response"] += 1
        elif rating is None:
            taking.dropped["response without a number for each rating"] += 1
        else:
            rated.append((rating, response))
    if len(rated) < 2:
        taking.dropped["prompt with fewer than two rated responses"] += 1
        return []
    if taking.pairs == "best-worst":  # the first of equals
        pairs = [(max(rated, key=lambda each: each[0]), min(rated, key=lambda each: each[0]))]
    else:
        pairs = [sorted(pair, key=lambda each: -each[0]) for pair in combinations(rated, 2)]
    common = {"image": _image(row, "image", "img_path"), "prompt": prompt, **_published(row, "id", number)}
    plain = [{**common, "chosen": good[1], "rejected": bad[1]} for good, bad in pairs if good[0] > bad[0]]
    taking.dropped["tie"] += len(pairs) - len(plain)
    return _numbered(plain)


def _completions(value: Any, at: str) -> list[Any]:
    """A list of completions, or of each of their fields a list, as `datasets` stores it."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        counts = {len(each) for each in value.values() if isinstance(each, list | tuple)}
        if len(counts) != 1:
            raise refusal(at, "its fields are not lists of one length", "give a list of completions")
        return [_at(value, i) for i in range(counts.pop())]
    if not isinstance(value, list | tuple):
        raise refusal(at, f"found {_type(value)}", "give a list of completions")
    return list(value)


def _at(value: Any, i: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _at(each, i) for name, each in value.items()}
    return value[i] if isinstance(value, list | tuple) and i < len(value) else None


def _rating(annotations: Any) -> Fraction | None:
    """The mean of a response's ratings, exactly, so that ties are ties; None unless each is a number."""
    if not isinstance(annotations, Mapping) or not annotations:
        return None
    ratings = [each.get("Rating") if isinstance(each, Mapping) else None for each in annotations.values()]
    numbers = [_number(rating) for rating in ratings]
    return sum(numbers) / Fraction(len(numbers)) if None not in numbers else None  # type: ignore[arg-type]


def _number(rating: Any) -> Fraction | None:
    if isinstance(rating, bool) or not isinstance(rating, str | int | float):
        return None
    try:
        value = float(rating)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(value) or abs(value) > _HIGHEST:
        return None
    return Fraction(value).limit_denominator(1000)  # 4.2 is 21/5


# --- what they share ----------------------------------------------------------------------------


def _type(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _image(row: Row, *names: str) -> Any:
    """The first of the fields that holds an image; Arrow gives an absent one as nulls."""
    for name in names:
        value = row.value.get(name)
        absent = isinstance(value, Mapping) and all(each is None for each in value.values())
        if value is not None and not absent:
            return value
    return None


def _images(row: Row) -> dict[str, Any]:
    return {"image": _image(row, "image"), "images": row.value.get("images")}


def _identity(row: Row, field: str, number: int) -> dict:
    """Return the id of a row: the one given, or one of our own from the row's number."""
    given = row.value.get(field)
    return {"id": record_id(given, number, f"{row.at}, {field}"), "id_is_ours": given is None}


def _published(row: Row, field: str, number: int) -> dict:
    """The same where ids are known to repeat."""
    return {**_identity(row, field, number), "id_is_ours": True}


def _numbered(plain: list[dict]) -> list[dict]:
    if len(plain) == 1:
        return plain
    return [{**record, "id": f"{record['id']}-{k}"} for k, record in enumerate(plain)]


FORMATS: dict[str, Callable[[Row, int, Taking], list[dict]]] = {
    "trl": _trl,
    "povid": _povid,
    "rlhfv": _rlhfv,
    "rlaifv": _rlaifv,
    "vlfeedback": _vlfeedback,
    "llavarlhf": _llavarlhf,
    "sharegpt": _sharegpt,
}
