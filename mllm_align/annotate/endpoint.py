"""A chat endpoint asked about records, by default which of two responses is better: vLLM, SGLang, a cloud.

Its answers are kept on disk and never asked for twice; docs/endpoint.md says what happens at each fault.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import random
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Protocol

import httpx2
from PIL import ExifTags, Image

from mllm_align.annotate.factory import Context
from mllm_align.annotate.kept import Kept
from mllm_align.annotate.pairwise import Pairwise
from mllm_align.config.annotators import ANNOTATORS, AnnotatorConfig
from mllm_align.config.servers import Server
from mllm_align.data.images import ImageSource, image_size, load_rgb
from mllm_align.data.records import Record
from mllm_align.errors import InputError, one_line, quoted, refusal

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; each pause is twice the one before
LONGEST_WISH = 60.0  # of a Retry-After that is followed
GIVE_UP = 8  # requests that failed for good before any answer came: the endpoint is down
PASSING = (408, 409, 425, 429)  # and 5xx: may go better when sent again
OF_ITS_OWN = (400, 413, 415, 422)  # what one request holds is refused: a filter of contents, a size
SENT_AS_THEY_ARE = ("PNG", "JPEG", "WEBP", "GIF")
SHORTEST_SECRET = 8  # "EMPTY" and the like protect nothing; words of an answer shall stay


class Question(Protocol):
    """What is asked: a text, about the record's images."""

    @property
    def record(self) -> Record: ...

    @property
    def text(self) -> str: ...


@ANNOTATORS.register("endpoint")
@dataclass(frozen=True)
class Endpoint(Server, AnnotatorConfig):
    """An OpenAI-compatible chat endpoint that takes images (vLLM, SGLang, a cloud), asked in both orders.

    Answers are kept on disk beside the run and never asked for twice.
    """

    # How it is reached, not what it answers.
    may_change: ClassVar[frozenset[str]] = frozenset(
        ("url", "key_variable", "concurrency", "timeout", "retries", "budget")
    )
    branch: ClassVar[str] = "annotator."
    url: str = "http://localhost:8000/v1"
    """Base address; /chat/completions is appended."""
    model: str = "default"
    """The model's name there."""

    @property
    def served(self) -> tuple[str, str]:
        return "annotator.model", self.model

    def open(self, context: Context) -> Pairwise:
        """Answers are kept in context.folder; without one, in memory."""
        import jax

        return Pairwise(EndpointClient(self, context.folder, jax.process_index()))


