"""What the formats of published preference sets share: the protocol of a reader, fields of a row."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from mllm_align.config.parts import READERS
from mllm_align.data.files import Row
from mllm_align.data.records import NEIGHBOURS, REJECTED, record_id
from mllm_align.errors import InputError, one_line, quoted, refusal
from mllm_align.registry import load_part

Pairs = Literal["best-worst", "all"]
RECORD = frozenset(("id", "image", "images", "prompt", "messages", "chosen", "rejected", "completion"))
RECORD |= {"responses", "id_is_ours", *REJECTED, NEIGHBOURS}


@dataclass
class Taking:
    """How rows are taken: which pairs of rated responses, and what is left out, by its reason."""

    pairs: Pairs = "best-worst"
    dropped: Counter[str] = field(default_factory=Counter)


class Reader:
    """A format: how it is told from others, and what a row of it becomes.

    published: a pair of identical responses is left out and counted; else it is a mistake, and refused.
    general: its fields are found in rows of other formats too; those are tried first.
    takes: fields of a row, beside RECORD, that the record has in other form.
    """

    published: ClassVar[bool] = True
    general: ClassVar[bool] = False
    takes: ClassVar[frozenset[str]] = frozenset()

    def fits(self, row: Mapping) -> bool:
        """Whether a row's fields are of this format."""
        return False

    def __call__(self, row: Row, number: int, taking: Taking) -> list[dict]:
        """What `parse_record` takes, for each record of a row; `id_is_ours` where the id may change.

        number: of the row in the whole data. Raises InputError for a row that is not of the format.
        """
        raise NotImplementedError


@READERS.register("trl")
class TRL(Reader):
    """TRL's vision preference format: what `parse_record` takes, and what a row of no other format is."""

    published = False

    def __call__(self, row: Row, number: int, taking: Taking) -> list[dict]:
        return [{**row.value, **identity(row, "id", number)}]


class Own(Reader):
    """A user's function: a row's fields in, out comes what `parse_record` takes, or a list of such; None
    leaves the row out."""

    published = False

    def __init__(self, name: str):
        self.name = name
        self.read = load_part(name, "reader")
        if not callable(self.read):
            raise InputError(f"reader {name} can't be called; name a function")

    def __call__(self, row: Row, number: int, taking: Taking) -> list[dict]:
        try:
            given = self.read(dict(row.value))
            records = [given] if isinstance(given, Mapping) else list(given or ())
        except InputError:
            raise
        except Exception as error:  # the user's program: anything may come out of it
            said = f"{type(error).__name__}: {one_line(error, 200)}"
            raise refusal(row.at, f"reader {self.name} raises {said}", "mend the reader") from error
        if not all(isinstance(each, Mapping) for each in records):
            found = ", ".join(sorted({type(each).__name__ for each in records}))
            raise refusal(row.at, f"reader {self.name} gives {found}", "return a dict, or a list of dicts")
        taking.dropped["row without a record"] += not records
        plain = [{**each, **identity(replace(row, value=each), "id", number)} for each in records]
        return numbered(plain) if all(each["id_is_ours"] for each in plain) else plain


def reader_of(format: str) -> Reader:
    """The reader of a format's name. Raises InputError for one that is not known."""
    if ":" in format:
        return Own(format)
    if format not in READERS:
        remedy = f"give one of auto, {', '.join(READERS)}, or your own as file.py:function"
        raise refusal("format", f"found {quoted(format)}", remedy)
    return READERS[format]()


def format_of(row: Mapping) -> str:
    """The format that the fields of a row tell."""
    fitting = [name for name, reader in READERS.items() if reader().fits(row)]
    return min(fitting, key=lambda name: READERS[name].general, default="trl")


def convert(row: Row, number: int, reader: Reader, taking: Taking) -> list[dict]:
    """The records of a row, without a published set's pairs of identical responses; these are counted."""
    plain = reader(row, number, taking)
    if not isinstance(reader, Own):
        rejected = {name: row.value[name] for name in REJECTED if name in row.value}
        plain = [rejected | each for each in plain]
    if not reader.published:
        return plain
    usable = [record for record in plain if not _identical(record)]
    taking.dropped["identical pair"] += len(plain) - len(usable)
    return usable


def beside(row: Row, reader: Reader, plain: Mapping) -> dict[str, Any]:
    """What the row says that the record doesn't, and what the reader adds to it."""
    theirs = {} if isinstance(reader, Own) else row.value
    own = {name: value for name, value in theirs.items() if name not in RECORD | reader.takes}
    return own | {name: value for name, value in plain.items() if name not in RECORD | own.keys()}


def _identical(record: dict) -> bool:
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return chosen.strip() == rejected.strip()
    return False


def has(row: Mapping, *names: str) -> bool:
    """Whether a row has values in all these fields."""
    return all(row.get(name) is not None for name in names)


def answered(row: Mapping) -> bool:
    return has(row, "chosen", "rejected")


def asked(row: Mapping) -> bool:
    return has(row, "prompt") or has(row, "messages")


def type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


def image(row: Row, *names: str) -> Any:
    """The first of the fields that holds an image; Arrow gives an absent one as nulls."""
    for name in names:
        value = row.value.get(name)
        absent = isinstance(value, Mapping) and all(each is None for each in value.values())
        if value is not None and not absent:
            return value
    return None


def images(row: Row) -> dict[str, Any]:
    return {"image": image(row, "image"), "images": row.value.get("images")}


def identity(row: Row, field: str, number: int) -> dict:
    """Return the id of a row: the one given, or one of our own from the row's number."""
    given = row.value.get(field)
    return {"id": record_id(given, number, f"{row.at}, {field}"), "id_is_ours": given is None}


def published(row: Row, field: str, number: int) -> dict:
    """The same where ids are known to repeat."""
    return {**identity(row, field, number), "id_is_ours": True}


def numbered(plain: list[dict]) -> list[dict]:
    if len(plain) == 1:
        return plain
    return [{**record, "id": f"{record['id']}-{k}"} for k, record in enumerate(plain)]
