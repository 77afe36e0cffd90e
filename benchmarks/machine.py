"""What the machine is, what else it was doing, and how two programs take turns on it."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return {"cpu": name, "cores": os.cpu_count(), "loadavg": round(os.getloadavg()[0], 2)}


def other_cpu_seconds() -> float:
    """CPU seconds used so far by every process but this one; differences tell noise from work."""
    own = os.times()
    ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    busy = (ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system


def take_turns(one_pass: Callable[[], list]) -> None:
    """For every line on stdin a timed pass, one JSON line on stdout. one_pass gives each row's tokens."""
    for _ in sys.stdin:
        before, cpu, began = other_cpu_seconds(), time.process_time(), time.perf_counter()
        made = one_pass()
        seconds, lengths = time.perf_counter() - began, [len(tokens) for tokens in made]
        turn = {
            "tokens_per_s": round(sum(lengths) / seconds, 1),
            "tokens": sum(lengths),
            "longest": max(lengths),
            "seconds": round(seconds, 4),
            "cpu_s": round(time.process_time() - cpu, 3),
            "other_cpu_s": round(other_cpu_seconds() - before, 2),
        }
        print(json.dumps(turn), flush=True)
