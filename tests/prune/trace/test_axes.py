"""Index maps against the indices themselves: every reshape, slice and concatenation of labelled arrays."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catode.prune.describe.trace.axes import Axis, Mismatch, product, runs, split_product, split_sum, total, unify


def labels(axis: Axis) -> list[tuple]:
    """Leaves and units of every index of an axis, by walking its tree; leaves of one index are left out."""
    axis = axis.find()
    if not axis.form:
        return [((id(axis), unit),) for unit in range(axis.size)] if axis.size > 1 else [()]
    parts = [labels(part) for part in axis.parts]
    if axis.form == "sum":
        return [label for part in parts for label in part]
    return [sum(labelled, ()) for labelled in itertools.product(*parts)]


def test_runs_of_a_fused_projection():
    heads, head = Axis(4), Axis(8)
    weight = Axis(96)
    unify(weight, product([Axis(3), heads, head]))
    at = [(run.offset, run.each) for run in runs(weight) if run.leaf is heads.find()]
    assert at == [(0, 8), (32, 8), (64, 8)]


def test_runs_behind_a_concatenation_and_a_flatten():
    first, second, place = Axis(3), Axis(5), Axis(4)
    flat = product([total([first, second]), place])
    at = {run.leaf: (run.offset, run.each) for run in runs(flat) if run.leaf is not place}
    assert at == {first: (0, 4), second: (12, 4)}


def test_a_reshaped_concatenation_ties_equal_parts():
    first, second = Axis(6), Axis(6)
    outer, inner = split_product(total([first, second]), 2)
    assert outer.size == 2 and first.find() is second.find() and inner.find() is first.find()


def test_a_chunk_after_a_shuffle_takes_whole_groups():
    group, inside = Axis(4), Axis(2)
    first, second = split_sum(product([group, inside]), 4)
    assert first.size == second.size == 4
    assert [leaf.size for leaf in group.leaves()] == [2, 2]


@pytest.mark.parametrize(
    "one, other",
    [
        (product([Axis(2), Axis(3)]), product([Axis(3), Axis(2)])),
        (total([Axis(2), Axis(4)]), product([Axis(2), Axis(3)])),
    ],
)
def test_maps_without_a_common_refinement_do_not_fit(one, other):
    with pytest.raises(Mismatch):
        unify(one, other)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=1, max_size=5), st.data())
def test_splits_keep_every_index(steps, data):
    axis = Axis(steps[0][1])
    for multiplied, size in steps[1:]:
        new = Axis(size)
        axis = product([axis, new]) if multiplied else total([axis, new])
    size = axis.size
    cut = data.draw(st.integers(1, size)) if size > 1 else 1
    try:
        if data.draw(st.booleans()) and size > cut:
            parts = split_sum(axis, cut)
            again = total(parts)
        else:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            parts = split_product(axis, data.draw(st.sampled_from(divisors)))
            again = product(parts)
    except Mismatch:
        return
    assert labels(axis) == labels(again)
    assert len(labels(axis)) == size


@given(st.lists(st.tuples(st.booleans(), st.integers(2, 4)), min_size=2, max_size=5))
def test_runs_list_every_entry_of_every_unit(steps):
    axis = Axis(steps[0][1])
    leaves = [axis]
    for multiplied, size in steps[1:]:
        new = Axis(size)
        leaves.append(new)
        axis = product([axis, new]) if multiplied else total([axis, new])
    kept = {leaves[0]: leaves[0].size - 1}
    entries = [
        run.offset + run.each * (leaves[0].size - 1) + place
        for run in runs(axis)
        if run.leaf is leaves[0]
        for place in range(run.each)
    ]
    assert axis.size - len(set(entries)) == axis.left(kept)
    assert len(entries) == len(set(entries))