class EndpointClient:
    """Answers of the endpoint, in the order asked; None where none came after all retries.

    folder: where answers are kept; None keeps them in memory. pause: seconds before the first retry. spent:
    requests of the budget that are spent. every: whether all answers are needed: then one that does not
    come is an error, and the first few end the call.

    Attributes that count since it was made: `sent` requests, of them `retried`; `failed`, which got no
    answer at all; `from_disk`, which needed no request because their answers had been kept.
    """

    def __init__(
        self,
        config: Server,
        folder: Path | None,
        process: int = 0,
        pause: float = FIRST_PAUSE,
        *,
        spent: int = 0,
        every: bool = False,
    ):
        self.config, self.every, self._branch = config, every, config.branch
        self.sent = self.retried = self.failed = self.from_disk = 0
        self._pause, self._random = pause, random.Random()
        self._url, self._shown = _addresses(config.url or "", f"{self._branch}url")
        self._key = _key(config.key_variable)
        self._kept = Kept(folder, process)
        self._kept.requests += spent
        self._one_call = threading.Lock()

    def __call__(
        self, asked: Sequence[Question], done: Callable[[int, str], None] | None = None
    ) -> list[str | None]:
        """done: called with the place and the answer of each question as soon as it is there."""
        with self._one_call:
            call = _Call(done)
            _run(self._ask(call, asked))
            if call.problem is not None:
                raise call.problem
        answers = [call.answers[key] for key in call.keys]
        if asked and self._ends(call):
            raise self._down(call)
        return answers

    async def _ask(self, call: _Call, asked: Sequence[Question]) -> None:
        """Fill the call; as many workers as requests may be on their way."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        most = self.config.concurrency
        limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
        # No redirects: they would take the key to another host. No timeout: ours is of the whole request.
        options: dict[str, Any] = {"follow_redirects": False, "timeout": None, "verify": _certificates()}
        async with httpx2.AsyncClient(headers=headers, limits=limits, **options) as client:
            left = self._unanswered(call, asked)
            await asyncio.gather(*(self._work(client, call, left) for _ in range(min(most, len(asked)))))

    def _unanswered(self, call: _Call, asked: Sequence[Question]) -> Iterator[tuple[str, bytes, str]]:
        """Key, body and record of each request to be sent, made only when a worker is free for it."""
        record, pictures = None, []
        for each in asked:
            if each.record is not record:
                record, pictures = each.record, [_picture(source) for source in each.record.images]
            body = self._body(each, pictures)
            key = sha256(body).hexdigest()
            place, new = len(call.keys), key not in call.answers
            call.keys.append(key)
            if new:
                call.answers[key] = self._kept.answers.get(key)
                self.from_disk += call.answers[key] is not None
            call.places.setdefault(key, []).append(place)
            if call.answers[key] is not None:
                call.tell(key)
            elif new:
                yield key, body, each.record.where

    def _body(self, asked: Question, pictures: Sequence[dict[str, Any]]) -> bytes:
        """The request, always the same bytes for the same question: its sha256 is the answer's name."""
        content = [*pictures, {"type": "text", "text": asked.text}]
        request = {
            "model": self.config.served[1],
            self.config.limit_name: self.config.max_tokens,
            "messages": [{"role": "user", "content": content}],
        }
        if self.config.temperature is not None:
            request["temperature"] = self.config.temperature
        return json.dumps(request, sort_keys=True, separators=(",", ":")).encode()

    async def _work(self, client: httpx2.AsyncClient, call: _Call, left: Iterator) -> None:
        try:
            for key, body, where in left:
                text = await self._answer(client, call, body, where)
                if text is not None:
                    call.answers[key] = text
                    self._kept.add(key, text)
                    call.tell(key)
                if call.problem is not None:
                    return
                if text is None:
                    self.failed += 1
                    call.failed += 1
                    if call.failed >= GIVE_UP and self._ends(call):
                        raise self._down(call)
        except InputError as problem:
            call.end(problem)

    async def _answer(self, client: httpx2.AsyncClient, call: _Call, body: bytes, where: str) -> str | None:
        """The answer to one request, sent again where that may help."""
        for attempt in range(self.config.retries + 1):
            if call.problem is not None:
                return None
            if self.config.budget is not None and self._kept.requests >= self.config.budget:
                raise self._spent()
            self._kept.count()
            self.sent += 1
            self.retried += attempt > 0
            try:
                return await self._send(client, body, where)
            except _Refused as refused:
                call.refused += 1
                call.refusal = call.refusal or refused.error
                return None
            except _Again as again:
                call.last = again.problem
                pause = min(self._pause * 2**attempt, LONGEST_PAUSE) * self._random.uniform(0.5, 1)
                if attempt < self.config.retries:
                    await call.pause(max(pause, again.wish))
        return None

    async def _send(self, client: httpx2.AsyncClient, body: bytes, where: str) -> str:
        """One request. Raises _Again where it may go better, _Refused where this one can't, InputError
        where none can."""
        try:
            async with asyncio.timeout(self.config.timeout):
                response = await client.post(self._url, content=body)
        except TimeoutError:
            raise _Again(f"no whole answer within {self.config.timeout:g} s") from None
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise refusal(self._shown, self._without_key(str(error)), f"mend {self._branch}url") from None
        except (httpx2.RequestError, OSError) as error:
            problem = f"{type(error).__name__}: {error}".rstrip(": ")
            raise _Again(self._without_key(problem)) from None
        if response.is_success:
            return self._content(response)
        if response.status_code in PASSING or response.status_code >= 500:
            raise _Again(self._told(response), _wish(response.headers.get("Retry-After", "")))
        error = self._refused(response, where)
        raise _Refused(error) if response.status_code in OF_ITS_OWN else error

    def _content(self, response: httpx2.Response) -> str:
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _Again(f"this is no chat completion: {self._told(response)}") from None
        if not isinstance(text, str):
            raise _Again(f"the answer's content is {type(text).__name__}, not text")
        text = text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair
        return self._without_key(text) if len(self._key) >= SHORTEST_SECRET else text

    def _told(self, response: httpx2.Response) -> str:
        """Status and start of what the server says."""
        text: Any = response.text
        with suppress(ValueError, RecursionError):
            text = response.json()
        with suppress(LookupError, TypeError):
            text = text["error"]["message"]
        if not isinstance(text, str):
            text = json.dumps(text, ensure_ascii=False)  # anew: the key may have been there with escapes
        text = self._without_key(text)[:300]
        return f"{response.status_code} {one_line(text, 300)}".strip()

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    # --- what ends a call ---------------------------------------------------------------------------

    def _refused(self, response: httpx2.Response, where: str) -> InputError:
        told, variable = self._told(response), self.config.key_variable
        if response.status_code in (401, 403):
            if self._key:
                problem = f"the server refuses the key of the environment variable {variable} ({told})"
                return refusal(self._shown, problem, "set the variable to a good one")
            problem = f"the server wants a key ({told})"
            return refusal(self._shown, problem, f"set the environment variable {variable} to it")
        if response.is_redirect:
            there = self._without_key(response.headers.get("Location", ""))
            problem = f"the server redirects to {quoted(there)}"
            return refusal(self._shown, problem, f"mend {self._branch}url")
        if response.status_code in (404, 405):
            problem = f"the server does not know this address or the model {quoted(self.config.served[1])}"
            remedy = f"check {self._branch}url and {self.config.served[0]}"
            return refusal(self._shown, f"{problem} ({told})", remedy)
        remedy = f"check {self.config.served[0]} and {self._branch}max_tokens"
        remedy += "" if self.every else ", or leave the record out"
        return refusal(f"{self._shown}, asked about {where}", f"the server refuses this ({told})", remedy)

    def _spent(self) -> InputError:
        problem = f"all {self.config.budget} requests are spent; the answers so far are kept"
        return refusal(f"{self._branch}budget", problem, "raise it, and the same command goes on")

    def _ends(self, call: _Call) -> bool:
        """Whether what has failed makes the call one of no use."""
        return (self.every and call.failed > 0) or self._hopeless(call)

    def _hopeless(self, call: _Call) -> bool:
        """Nothing was answered, and not because a server that has answered before refuses these."""
        return not call.answered and (call.failed > call.refused or not self._kept.answers)

    def _down(self, call: _Call) -> InputError:
        if call.refusal is not None and call.refused == call.failed:
            return call.refusal
        some = "" if call.answered else "any of "
        problem = f"no answer to {some}{call.failed} requests; the last problem: {call.last}"
        return refusal(self._shown, problem, "mend it, and the same command goes on")


