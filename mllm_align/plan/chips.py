"""TPU chips with their published figures, and the names of the slices offered by the vendor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from mllm_align.errors import InputError
from mllm_align.training.flops import PEAK

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Figures of one chip (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm).

    kind: JAX's `device_kind`. hbm: bytes of main memory; usable: bytes that the compiler allows a program.
    bandwidth: of main memory, bytes/s. links: number of interconnect links; link: bytes/s of one link, one
    way. network: a chip's share of its host's bandwidth to other slices, bytes/s.
    """

    name: str
    kind: str
    hbm: int
    usable: float
    bandwidth: float
    links: int
    link: float
    network: float
    vendor: tuple[str, ...]
    """Prefixes of the vendor's slice names; a number follows."""
    counted: int
    """The number per chip: names of v4 and v5p count TensorCores."""
    shapes: tuple[str, ...]
    """Shapes of the slices offered."""

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAK[self.kind]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 32 * GIB, 30.5 * GIB, 1228e9, 6, 50e9, 6.25e9, ("v4",), 2, CUBES),
        Chip(
            "v5e",
            "TPU v5 lite",
            16 * GIB,
            15.75 * GIB,
            819e9,
            4,
            50e9,
            3.125e9,
            ("v5litepod", "v5e"),
            1,
            FLAT,
        ),
        Chip("v5p", "TPU v5", 95 * GIB, 95.73 * GIB, 2765e9, 6, 100e9, 6.25e9, ("v5p",), 2, CUBES),
        Chip("v6e", "TPU v6 lite", 32 * GIB, 31.24 * GIB, 1640e9, 4, 100e9, 12.5e9, ("v6e",), 1, FLAT),
    )
}


@dataclass(frozen=True)
class Topology:
    """`slices` slices, each a torus of chips of this shape."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * prod(self.shape)

    @property
    def name(self) -> str:
        """JAX's name."""
        one = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices}x{one}"

    @property
    def vendor_name(self) -> str:
        """The vendor's name."""
        one = f"{self.chip.vendor[0]}-{prod(self.shape) * self.chip.counted}"
        return one if self.slices == 1 else f"{self.slices} x {one}"

    @property
    def links(self) -> int:
        """Links that a chip uses in this slice: one along an axis of size 2, two along a longer axis."""
        return min(sum(min(size, 3) - 1 for size in self.shape), self.chip.links)

    def __str__(self) -> str:
        return f"{self.name} ({self.vendor_name}, {self.chips} chip{'s' * (self.chips > 1)})"


def topology(name: str) -> Topology:
    """Parse v5e:4x4, 2xv5e:16x16 (two slices), or the vendor's v5litepod-16, v5p-32.

    Raises InputError for an unknown name.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*?)(?::([\dx]+)|-(\d+))", name.strip().lower())
    if not found:
        raise _unknown(name)
    slices, family, shape, number = int(found[1] or 1), found[2], found[3], found[4]
    chip = next((c for c in CHIPS.values() if family == c.name or family in c.vendor), None)
    if chip is None or slices < 1:
        raise _unknown(name)
    if number:
        shape = next((s for s in chip.shapes if prod(_sizes(s)) * chip.counted == int(number)), None)
    if shape not in chip.shapes:
        raise _unknown(name, chip)
    return Topology(chip, _sizes(shape), slices)


def describe(where: Topology) -> list:
    """The topology's devices, as described by the installed TPU compiler."""
    from jax.experimental import topologies

    options: dict = {"num_slices": where.slices} if where.slices > 1 else {}
    if where.chip.name == "v4":  # one device a chip, not one a core
        options["chip_config_name"] = "megacore"
    one = Topology(where.chip, where.shape).name
    return topologies.get_topology_desc(one, platform="tpu", **options).devices


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split("x"))


def _unknown(name: str, chip: Chip | None = None) -> InputError:
    if chip is None:
        known = "; ".join(f"{c.name}:{c.shapes[0]} to {c.name}:{c.shapes[-1]}" for c in CHIPS.values())
        return InputError(
            f"--topology {name!r} is not known; there are {known}, and 2xv5e:4x4 for two slices"
        )
    known = ", ".join(f"{chip.name}:{s} = {Topology(chip, _sizes(s)).vendor_name}" for s in chip.shapes)
    return InputError(f"--topology {name!r} is no slice of {chip.name}; there are {known}")
