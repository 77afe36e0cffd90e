"""Expressions over the fields of records: which records to keep, and what they score."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import SandboxedEnvironment

from mllm_align.curation.items import Item
from mllm_align.errors import InputError, nearest, one_line, quoted, refusal

OWN = ("id", "source", "prompt", "chosen", "rejected", "images", "image", "turns")


class Where:
    """An expression of Jinja, evaluated in its sandbox; the names in it are fields of a record.

    Of the record: `id`, `source`, `prompt` (the last user turn's text), `chosen`, `rejected` (None without
    one), `images` and `turns` (how many), `image` (the first one's path, None if it is no file). Others
    are fields of its row, None where it lacks them.
    option: where it was given, for errors. Raises InputError for text that is no expression.
    """

    def __init__(self, text: str, option: str = "--where"):
        self.text, self.option = text, option
        environment = SandboxedEnvironment()
        try:
            self._evaluate = environment.compile_expression(text)
            self._names = find_undeclared_variables(environment.parse("{{ (" + text + ") }}"))
        except TemplateError as error:
            problem = f"{quoted(text)} is no expression ({one_line(error, 200)})"
            raise refusal(option, problem, "write it as 'origin == \"coco\"' (docs/curation.md)") from error
        self._names -= set(environment.globals)
        self._unseen, self._others = set(self._names) - set(OWN), set()

    def __call__(self, item: Item) -> bool:
        """Whether to keep a record. Raises InputError where `value` does."""
        return bool(self.value(item))

    def value(self, item: Item) -> Any:
        """The expression's value. Raises InputError where it fails on the record."""
        record = item.record
        path = record.images[0].path if record.images else None
        own = record.id, item.source, item.prompt, item.chosen, item.rejected, len(record.images)
        own = *own, None if path is None else str(path), len(record.messages)
        values = item.fields | dict(zip(OWN, own, strict=True))
        if self._unseen:
            self._unseen -= values.keys()
            self._others |= values.keys()
        try:
            return self._evaluate(dict.fromkeys(self._names) | values)
        except Exception as error:  # an expression may raise anything
            problem = f"{self.option} fails on it ({type(error).__name__}: {one_line(error, 200)})"
            raise refusal(
                record.where, problem, "ask for the field first: 'x is number and x > 1'"
            ) from error

    def check(self) -> None:
        """Refuse names that no record had, once all have been looked at."""
        if self._unseen:
            name = min(self._unseen)
            have = ", ".join(sorted(self._others))
            problem = f"{self.option} names {quoted(name)}, a field that no record has"
            remedy = f"the records have {one_line(have, 400)}"
            raise InputError(f"{problem}{nearest(name, self._others)}; {remedy}")


def everywhere(item: Any) -> bool:
    """What keeps all records."""
    return True
