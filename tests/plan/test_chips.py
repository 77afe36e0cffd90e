"""Names and sizes of TPU slices."""

import pytest

from mllm_align.errors import InputError
from mllm_align.plan.chips import CHIPS, topology

# As JAX names it, as the vendor does, chips.
NAMES = [
    ("v5e:1x1", "v5litepod-1", 1),
    ("v5e:2x4", "v5litepod-8", 8),
    ("v5e:4x4", "v5litepod-16", 16),
    ("v5e:16x16", "v5litepod-256", 256),
    ("v6e:4x4", "v6e-16", 16),
    ("v5p:2x2x1", "v5p-8", 4),
    ("v5p:2x2x4", "v5p-32", 16),
    ("v5p:8x8x8", "v5p-1024", 512),
    ("v4:2x2x4", "v4-32", 16),
]


@pytest.mark.parametrize(("name", "vendor", "chips"), NAMES)
def test_both_names_mean_one_slice(name, vendor, chips):
    found = topology(name)
    assert (found.name, found.vendor_name, found.chips) == (name, vendor, chips)
    assert topology(vendor) == found


def test_short_vendor_name_and_slices():
    assert topology("v5e-16") == topology("v5e:4x4")
    two = topology("2xv5e:4x4")
    assert (two.slices, two.chips, two.name, two.vendor_name) == (2, 32, "2xv5e:4x4", "2 x v5litepod-16")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e:3x3", "no slice of v5e; there are v5e:1x1 = v5litepod-1, v5e:2x2 = v5litepod-4"),
        ("v5p-7", "no slice of v5p; there are v5p:2x2x1 = v5p-8"),
        ("h100:8", "not known; there are v4:2x2x1 to"),
        ("", "not known"),
        ("0xv5e:4x4", "not known"),
    ],
)
def test_unknown_names_list_what_exists(name, says):
    with pytest.raises(InputError) as error:
        topology(name)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_cables_in_use():
    """An axis of two has one cable to the neighbour, not two."""
    assert [topology(n).links for n in ("v5e:1x1", "v5e:2x4", "v5e:4x4", "v5p:2x2x4", "v5p:4x4x4")] == [
        0,
        3,
        4,
        4,
        6,
    ]


def test_chips_are_plausible():
    for chip in CHIPS.values():
        assert chip.peak > 1e14 and 0.9 < chip.usable / chip.hbm < 1.02


@pytest.mark.slow
def test_the_compiler_knows_every_name():
    pytest.importorskip("libtpu")
    import subprocess
    import sys

    from mllm_align.plan.worker import ENVIRONMENT

    program = """
from mllm_align.plan.chips import CHIPS, describe, topology
for chip in CHIPS.values():
    for shape in chip.shapes:
        for slices in ("", "2x"):
            where = topology(f"{slices}{chip.name}:{shape}")
            if where.chips > 600: continue
            devices = describe(where)
            assert len(devices) == where.chips, (where, len(devices))
            assert devices[0].device_kind == chip.kind
"""
    import os

    subprocess.run([sys.executable, "-c", program], env=os.environ | ENVIRONMENT, check=True, timeout=300)
