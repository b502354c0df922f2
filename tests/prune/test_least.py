"""Least widths in training: no cut goes below them, what they keep is folded, a resumed run is the same run."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import catode
from catode.prune import selfcheck
from catode.prune.describe.costs import count
from catode.prune.gated.cut import keep_units, restrict
from catode.structures import fates
from catode.structures.description import Block, Site

IMAGES = (2, 3, 8, 8)


class Residual(nn.Module):
    """``x + project(norm(expand(x)))``."""

    def __init__(self):
        super().__init__()
        self.expand, self.norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x):
        return x + self.project(self.norm(self.expand(x)).relu())


class Network(nn.Module):
    """Two branches, and a width in none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), Residual(), Residual()
        self.last, self.head = nn.Conv2d(8, 10, 3, padding=1), nn.Linear(10, 4)

    def forward(self, x):
        x = self.two(self.one(self.stem(x)))
        return self.head(self.last(x).relu().mean((2, 3)))


LEAST = {"one.expand": 5, "two.*": 12, "last": 3}


def pruned(least=LEAST, **given):
    model = Network()
    blocks = catode.describe(model, torch.zeros(IMAGES), least=least)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    own = dict(nu=1e4, steps=60, warmup=5, memory=10, epoch_steps=math.inf, alpha=0.0)
    return (
        model,
        optimizer,
        catode.Pruner(model, torch.zeros(IMAGES), optimizer=optimizer, blocks=blocks, **own | given),
    )


