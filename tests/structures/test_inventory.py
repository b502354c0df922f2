"""The numbering of structures: a walk by hand, closure against brute force, records there and back, refusals."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catode.structures import fates
from catode.structures.description import CONSUMER, PRODUCER, Attribute, Block, Site, Slice
from catode.structures.inventory import KINDS, Inventory


def build(widths):
    return Inventory(
        [
            Block(f"b{b}", f"b{b}.bn", tuple(Site(f"b{b}.s{s}", width, (), ()) for s, width in enumerate(own)))
            for b, own in enumerate(widths)
        ]
    )


@st.composite
def inventories(draw, most=4, blocks=3):
    widths = st.lists(st.integers(1, most), min_size=1, max_size=2)
    return build(draw(st.lists(widths, min_size=1, max_size=blocks)))


def masks(draw, owner):
    return np.array(draw(st.lists(st.booleans(), min_size=owner.size, max_size=owner.size)), dtype=bool)


@st.composite
def kept(draw):
    owner = draw(inventories())
    return owner, masks(draw, owner)


SMALL = build([[2, 1], [3]])  # layers 0, 1; units 2, 3 | 4 | 5, 6, 7


def test_a_small_numbering_by_hand():
    assert (SMALL.layers, SMALL.size) == (2, 8) and KINDS == ("layer", "unit")
    assert [place.units.tolist() for place in SMALL.places] == [[2, 3], [4], [5, 6, 7]]
    assert [(p.number, p.layer, p.position, p.block.name, p.site.name) for p in SMALL.places] == [
        (0, 0, 0, "b0", "b0.s0"),
        (1, 0, 1, "b0", "b0.s1"),
        (2, 1, 0, "b1", "b1.s0"),
    ]
    assert [units.tolist() for units in SMALL.units] == [[2, 3], [4], [5, 6, 7]]
    assert SMALL.widths.tolist() == [2, 1, 3] and SMALL.site_layer.tolist() == [0, 0, 1]
    assert SMALL.unit_site.tolist() == [0, 0, 1, 2, 2, 2] and SMALL.unit_layer.tolist() == [0, 0, 0, 1, 1, 1]
    assert SMALL.is_layer.tolist() == [True] * 2 + [False] * 6
    assert SMALL.names() == [
        {"kind": "layer", "block": "b0", "site": "", "index": ""},
        {"kind": "layer", "block": "b1", "site": "", "index": ""},
        {"kind": "unit", "block": "b0", "site": "b0.s0", "index": 0},
        {"kind": "unit", "block": "b0", "site": "b0.s0", "index": 1},
        {"kind": "unit", "block": "b0", "site": "b0.s1", "index": 0},
        {"kind": "unit", "block": "b1", "site": "b1.s0", "index": 0},
        {"kind": "unit", "block": "b1", "site": "b1.s0", "index": 1},
        {"kind": "unit", "block": "b1", "site": "b1.s0", "index": 2},
    ]
    there = np.array([1, 0, 1, 0, 1, 0, 1, 1], dtype=bool)
    assert [place.number for place in SMALL.standing(there)] == [0, 1]
    assert [units.tolist() for units in SMALL.left(there)] == [[2], [4], [6, 7]]
    assert SMALL.close(there).tolist() == [True, False, True, False, True, False, False, False]
    assert SMALL.record(there) == {
        "b0": {"kept": True, "sites": {"b0.s0": [0], "b0.s1": [0]}},
        "b1": {"kept": False, "sites": {"b1.s0": []}},
    }


@settings(max_examples=60)
@given(inventories())
def test_law_every_structure_has_one_number(owner):
    numbers = [*range(owner.layers), *itertools.chain(*(units.tolist() for units in owner.units))]
    assert numbers == list(range(owner.size))
    assert [place.number for place in owner.places] == list(range(len(owner.widths)))
    for number, name in enumerate(owner.names()):
        assert (name["kind"] == KINDS[0]) == owner.is_layer[number]
        if name["kind"] == "unit":
            place = owner.places[owner.unit_site[number - owner.layers]]
            assert (place.block.name, place.site.name) == (name["block"], name["site"])
            assert place.units[name["index"]] == number and owner.unit_layer[number - owner.layers] == place.layer
            assert place.block.sites[place.position] is place.site and owner.blocks[place.layer] is place.block


def closed(owner, kept):
    """By the words: a block is there if and only if all its sites have units; without it there are none."""
    for layer in range(owner.layers):
        units = [kept[place.units] for place in owner.places if place.layer == layer]
        if not (all(u.any() for u in units) if kept[layer] else not any(u.any() for u in units)):
            return False
    return True


@settings(max_examples=40)
@given(st.data())
def test_law_close_finds_the_largest_closed_part(data):
    owner = data.draw(inventories(most=2, blocks=2))
    there = masks(data.draw, owner)
    before = there.copy()
    found = owner.close(there)
    assert (there == before).all(), "close() must leave its argument alone"
    assert closed(owner, found) and not (found & ~there).any()
    where = np.flatnonzero(there)
    for choice in itertools.product((False, True), repeat=len(where)):
        other = np.zeros(owner.size, dtype=bool)
        other[where] = choice
        assert not closed(owner, other) or not (other & ~found).any()


@settings(max_examples=60)
@given(kept(), st.integers(0, 2**32 - 1))
def test_law_close_is_idempotent_and_monotone(case, seed):
    owner, there = case
    found = owner.close(there)
    assert found.dtype == bool and (owner.close(found) == found).all()
    less = there & (np.random.default_rng(seed).random(owner.size) < 0.7)
    assert not (owner.close(less) & ~found).any()
    assert owner.close(there.astype(int).tolist()).tolist() == found.tolist()


@settings(max_examples=60)
@given(kept())
def test_law_a_closed_structure_is_read_back_as_it_was_written(case):
    owner, there = case
    found = owner.close(there)
    assert (owner.kept(owner.record(found)) == found).all()


def test_the_sites_of_a_block_that_is_gone_need_not_be_named():
    record = SMALL.record(np.ones(8, dtype=bool))
    record["b1"] = {"kept": False, "sites": {}}
    assert SMALL.kept(record).tolist() == [True, False, True, True, True, False, False, False]


def broken(**changes):
    record = copy.deepcopy(SMALL.record(np.ones(8, dtype=bool)))
    for name, value in changes.items():
        record[name] = value
    return record


BLOCK = {"kept": True, "sites": {"b1.s0": [0, 1, 2]}}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, "`blocks` of structure.json must name the architecture's blocks; got"),
        ({"b0": BLOCK}, "`blocks` of structure.json must name the architecture's blocks; got"),
        (broken(b2=BLOCK), "`blocks` of structure.json must name the architecture's blocks; got"),
        (broken(b1={"kept": True, "sites": {}}), "`b1` in structure.json must name its sites; got []"),
        (
            broken(b1={"kept": True, "sites": {"x": [0], "b1.s0": [0]}}),
            "`b1` in structure.json must name its sites; got ['b1.s0', 'x']",
        ),
        *(
            (
                broken(b1={"kept": True, "sites": {"b1.s0": units}}),
                f"`b1.s0` in structure.json must keep different units of 0..2; got {units}",
            )
            for units in ([], [3], [-1], [0, 0], [0, 1, 2, 3], [2, -1], [1, 7])
        ),
    ],
)
def test_records_of_other_networks_are_refused_in_one_line(record, says):
    with pytest.raises(ValueError) as caught:
        SMALL.kept(record)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("units", [[0], [2], [0, 2], [2, 0], [0, 1, 2]])
def test_any_different_units_of_a_site_may_be_kept(units):
    found = SMALL.kept(broken(b1={"kept": True, "sites": {"b1.s0": units}}))
    assert np.flatnonzero(found[5:]).tolist() == sorted(units)


@pytest.mark.parametrize(
    ("offset", "each", "units", "expected"),
    [
        (0, 1, [0, 3], [0, 3]),
        (5, 1, [0, 2], [5, 7]),
        (0, 3, [1], [3, 4, 5]),
        (10, 2, [2, 0], [14, 15, 10, 11]),
        (4, 2, [], []),
    ],
)
def test_entries_of_a_slice_by_hand(offset, each, units, expected):
    entries = Slice("weight", 0, PRODUCER, offset, each).entries(units)
    assert entries.tolist() == expected and entries.dtype == np.int64
    assert PRODUCER != CONSUMER


def test_a_slice_is_a_whole_dimension_of_single_entries_unless_it_says_so():
    assert Slice("weight", 1, CONSUMER).entries([0, 1, 4]).tolist() == [0, 1, 4]
    assert Block("b", "b.bn", ()).fixed == () and not Site("s", 1, (), ()).normalised


def test_every_fate_has_one_meaning_and_one_colour():
    assert tuple(fates.COLORS) == fates.FATES and len(set(fates.FATES)) == len(fates.FATES) == 11
    assert len(set(fates.COLORS.values())) == 11 and len(set(fates.MEANINGS.values())) == 11
    assert {fate for fate in fates.FATES if "removed" in fates.MEANINGS[fate]} == set(fates.REMOVED)
    rule = {fates.UNDECIDED, fates.COMMITTED, fates.PRUNED_TOLERANCE, fates.PRUNED_ZERO, fates.REMOVED_WITH_BLOCK}
    assert set(fates.NOT_BY_RULE) == set(fates.FATES) - rule


def lasting(widths):
    """A block that is a branch, and one that only holds sites, of which none may lose its last unit."""
    sites = [Site(f"s{n}", width, (), ()) for n, width in enumerate(widths)]
    return Inventory([Block("branch", "o", (sites[0],)), Block("held", "", tuple(sites[1:]), removable=False)])


def test_a_block_that_stays_keeps_a_unit_of_every_site():
    owner = lasting([2, 3, 2])
    assert owner.removable.tolist() == [True, False, *[True] * 7] and owner.least.tolist() == [0, 1, 1]
    closed = owner.close(np.zeros(owner.size, dtype=bool))
    assert np.flatnonzero(closed).tolist() == [1, 4, 7]
    some = np.ones(owner.size, dtype=bool)
    some[[4, 5]] = False
    assert (owner.close(some) == some).all()
    assert np.flatnonzero(owner.at_least(some)).tolist() == [6]
    assert owner.short(some, ~some) == []
    going = np.isin(np.arange(owner.size), [2, 3, 6, 7])
    assert [(units.tolist(), number) for units, number in owner.short(some, going)] == [([6], 1)]


@given(st.data())
def test_law_closing_twice_is_closing_once_and_what_must_stay_stays(data):
    owner = lasting(data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)))
    closed = owner.close(masks(data.draw, owner))
    assert (owner.close(closed) == closed).all() and closed[~owner.removable].all()
    assert all(closed[owner.units[number]].any() for number in np.flatnonzero(owner.least))
    assert (owner.kept(owner.record(closed)) == closed).all()


def test_a_record_with_fewer_units_than_the_least_is_refused():
    owner = Inventory([Block("b", "b.bn", (Site("b.s", 4, (), (), least=2),))])
    record = {"b": {"kept": True, "sites": {"b.s": [1, 3]}}}
    assert owner.kept(record).tolist() == [True, False, True, False, True]
    record["b"]["sites"]["b.s"] = [3]
    with pytest.raises(ValueError, match=r"^`b\.s` in structure\.json must keep at least 2 units; got 1\. Describe"):
        owner.kept(record)
    record["b"] |= {"kept": False}
    assert not owner.kept(record).any(), "the block may go as a whole"


def test_a_record_without_a_block_that_stays_is_refused():
    owner = lasting([2, 3])
    record = owner.record(np.ones(owner.size, dtype=bool))
    record["held"]["kept"] = False
    with pytest.raises(ValueError, match="`held` in structure.json must be kept"):
        owner.kept(record)


def test_an_attribute_counts_each_unit_once_unless_it_says_otherwise():
    assert Attribute("module", "width") == Attribute("module", "width", each=1, fixed=0)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({}, "layer"),
        ({"module": "stage", "addend": "add"}, "stage"),
        ({"module": "stage", "absent": (("layer.a", 0),)}, "stage"),
        ({"absent": (("layer.a", 0),)}, ""),
        ({"output": "", "removable": False}, ""),
        ({"output": "", "removable": False, "module": "stage"}, "stage"),
    ],
)
def test_a_block_lies_in_its_module_or_under_its_name_or_in_the_whole_network(given, place):
    assert Block(**{"name": "layer", "output": "layer.b", "sites": ()} | given).place == place
