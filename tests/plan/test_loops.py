"""How often loops run, against Python's own ranges."""

import re

import pytest

from mllm_align.plan import hlo
from mllm_align.plan.counts import count
from mllm_align.plan.loops import trips

LOOP = """
%body (p: (s32[], s32[], f32[])) -> (s32[], s32[], f32[]) {
  %p = (s32[], s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %x = f32[] get-tuple-element(%p), index=2
  %by = s32[] constant(STEP)
  %next = s32[] add(%i, %by)
  ROOT %out = (s32[], s32[], f32[]) tuple(%next, %n, %x)
}

%condition (q: (s32[], s32[], f32[])) -> pred[] {
  %q = (s32[], s32[], f32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=1
  %stop = s32[] constant(STOP)
  CONDITION
}

ENTRY %main (k: s32[], y: f32[]) -> (s32[], s32[], f32[]) {
  %k = s32[] parameter(0)
  %y = f32[] parameter(1)
  %first = s32[] constant(START)
  %end = s32[] constant(STOP)
  %start = (s32[], s32[], f32[]) tuple(%first, %end, %y)
  ROOT %loop = (s32[], s32[], f32[]) while(%start), condition=%condition, body=%body
}
"""
LESS = "ROOT %less = pred[] compare(%j, %stop), direction=LT"


def told(start=0, stop=10, step=1, condition=LESS, change=lambda text: text):
    """What is found of a loop from start to stop."""
    values = {"START": start, "STOP": stop, "STEP": step, "CONDITION": condition}
    text = LOOP
    for name, value in values.items():
        text = re.sub(rf"\b{name}\b", str(value), text)
    module = hlo.parse(change(text))
    inside = module.computations[module.entry]
    return trips(module, inside, inside[module.roots[module.entry]])


@pytest.mark.parametrize(
    "start, stop, step",
    [(0, 10, 1), (0, 9, 2), (0, 10, 2), (3, 10, 4), (-5, 3, 3), (0, 0, 1), (7, 3, 1), (0, 1, 100)],
)
@pytest.mark.parametrize(
    "condition",
    [
        LESS,
        "ROOT %more = pred[] compare(%stop, %j), direction=GT",
        "ROOT %less = pred[] compare(%j, %m), direction=LT",
    ],
    ids=["less", "greater", "bound in the tuple"],
)
def test_start_step_and_bound(start, stop, step, condition):
    assert told(start, stop, step, condition) == len(range(start, stop, step))


def test_counters_are_followed_through_copies_and_sums():
    """The bound is j + 2 < 10, of a copy of the counter."""
    condition = """%c = s32[] copy(%j)
  %two = s32[] constant(2)
  %later = s32[] add(%two, %c)
  ROOT %less = pred[] compare(%later, %stop), direction=LT"""
    assert told(0, 10, 3, condition) == len(range(0, 8, 3))


def test_a_comparison_within_a_fusion():
    fused = """
%compared (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%b, %a), direction=LT
}
"""
    condition = "ROOT %fused = pred[] fusion(%stop, %j), kind=kLoop, calls=%compared"
    assert told(2, 11, 3, condition, lambda text: fused + text) == len(range(2, 11, 3))


def test_a_step_within_a_fusion():
    fused = """
%added (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %three = s32[] constant(3)
  ROOT %sum = s32[] add(%a, %three)
}
"""

    def change(text):
        return fused + text.replace("add(%i, %by)", "fusion(%i), kind=kLoop, calls=%added")

    assert told(0, 10, change=change) == len(range(0, 10, 3))


def test_a_loop_that_may_end_early_runs_its_most():
    condition = """%less = pred[] compare(%j, %stop), direction=LT
  %z = f32[] get-tuple-element(%q), index=2
  %one = f32[] constant(1)
  %small = pred[] compare(%z, %one), direction=LT
  ROOT %both = pred[] and(%less, %small)"""
    assert told(0, 7, condition=condition) == 7


def test_what_the_compiler_knows_goes_first():
    def change(text):
        return text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"4"}}')

    assert told(0, 10, change=change) == 4


@pytest.mark.parametrize(
    "before, after", [("tuple(%first, %end", "tuple(%k, %end"), ("direction=LT", "direction=NE")]
)
def test_what_the_program_does_not_tell(before, after):
    """Where the counter starts at data, or ends at no bound."""
    assert told() == 10
    assert told(change=lambda text: text.replace(before, after)) is None


def test_a_counter_that_falls_has_no_bound_above():
    assert told(step=-1) is None


def test_a_step_that_can_not_be_read_counts_as_one():
    """The counters of scans rise by one."""
    assert told(step=3, change=lambda text: text.replace("add(%i, %by)", "add(%i, %i)")) == 10


def test_the_trip_count_of_a_loop_that_does_not_tell():
    """TPU modules carry no known_trip_count: it follows from start, step and bound."""
    text = """
%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[4,4] get-tuple-element(%p), index=1
  %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[4,4]) tuple(%next, %y)
}

%condition (q: (s32[], f32[4,4])) -> pred[] {
  %q = (s32[], f32[4,4]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(9)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[4,4]) -> (s32[], f32[4,4]) {
  %a = f32[4,4]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,4]) tuple(%zero, %a)
  ROOT %loop = (s32[], f32[4,4]) while(%start), condition=%condition, body=%body
}
"""
    assert count(hlo.parse(text)).flops == 5 * 2 * 4**3
    lines = [line for line in text.splitlines() if "get-tuple-element" not in line]
    newer = "\n".join(lines).replace("%i,", "%p#0,").replace("%x", "%p#1").replace("%j,", "%q#0,")
    assert "compare(%q#0, %end)" in newer and "dot(%p#1, %p#1)" in newer
    assert count(hlo.parse(newer)) == count(hlo.parse(text))
