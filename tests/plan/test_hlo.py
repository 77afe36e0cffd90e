"""FLOPs and collectives of compiled programs, against hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_align.plan import hlo
from mllm_align.plan.counts import count


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]), ("x",))


def counted(f, *args, **kwargs):
    text = jax.jit(f, **kwargs).lower(*args).compile().as_text()
    return count(hlo.parse(text), devices=8)


def test_matrix_product():
    a, b = jnp.zeros((64, 32)), jnp.zeros((32, 48))
    assert counted(lambda a, b: a @ b, a, b).flops == 2 * 64 * 32 * 48


def test_batched_product_with_two_contracted_axes():
    a, b = jnp.zeros((3, 8, 4, 5)), jnp.zeros((3, 4, 5, 7))
    assert counted(lambda a, b: jnp.einsum("bmij,bijn->bmn", a, b), a, b).flops == 2 * 3 * 8 * 20 * 7


def test_loops_count_as_often_as_they_run():
    """Two scans, one in the other: XLA's own analysis counts the product once."""
    w = jnp.zeros((5, 32, 32))

    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

    assert counted(lambda x, w: jax.lax.scan(inner, x, w)[0], jnp.zeros((16, 32)), w).flops == (
        5 * 3 * 2 * 16 * 32 * 32
    )


def test_a_loop_of_unknown_length_is_told():
    def program(x):
        return jax.lax.while_loop(lambda x: x.sum() < 10, lambda x: x @ x, x)

    text = jax.jit(program).lower(jnp.zeros((8, 8))).compile().as_text()
    once, ten = (count(hlo.parse(text), unknown=n) for n in (1, 10))
    assert once.unknown_loops == 1 and ten.flops == 10 * once.flops == 10 * 2 * 8**3


def test_a_loop_that_may_end_early_counts_its_most():
    """As decoding: until all are done, or the tokens are full."""

    def program(x):
        def going(state):
            return (state[0] < 12) & (state[1].sum() < 10)

        return jax.lax.while_loop(going, lambda state: (state[0] + 1, state[1] @ state[1]), (0, x))

    assert counted(program, jnp.zeros((8, 8))).flops == 12 * 2 * 8**3


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


def test_collectives_of_a_sharded_product(mesh):
    """Rows of x and of w are cut in 8: w is gathered; its gradient would be reduced."""
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    out = NamedSharding(mesh, P("x"))
    found = counted(lambda x, w: x @ w, x, w, out_shardings=out)
    (gather,) = found.collectives.values()
    size = 32 * 16 * 4
    assert (gather.kind, gather.group, gather.count) == ("all-gather", 8, 1)
    assert (gather.operand, gather.output, gather.sent) == (size / 8, size, size * 7 / 8)
    assert found.flops == 2 * 8 * 32 * 16


def test_collectives_in_a_loop(mesh):
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    w = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))

    def program(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = counted(program, x, w, out_shardings=NamedSharding(mesh, P("x")))
    gathers = [c for c in found.collectives.values() if c.kind == "all-gather"]
    assert sum(c.sent for c in gathers) == 6 * 32 * 32 * 4 * 7 / 8


def test_an_all_reduce_is_sent_twice(mesh):
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    found = counted(lambda x: x.sum(0), x, out_shardings=NamedSharding(mesh, P()))
    (reduce,) = found.collectives.values()
    assert reduce.kind == "all-reduce" and reduce.sent == 2 * 32 * 4 * 7 / 8


def test_pieces_of_a_fused_collective_count_once():
    """A TPU writes an asynchronous collective into the fusions that run beside it."""
    gather = "f32[8] all-gather(%p), replica_groups={{0,1}}, dimensions={0}, channel_id=7"
    text = "ENTRY %main (p: f32[4]) -> f32[8] {\n  %p = f32[4] parameter(0)\n"
    for number, start in enumerate(("-1", "2", "2")):
        note = (
            f'backend_config={{"async_collective_fusion_config":{{"flag_start":"{start}","flag_end":"8"}}}}'
        )
        text += f"  %g.{number} = {gather}, {note}\n"
    (found,) = count(hlo.parse(text + "  ROOT %out = f32[8] copy(%g.2)\n}\n")).collectives.values()
    assert (found.count, found.sent) == (1, 16)


def test_what_goes_between_slices():
    text = """
ENTRY %main (p: f32[256]) -> token[] {
  %p = f32[256] parameter(0)
  %begin = token[] after-all()
  %s = (f32[256], u32[], token[]) send(%p, %begin), frontend_attributes={TARGET}
  ROOT %end = token[] send-done(%s), channel_id=2
}
"""
    text = text.replace(
        "TARGET", '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    )
    (found,) = count(hlo.parse(text)).collectives.values()
    assert (found.kind, found.slices, found.operand, found.sent) == ("all-reduce", 2, 1024, 1024)


def test_batched_products_that_a_tpu_writes_as_convolutions():
    """8 products of 5x6 and 6x7: the window slides over a batch and meets one real pair at each place."""
    text = """
ENTRY %main (a: f32[8,5,6], b: f32[8,6,7]) -> f32[8,5,7] {
  %a = f32[8,5,6] parameter(0)
  %b = f32[8,6,7] parameter(1)
  ROOT %c = f32[8,5,7] convolution(%a, %b), window={WINDOW}, dim_labels=0bf_0io->0bf
}
""".replace("WINDOW", "size=8 stride=7 pad=0_0 lhs_dilate=8")
    assert count(hlo.parse(text)).flops == 8 * 2 * 5 * 6 * 7


def test_products_with_a_vector_that_are_written_as_sums():
    """A TPU multiplies a single row elementwise and adds up."""
    text = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (a: f32[64,32], b: f32[64,32]) -> f32[32] {
  %a = f32[64,32] parameter(0)
  %b = f32[64,32] parameter(1)
  %zero = f32[] constant(0)
  %products = f32[64,32] multiply(%a, %b)
  ROOT %out = f32[32] reduce(%products, %zero), dimensions={0}, to_apply=%add
}
"""
    assert count(hlo.parse(text)).flops == 2 * 64 * 32


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
