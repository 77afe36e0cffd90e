"""Sets with a question and two answers in each row."""

from collections.abc import Mapping

from mllm_align.config.parts import READERS
from mllm_align.data.files import Row
from mllm_align.data.formats.base import Reader, Taking, answered, asked, has, image, published
from mllm_align.data.records import check_object, check_text
from mllm_align.errors import one_line, refusal
from mllm_align.files import parse_json


@READERS.register("rlhfv")
class RLHFV(Reader):
    """RLHF-V: one question with both answers, often as JSON in a string."""

    takes = frozenset(("text", "image_path", "idx"))

    def fits(self, row: Mapping) -> bool:
        return "text" in row and ("origin_dataset" in row or "ds_name" in row) and not answered(row)

    def __call__(self, row: Row, number: int, taking: Taking) -> list[dict]:
        at = f"{row.at}, text"
        text = row.value.get("text")
        if isinstance(text, str):
            try:
                text = parse_json(text)
            except ValueError as error:
                raise refusal(at, f"is not JSON ({one_line(error)})", "mend it") from error
        check_object(text, at)
        return [_asked(text, row, number, at)]


@READERS.register("rlaifv")
class RLAIFV(Reader):
    """RLAIF-V: the same, in fields of their own."""

    takes = frozenset(("question", "image_path", "idx"))

    def fits(self, row: Mapping) -> bool:
        texts = all(isinstance(row.get(name), str) for name in ("chosen", "rejected"))
        return not asked(row) and has(row, "question") and texts

    def __call__(self, row: Row, number: int, taking: Taking) -> list[dict]:
        return [_asked(row.value, row, number, row.at)]


def _asked(fields: Mapping, row: Row, number: int, at: str) -> dict:
    dot = ", " if fields is row.value else "."
    question, chosen, rejected = (
        check_text(fields.get(name), f"{at}{dot}{name}") for name in ("question", "chosen", "rejected")
    )
    plain = {"image": image(row, "image", "image_path"), "prompt": question}
    return {**plain, "chosen": chosen, "rejected": rejected, **published(row, "idx", number)}
