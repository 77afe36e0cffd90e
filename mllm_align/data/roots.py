"""The folders that image paths are relative to, and must stay in."""

import os
from collections.abc import Iterable
from pathlib import Path

from mllm_align.data.images import is_url, url_refusal
from mllm_align.data.inline import no_path
from mllm_align.errors import one_line, quoted, refusal

_MAX_PATH, _MAX_NAME = 4095, 255  # bytes, the limits of Linux


class Roots:
    """The folders in which an image is searched, in order.

    folders: if empty, the current folder, and paths may leave it. within: further folders that a path may
    point into. allow_outside: a path may point anywhere.
    """

    def __init__(
        self,
        folders: Iterable[str | os.PathLike] = (),
        allow_outside: bool = False,
        within: Iterable[str | os.PathLike] = (),
    ):
        self.names = [os.fspath(folder) for folder in folders]
        self.folders = [os.path.realpath(folder) for folder in self.names or [""]]
        self.free = allow_outside or not self.names
        inside = [*self.folders, *(os.path.realpath(folder) for folder in within)]
        self._inside = tuple(folder.rstrip(os.sep) + os.sep for folder in inside)
        self._parents: dict[str, str] = {}

    def find(self, name: str, at: str) -> Path:
        """Return an image's path with symlinks and `..` resolved, so that the checked path is the one used.

        Of several folders, the first that has the file is taken. Raises `InputError`, which names `at`, for
        text that is not a path, for a path that leaves the folders and for a file found in none of several.
        """
        if is_url(name):
            raise url_refusal(at, name)
        if not name.strip():
            raise refusal(at, "the path is empty", "give the path of an image file")
        try:
            written = os.fsencode(name)
        except UnicodeEncodeError as error:
            raise refusal(at, f"{quoted(name)} is no path (a lone surrogate)", "correct it") from error
        if b"\0" in written:
            raise refusal(at, f"{quoted(name)} is no path (embedded null byte)", "correct it")
        if len(written) > _MAX_NAME and _too_long(written):
            raise no_path(name, at)
        try:
            paths = (self._resolved(os.path.join(folder, name)) for folder in self.folders)
            path = next(paths) if len(self.folders) == 1 else next(filter(os.path.exists, paths), None)
        except OSError as error:
            raise refusal(at, f"{quoted(name)} is no path ({one_line(error)})", "correct it") from error
        if path is None:
            problem = f"no file {quoted(name)} in any of {', '.join(map(quoted, self.names))}"
            raise refusal(at, problem, "check the path and --data.image-root")
        if not self.free and not path.startswith(self._inside):
            where = " and ".join(map(quoted, self.names))
            problem = f"the path {quoted(name)} leaves the image folder {where}"
            raise refusal(at, problem, "move the file there or set --data.allow-outside")
        return Path(path)

    def _resolved(self, path: str) -> str:
        """`os.path.realpath`, with each parent folder resolved once."""
        parent, name = os.path.split(path)
        if name in ("", ".", ".."):
            return os.path.realpath(path)
        if parent not in self._parents:
            self._parents[parent] = os.path.realpath(parent)
        path = os.path.join(self._parents[parent], name)
        return os.path.realpath(path) if os.path.islink(path) else path


def _too_long(name: bytes) -> bool:
    return len(name) > _MAX_PATH or any(len(part) > _MAX_NAME for part in name.split(b"/"))
