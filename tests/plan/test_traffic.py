"""Bytes read and written in main memory, by hand."""

import pytest

from mllm_align.plan import hlo
from mllm_align.plan.counts import count

KIB = 1024  # an f32[256]


def bytes_of(*lines, before=""):
    """Of an entry computation of these lines; its parameters move nothing."""
    text = before + "ENTRY %main () -> f32[256] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"
    return count(hlo.parse(text)).hbm_bytes


A = "%a = f32[256] parameter(0)"
B = "%b = f32[256] parameter(1)"
LAYERS = "%l = f32[100,256] parameter(2)"
I = "%i = s32[] parameter(3)"
ON_CHIP = "%s = f32[256]{0:S(1)} parameter(4)"


@pytest.mark.parametrize(
    "lines, kib",
    [
        ([A, B, "ROOT %c = f32[256] add(%a, %b)"], 3),
        ([A, "ROOT %c = f32[256] negate(%a)"], 2),
        ([A, "ROOT %c = bf16[256] convert(%a)"], 1.5),
        ([A, ON_CHIP, "ROOT %c = f32[256] add(%a, %s)"], 2),
        ([ON_CHIP, "ROOT %c = f32[256]{0:S(1)} negate(%s)"], 0),
        ([A, "ROOT %c = f32[16,16] bitcast(%a)"], 0),
        ([A, B, "ROOT %c = (f32[256], f32[256]) tuple(%a, %b)"], 0),
        ([LAYERS, I, "ROOT %c = f32[1,256] dynamic-slice(%l, %i), dynamic_slice_sizes={1,256}"], 2),
        ([LAYERS, "ROOT %c = f32[2,256] slice(%l), slice={[3:5], [0:256]}"], 4),
        ([LAYERS, I, "ROOT %c = f32[5,256] gather(%l, %i), offset_dims={1}"], 10),
        ([LAYERS, A, I, "ROOT %c = f32[100,256] dynamic-update-slice(%l, %a, %i)"], 2),
        ([A, "ROOT %c = (f32[256]{0:S(1)}, f32[256], u32[]) copy-start(%a)"], 1),
        ([ON_CHIP, "ROOT %c = (f32[256], f32[256]{0:S(1)}, u32[]) copy-start(%s)"], 1),
        ([A, 'ROOT %c = f32[256] custom-call(%a), custom_call_target="tpu_custom_call"'], 2),
        ([A, 'ROOT %c = f32[256] custom-call(%a), custom_call_target="Sharding"'], 0),
        (["ROOT %c = s32[256] iota(), iota_dimension=0"], 0),
    ],
    ids=lambda value: value[-1].split(" ", 3)[3][:20] if isinstance(value, list) else "",
)
def test_an_instruction_reads_its_operands_and_writes_its_result(lines, kib):
    assert bytes_of(*lines) == kib * KIB


FUSED = """%fused (p: f32[256], q: f32[256]) -> f32[256] {
  %p = f32[256] parameter(0)
  %q = f32[256] parameter(1)
  %r = f32[256] multiply(%p, %q)
  %s = f32[256] add(%r, %p)
  ROOT %t = f32[256] negate(%s)
}

"""


def test_what_happens_within_a_fusion_is_free():
    """Two operands are read, once each, and one result is written."""
    assert bytes_of(A, B, "ROOT %c = f32[256] fusion(%a, %b), kind=kLoop, calls=%fused", before=FUSED) == (
        3 * KIB
    )


def test_every_result_of_a_fusion_is_written():
    fused = FUSED.replace("ROOT %t = f32[256] negate(%s)", "ROOT %t = (f32[256], f32[256]) tuple(%r, %s)")
    line = "ROOT %c = (f32[256], f32[256]{0:S(1)}) fusion(%a, %b), kind=kLoop, calls=%fused"
    assert bytes_of(A, B, line, before=fused) == 3 * KIB, "one of the two lies on chip"


def test_what_a_fusion_hands_on_and_what_it_goes_on_with_are_free():
    """As where products and the next piece of a collective share a fusion."""
    piece = '%u = f32[256] all-gather(%q), backend_config={"flag_start":"1"}\n'
    fused = FUSED.replace(
        "ROOT %t = f32[256] negate(%s)",
        f"{piece}  ROOT %t = (f32[256], f32[256], f32[256]) tuple(%r, %p, %u)",
    )
    fused = fused.replace("multiply(%p, %q)", "negate(%p)")
    line = "ROOT %c = (f32[256], f32[256], f32[256]) fusion(%a, %b), kind=kOutput, calls=%fused"
    assert bytes_of(A, B, line, before=fused) == 2 * KIB
    assert bytes_of(A, B, line, before=fused.replace('"1"', '"-1"')) == 4 * KIB


