"""Sets with conversations of several turns, as LLaVA and ShareGPT store them."""

from collections.abc import Mapping
from typing import Any

from mllm_align.config.parts import READERS
from mllm_align.data.files import Row
from mllm_align.data.formats.base import (
    Reader,
    Taking,
    answered,
    asked,
    image,
    images,
    numbered,
    published,
    type_name,
)
from mllm_align.data.records import check_object, check_text
from mllm_align.errors import quoted, refusal

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@READERS.register("povid")
class POVID(Reader):
    """POVID: two conversations, a record for each answer in which they differ."""

    takes = frozenset(("conversations", "rejected_conversations"))

    def fits(self, row: Mapping) -> bool:
        return "rejected_conversations" in row

    def __call__(self, row: Row, number: int, taking: Taking) -> list[dict]:
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
        common = {**images(row), **published(row, "id", number)}
        plain = [
            {**common, "prompt": chosen[:i], "chosen": good, "rejected": bad} for i, good, bad in differing
        ]
        return numbered(plain)


@READERS.register("llavarlhf")
class LlavaRLHF(Reader):
    """LLaVA-RLHF: a conversation, two further answers, and which is preferred."""

    takes = frozenset(("conversations", "output_1", "output_2", "preference"))

    def fits(self, row: Mapping) -> bool:
        return "output_1" in row and "output_2" in row and not answered(row)

    def __call__(self, row: Row, number: int, taking: Taking) -> list[dict]:
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
        return [{**answers, "image": image(row, "image"), **published(row, "id", number)}]


@READERS.register("nlf")
class NLF(Reader):
    """DRESS's NLF: answers that were criticised and refined; the first one against the last.

    A pair says the ratings of both, and the critique of the rejected one.
    """

    takes = frozenset(("image_id", "interaction"))

    def fits(self, row: Mapping) -> bool:
        return "interaction" in row and "image_id" in row and not answered(row)

    def __call__(self, row: Row, number: int, taking: Taking) -> list[dict]:
        at = f"{row.at}, interaction"
        turns = row.value.get("interaction")
        if not isinstance(turns, list | tuple):
            raise refusal(at, f"found {type_name(turns)}", "give a list of turns with user and model")
        for i, turn in enumerate(turns):
            check_object(turn, f"{at}[{i}]")
        if len(turns) < 2:
            taking.dropped["answer without a refined one"] += 1
            return []
        first, last = turns[0], turns[-1]
        texts = {
            "prompt": check_text(first.get("user"), f"{at}[0].user"),
            "chosen": check_text(last.get("model"), f"{at}[{len(turns) - 1}].model"),
            "rejected": check_text(first.get("model"), f"{at}[0].model"),
        }
        about = {"chosen_rating": last.get("rating"), "rejected_rating": first.get("rating")}
        about["rejected_reason"] = first.get("critique_NLF")
        plain = {**texts, **about, "image": image(row, "image", "image_id")}
        return [{**plain, **published(row, "id", number)}]


@READERS.register("sharegpt")
class ShareGPT(Reader):
    """ShareGPT's and LLaVA's conversations: with `chosen` and `rejected`, or for SFT on the last answer."""

    general = True
    takes = frozenset(("conversations", "system"))

    def fits(self, row: Mapping) -> bool:
        return not asked(row) and "conversations" in row

    def __call__(self, row: Row, number: int, taking: Taking) -> list[dict]:
        at = f"{row.at}, conversations"
        messages = _messages(row.value.get("conversations"), at)
        system = row.value.get("system")
        if system is not None and check_text(system, f"{row.at}, system").strip():
            messages.insert(0, {"role": "system", "content": system})
        plain: dict[str, Any] = {**images(row), **published(row, "id", number)}
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
        found = "an empty list" if isinstance(turns, list | tuple) else type_name(turns)
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
