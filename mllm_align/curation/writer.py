"""Who writes for the makers of pairs: an endpoint, or a model on these devices; answers are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mllm_align.annotate.judge import LocalModel
from mllm_align.annotate.kept import Kept
from mllm_align.config.servers import Writer
from mllm_align.data.records import Record
from mllm_align.errors import InputError, Interrupted
from mllm_align.locks import alone
from mllm_align.progress import progress_bar

if TYPE_CHECKING:
    from mllm_align.models.bundle import Bundle

TRIES = 3  # answers of a record that are asked for
Answers = list[str | None]


class Request(Protocol):
    """What a writer is asked: a text, and the same as a record of its own."""

    @property
    def text(self) -> str: ...
    @property
    def record(self) -> Record: ...


class Asks(Protocol):
    """Answers to requests, None where none came. silence: what that means. sent: requests that were sent.
    from_disk: answers that were there."""

    silence: str

    def __call__(self, asked: Sequence[Request]) -> Answers: ...
    @property
    def sent(self) -> int: ...
    @property
    def from_disk(self) -> int: ...


def check_writer(writer: Writer) -> None:
    """Raises InputError where there is nobody to ask."""
    if not writer.given:
        raise InputError(
            "nobody is there to write; name an endpoint with --writer.url, or a --writer.model"
        )


@contextmanager
def open_writer(writer: Writer, out: Path) -> Iterator[Asks]:
    """Who writes for the file `out`, which is locked; answers are kept in a folder beside it
    (pairs.answers), and the same requests are answered from there. An interrupt says so."""
    folder = out.with_suffix(".answers")
    with alone(out):
        try:
            yield _Model(writer, folder) if writer.model is not None else _Server(writer, folder)
        except KeyboardInterrupt as error:
            raise Interrupted(f"interrupted; the answers so far are kept in {folder}") from error


class _Server:
    """An endpoint."""

    silence = "without an answer"

    def __init__(self, writer: Writer, folder: Path):
        from mllm_align.annotate.endpoint import EndpointClient

        self._client = EndpointClient(writer, folder)

    def __call__(self, asked: Sequence[Request]) -> Answers:
        with progress_bar(len(asked), "writing") as bar:

            def tell(place: int, text: str) -> None:
                bar.update()

            return self._client(asked, tell)

    @property
    def sent(self) -> int:
        return self._client.sent

    @property
    def from_disk(self) -> int:
        return self._client.from_disk


class _Model:
    """A model on these devices. Answers go by its weights, the length that they may have, and the text."""

    silence = "too long for the writer"

    def __init__(self, writer: Writer, folder: Path):
        from mllm_align.models.sources import open_model
        from mllm_align.prepare import name_weights

        source = open_model(str(writer.model))
        name_weights(source)
        self._of = f"{source.fingerprint} {writer.max_tokens}"
        self._kept, self.sent, self.from_disk = Kept(folder, 0), 0, 0
        self._asks = LocalModel(
            lambda: _load(writer), writer.max_tokens, writer.batch_size, progress="writing"
        )

    def __call__(self, asked: Sequence[Request]) -> Answers:
        keys = [sha256(f"{self._of} {each.text}".encode()).hexdigest() for each in asked]
        left = [place for place, key in enumerate(keys) if key not in self._kept.answers]
        self.sent, self.from_disk = self.sent + len(left), self.from_disk + len(keys) - len(left)

        def keep(place: int, text: str) -> None:
            self._kept.count()
            self._kept.add(keys[left[place]], text)

        self._asks([asked[place].record for place in left], keep)
        return [self._kept.answers.get(key) for key in keys]


def _load(writer: Writer) -> Bundle:
    from mllm_align.models.bundle import load

    return load(str(writer.model), "auto", None)