def run(model, optimizer, pruner, begin, end):
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, *IMAGES[1:], generator=generator), torch.randint(4, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        for place in pruner.inventory.standing(pruner.kept):
            assert pruner.kept[place.units].sum() >= place.site.least
            assert len(pruner.state.present[place.number]) >= place.site.least


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("round_to", [1, 4])
def test_widths_come_down_to_their_least_and_no_further(round_to):
    model, optimizer, pruner = pruned(round_to=round_to)
    sites = {place.site.name: place for place in pruner.inventory.places}
    assert {name: place.site.least for name, place in sites.items()} == {"one.expand": 5, "two.expand": 12, "last": 3}
    assert not pruner.gated[sites["two.expand"].units].any(), "a width that stays whole has no gates"
    run(model, optimizer, pruner, 0, 60)
    model = pruner.finish()
    widths = {name: int(pruner.kept[place.units].sum()) for name, place in sites.items()}
    assert widths == {"one.expand": {1: 5, 4: 8}[round_to], "two.expand": 12, "last": {1: 3, 4: 4}[round_to]}
    assert (model.one.expand.out_channels, model.two.project.in_channels) == (widths["one.expand"], 12)
    for name in ("one.expand", "last"):
        fate = pruner.fate[sites[name].units]
        assert (fate == fates.KEPT_AT_LEAST).sum() == sites[name].site.least
        assert (fate == fates.KEPT_FOR_WIDTH).sum() == widths[name] - sites[name].site.least
    assert pruner.kept_for_width == sum(widths.values()) - 12 - 5 - 3
    assert count(model, torch.zeros(IMAGES)) == pruner.counts()
    again = Network()
    restrict(again, catode.describe(again, torch.zeros(IMAGES)), pruner.structure()).load_state_dict(model.state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_a_least_keeps_does_not_change_the_network_when_it_is_decided():
    """Its keep probability goes into its weights: gated and plain network are the same."""
    model, optimizer, pruner = pruned()
    x, carry_out, low = torch.randn(IMAGES), pruner._carry_out, []

    def watched(outcome):
        pruner.gates.set(torch.from_numpy(pruner.keep_prob).float(), pruner.gates.draw.detach())
        new = (outcome.fate == fates.KEPT_AT_LEAST) & (pruner.fate != fates.KEPT_AT_LEAST)
        low.extend(pruner.keep_prob[new])
        with torch.no_grad():
            before = model.eval()(x)
            removed = carry_out(outcome)
            torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
        model.train()
        return removed

    pruner._carry_out = watched
    run(model, optimizer, pruner, 0, 60)
    assert len(low) >= 5 and min(low) < 0.9


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_branch_goes_although_its_width_has_a_least():
    model, optimizer, pruner = pruned(alpha=1.0)
    run(model, optimizer, pruner, 0, 60)
    model = pruner.finish()
    assert set(pruner.fate[: pruner.inventory.layers]) - {fates.COMMITTED} <= {*fates.REMOVED, fates.KEPT_AS_LAST}
    assert pruner.layers_kept < 2
    assert count(model, torch.zeros(IMAGES)) == pruner.counts()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_keeps_the_least():
    model, optimizer, pruner = pruned()
    run(model, optimizer, pruner, 0, 40)
    state = copy.deepcopy((pruner.state_dict(), optimizer.state_dict()))
    assert (pruner.fate == fates.KEPT_AT_LEAST).any(), "something is at its least already"
    run(model, optimizer, pruner, 40, 60)
    done = pruner.finish().state_dict()
    again, other, resumed = pruned()
    resumed.load_state_dict(state[0])
    other.load_state_dict(state[1])
    run(again, other, resumed, 40, 60)
    same = resumed.finish().state_dict()
    assert (resumed.fate == pruner.fate).all() and all(torch.equal(same[name], done[name]) for name in done)
    for least, words in ((None, "pruner.fate, where widths are at a least"), ({"one.*": 9, "last": 3}, "pruner.kept")):
        with pytest.raises(ValueError, match=words) as refused:
            pruned(least)[2].load_state_dict(state[0])
        assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_target_is_reached_where_the_leasts_permit_it():
    model, optimizer, pruner = pruned(target_macs=0.6, nu=0.5, alpha=0.5, least={"one.expand": 5, "last": 3})
    run(model, optimizer, pruner, 0, 60)
    pruner.finish()
    assert pruner.target.of(pruner.kept) <= 0.61


def hand(least):
    """A block by hand with a least."""
    site = Site("one.expand", 12, ("one.expand", "one.norm"), ("one.project",), normalised=False, least=least)
    return [Block("held", "", (site,), removable=False)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: catode.describe(Network(), torch.zeros(IMAGES), least={"one.expand": 13}),
         r"^`least\['one.expand'\]` must be at most 12, the largest of its widths; got .*=13\. Use keep=\["),
        (lambda: selfcheck.check(Network(), torch.zeros(IMAGES), hand(13)),
         r"^site `one.expand` must keep 0 to 12 units, its width, as `least`; got 13\. Correct it\.$"),
        (lambda: selfcheck.check(Network(), torch.zeros(IMAGES), hand(2.0)), r"as `least`; got 2\.0\. Correct it\.$"),
        (lambda: keep_units(Network(), hand(4)[0].sites[0], range(3)),
         r"^site `one.expand` must keep at least 4 units; got 3\. Lower its `least`\.$"),
        (lambda: pruned(target_macs=0.5), r"^`target_macs` must lie in .*=0\.5\. Without all that can go the network keeps 0\.65"),
        (lambda: pruned({"*": 12}), r"^`alpha` must be above 0 for a model of which no width can go below its `least`; got 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_a_model_that_is_to_stay_whole_is_refused():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    blocks = catode.describe(model, torch.zeros(2, 6), least={"0": 8})
    with pytest.raises(ValueError, match="^`least` must leave something that can go; got the whole width everywhere"):
        catode.Pruner(
            model,
            torch.zeros(2, 6),
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            blocks=blocks,
            nu=1.0,
            steps=50,
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_record_below_the_least_is_refused():
    inventory = pruned()[2].inventory
    record = inventory.record(np.ones(inventory.size, dtype=bool))
    record["one"]["sites"]["one.expand"] = [0, 3]
    with pytest.raises(ValueError, match="`one.expand` in structure.json must keep at least 5 units; got 2"):
        inventory.kept(record)
