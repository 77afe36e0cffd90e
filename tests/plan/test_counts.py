"""FLOPs and collectives of programs, compiled and written by hand, against numpy and hand counts."""

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


def entry(*lines, result="f32[4]"):
    """A module whose entry computation has these lines."""
    return "ENTRY %main () -> " + result + " {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


# ---- matrix products ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "left, right, contracted, batch, out",
    [
        ((6, 5), (5, 7), ([1], [0]), ([], []), (6, 7)),
        ((5, 6), (7, 5), ([0], [1]), ([], []), (6, 7)),
        ((3, 6, 5), (3, 5, 7), ([2], [1]), ([0], [0]), (3, 6, 7)),
        ((3, 4, 6, 5), (3, 4, 5, 7), ([3, 1], [2, 1]), ([0], [0]), (3, 6, 7)),
        ((5,), (5,), ([0], [0]), ([], []), ()),
        ((6,), (7,), ([], []), ([], []), (6, 7)),
    ],
)
def test_a_product_of_two_counts_its_multiplications(left, right, contracted, batch, out):
    """As many as numpy adds up where all factors are 1."""
    dims = (contracted, batch)
    wanted = np.asarray(jax.lax.dot_general(jnp.ones(left), jnp.ones(right), dims))
    assert wanted.shape == out

    def listed(dims):
        return "{" + ",".join(map(str, dims)) + "}"

    shapes = ["f32[" + ",".join(map(str, dims)) + "]" for dims in (left, right, out)]
    text = entry(
        f"%a = {shapes[0]} parameter(0)",
        f"%b = {shapes[1]} parameter(1)",
        f"ROOT %c = {shapes[2]} dot(%a, %b), lhs_contracting_dims={listed(contracted[0])}, "
        f"rhs_contracting_dims={listed(contracted[1])}",
    )
    assert count(hlo.parse(text)).flops == 2 * wanted.sum()


def test_every_branch_of_a_conditional_counts():
    """Any of them may run."""
    product = """%NAME (p: f32[N,N]) -> f32[N,N] {
  %p = f32[N,N] parameter(0)
  ROOT %d = f32[N,N] dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

"""
    sizes = {"one": "4", "two": "6"}
    branches = "".join(product.replace("NAME", name).replace("N", n) for name, n in sizes.items())
    for named in (
        "branch_computations={%one, %two}",
        "true_computation=%one, false_computation=%two",
    ):
        text = branches + entry(
            "%i = s32[] parameter(0)",
            "%x = f32[4,4] parameter(1)",
            "%y = f32[6,6] parameter(2)",
            f"ROOT %c = f32[] conditional(%i, %x, %y), {named}",
        )
        assert count(hlo.parse(text)).flops == 2 * 4**3 + 2 * 6**3


