"""What the machine is, and what else it was doing."""

import os
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
