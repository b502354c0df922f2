"""What becomes of structures at a check: the laws of `catode.decisions.outcomes` for any measurement, width and target."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from catode.decisions.outcomes import COMMITTED, FORCED, PROMOTED, PRUNED_TOLERANCE, PRUNED_ZERO, UNDECIDED, Outcomes
from catode.decisions.rules import NEARLY_ONE
from catode.decisions.target import Target
from catode.prune.describe.costs import describe
from catode.train.models import Architecture, ResNet

MODEL = ResNet(Architecture("basic", (1, 1, 1), 16, "A", "cifar"), 1, 3)
COST = describe(MODEL, MODEL.structures(), torch.zeros(1, 1, 8, 8))
N = COST.size


@st.composite
def checks(draw, targets=(None, "macs", "params"), multiples=(1, 4, 8), watching=False):
    """Rules, and the arguments of `Outcomes.of` at some check of some run."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    quantity = draw(st.sampled_from(targets))
    target = None if quantity is None else Target(COST, quantity, draw(st.floats(0.1, 0.95)))
    multiple = draw(st.sampled_from(multiples))
    kept = np.ones(N, dtype=bool)
    for units in COST.sites:  # widths that earlier checks may have left
        kept[rng.permutation(units)[: rng.integers(0, len(units) // multiple) * multiple]] = False
    open_ = kept & (rng.random(N) < draw(st.floats(0.3, 1.0)))
    theta = np.where(open_, rng.choice([0.0, 0.2, 0.6, 0.95, 1.0], size=N), np.where(kept, 1.0, 0.0))
    zero = open_ & (theta == 0.0) & (rng.random(N) < draw(st.floats(0.0, 1.0)))
    rest = open_ & ~zero
    found = dict(
        keep_prob=theta, benefit=rng.normal(size=N), benefit_upper=rng.gamma(1.0, size=N), price=np.full(N, 0.5)
    )
    return Outcomes(COST, multiple, target), dict(
        state=np.where(open_, UNDECIDED, np.where(kept, COMMITTED, PRUNED_ZERO)).astype("<U16"),
        kept=kept,
        found=found,
        zero=zero,
        safe=rest & (rng.random(N) < draw(st.floats(0.0, 0.6))),
        certain=rest & (theta >= NEARLY_ONE) & (rng.random(N) < 0.5),
        watching=(rng.random(N) < 0.5) & watching,
        final=draw(st.booleans()),
    )


@given(checks())
def test_every_structure_ends_in_one_piece_with_the_network(check):
    rules, given_ = check
    result = rules.of(**given_)
    open_ = given_["state"] == UNDECIDED
    assert (result.kept == COST.close(result.kept)).all() and not (result.kept & ~given_["kept"]).any()
    assert result.kept[COST.is_layer].any()
    assert (result.state == given_["state"])[~open_ & (result.kept == given_["kept"])].all(), "the decided stay decided"
    gone = given_["kept"] & ~result.kept
    assert np.isin(result.state[gone], [PRUNED_ZERO, PRUNED_TOLERANCE, PROMOTED, FORCED]).all()
    assert np.isin(result.state[open_ & result.kept], [UNDECIDED, COMMITTED, FORCED]).all()
    assert not (result.folded & ~result.kept).any()
    if given_["final"]:
        assert not (result.state == UNDECIDED).any()
    if result.everything:
        assert (result.kept == given_["kept"]).all() and not (result.state == UNDECIDED).any()


@given(checks(targets=[None], multiples=[1]))
def test_alone_goes_what_may_go_and_stays_what_is_certain(check):
    rules, given_ = check
    result = rules.of(**given_)
    going, open_ = given_["zero"] | given_["safe"], given_["state"] == UNDECIDED
    if given_["final"]:
        going = going | (open_ & ~given_["certain"] & (given_["found"]["keep_prob"] < 0.5))
    left = COST.close(given_["kept"] & ~going)
    assert result.everything == (not left[COST.is_layer].any())
    if not result.everything:
        assert (result.kept == left).all() and not result.folded.any()
        assert (result.state[given_["zero"]] == PRUNED_ZERO).all()
        assert (result.state[given_["safe"]] == PRUNED_TOLERANCE).all()
        assert (result.state[given_["certain"] & left] == COMMITTED).all()


@given(checks())
def test_widths_change_by_whole_groups_unless_the_block_goes(check):
    rules, given_ = check
    result = rules.of(**given_)
    for units in COST.sites:
        before, after = given_["kept"][units].sum(), result.kept[units].sum()
        assert after in (0, before) or after % rules.round_to == 0
        assert result.folded[units].sum() < rules.round_to, "a whole group would have gone"


@given(checks(targets=["macs", "params"]))
def test_a_target_keeps_what_would_lead_past_it_and_says_that_it_was_forced(check):
    rules, given_ = check
    result = rules.of(**given_)
    free = Outcomes(COST, rules.round_to).of(**given_ | {"final": False})
    if not (free.everything or result.everything or given_["final"]):
        assert not (free.kept & ~result.kept).any(), "a target lets nothing more go"
    met = rules.target.of(given_["kept"]) <= rules.target.share
    if met and rules.target.of(free.kept) < rules.target.share:
        assert (result.kept == given_["kept"]).all() or rules.target.of(result.kept) >= rules.target.share
    if not result.everything:
        stays = (given_["state"] == UNDECIDED) & result.kept & (result.state != UNDECIDED) & ~result.folded
        near_one = given_["found"]["keep_prob"] >= NEARLY_ONE
        assert (result.state[stays] == np.where(near_one, COMMITTED, FORCED)[stays]).all()


@given(checks(targets=[None], multiples=[1], watching=True))
def test_what_is_watched_stays_undecided_beyond_the_end(check):
    rules, given_ = check
    result = rules.of(**given_ | {"final": True})
    own = given_["watching"] & (given_["state"] == UNDECIDED) & ~given_["certain"]
    own &= ~given_["zero"] & ~given_["safe"]
    if not result.everything:
        assert (result.watched == own).all()
        assert (result.state[own & result.kept] == UNDECIDED).all()
        assert (result.state[own & ~result.kept] == PROMOTED).all()