# ---- convolutions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, window, stride, pad, lhs_dilate, rhs_dilate, groups",
    [
        (9, 3, 1, (0, 0), 1, 1, 1),
        (9, 3, 2, (1, 1), 1, 1, 1),
        (9, 4, 3, (2, 5), 1, 1, 1),
        (9, 3, 1, (2, 2), 3, 1, 1),
        (9, 3, 1, (4, 4), 1, 4, 1),
        (7, 5, 2, (6, 3), 2, 3, 2),
    ],
)
def test_a_convolution_counts_products_with_real_inputs(
    size, window, stride, pad, lhs_dilate, rhs_dilate, groups
):
    """As many as a convolution of ones adds up; the other axis is 5 wide, its window 2."""
    batch, inputs, outputs = 2, 4, 6
    ones = jax.lax.conv_general_dilated(
        jnp.ones((batch, size, 5, inputs)),
        jnp.ones((window, 2, inputs // groups, outputs)),
        window_strides=(stride, 1),
        padding=(pad, (0, 1)),
        lhs_dilation=(lhs_dilate, 1),
        rhs_dilation=(rhs_dilate, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    shape = ",".join(map(str, ones.shape))
    text = entry(
        f"%a = f32[{batch},{size},5,{inputs}] parameter(0)",
        f"%b = f32[{window},2,{inputs // groups},{outputs}] parameter(1)",
        f"ROOT %c = f32[{shape}] convolution(%a, %b), "
        f"window={{size={window}x2 stride={stride}x1 pad={pad[0]}_{pad[1]}x0_1 lhs_dilate={lhs_dilate}x1 "
        f"rhs_dilate={rhs_dilate}x1}}, dim_labels=b01f_01io->b01f, feature_group_count={groups}",
    )
    assert count(hlo.parse(text)).flops == 2 * float(ones.sum())


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


def test_a_sum_of_squares_is_no_product():
    text = entry(
        "%a = f32[64,32] parameter(0)",
        "%zero = f32[] constant(0)",
        "%squares = f32[64,32] multiply(%a, %a)",
        "ROOT %out = f32[32] reduce(%squares, %zero), dimensions={0}, to_apply=%main",
    )
    assert count(hlo.parse(text)).flops == 0


# ---- kernels -----------------------------------------------------------------------------------------


def kernel(rest):
    return entry(
        "%a = f32[8] parameter(0)", f'ROOT %k = f32[8] custom-call(%a), custom_call_target="{rest}'
    )


def test_a_kernel_says_what_it_costs_or_is_asked():
    told = kernel('tpu_custom_call", backend_config={"cost_estimate":{"flops":"1200"}}')
    found = count(hlo.parse(told), kernel_flops=lambda call: 7.0)
    assert (found.flops, found.unknown_kernels) == (1200, 0)
    for silent in (
        kernel('tpu_custom_call"'),
        kernel('tpu_custom_call", backend_config={"cost_estimate":{"flops":"0"}}'),
        kernel('__gpu$xla.gpu.triton"'),
    ):
        found = count(hlo.parse(silent), kernel_flops=lambda call: 7.0)
        assert (found.flops, found.unknown_kernels) == (7, 0)
        found = count(hlo.parse(silent))
        assert (found.flops, found.unknown_kernels) == (0, 1)
    found = count(hlo.parse(kernel('Sharding"')))
    assert (found.flops, found.unknown_kernels, found.hbm_bytes) == (0, 0, 0)


# ---- collectives -------------------------------------------------------------------------------------


def sent_round_a_ring(kind, group, size):
    """Bytes that each of `group` devices passes on, share by share; size: bytes of the whole array."""
    share = size / group
    if kind == "all-to-all":  # every device keeps one of its shares
        return (group - 1) * share
    rounds = {"all-gather": group - 1, "reduce-scatter": group - 1, "all-reduce": 2 * (group - 1)}
    return rounds[kind] * share


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce", "all-to-all"])
def test_bytes_sent_of_every_collective(kind, group):
    """Of a whole array of 64 numbers of 32 bits; what each device puts in, and gets out."""
    share = 64 // group
    into, out = {
        "all-gather": (share, 64),
        "reduce-scatter": (64, share),
        "all-reduce": (64, 64),
        "all-to-all": (64, 64),
    }[kind]
    groups = (
        "{" + ",".join("{" + ",".join(str(group * i + j) for j in range(group)) + "}" for i in (0, 1)) + "}"
    )
    text = entry(
        f"%p = f32[{into}] parameter(0)", f"ROOT %c = f32[{out}] {kind}(%p), replica_groups={groups}"
    )
    (found,) = count(hlo.parse(text), devices=2 * group).collectives.values()
    assert (found.kind, found.group, found.slices, found.count) == (kind, group, 1, 1)
    assert (found.operand, found.output) == (4 * into, 4 * out)
    assert found.sent == sent_round_a_ring(kind, group, 4 * 64)


def test_a_permutation_sends_its_operand():
    text = entry(
        "%p = bf16[64] parameter(0)",
        "ROOT %c = bf16[64] collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,0}}",
    )
    (found,) = count(hlo.parse(text), devices=4).collectives.values()
    assert (found.kind, found.group, found.sent) == ("collective-permute", 2, 128)


@pytest.mark.parametrize(
    "kind, into, out",
    [
        ("all-gather", "f32[16]", "(f32[16], f32[64])"),
        ("all-reduce", "f32[64]", "f32[64]"),
        ("collective-permute", "f32[64]", "(f32[64], f32[64], u32[], u32[])"),
    ],
)
def test_a_collective_that_is_started_and_awaited_counts_once(kind, into, out):
    text = entry(
        f"%p = {into} parameter(0)",
        f"%s = {out} {kind}-start(%p), replica_groups={{{{0,1,2,3}}}}",
        f"ROOT %d = f32[64] {kind}-done(%s)",
    )
    (found,) = count(hlo.parse(text), devices=4).collectives.values()
    size = 256 if kind == "collective-permute" else sent_round_a_ring(kind, 4, 256)
    assert (found.kind, found.count, found.sent) == (kind, 1, size)


def test_a_group_of_one_sends_nothing():
    text = entry("%p = f32[64] parameter(0)", "ROOT %c = f32[64] all-reduce(%p), replica_groups={{0},{1}}")
    assert count(hlo.parse(text), devices=2).collectives == {}


def test_an_all_reduce_of_which_a_share_is_kept_is_a_reduce_scatter():
    """A TPU fuses the two halves: the sum over all devices, and the slice of each."""
    fused = """%both (p: f32[64], i: s32[]) -> f32[16] {
  %p = f32[64] parameter(0)
  %i = s32[] parameter(1)
  %sum = f32[64] all-reduce(%p), replica_groups={{0,1,2,3}}
  %copy = f32[64] bitcast(%sum)
  ROOT %share = f32[16] dynamic-slice(%copy, %i), dynamic_slice_sizes={16}
}

"""
    text = fused + entry(
        "%a = f32[64] parameter(0)",
        "%j = s32[] parameter(1)",
        "ROOT %f = f32[16] fusion(%a, %j), kind=kCustom, calls=%both",
    )
    (found,) = count(hlo.parse(text), devices=4).collectives.values()
    assert (found.kind, found.operand, found.output) == ("reduce-scatter", 256, 64)
    assert found.sent == sent_round_a_ring("reduce-scatter", 4, 256)


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