def test_a_parameter_that_is_sliced_and_used_whole_is_read_whole():
    fused = """%fused (p: f32[100,256], i: s32[]) -> f32[100,256] {
  %p = f32[100,256] parameter(0)
  %i = s32[] parameter(1)
  %d = f32[1,256] dynamic-slice(%p, %i), dynamic_slice_sizes={1,256}
  %w = f32[100,256] broadcast(%d), dimensions={0,1}
  ROOT %t = f32[100,256] add(%p, %w)
}

"""
    on_chip = "%i = s32[]{:S(6)} parameter(3)"
    line = "ROOT %c = f32[100,256] fusion(%l, %i), kind=kLoop, calls=%fused"
    assert bytes_of(LAYERS, on_chip, line, before=fused) == 200 * KIB


def test_a_parameter_that_is_sliced_twice_is_read_twice_and_never_more_than_whole():
    def fused(size):
        return f"""%fused (p: f32[100,256]) -> f32[{size},256] {{
  %p = f32[100,256] parameter(0)
  %d = f32[{size},256] slice(%p), slice={{[0:{size}], [0:256]}}
  %e = f32[{size},256] slice(%p), slice={{[5:{size + 5}], [0:256]}}
  ROOT %t = f32[{size},256] add(%d, %e)
}}

"""

    for size, read in ((2, 4), (80, 100)):
        line = f"ROOT %c = f32[{size},256] fusion(%l), kind=kLoop, calls=%fused"
        assert bytes_of(LAYERS, line, before=fused(size)) == (read + size) * KIB


def test_another_tiling_of_the_same_bytes_is_free_within_a_fusion():
    """As the compiler calls stacked int8 matrices before it takes a layer's."""
    fused = """%tiled (q: s8[100,1024]) -> s8[100,1024] {
  %q = s8[100,1024]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %t = s8[100,1024]{1,0:T(8,128)(4,1)} copy(%q)
}

%fused (p: s8[100,1024], i: s32[]) -> s8[1,1024] {
  %p = s8[100,1024]{1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %f = s8[100,1024]{1,0:T(8,128)(4,1)} fusion(%p), kind=kLoop, ALIASING, calls=%tiled
  ROOT %d = s8[1,1024]{1,0:T(8,128)(4,1)} dynamic-slice(%f, %i), dynamic_slice_sizes={1,1024}
}

"""
    layers, on_chip = "%l = s8[100,1024] parameter(2)", "%i = s32[]{:S(6)} parameter(3)"
    line = "ROOT %c = s8[1,1024] fusion(%l, %i), kind=kLoop, calls=%fused"
    aliasing = fused.replace("ALIASING", "output_to_operand_aliasing={{}: (0, {})}")
    assert bytes_of(layers, on_chip, line, before=aliasing) == 2 * KIB
    assert bytes_of(layers, on_chip, line, before=fused.replace("ALIASING, ", "")) == 101 * KIB


def test_memory_traffic_leaves_out_what_lies_on_chip():
    text = """
ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %b = f32[1024]{0:T(1024)S(1)} negate(%a)
  ROOT %c = f32[1024]{0:T(1024)} negate(%b)
}
"""
    assert count(hlo.parse(text)).hbm_bytes == 2 * 4096


def test_memory_traffic_of_a_slice_within_a_fusion():
    """Of 100 layers of 1 KiB one is read, and one written; the slice stands in a fusion of its own."""
    text = """
%take (p: f32[100,256], i: s32[]) -> f32[1,256] {
  %p = f32[100,256] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = f32[1,256] dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,256}
}

%body (q: f32[100,256], j: s32[], r: f32[100,256]) -> f32[100,256] {
  %q = f32[100,256] parameter(0)
  %j = s32[] parameter(1)
  %r = f32[100,256] parameter(2)
  %y = s32[] constant(0)
  %t = f32[1,256] fusion(%q, %j), kind=kLoop, calls=%take
  ROOT %u = f32[100,256] dynamic-update-slice(%r, %t, %j, %y)
}

ENTRY %main (a: f32[100,256], k: s32[], b: f32[100,256]) -> f32[100,256] {
  %a = f32[100,256] parameter(0)
  %k = s32[]{:S(6)} parameter(1)
  %b = f32[100,256] parameter(2)
  ROOT %f = f32[100,256] fusion(%a, %k, %b), kind=kLoop, calls=%body
}
"""
    assert count(hlo.parse(text)).hbm_bytes == 2 * 1024
