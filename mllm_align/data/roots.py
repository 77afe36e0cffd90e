"""The folders that the paths of images start from, and may not leave."""

import os
from collections.abc import Iterable
from pathlib import Path

from mllm_align.data.images import is_url, url_refusal
from mllm_align.data.inline import no_path
from mllm_align.errors import one_line, quoted, refusal

_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes that Linux takes


class Roots:
    """Folders in the order in which an image is looked for.

    folders: none means the current folder, which paths may leave. within: further folders that a path may
    lead into. allow_outside: a path may lead anywhere.
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
        """Return an image's path with symlinks and `..` resolved, so that it stays what was checked.

        Of several folders, the first in which the file exists. Raises `InputError`, which names `at`, for
        what is no path, for one that leaves the folders and for a file that none of several has.
        """
        if is_url(name):
            raise url_refusal(at, name)
        if not name.strip():
            raise refusal(at, "the path is empty", "give the path of an image file")
        try:
            written = os.fsencode(name)
        except UnicodeEncodeError as error:
            raise refusal(at, f"{quoted(name)} is no path (half of a surrogate pair)", "mend it") from error
        if b"\0" in written:
            raise refusal(at, f"{quoted(name)} is no path (embedded null byte)", "mend it")
        if len(written) > _LONGEST_NAME and _too_long(written):
            raise no_path(name, at)
        try:
            paths = (self._resolved(os.path.join(folder, name)) for folder in self.folders)
            path = next(paths) if len(self.folders) == 1 else next(filter(os.path.exists, paths), None)
        except OSError as error:
            raise refusal(at, f"{quoted(name)} is no path ({one_line(error)})", "mend it") from error
        if path is None:
            problem = f"no file {quoted(name)} in any of {', '.join(map(quoted, self.names))}"
            raise refusal(at, problem, "check the path and --data.image-root")
        if not self.free and not path.startswith(self._inside):
            where = " and ".join(map(quoted, self.names))
            problem = f"the path {quoted(name)} leaves the image folder {where}"
            raise refusal(at, problem, "move the file there or set --data.allow-outside")
        return Path(path)

    def _resolved(self, path: str) -> str:
        """`os.path.realpath`, with the folders of many images resolved once."""
        parent, name = os.path.split(path)
        if name in ("", ".", ".."):
            return os.path.realpath(path)
        if parent not in self._parents:
            self._parents[parent] = os.path.realpath(parent)
        path = os.path.join(self._parents[parent], name)
        return os.path.realpath(path) if os.path.islink(path) else path


def _too_long(name: bytes) -> bool:
    return len(name) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in name.split(b"/"))
