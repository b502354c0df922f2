"""Where units lie after cuts: ranks among the entries that are left, against a mask of the whole tensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catode.structures.description import CONSUMER, PRODUCER, TIED, Block, Site, Slice
from catode.structures.inventory import Inventory
from catode.structures.layout import Layout, layout_of, units_in


@st.composite
def tensors(draw):
    """Sites with one or two ranges each in one dimension, with entries of nobody between them, and what is kept of them."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=4))
    gaps = draw(st.lists(st.integers(0, 2), min_size=9, max_size=9))
    order = draw(st.permutations([site for site, (_, _, ranges) in enumerate(sizes) for _ in range(ranges)]))
    parts, end = [[] for _ in sizes], 0
    for place, site in enumerate(order):
        end += gaps[place]
        width, each, _ = sizes[site]
        parts[site].append(Slice("t", 0, PRODUCER, end, each))
        end += width * each
    sites = [
        Site(f"s{n}", width, (), (), parts=tuple(own))
        for n, ((width, *_), own) in enumerate(zip(sizes, parts, strict=True))
    ]
    kept = [draw(st.lists(st.booleans(), min_size=site.width, max_size=site.width).filter(any)) for site in sites]
    return sites, [np.flatnonzero(own) for own in kept], end + gaps[-1]


@given(tensors())
def test_law_entries_are_ranks_among_those_that_are_left(drawn):
    sites, kept, size = drawn
    whole, stays = np.arange(size), np.ones(size, dtype=bool)
    for site, units in zip(sites, kept, strict=True):
        for part in site.parts:
            stays[part.entries(np.setdiff1d(np.arange(site.width), units))] = False
    layout = Layout(sites)
    again = Layout(sites, {site: len(units) for site, units in zip(sites, kept, strict=True)})
    before = layout.copy()
    for site, units in zip(sites, kept, strict=True):
        layout.keep(site, len(units))
    for site, units in zip(sites, kept, strict=True):
        assert layout.present(site) == again.present(site) == len(units) and before.present(site) == site.width
        for part in site.parts:
            for one in (layout, again):
                assert (whole[stays][one.entries(part, np.arange(len(units)))] == part.entries(units)).all()
            assert (before.entries(part, units) == part.entries(units)).all()


def test_sites_of_plain_layers_have_their_tensors_to_themselves():
    site = Site("a", 4, ("a",), ("b",))
    layout = Layout([site], {site: 2})
    assert layout.present(site) is None and layout.entries(Slice("b.weight", 1, CONSUMER), [0, 1]).tolist() == [0, 1]


def test_the_layout_of_a_cut_network():
    one = Site("one", 3, (), (), parts=(Slice("t", 0, PRODUCER, 0, 2), Slice("u", 1, CONSUMER)))
    other = Site("other", 2, (), (), parts=(Slice("t", 0, PRODUCER, 6), Slice("v", 1, CONSUMER)))
    inventory = Inventory([Block("b", "", (one, other), removable=False)])
    layout = layout_of(inventory, [np.array([1, 3]), np.array([4, 5])])
    assert layout.present(one) == 2 and layout.entries(other.parts[0], [0, 1]).tolist() == [4, 5]


@pytest.mark.parametrize(
    ("each", "multiple", "units"), [(1, 8, 8), (2, 8, 4), (64, 8, 1), (3, 8, 8), (12, 8, 2), (16, 1, 1)]
)
def test_units_that_make_up_a_multiple_of_a_width(each, multiple, units):
    parts = (Slice("t", 0, PRODUCER, 0, each), Slice("bias", 0, TIED), Slice("u", 1, CONSUMER, 0, 7 * each))
    assert units_in(multiple, Site("s", 4, (), (), parts=parts)) == units
    assert units_in(multiple, Site("s", 4, ("a",), ("b",))) == multiple