class _Again(Exception):
    """A request that may go better when it is sent again, at the earliest after `wish` seconds."""

    def __init__(self, problem: str, wish: float = 0.0):
        super().__init__(problem)
        self.problem, self.wish = problem, wish


class _Refused(Exception):
    """A request that the server refuses for what it holds."""

    def __init__(self, error: InputError):
        super().__init__(str(error))
        self.error = error


@dataclass
class _Call:
    """One call's requests, by their keys in the order asked, and what came of them."""

    done: Callable[[int, str], None] | None = None
    keys: list[str] = field(default_factory=list)
    places: dict[str, list[int]] = field(default_factory=dict)  # of each key that are to be told of
    answers: dict[str, str | None] = field(default_factory=dict)
    failed: int = 0
    refused: int = 0  # of those that failed
    refusal: InputError | None = None  # the first
    last: str = ""
    problem: InputError | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def answered(self) -> bool:
        return any(text is not None for text in self.answers.values())

    def tell(self, key: str) -> None:
        """Tell of an answer that is there, for all places that wait for it."""
        for place in self.places.pop(key, []):
            if self.done is not None:
                self.done(place, self.answers[key] or "")

    def end(self, problem: InputError) -> None:
        """Send nothing more; what is on its way is waited for and kept: it is paid for."""
        self.problem = self.problem or problem
        self.over.set()

    async def pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """asyncio.run, also where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


@cache  # reading them takes longer than a short request
def _certificates() -> ssl.SSLContext:
    return httpx2.create_ssl_context()


def _addresses(url: str, option: str) -> tuple[httpx2.URL, str]:
    """Where requests go, and how messages name it: without a query, which may hold a secret. option: the
    setting that has it."""
    try:
        base = httpx2.URL(url)
        base.host.encode("idna")
        usable = base.host and "%" not in base.host and 0 < (base.port or 80) < 65536
    except (httpx2.InvalidURL, UnicodeError):
        usable = False
    if not usable:
        remedy = "give an address as http://localhost:8000/v1"
        raise refusal(option, f"{quoted(url.partition('?')[0])} is no usable address", remedy)
    shown = f"{option} {base.copy_with(query=None, fragment=None)}"
    return base.copy_with(path=base.path.rstrip("/") + "/chat/completions", fragment=None), shown


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not all("!" <= c <= "~" for c in key):  # no header can hold it; the client's error would show it
        raise refusal(variable, "holds a character that no key has", "set this environment variable again")
    return key


def _wish(header: str) -> float:
    """Seconds that a Retry-After asks for, at most LONGEST_WISH; 0 where it can't be read."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return 0.0
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WISH) if math.isfinite(seconds) else 0.0


def _picture(source: ImageSource) -> dict[str, Any]:
    """An image as a part of a message."""
    kind, data = _encoded(source)
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _encoded(source: ImageSource) -> tuple[str, bytes]:
    """Media type and file: as it is, where every reader sees the picture in it that `load_rgb` does."""
    data = source.read()
    if data is not None:
        size = image_size(source)  # explains a file that can't be used
        with Image.open(BytesIO(data)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1 or image.size != size
            moving, clear = getattr(image, "is_animated", False), "transparency" in image.info
            plain = image.mode in ("RGB", "L", "P") and not (turned or moving or clear)
            if plain and image.format in SENT_AS_THEY_ARE:
                return Image.MIME[image.format], data
    file = BytesIO()
    load_rgb(source).save(file, "PNG")
    return "image/png", file.getvalue()
