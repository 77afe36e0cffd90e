"""The prompt group's arrays: padding, positions after a prefix, views, shapes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.batch import (
    Group,
    HostPrefix,
    Pixels,
    Prefix,
    Responses,
    Shape,
    blank,
    blank_prefix,
    pad,
    pad_prefixes,
    padded,
    stack,
    with_responses,
)

TILE = (4, 3)  # patches of a tile, numbers of a patch


def ids(*values):
    return np.array(values, np.int32)


def host_prefix(tokens, tiles=0):
    """Text of these tokens; its first `tiles` places are image embeddings, all in one tile each."""
    image = np.where(np.arange(len(tokens)) < tiles, 1 + np.arange(len(tokens)), -1).astype(np.int32)
    patches = np.arange(tiles * 12, dtype=np.float32).reshape(tiles, *TILE) + 1
    place = np.tile(np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int16), (tiles, 1, 1))
    return HostPrefix.causal(ids(*tokens), image, Pixels(patches, place))


def group(tokens, *responses, tiles=1):
    return Group((host_prefix(tokens, tiles),), tuple(ids(*r) for r in responses))


SHORT = group([9, 4, 5], [7, 8], [6])
LONG = group([9, 9, 1, 2, 3], [5], [1, 2, 3], tiles=2)


# ---- padding -----------------------------------------------------------------------------------------


def test_padded_lengthens_one_axis():
    array = np.array([[1, 2, 3], [4, 5, 6]], np.int16)
    rows, columns = padded(array, 3, -1), padded(array, 4, 9, axis=-1)
    assert rows.tolist() == [[1, 2, 3], [4, 5, 6], [-1, -1, -1]]
    assert columns.tolist() == [[1, 2, 3, 9], [4, 5, 6, 9]]
    assert rows.dtype == columns.dtype == np.int16


def test_prefixes_are_padded_at_the_end_of_their_row():
    found = pad_prefixes([SHORT.prefix, LONG.prefix], 6, 3)
    assert found.tokens.tolist() == [[9, 4, 5, 0, 0, 0], [9, 9, 1, 2, 3, 0]]
    assert found.image.tolist() == [[1, -1, -1, -1, -1, -1], [1, 2, -1, -1, -1, -1]]
    assert found.order.tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 0]]
    assert found.rope.tolist() == [[row] for row in found.order.tolist()]
    assert found.visible.tolist() == [[True] * 3 + [False] * 3, [True] * 5 + [False]]
    assert found.length.tolist() == [3, 5] and found.last.tolist() == [[2], [4]]
    patches, place = found.pixels
    assert patches.shape == (2, 3, *TILE) and place.shape == (2, 3, 4, 2)
    assert (patches[0, :1] == SHORT.prefix.patches).all() and not patches[0, 1:].any()
    assert (place[0, :1] == SHORT.prefix.place).all() and (place[0, 1:] == -1).all()
    alone = pad_prefixes([SHORT.prefix], 4)
    assert alone.patches is None and alone.place is None


def test_a_batch_holds_every_response_and_says_what_is_padding():
    batch = pad([SHORT, LONG], Shape(8, 4, 2), 2)
    assert batch.responses.tokens.tolist() == [
        [[7, 8, 0, 0], [6, 0, 0, 0]],
        [[5, 0, 0, 0], [1, 2, 3, 0]],
    ]
    assert batch.responses.mask.sum(-1).tolist() == [[2, 1], [1, 3]]
    assert (np.diff(batch.responses.mask.astype(int)) <= 0).all(), "real tokens stand at the start"
    assert batch.responses.weight.tolist() == [1, 1] and batch.responses.weight.dtype == np.float32
    assert batch.views == ((0, 1),) and batch.shape == Shape(8, 4, 2)


def test_filler_rows_repeat_the_first_group_with_weight_zero():
    batch = pad([SHORT, LONG], Shape(5, 3, 2), 4)
    assert batch.responses.weight.tolist() == [1, 1, 0, 0]
    one = pad([SHORT], Shape(5, 3, 2), 1)
    arrays = [replace(each.responses, weight=None) for each in (batch, one)], [batch.prefixes, one.prefixes]
    for many, single in arrays:
        for ours, first in zip(jax.tree.leaves(many), jax.tree.leaves(single), strict=True):
            assert (ours[2:] == first).all()


def test_prompts_alone_have_no_responses():
    batch = pad([group([1, 2])], Shape(4, 6, 1), 1)
    assert batch.responses.tokens.shape == (1, 0, 6) and batch.views == ((),)
    assert group([1, 2]).shape == Shape(2, 0, 1)


@pytest.mark.parametrize("smaller", [Shape(4, 3, 2), Shape(5, 2, 2), Shape(5, 3, 1)])
def test_a_group_that_does_not_fit_is_refused(smaller):
    assert LONG.shape == Shape(5, 3, 2)
    with pytest.raises(ValueError, match="does not fit"):
        pad([SHORT, LONG], smaller, 2)


def test_micro_batches_are_stacked_on_a_new_axis():
    first, second = (pad([each], Shape(5, 3, 2), 1) for each in (SHORT, LONG))
    both = stack([first, second])
    assert both.views == first.views
    for ours, one, two in zip(*map(jax.tree.leaves, (both, first, second)), strict=True):
        assert ours.shape == (2, *one.shape) and (ours[0] == one).all() and (ours[1] == two).all()
    assert both.shape == Shape(5, 3, 2)


# ---- prefixes ----------------------------------------------------------------------------------------


def test_a_kept_token_keeps_its_order_and_rotation():
    rope = np.stack([10 * np.arange(5), 20 * np.arange(5)]).astype(np.int32)
    prefix = replace(LONG.prefix, rope=rope)
    found = prefix.keep(np.array([True, False, True, False, True]))
    assert found.tokens.tolist() == [9, 1, 3] and found.image.tolist() == [1, -1, -1]
    assert found.order.tolist() == [0, 2, 4] and found.rope.tolist() == [[0, 20, 40], [0, 40, 80]]
    assert found.visible.all() and found.patches is prefix.patches


def mixed(prefix, taps=2):
    """Every embedding is mixed with itself and the next, but for the last."""
    shown = np.broadcast_to(prefix.image >= 0, (taps, len(prefix.image)))
    rows = np.stack([prefix.image + i for i in range(taps)])
    shares = np.where(shown, np.float32(0.25), np.float32(0))
    return replace(prefix, taps=np.where(shown, rows, 0), mix=shares)


def test_shares_go_with_their_embedding():
    found = pad_prefixes([mixed(SHORT.prefix), mixed(LONG.prefix)], 6)
    assert found.taps.tolist() == [[[1] + 5 * [0], [2] + 5 * [0]], [[1, 2] + 4 * [0], [2, 3] + 4 * [0]]]
    assert found.mix.tolist()[1] == 2 * [[0.25, 0.25, 0, 0, 0, 0]]
    kept = mixed(LONG.prefix).keep(np.array([False, True, True, False, False]))
    assert kept.taps.tolist() == [[2, 0], [3, 0]] and kept.mix.tolist() == [[0.25, 0], [0.25, 0]]
    like = jax.tree.map(lambda x: (x.shape[1:], x.dtype), found)
    made = blank_prefix(lambda shape, dtype: (shape, dtype), 6, axes=1, taps=2)
    assert (made.taps, made.mix) == (like.taps, like.mix)


def test_a_continuation_counts_on_from_the_last_real_token():
    """Of each row, in the order of attention and in every axis of rotation."""
    prefix = pad_prefixes([SHORT.prefix, LONG.prefix], 7)
    axes = jnp.stack([3 * prefix.order, 5 * prefix.order], axis=1)
    order, rope = replace(prefix, order=2 * prefix.order, rope=axes).after(3)
    assert order.tolist() == [[5, 6, 7], [9, 10, 11]]
    assert rope.tolist() == [[[7, 8, 9], [11, 12, 13]], [[13, 14, 15], [21, 22, 23]]]


def test_the_prefix_is_that_of_the_records_own_images():
    two = Group((SHORT.prefix, LONG.prefix), SHORT.responses)
    batch = pad([two], two.shape, 1)
    assert SHORT.prefix is SHORT.prefixes[0] is two.prefix and batch.prefix is batch.prefixes[0]
    length, response = SHORT.shape.prefix, SHORT.shape.response
    assert two.shape.tokens(two.views) == length + 2 * response + LONG.shape.prefix + response


# ---- responses and views -----------------------------------------------------------------------------


def test_some_of_the_responses():
    tokens = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    stored = (np.zeros((2, 3, 4)),)
    responses = Responses(tokens, tokens % 2 == 0, np.ones(2), stored, np.ones((2, 3, 4)))
    for which in ((0, 1, 2), (2,), (2, 0)):
        found = responses.take(which)
        assert (found.tokens == np.stack([tokens[:, k] for k in which], 1)).all()
        assert (found.mask == (found.tokens % 2 == 0)).all() and found.weight is responses.weight
        assert found.reference is None and found.sampler is None


def test_every_prefix_is_continued_by_all_responses_unless_told():
    prefixes = (SHORT.prefix, LONG.prefix)
    assert Group(prefixes, SHORT.responses).views == ((0, 1), (0,))
    assert Group(prefixes, SHORT.responses, ((0, 1), (1,))).views == ((0, 1), (1,))


def test_fields_of_the_responses_are_replaced():
    batch = pad([SHORT], SHORT.shape, 1)
    found = with_responses(batch, weight=np.zeros(1))
    assert found.responses.weight.tolist() == [0] and batch.responses.weight.tolist() == [1]
    assert found.responses.tokens is batch.responses.tokens and found.prefixes is batch.prefixes


def test_views_are_static():
    """Two groups that differ in nothing else are two programs."""
    batch = pad([SHORT], SHORT.shape, 1)
    other = replace(batch, views=((1, 0),))
    assert jax.tree.structure(batch) != jax.tree.structure(other)


# ---- shapes ------------------------------------------------------------------------------------------


def test_the_union_of_shapes_holds_both():
    one, two = Shape(8, 3, 5, ((4, 1), (2, 2))), Shape(6, 7, 1, ((3, 3), (2, 1)))
    both = one.union(two)
    assert both == two.union(one) == Shape(8, 7, 5, ((4, 3), (2, 2)))
    assert both.holds(one) and both.holds(two) and both.holds(both)
    assert not one.holds(two) and not two.holds(one)
    assert both.prefixes == ((8, 5), (4, 3), (2, 2))


def test_shapes_of_other_numbers_of_prefixes_have_no_union():
    with pytest.raises(ValueError):
        Shape(8, 3, 5).union(Shape(8, 3, 5, ((4, 1),)))


def test_a_group_of_two_prefixes_knows_its_shape():
    two = Group((SHORT.prefix, LONG.prefix), SHORT.responses, ((0, 1), (0,)))
    assert two.shape == Shape(3, 2, 1, ((5, 2),))
    batch = pad([two], Shape(4, 2, 1, ((6, 2),)), 1)
    assert batch.shape == Shape(4, 2, 1, ((6, 2),))
    assert [p.tokens.shape for p in batch.prefixes] == [(1, 4), (1, 6)]
    for narrow in ((4, 2), (5, 1)):
        with pytest.raises(ValueError, match="does not fit"):
            pad([two], Shape(3, 2, 1, (narrow,)), 1)


@pytest.mark.parametrize("views", [((0, 1),), ((0, 1, 2), (2,)), ((),)])
def test_blank_has_the_leaves_of_a_padded_group(views):
    """Their shapes without the leading axis, and their dtypes."""
    count = 1 + max((k for view in views for k in view), default=-1)
    prefixes = tuple(host_prefix([1, 2, 3], 1) for _ in views)
    made = Group(prefixes, tuple(ids(1, 2) for _ in range(count)), views)
    shape = Shape(5, 4, 2, ((6, 1),) * (len(views) - 1))
    batch = pad([made], shape, 1)
    found = blank(jax.ShapeDtypeStruct, shape, TILE, views, axes=1)
    assert jax.tree.structure(found) == jax.tree.structure(batch)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(batch), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape[1:], theirs.dtype)
    stored = blank(jax.ShapeDtypeStruct, shape, TILE, views, axes=1, reference=True).responses.reference
    assert stored is not None
    assert [(x.shape, x.dtype) for x in stored] == [((len(v), 4), np.float32) for v in views]
    fields = ("old", "advantages")
    rollout = blank(jax.ShapeDtypeStruct, shape, TILE, views, axes=1, fields=fields).responses
    assert rollout.returns is None and rollout.values is None
    for each in (rollout.old, rollout.advantages):
        assert each is not None and (each.shape, each.dtype) == ((count, 4), np.float32)


def test_a_blank_prefix_has_its_axes_of_rotation():
    found = blank_prefix(lambda shape, dtype: (shape, dtype), 7, axes=3)
    assert isinstance(found, Prefix) and found.patches is None and found.place is None
    assert found.rope == ((3, 7), jnp.int32) and found.order == ((7,), jnp.int32)
