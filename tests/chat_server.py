"""A chat endpoint on this machine whose faults are told beforehand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one request: waits, then sends `body`, a byte each `trickle` seconds."""

    body: bytes | str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    trickle: float = 0.0
    cut: bool = False  # the connection ends in the middle


def said(content: Any, **others: Any) -> Reply:
    """A chat completion."""
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return Reply(json.dumps({"object": "chat.completion", "choices": choices}), **others)


def shown(request: dict[str, Any]) -> tuple[str, str]:
    """The two responses that a request compares."""
    text = request["messages"][0]["content"][-1]["text"]
    first, _, rest = text.partition("Response 1:\n")[2].partition("\n\nResponse 2:\n")
    return first, rest.partition("\n\nWhich response")[0]


class Chat:
    """`reply` says what to do with a request, given its number from 0; here is what came."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda request, number: said("Response 1")
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.url = ""

    def came(self, path: str, headers: dict[str, str], body: bytes) -> Reply:
        with self.lock:
            number = len(self.requests)
            self.requests.append(json.loads(body))
            self.headers.append(headers)
            self.paths.append(path)
            self.times.append(time.monotonic())
            return self.reply(self.requests[-1], number)


@contextmanager
def chat_server() -> Iterator[Chat]:
    chat = Chat()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body go in two writes

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with chat.lock:
                chat.at_once += 1
                chat.most_at_once = max(chat.most_at_once, chat.at_once)
            try:
                self.answer(chat.came(self.path, dict(self.headers), body))
            finally:
                with chat.lock:
                    chat.at_once -= 1

        def answer(self, reply: Reply) -> None:
            chat.over.wait(reply.wait)
            body = reply.body.encode() if isinstance(reply.body, str) else reply.body
            with suppress(OSError):  # the client has gone
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if reply.cut:
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                if not reply.trickle:
                    self.wfile.write(body)
                    return
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if chat.over.wait(reply.trickle):
                        return

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        chat.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield chat
        finally:
            chat.over.set()
            server.shutdown()
