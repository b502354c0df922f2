"""`round_to`: widths are multiples, nothing goes that was not decided to go, and what is kept changes nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from catode.decisions import rules
from catode.decisions.limits import QUANTITIES, Limits
from catode.decisions.target import SLACK
from catode.prune.pruner import Pruner
from catode.train.data import load
from catode.train.models import DenseResNet

BLOCKS, HIDDEN = 3, 24
EXAMPLE = torch.zeros(1, 1, 8, 8)


def limits(n, **given):
    return Limits(**{name: np.zeros(n) for name in QUANTITIES} | given)


@given(data=st.data(), multiple=st.integers(1, 9), widths=st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_law_whole_groups_leave_and_the_most_useful_wait(data, multiple, widths):
    n, starts = sum(widths), np.concatenate([[0], np.cumsum(widths)])
    leaving = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=bool)
    theta = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.4]), min_size=n, max_size=n)))
    sites = [np.arange(a, b) for a, b in pairwise(starts)]
    found = limits(n, keep_prob=theta, benefit=np.linspace(-1, 1, n), price=np.full(n, 0.5))
    held = rules.hold_back(leaving, found, sites, multiple)
    assert not (held & ~leaving).any()
    for units in sites:
        going = leaving[units] & ~held[units]
        left = len(units) - going.sum()
        assert left % multiple == 0 or left == len(units)
        assert held[units].sum() < multiple
        if going.any() and held[units].any():
            worth = list(zip(theta[units], found.benefit[units], strict=True))
            assert min(w for w, h in zip(worth, held[units], strict=True) if h) > max(
                w for w, g in zip(worth, going, strict=True) if g
            )


def network():
    torch.manual_seed(0)
    return DenseResNet(64, 10, blocks=BLOCKS, width=32, hidden=HIDDEN)


def make(**changes):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    settings = dict(nu=1.0, rate_ratio=0.1, steps=200, warmup=20, check_every=10, probe_size=16, memory=50, round_to=8)
    return model, optimizer, Pruner(model, EXAMPLE, optimizer=optimizer, **settings | changes)


def train(model, optimizer, pruner, steps, each=lambda check: None):
    images = load("digits")
    x = (images.train_images.float() / 255 - images.mean[0]) / images.std[0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        part = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(model.train()(x[part]), images.train_labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        check = pruner.step()
        if check is not None:
            each(check)


def widths(model):
    return [block.hidden.out_features for block in model.blocks if hasattr(block, "hidden")]


@pytest.mark.parametrize("multiple", [8, 5])  # 24 is no multiple of 5: a site stays whole or shrinks to 20, 15, ..
def test_every_width_at_every_moment_is_a_multiple(multiple):
    model, optimizer, pruner = make(round_to=multiple)
    seen = []

    def each(check):
        seen.append(widths(model))
        rows = {(r["block"], r["index"]): r for r in check.rows if r["kind"] == "unit"}
        for row in rows.values():  # no unit leaves but by its own rule, by rounding down or with its block
            if row["fate"] == "pruned_tolerance":
                assert row["keep_prob"] <= row["tolerance"] and row["benefit_upper"] < row["price"]
            if row["fate"] == "pruned_zero":
                assert row["keep_prob"] == 0.0

    train(model, optimizer, pruner, 200, each)
    assert pruner.finished and min(map(sum, seen)) < BLOCKS * HIDDEN
    assert all(w % multiple == 0 or w == HIDDEN for found in seen for w in found)
    assert sum(widths(pruner.finish())) == pruner.units_kept and widths(model) == seen[-1]
    assert pruner.kept_for_width <= min((multiple - 1) * BLOCKS, pruner.decisions().get("kept_for_width", 0))


def prepared(thetas):
    """A pruner some steps on, whose first site has these thetas and all else is at 1."""
    model, optimizer, pruner = make(nu=1e-6)
    train(model, optimizer, pruner, 20)
    pruner.keep_prob[:] = 1.0
    pruner.keep_prob[BLOCKS : BLOCKS + len(thetas)] = thetas
    pruner.read()
    return model, optimizer, pruner


def test_what_is_kept_for_width_are_the_best_and_the_network_stays_what_it_was():
    """13 of 24 units would be rounded down: 8 go, the 5 of the largest theta stay with it folded into their weights."""
    model, optimizer, pruner = prepared(np.linspace(0.1, 0.4, 13))
    expected = network()
    with torch.no_grad():
        expected.load_state_dict(pruner.gates.folded_state())
        expected.blocks[0].out.weight[:, :8] = 0.0
        x = torch.randn(16, *EXAMPLE.shape[1:])
        after = expected.eval()(x)
        momentum = optimizer.state[model.blocks[0].out.weight]["momentum_buffer"].clone()
        final = pruner.finish().eval()
        assert widths(final) == [16, 24, 24] and pruner.kept_for_width == 5
        assert pruner.structure()["blocks.0"]["sites"]["blocks.0.hidden"] == list(range(8, 24))
        assert torch.allclose(final(x), after, atol=1e-6)
    theta = torch.cat([torch.linspace(0.1, 0.4, 13)[8:], torch.ones(11)])
    found = optimizer.state[final.blocks[0].out.weight]["momentum_buffer"]
    assert torch.allclose(found, momentum[:, 8:] * theta, atol=1e-7)
    assert (pruner.fate[BLOCKS : BLOCKS + 8] == "removed_out_of_time").all()
    assert (pruner.fate[BLOCKS + 8 : BLOCKS + 13] == "kept_for_width").all()


def test_units_at_zero_that_cannot_make_a_group_are_kept_once_the_rest_is_decided():
    model, _, pruner = prepared(np.zeros(3))
    pruner.state.zero[BLOCKS : BLOCKS + 3] = True
    check = pruner._check(0.5)
    assert (pruner.fate[BLOCKS : BLOCKS + 3] == "undecided").all() and check.removed == 0
    pruner.fate[BLOCKS + 3 : BLOCKS + HIDDEN] = "committed"
    check = pruner._check(0.5)
    assert (pruner.fate[BLOCKS : BLOCKS + 3] == "kept_for_width").all() and check.removed == 0
    assert widths(model)[0] == HIDDEN and pruner.kept_for_width == 3
    weights = model.blocks[0].out.weight.detach()
    assert not weights[:, :3].any() and weights[:, 3:].all()  # it computes nothing yet, and it can learn:
    assert model.blocks[0].hidden.weight[:3].detach().any()


def test_a_site_may_empty_and_takes_its_block_along():
    model, _, pruner = prepared(np.zeros(HIDDEN))
    pruner.state.zero[BLOCKS : BLOCKS + HIDDEN] = True
    pruner._check(0.5)
    assert widths(model) == [24, 24] and pruner.layers_kept == 2 and pruner.kept_for_width == 0


@pytest.mark.parametrize(("multiple", "share"), [(4, 0.4), (8, 0.55), (8, 0.7)])
def test_a_target_is_met_in_whole_groups(multiple, share):
    settings = dict(round_to=multiple, target_macs=share, alpha=0.0, steps=300, warmup=30, rate_ratio=None)
    model, optimizer, pruner = make(**settings)
    train(model, optimizer, pruner, 300)
    assert all(width % multiple == 0 for width in widths(pruner.finish()))
    whole = np.ones(pruner.complexity.size)
    group = multiple * pruner.target.parts(whole)[-1]
    assert abs(pruner.target.of(pruner.kept) - share) <= max(group / 2, SLACK) + 1e-9


def test_a_narrow_site_leaves_in_groups_by_tolerance_too():
    units, left = np.arange(16), np.arange(16)
    found = limits(16, benefit_upper=np.linspace(0.1, 0.2, 16), price=np.ones(16), keep_prob=np.full(16, 0.1))
    for _ in range(2):  # a quarter of the site is less than a group
        safe = rules.ration(np.isin(units, left), found, np.zeros(16, bool), [left], multiple=8)
        safe &= ~rules.hold_back(safe, found, [left], 8)
        left = np.setdiff1d(left, units[safe])
    assert len(left) == 0


@pytest.mark.parametrize("value", [0, -8, 2.0, True, "8"])
def test_bad_multiples_are_refused(value):
    with pytest.raises(ValueError, match=r"`round_to` must be an integer"):
        make(round_to=value)
