"""The text of compiled programs, read into computations and instructions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.plan import hlo
from mllm_align.plan.hlo import Array


@pytest.mark.parametrize(
    "shape, arrays, sizes",
    [
        ("f32[4,8]{1,0}", [Array("f32", (4, 8), 0)], [128]),
        ("bf16[3]", [Array("bf16", (3,), 0)], [6]),
        ("pred[10]{0:T(256)S(1)}", [Array("pred", (10,), 1)], [10]),
        ("s4[10]", [Array("s4", (10,), 0)], [5]),
        ("f8e4m3fn[10]", [Array("f8e4m3fn", (10,), 0)], [10]),
        ("c64[2]", [Array("c64", (2,), 0)], [16]),
        ("u32[]{:S(2)}", [Array("u32", (), 2)], [4]),
        ("f32[<=16,2]", [Array("f32", (16, 2), 0)], [128]),
        ("f32[0,5]", [Array("f32", (0, 5), 0)], [0]),
        ("token[]", [Array("token", (), 0)], [0]),
        ("()", [], []),
        (
            "(f32[2]{0}, /*index=1*/(s32[], bf16[4,4]{1,0:T(8,128)(2,1)S(1)}))",
            [Array("f32", (2,), 0), Array("s32", (), 0), Array("bf16", (4, 4), 1)],
            [8, 4, 32],
        ),
    ],
)
def test_shapes(shape, arrays, sizes):
    found = hlo.arrays(shape)
    assert list(found) == arrays and [array.bytes for array in found] == sizes


def test_instructions_and_what_they_call():
    text = """HloModule jit_f, is_scheduled=true

%fused (p.1: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  %c = f32[] constant(2.5)
  %wide = f32[4]{0} broadcast(%c), dimensions={}
  ROOT %out.2 = f32[4]{0} multiply(%p.1, %wide), metadata={op_name="jit(f)/mul (x)"}
}

ENTRY %main.7 (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %fusion = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={source="a = b(c"}
}
"""
    module = hlo.parse(text)
    assert (module.entry, list(module.computations)) == ("main.7", ["fused", "main.7"])
    assert module.roots == {"fused": "out.2", "main.7": "fusion"}
    inside = module.computations["fused"]
    assert list(inside) == ["p.1", "c", "wide", "out.2"]
    assert (inside["p.1"].opcode, inside["p.1"].operands) == ("parameter", ("0",))
    assert inside["c"].operands == ("2.5",) and inside["out.2"].operands == ("p.1", "wide")
    fusion = module.computations["main.7"]["fusion"]
    assert (fusion.called("calls"), fusion.called("body")) == ("fused", None)


def test_an_instruction_over_several_lines():
    """As the notes of kernels may be."""
    text = """ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %k = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={
"cost_estimate":{"flops":"12"}
}
  ROOT %y = f32[4]{0} negate(%k)
}
"""
    inside = hlo.parse(text).computations["main"]
    assert list(inside) == ["x", "k", "y"] and '"flops":"12"' in inside["k"].rest


def test_numbers_among_attributes():
    rest = ", feature_group_count=12, window={size=3}"
    assert hlo.number(rest, "feature_group_count", "1") == "12"
    assert hlo.number(rest, "group_count", "1") == "1"


def test_what_xla_writes_is_read_whole():
    """Every instruction that a compiled program has."""

    def program(x):
        return jax.lax.scan(lambda c, row: (jnp.tanh(c @ row), c.sum()), x[0], x)

    text = jax.jit(program).lower(jnp.zeros((5, 8, 8))).compile().as_text()
    module = hlo.parse(text)
    lines = [line for line in text.splitlines() if line.startswith("  ") and " = " in line]
    assert sum(map(len, module.computations.values())) == len(lines)
    for inside in module.computations.values():
        for each in inside.values():
            if each.opcode not in ("constant", "parameter"):
                assert all(name in inside for name in each.operands), each


def test_elements_of_nested_tuples():
    """Commas of layouts and of inner tuples part nothing."""
    text = """
ENTRY %main (a: f32[4,4]) -> f32[2,4] {
  %a = ((f32[4,4]{1,0:T(8,128)}), /*index=1*/(s32[], f32[2,4]{1,0:T(8,128)S(1)}), u32[]{:S(2)}) parameter(0)
  %b = u32[] copy(%a#2)
  ROOT %c = f32[2,4]{1,0} copy(%a#1#1)
}
"""
    inside = hlo.parse(text).computations["main"]
    assert [array.dims for array in inside["a#1"].arrays] == [(), (2, 4)]
    (element,) = inside["a#1#1"].arrays
    assert (element.dtype, element.dims, element.space) == ("f32", (2, 4), 1)
    assert inside["a#2"].arrays[0].dtype == "u32" and inside["a#2"].operands == ("a",)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_in_every_notation(text, groups):
    assert np.sort(hlo.replica_groups(text, 4)).tolist() == groups


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("hello")
