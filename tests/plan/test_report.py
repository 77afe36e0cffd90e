"""The arithmetic of the bound, and what the verdict advises."""

import dataclasses

import pytest

from mllm_align import BDHSConfig, Config
from mllm_align.plan.chips import GIB, topology
from mllm_align.plan.compiled import Compiled
from mllm_align.plan.counts import Collective, Counts
from mllm_align.plan.report import advice, gib, number, program_plan, program_text, refusal, times, verdict

WHERE = topology("v5e:4x4")
METADATA = {"rows": 32, "devices": 16, "mesh": {"slice": 1, "data": 1, "fsdp": 16, "tensor": 1}}


def compiled(temporaries=4 * GIB, **counts):
    memory = {"arguments": 3 * GIB, "outputs": 2 * GIB, "aliased": 2 * GIB, "temporaries": temporaries}
    return Compiled(memory, None, Counts(**counts), METADATA, 1.0)


def test_bound_is_the_slowest_part():
    ring = Collective("all-gather", 16, 1, count=1, sent=400e9)
    made = program_plan(
        "train", compiled(flops=197e12, hbm_bytes=819e9, collectives={0: ring}), WHERE, 1e12, {"pairs": 32}
    )
    assert made.parts == {"compute": 1.0, "memory": 1.0, "interconnect": 2.0}
    assert (made.bound, made.limit, made.rates) == (2.0, "interconnect", {"pairs/s": 16.0})
    assert made.needed == 7 * GIB and made.fits


def test_what_crosses_slices_takes_the_network():
    crossing = Collective("all-reduce", 2, 2, count=1, sent=3.125e9)
    made = program_plan("train", compiled(collectives={0: crossing}), topology("2xv5e:4x4"), 1, {})
    assert made.limit == "network" and made.bound == 1.0


def test_what_a_run_holds_meanwhile_counts():
    held = dataclasses.replace(compiled(), metadata=METADATA | {"resident": 10 * GIB})
    made = program_plan("decode", held, WHERE, 1, {})
    assert made.needed == 17 * GIB and not made.fits
    assert "resident besides 10.00" in program_text(made)


def test_no_bound_where_peaks_are_unknown():
    made = program_plan("train", compiled(flops=1e12), None, 1e12, {"pairs": 32})
    assert made.bound is None and made.fits and "bound" not in program_text(made)


def test_verdict_says_what_to_change():
    config, mesh = Config(batch_size=32), METADATA["mesh"]
    fits = program_plan("train", compiled(), WHERE, 1, {})
    assert verdict([fits], config, mesh, WHERE).startswith(
        "fits: train needs 7.00 of 15.75 GiB a chip, 8.75"
    )
    large = program_plan("train", compiled(temporaries=14 * GIB), WHERE, 1, {})
    words = verdict([fits, large], config, mesh, WHERE)
    assert words.startswith("does not fit: train needs 17.00 of 15.75 GiB a chip; run fewer rows at once")
    assert "micro_batches 2" in words and "reference stored" in words and "mesh.tensor 2" in words
    assert "lora.base int8" in words
    assert "\n" not in words


def test_advice_starts_with_what_is_not_cut():
    mesh = {"slice": 1, "data": 16, "fsdp": 1, "tensor": 1}
    large = program_plan("train", compiled(temporaries=14 * GIB), WHERE, 1, {})
    words = verdict([large], Config(lora=None, remat="none"), mesh, WHERE)
    assert "chip; cut the parameters further (mesh.fsdp 16, mesh.data 1)" in words
    assert "remat full" in words and "lora" in words


def test_a_refusal_of_the_compiler_is_a_verdict():
    said = "RESOURCE_EXHAUSTED: HLO temporaries (17.16G) exceeds available HBM (15.75G). See"
    refused = program_plan("train", Compiled(None, said, None, METADATA, 1.0), WHERE, 1, {})
    words = verdict([refused], Config(), METADATA["mesh"], WHERE)
    assert not refused.fits
    assert words.startswith("does not fit: train needs 17.16 GiB of temporaries alone, of 15.75 a chip; ")
    assert "17.16" in program_text(refused)


def test_what_is_not_known_is_noted():
    made = program_plan("decode", compiled(flops=1.0, unknown_loops=2, unknown_kernels=3), WHERE, 1, {})
    assert made.notes == [
        "2 loops of unknown length counted at the maximum of tokens",
        "3 kernels of unknown cost counted as nothing",
    ]
    assert all(f"note          {note}" in program_text(made) for note in made.notes)


def test_seconds_of_each_part():
    """v5e: 197 TFLOP/s, 819 GB/s, 4 cables of 50 GB/s in a 4x4."""
    ring = Collective("all-gather", 16, 1, count=1, sent=100e9)
    found = times(Counts(flops=197e12, hbm_bytes=81.9e9, collectives={0: ring}), WHERE)
    assert found == pytest.approx({"compute": 1.0, "memory": 0.1, "interconnect": 0.5})
    assert set(times(Counts(), WHERE)) == {"compute", "memory"}


def test_a_job_of_generation_is_advised_fewer_rows():
    bad = program_plan("decode", compiled(temporaries=14 * GIB), WHERE, 1, {})
    words = advice(bad, BDHSConfig(batch_size=32), METADATA["mesh"])
    assert words.startswith("run fewer rows at once (batch_size 16)") and "micro_batches" not in words


def test_words_of_a_refusal_that_are_not_known_stand_as_they_are():
    assert refusal("RESOURCE_EXHAUSTED: too large") == "RESOURCE_EXHAUSTED: too large"


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0 "), (999, "999 "), (1000, "1 k"), (1.234e6, "1.23 M"), (5e12, "5 T"), (2e18, "2e+03 P")],
)
def test_three_digits_with_a_prefix(value, shown):
    assert number(value) == shown


def test_gibibytes():
    assert gib(3 * 2**29) == "1.50" and gib(None) == "?"
