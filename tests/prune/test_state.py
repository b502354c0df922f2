"""What a pruner takes up again, and what it refuses."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from test_pruner import dense, loop, make

from catode.prune.state import ARRAY, NAMES, SCHEMA, Rule, pack
from catode.structures import fates


def leaves(schema, packed, place=()):
    """Place, rule and value of every packed value."""
    for name, rule in schema.items():
        if isinstance(rule, Rule):
            yield (*place, name), rule, packed[name]
        elif packed[name] is not None:
            yield from leaves(rule, packed[name], (*place, name))


@pytest.fixture(scope="module", params=[dict(), dict(shadow=500), dict(measure_every=1, target_macs=0.5, read_every=4)])
def saved(request):
    """Arguments of a pruner, and its state in the middle of a run and of a burst."""
    model, optimizer, pruner = make(**request.param)
    loop(model, optimizer, pruner, 83)
    state = pruner.state_dict()
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    return request.param, torch.load(buffer, weights_only=True)


def put(state, place, value):
    """A copy of a state with another value at a place."""
    state = copy.deepcopy(state)
    part = state["pruner"]
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    return state


def wrong(value):
    """Values of other types, shapes, kinds and signs than a packed one."""
    yield from ("x", {}, [None], {ARRAY: None}, {NAMES: [3]}, 2j, torch.zeros(2, 3, 4))
    yield True if not isinstance(value, bool) else 1
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield from (-1, -1.0, math.nan, math.inf, float(value) if type(value) is int else int(value))
    tensor = value[ARRAY] if isinstance(value, dict) and ARRAY in value else value
    if not torch.is_tensor(tensor):
        return
    wrap = (lambda t: {ARRAY: t}) if tensor is not value else lambda t: t
    yield from (None, tensor.tolist(), {ARRAY: tensor} if tensor is value else tensor)
    yield from map(wrap, (tensor[..., :-1], torch.cat([tensor, tensor], -1), tensor[None], tensor.cfloat()))
    if tensor.dtype.is_floating_point:
        yield from (wrap(torch.full_like(tensor, bad)) for bad in (-1.0, math.nan, math.inf))


MAY_BE = {  # numbers that are not wrong there, of -1, NaN and infinity, and whether nothing may stand there
    "total": (-1,),
    "_last": (-1, math.nan),
    "numbers": (-1, math.nan, math.inf),
    "outcome_time": (math.nan,),
    "weights": (None,),
}


def allowed(place, bad):
    tensor = bad[ARRAY] if isinstance(bad, dict) and ARRAY in bad else bad
    if place[-1] == "weights" and torch.is_tensor(bad) and bad.dim() == 1 and bad.is_floating_point():
        return True
    for number in MAY_BE.get(place[-1], ()):
        if bad is None and number is None:
            return True
        if torch.is_tensor(tensor) and tensor.is_floating_point() and number is not None:
            like = torch.full_like(tensor, number)
            if torch.equal(torch.nan_to_num(tensor, nan=7.0), torch.nan_to_num(like, nan=7.0)):
                return True
    return False


def test_law_every_packed_value_has_a_rule(saved):
    _, state = saved

    def names(tree, rules):
        assert tree.keys() == rules.keys()
        for name, rule in rules.items():
            if not isinstance(rule, Rule) and tree[name] is not None:
                names(tree[name], rule)

    names(state["pruner"], SCHEMA)


def refusal(changes, state, pruner=None):
    """What is said of a state; a pruner that refused one before is as fresh as another."""
    pruner = pruner or make(dense(3), **changes)[2]
    with pytest.raises(ValueError, match=r"^`state` must [^\n]+$") as refused:
        pruner.load_state_dict(state)
    return str(refused.value)


def test_law_every_wrong_value_is_one_line_that_names_its_place(saved):
    changes, state = saved
    tried, pruner = 0, make(dense(3), **changes)[2]
    before = str(pack(pruner.state)), pruner.checksum()
    for place, _, value in leaves(SCHEMA, state["pruner"]):
        for bad in wrong(value):
            if not allowed(place, bad):
                try:
                    told = refusal(changes, put(state, place, bad), pruner)
                except pytest.fail.Exception:
                    pytest.fail(f"{place} may be {bad}")
                named = f"something else at pruner.{'.'.join(place)}, which must "
                assert named in told or "of the same network" in told, (place, bad)
                tried += 1
    assert tried > 500 and (str(pack(pruner.state)), pruner.checksum()) == before


def test_what_a_state_leaves_open_is_taken_up(saved):
    changes, state = saved
    for place, _, value in leaves(SCHEMA, state["pruner"]):
        for bad in wrong(value):
            if not allowed(place, bad):
                continue
            if torch.is_tensor(bad) and bad.shape != value.shape:  # a vector of other weights
                assert "gradients of the network's" in refusal(changes, put(state, place, bad))
            else:
                make(dense(3), **changes)[2].load_state_dict(put(state, place, bad))


def burst(state, **changes):
    """The state with a part of its first gradient of a burst changed."""
    gradient, draw = state["pruner"]["products"]["burst"][0]
    parts = dict(gradient=gradient, draw=draw) | changes
    return put(state, ("products", "burst"), [list(parts.values())])


@pytest.mark.parametrize(
    "changes",
    [
        dict(gradient=None),
        dict(gradient=torch.zeros(5)),
        dict(gradient=torch.zeros(3, 4)),
        dict(gradient=torch.zeros(5, dtype=torch.int64)),
        dict(draw=None),
        dict(draw={ARRAY: torch.ones(3, dtype=torch.float64)}),
        dict(draw={ARRAY: torch.ones(75)}),
        dict(draw={ARRAY: torch.full((75,), 2.0, dtype=torch.float64)}),
        dict(draw={ARRAY: torch.full((75,), math.nan, dtype=torch.float64)}),
        dict(more=3),
    ],
    ids=str,
)
def test_a_wrong_part_of_a_burst_is_one_line(changes):
    model, optimizer, pruner = make()
    loop(model, optimizer, pruner, 81)
    state = pruner.state_dict()
    assert len(pruner.keep_prob) == 75 and len(state["pruner"]["products"]["burst"]) == 1
    assert "burst" in (told := refusal({}, burst(state, **changes))) or "gradients of the network's" in told


def contrary(state):
    """States whose values follow their rules, but not each other."""
    packed = state["pruner"]
    kept, keep_prob = packed["kept"][ARRAY], packed["keep_prob"][ARRAY]
    yield "kept", put(state, ("kept",), {ARRAY: ~kept})
    yield "kept", put(state, ("fate",), {NAMES: [fates.PRUNED_ZERO] * len(kept)})
    decided = [fates.COMMITTED if fate == fates.UNDECIDED else fate for fate in packed["fate"][NAMES]]
    yield "keep_prob", put(put(state, ("fate",), {NAMES: decided}), ("keep_prob",), {ARRAY: 0 * keep_prob})
    units = [part[ARRAY] for part in packed["present"]]
    for other in (units[0][:-1], units[0].flip(0), units[0] - 1, units[0][None], units[1]):
        yield "present", put(state, ("present",), [{ARRAY: part} for part in (other, *units[1:])])
    yield "draws.rows", put(state, ("draws", "rows"), None)
    yield "draws.rows", put(state, ("draws", "rows"), packed["draws"]["rows"][:0])


def test_values_that_contradict_each_other_are_one_line():
    model, optimizer, pruner = make()
    loop(model, optimizer, pruner, 83)
    state = pruner.state_dict()
    found = list(contrary(state))
    for name, other in found:
        assert f"something else at pruner.{name}, which must" in refusal({}, other)
    assert len(found) == 10


@pytest.mark.parametrize("change", ["nan", "dtype", "longer", "unknown", "kind"])
def test_wrong_weights_are_one_line(change):
    model, optimizer, pruner = make()
    loop(model, optimizer, pruner, 83)
    state = pruner.state_dict()
    name = next(iter(state["model"]))
    tensor = state["model"][name]
    state["model"] |= {
        "nan": {name: tensor * math.nan},
        "dtype": {name: tensor.double()},
        "longer": {name: torch.cat([tensor, tensor])},
        "unknown": {"unknown": tensor},
        "kind": {name: 3},
    }[change]
    assert f"model.{'unknown' if change == 'unknown' else name}" in refusal({}, state)


def test_a_state_is_taken_up_at_every_step_of_a_run():
    """What is checked holds while gates are missing, measured, removed and gone."""
    model, optimizer, pruner = make(nu=5.0, steps=120, memory=10, measure_every=1, check_every=5, width_multiple=4)

    def packed(pruner):  # of a removed block, which units were present matters no more
        return str({name: value for name, value in pack(pruner.state).items() if name != "present"})

    def again(_):
        other = make(dense(3), nu=5.0, steps=120, memory=10, measure_every=1, check_every=5, width_multiple=4)[2]
        other.load_state_dict(pruner.state_dict())
        assert packed(other) == packed(pruner)

    loop(model, optimizer, pruner, 130, each=again)
    assert pruner.finished and (~pruner.kept).any()
