"""What a part says: one JSON line for each of its items, as soon as it is there."""

from __future__ import annotations

import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

OURS = ("mllm_align", "gpu_check")
LAST = 12  # lines of a traceback
Figures = dict[str, Any]


class LeftOut(Exception):
    """Raised by an item that can't run here, with the reason."""


def check(found: float, bound: float) -> Figures:
    """A checked number: the item fails if it is above its bound or NaN."""
    return {"found": float(found), "bound": float(bound)}


class Lines:
    """Runs a part's items in sequence, and continues after one that fails."""

    def __init__(self, part: str, seconds: float, out: TextIO | None = None):
        self.part, self.out = part, out or sys.stdout
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that this part still has."""
        return self.end - time.monotonic()

    def __call__(self, item: str, make: Callable[[], Figures], needs: float = 0.0) -> bool:
        """The line of one item; whether it passed. needs: seconds without which it is not begun."""
        began = time.monotonic()
        try:
            if self.left() < needs:
                raise LeftOut(
                    f"takes about {needs:.0f} s; {max(self.left(), 0):.0f} s are left of its time"
                )
            figures = make()
            checks = figures.get("checks", {})
            wrong = [name for name, each in checks.items() if not each["found"] <= each["bound"]]  # NaN too
            said: Figures = {"status": "ok"}
            if wrong:
                said = {"status": "failed", "reason": f"out of bounds: {', '.join(wrong)}"}
            said |= figures
        except Exception as error:
            said = told(error)
        gc.collect()  # what a failed item held on the device goes with its frames
        write({"part": self.part, "item": item, **said}, began, self.out)
        return said["status"] == "ok"


def told(error: Exception) -> Figures:
    """A failure's figures; a package that is not there leaves the item out."""
    if isinstance(error, LeftOut):
        return {"status": "left out", "reason": str(error)}
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in OURS:
        return {"status": "left out", "reason": f"needs {error.name}, which is not installed"}
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return {
        "status": "failed",
        "reason": reason(error),
        "traceback": [line[:300] for line in lines[-LAST:]],
    }


def reason(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300].removesuffix(": ")


def write(line: Figures, began: float, out: TextIO) -> None:
    """JSON has no NaN: such a number is written as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else str(value)
        return value

    line = {**line, "seconds": round(time.monotonic() - began, 2)}
    print(json.dumps(plain(line)), file=out, flush=True)
