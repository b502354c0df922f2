"""The pruner in a loop that its user owns."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import math
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from catode._saved import saved_fields
from catode.prune.checking import ROW_FIELDS
from catode.prune.describe.costs import Counts, count
from catode.prune.gated.cut import restrict, unit_norms
from catode.prune.measure.measuring import NotFinite
from catode.prune.optimizers import check_optimizer, ode_time
from catode.prune.pruner import Pruner
from catode.prune.state import ARRAY, PrunerState, pack
from catode.structures.fates import FATES, KEPT_OUT_OF_TIME, REMOVED
from catode.train import data
from catode.train.models import DenseBlock, DenseResNet, build

EXAMPLE = torch.zeros(1, 1, 8, 8)
BLOCKS, HIDDEN = 3, 24


@functools.cache
def digits():
    images = data.load("digits")
    scale = [(x.float() / 255 - images.mean[0]) / images.std[0] for x in (images.train_images, images.test_images)]
    return scale[0], images.train_labels, scale[1], images.test_labels


def batches(seed, size=64):
    x, y, *_ = digits()
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for part in order.split(size)[:-1]:
            yield x[part], y[part]


def dense(seed=0):
    torch.manual_seed(seed)
    return DenseResNet(64, 10, blocks=BLOCKS, width=32, hidden=HIDDEN)


def make(model=None, *, lr=0.05, **changes):
    model = dense() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    settings = dict(
        nu=0.5, rate_ratio=0.05, steps=400, warmup=40, measure_every=2, check_every=20, probe_size=16, memory=100
    )
    return model, optimizer, Pruner(model, EXAMPLE, optimizer=optimizer, **settings | changes)


def loop(model, optimizer, pruner, steps, seed=0, loss=F.cross_entropy, each=None):
    """A plain training loop with one line for the pruner; returns the checks."""
    checks = []
    model.train()
    for _, (x, y) in zip(range(steps), batches(seed), strict=False):
        value = loss(model(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        check = pruner.step()
        if check is not None:
            checks.append(check)
        if each is not None:
            each(check)
    return checks


def accuracy(model):
    *_, x, y = digits()
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def physical(pruner):
    """Counts of the compact network as it now stands, without its gates."""
    state, structure = pruner.snapshot()
    fresh = dense(5)
    restrict(fresh, fresh.structures(), structure).load_state_dict(state)
    return count(fresh, EXAMPLE)


def assert_plain(model):
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks


@pytest.fixture(scope="module")
def finished():
    """One whole run, every step's thetas recorded."""
    model, optimizer, pruner = make()
    thetas, counted = [], []

    def each(check):
        thetas.append(pruner.keep_prob.copy())
        if check is not None:
            counted.append((pruner.counts(), physical(pruner)))

    checks = loop(model, optimizer, pruner, 500, each=each)
    final = pruner.finish()
    return SimpleNamespace(
        model=model, optimizer=optimizer, pruner=pruner, checks=checks, thetas=thetas, counted=counted, final=final
    )


def test_the_end_is_a_plain_smaller_network_that_works(finished):
    assert finished.final is finished.model and finished.pruner.finished
    assert_plain(finished.final)
    copy.deepcopy(finished.final)
    dense_counts = count(dense(), EXAMPLE)
    small = count(finished.final, EXAMPLE)
    assert small == finished.pruner.counts()
    assert small.macs < 0.9 * dense_counts.macs and small.params < dense_counts.params
    assert accuracy(finished.final) > 0.9
    assert finished.pruner.expected_macs == small.macs
    assert finished.pruner.step() is None, "a step after the end does nothing"


def test_law_counted_and_physical_network_agree_at_every_check(finished):
    assert len(finished.counted) > 5
    for pruner_counts, model_counts in finished.counted:
        assert pruner_counts == model_counts


def test_law_thetas_stay_in_the_unit_interval_and_zero_is_absorbing(finished):
    thetas = np.array(finished.thetas)
    assert ((thetas >= 0) & (thetas <= 1)).all()
    gone = thetas == 0
    assert (gone[1:] >= gone[:-1]).all()
    assert (thetas[:40] == 1).all(), "nothing moves in the warm-up"
    assert (thetas[-1] != thetas[0]).any()


def test_states_account_for_every_structure(finished):
    pruner = finished.pruner
    assert set(pruner.fate) <= set(FATES) - {"undecided"} and pruner.undecided == 0
    assert sum(pruner.decisions().values()) == pruner.complexity.size
    removed = np.isin(pruner.fate, REMOVED)
    assert not pruner.kept[removed].any()
    assert pruner.kept[pruner.fate == "committed"].all()
    assert (pruner.keep_prob == pruner.kept).all()
    assert (pruner.complexity.inventory.close(pruner.kept) == pruner.kept).all()
    assert pruner.layers_kept == sum(isinstance(b, DenseBlock) for b in finished.final.blocks)
    assert pruner.units_kept == sum(b.hidden.out_features for b in finished.final.blocks if isinstance(b, DenseBlock))
    assert 0 <= pruner.decided_by_rule <= 1


def test_rows_of_a_check_keep_the_promises_of_the_fates(finished):
    rows = [row for check in finished.checks for row in check.rows]
    assert rows and all(tuple(row) == ROW_FIELDS for row in rows)
    seen = set()
    for row in rows:
        seen.add(row["fate"])
        assert row["fate"] in FATES and row["kind"] in ("layer", "unit") and row["risk"] == 0.05
        assert 0 <= row["keep_prob"] <= 1 and row["price"] > 0
        if row["fate"] == "pruned_tolerance":
            assert row["benefit_upper"] < row["price"] and 0 < row["keep_prob"] <= row["tolerance"]
        if row["fate"] == "pruned_zero":
            assert row["keep_prob"] == 0
        if row["fate"] == "committed":
            assert row["keep_prob"] >= 0.9
        if not math.isnan(row["tolerance"]):
            assert row["tolerance"] <= min(row["separatrix"], 1.0)
    assert len(seen) >= 3
    decided = [
        (r["kind"], r["block"], r["site"], r["index"])
        for r in rows
        if r["fate"] not in ("undecided", "removed_with_block")
    ]
    assert len(decided) == len(set(decided)), "nothing is decided twice, but what was committed may go with its block"


def test_law_the_optimizer_follows_every_compaction(finished):
    parameters = list(finished.final.parameters())
    held = finished.optimizer.param_groups[0]["params"]
    assert {id(p) for p in held} == {id(p) for p in parameters} and len(held) == len(parameters)
    assert set(finished.optimizer.state) == set(parameters)
    for p in parameters:
        assert finished.optimizer.state[p]["momentum_buffer"].shape == p.shape


def test_structure_and_weights_fit_a_fresh_network(finished):
    state, structure = finished.pruner.snapshot()
    fresh = dense(5)
    restrict(fresh, fresh.structures(), structure)
    fresh.load_state_dict(state)
    *_, x, _ = digits()
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), finished.final.eval()(x))


def test_a_snapshot_in_mid_run_is_the_mean_field_network():
    model, optimizer, pruner = make(initial_keep_prob=0.7, warmup=150, check_every=10)
    loop(model, optimizer, pruner, 30)
    state, structure = pruner.snapshot()
    fresh = dense(5)
    restrict(fresh, fresh.structures(), structure)
    fresh.load_state_dict(state)
    *_, x, _ = digits()
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert pruner.undecided == pruner.complexity.size


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6), st.floats(0, 1e3)), min_size=1, max_size=30),
    st.floats(0.01, 1.0),
    st.floats(1e-3, 1e3),
)
def test_law_projection_keeps_theta_in_the_unit_interval(rounds, initial, rate_ratio):
    _, _, pruner = make(initial_keep_prob=initial, rate_ratio=rate_ratio, warmup=0)
    n = pruner.complexity.size
    for seed, centre, spread in rounds:
        random = np.random.default_rng(seed)
        before = pruner.keep_prob.copy()
        pruner.state.done += 1
        pruner.state.time += 0.5
        pruner.state.pending += 0.5
        seen = random.random(n) < 0.7
        pruner._move(centre + spread * random.standard_normal(n), seen, pruner.state.done)
        assert ((pruner.keep_prob >= 0) & (pruner.keep_prob <= 1)).all()
        assert (pruner.keep_prob[~seen] == before[~seen]).all(), "what was not seen does not move"
        assert (pruner.keep_prob[before == 0] == 0).all()
        assert pruner.expected_complexity == pytest.approx(pruner.complexity.index(pruner.keep_prob, 0.0))


def test_missing_evidence_does_not_override_initial_keep_prob():
    """Where theta starts is the user's choice; a step without evidence is no reason to leave it at once."""
    model, optimizer, pruner = make(initial_keep_prob=0.5, warmup=0, rate_ratio=1e-6)
    loop(model, optimizer, pruner, 2)
    assert (np.abs(pruner.keep_prob - 0.5) < 0.25).all()


@pytest.mark.parametrize("memory", [10, 15, 45])
def test_a_short_memory_still_pools_sensibly(memory):
    """Layers pool over memory / 10: with a short one the window keeps a floor."""
    _, _, pruner = make(memory=memory)
    n = pruner.complexity.size
    for _ in range(12):
        pruner.state.done += 1
        pruner.state.pending += 0.5
        pruner._move(np.full(n, -0.25), np.ones(n, dtype=bool), pruner.state.done)
        np.testing.assert_allclose(pruner.state.evidence.benefit, 0.25)


def test_alpha_zero_gates_no_layers():
    model, optimizer, pruner = make(alpha=0.0, steps=120, warmup=10)
    layers = slice(0, BLOCKS)
    assert (pruner.fate[layers] == "committed").all() and pruner.undecided == BLOCKS * HIDDEN
    x, y = next(batches(0))
    F.cross_entropy(model(x), y).backward()
    assert not pruner.gates.draw.grad[layers].any() and pruner.gates.draw.grad[BLOCKS:].all()
    model, optimizer, pruner = make(alpha=0.0, steps=120, warmup=10)
    checks = loop(model, optimizer, pruner, 120)
    assert all(row["kind"] == "unit" for check in checks for row in check.rows)
    assert sum(pruner.decisions().values()) == BLOCKS * HIDDEN
    assert_plain(pruner.finish())


def test_alpha_one_gates_no_units():
    model, optimizer, pruner = make(alpha=1.0, steps=120, warmup=10)
    assert (pruner.fate[BLOCKS:] == "committed").all() and pruner.undecided == BLOCKS
    x, y = next(batches(0))
    F.cross_entropy(model(x), y).backward()
    assert not pruner.gates.draw.grad[BLOCKS:].any() and pruner.gates.draw.grad[:BLOCKS].all()
    model, optimizer, pruner = make(alpha=1.0, steps=120, warmup=10)
    checks = loop(model, optimizer, pruner, 120)
    rows = [row for check in checks for row in check.rows]
    assert rows and all(row["kind"] == "layer" or row["fate"] == "removed_with_block" for row in rows)
    final = pruner.finish()
    assert_plain(final)
    assert all(b.hidden.out_features == HIDDEN for b in final.blocks if isinstance(b, DenseBlock))


def test_a_fixed_tolerance_is_used_as_it_is():
    model, optimizer, pruner = make(tolerance=0.4, steps=200, warmup=20)
    rows = [row for check in loop(model, optimizer, pruner, 200) for row in check.rows]
    values = {row["tolerance"] for row in rows if not math.isnan(row["tolerance"])}
    assert values == {0.4}
    assert any(row["fate"] == "pruned_tolerance" for row in rows)
    assert all(0 < row["keep_prob"] <= 0.4 for row in rows if row["fate"] == "pruned_tolerance")


@pytest.mark.parametrize("changes", [{}, {"alpha": 0.0}, {"alpha": 1.0}, {"tolerance": 1.0}], ids=str)
def test_when_everything_would_go_a_network_is_left_and_a_warning_given(changes):
    model, optimizer, pruner = make(nu=1e4, rate_ratio=0.2, steps=300, warmup=20, **changes)
    warnings = [w for check in loop(model, optimizer, pruner, 300) for w in check.warnings]
    assert len(warnings) == 1 and "nu" in warnings[0] and "too large" in warnings[0] and "\n" not in warnings[0]
    final = pruner.finish()
    assert pruner.layers_kept >= 1 and pruner.units_kept >= 1 and pruner.undecided == 0
    assert_plain(final)
    assert count(final, EXAMPLE) == pruner.counts()
    assert final.eval()(digits()[2]).isfinite().all()


def test_what_is_undecided_when_time_is_out_says_so():
    model, optimizer, pruner = make(steps=10, warmup=9)
    loop(model, optimizer, pruner, 10)
    assert pruner.finished and set(pruner.fate) == {KEPT_OUT_OF_TIME} and pruner.kept.all()
    assert pruner.decided_by_rule == 0.0
    assert count(model, EXAMPLE) == count(dense(), EXAMPLE)


def test_finish_may_come_early():
    model, optimizer, pruner = make()
    loop(model, optimizer, pruner, 7)
    assert_plain(pruner.finish())
    assert pruner.finish() is model


def test_a_step_needs_a_backward_pass():
    model, optimizer, pruner = make()
    with pytest.raises(RuntimeError, match="backward"):
        pruner.step()
    loop(model, optimizer, pruner, 1)
    with pytest.raises(RuntimeError, match="backward"):
        pruner.step()
    x, y = next(batches(0))
    F.cross_entropy(model.eval()(x), y).backward()
    with pytest.raises(RuntimeError, match="train mode"):
        pruner.step()


def test_another_loss_is_refused():
    model, optimizer, pruner = make()
    with pytest.raises(RuntimeError, match="^`loss` must be given where .* mean softmax cross-entropy"):
        loop(model, optimizer, pruner, 4, loss=lambda z, y: F.mse_loss(z, F.one_hot(y, 10).float()))


def smoothed(model, batch, smoothing):
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_scaled_loss_gives_the_same_thetas(smoothing):
    found = []
    for scale in (1.0, 256.0):
        loss = partial(smoothed, smoothing=smoothing) if smoothing else None
        model, optimizer, pruner = make(warmup=5, loss=loss)
        model.train()
        for _, (x, y) in zip(range(40), batches(0), strict=False):
            optimizer.zero_grad()
            (scale * F.cross_entropy(model(x), y, label_smoothing=smoothing)).backward()
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad /= scale
            optimizer.step()
            pruner.step((x, y), grad_scale=scale)
        found.append(pruner.keep_prob)
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


def run_again(seed):
    model, optimizer, pruner = make(seed=seed, steps=120, warmup=10, rate_ratio=0.2)
    loop(model, optimizer, pruner, 120)
    return model, pruner


def test_law_the_same_seed_gives_the_same_run():
    (one, a), (two, b), (_, c) = run_again(0), run_again(0), run_again(1)
    assert (a.fate == b.fate).all() and (a.keep_prob == b.keep_prob).all()
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.state_dict().items())
    assert not torch.equal(a.gates.draw, c.gates.draw) or (a.fate != c.fate).any()


@pytest.mark.parametrize("estimator", ["curvature", "paired", "straight-through"])
@pytest.mark.parametrize("per_example", [False, True])
def test_every_estimator_and_mode_runs_to_a_plain_network(estimator, per_example):
    model, optimizer, pruner = make(
        estimator=estimator, layer_estimator=estimator, per_example=per_example, steps=60, warmup=5, rate_ratio=0.3
    )
    loop(model, optimizer, pruner, 60)
    assert pruner.finished
    assert_plain(model)
    assert count(model, EXAMPLE) == pruner.counts()


def test_a_convolutional_network_and_a_foreign_one(bottleneck_net):
    for model in (build("resnet14", in_channels=1, classes=10), bottleneck_net()):
        model, optimizer, pruner = make(model, steps=30, warmup=2, rate_ratio=1.0, nu=2.0, check_every=5)
        loop(model, optimizer, pruner, 30)
        assert_plain(model)
        assert count(model, EXAMPLE) == pruner.counts() and isinstance(pruner.counts(), Counts)
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_macs_removed_by_a_fate_include_what_goes_with_them():
    _, _, pruner = make()
    pruner.fate[BLOCKS : BLOCKS + HIDDEN] = "pruned_tolerance"  # every unit of the first block
    one_block = HIDDEN * (32 + 32 + 1)  # two linear layers and a norm; biases cost no MACs
    assert pruner.macs_removed("pruned_tolerance") == one_block
    assert pruner.macs_removed("pruned_zero") == 0


BAD = [
    ("nu", 0),
    ("nu", -1.0),
    ("nu", float("nan")),
    ("nu", float("inf")),
    ("rate_ratio", 0.0),
    ("rate_ratio", "fast"),
    ("steps", 0),
    ("steps", 1.5),
    ("alpha", -0.1),
    ("alpha", 1.1),
    ("beta", -0.1),
    ("beta", 2),
    ("risk", 0.0),
    ("risk", 0.5),
    ("risk", 0.7),
    ("tolerance", -0.1),
    ("tolerance", 1.5),
    ("warmup", -1),
    ("initial_keep_prob", 0.0),
    ("initial_keep_prob", 1.2),
    ("estimator", "reinforce"),
    ("layer_estimator", "STE"),
    ("probe_size", 1),
    ("measure_every", 0),
    ("check_every", 0),
    ("read_every", 0),
    ("memory", 9),
    ("epoch_steps", 0.0),
    ("epoch_steps", True),
    ("per_example", "no"),
    ("seed", 0.5),
    ("seed", None),
    ("images", 0),
    ("shadow", 399),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_input_is_refused_and_the_model_left_alone(name, value):
    model = dense()
    with pytest.raises(ValueError, match=rf"^`{name}` must [^\n]+; got [^\n]+$"):
        make(model, **{name: value})
    assert_plain(model)


def test_settings_are_plain_numbers_whatever_was_given():
    """A float32 in a setting must not lower the precision of prices, nor a numpy scalar get into a checkpoint."""
    given = dict(nu=np.float32(0.1), alpha=np.float32(0.3), steps=np.int64(400), shadow=np.int64(500), seed=np.int64(3))
    own = make(**given)[2].settings
    assert {name: type(getattr(own, name)) for name in given} == dict(
        nu=float, alpha=float, steps=int, shadow=int, seed=int
    )
    assert (own.nu, own.alpha) == (float(np.float32(0.1)), float(np.float32(0.3)))
    assert own.tolerance is None and own.images is None


def test_with_a_target_the_rows_tell_the_speeds_that_were_used():
    """The price set at a check holds from then on; its rows tell the speed, like the price, that its tolerances were of."""
    model, optimizer, pruner = make(target_macs=0.5, steps=200, check_every=10)
    speeds, seen = [], []

    def each(check):
        if check is not None:
            seen.append((speeds[-1], {row["rate_ratio"] for row in check.rows if row["kind"] == "layer"}))
        speeds.append(pruner.state.rate_ratio.copy())

    loop(model, optimizer, pruner, 150, each=each)
    assert len({tuple(speed) for speed, _ in seen}) > 2  # it was set anew more than once
    assert all(rows <= set(before[pruner.is_layer].tolist()) for before, rows in seen)


def test_limits_are_of_their_moment():
    model, optimizer, pruner = make(warmup=0, rate_ratio=1.0, target_macs=0.5)
    loop(model, optimizer, pruner, 60)
    limits = pruner.limits()
    before = {name: values.copy() for name, values in limits.columns().items()}
    loop(model, optimizer, pruner, 60, seed=1)
    assert all(np.array_equal(values, before[name], equal_nan=True) for name, values in limits.columns().items())
    assert not np.array_equal(pruner.keep_prob, before["keep_prob"])


def test_a_model_of_which_nothing_can_go_is_refused():
    with pytest.raises(ValueError, match=r"^`model` must have a branch or a width that can go; Sequential has none"):
        make(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def test_dead_channels_round_widths_up_while_training_and_are_gone_in_the_end():
    model, optimizer, pruner = make(width_multiple=8)
    padded = []

    def each(check):
        if check is None:
            return
        for number, block in enumerate(pruner.blocks):
            if not pruner.kept[number]:
                continue
            live = len(pruner.structure()[block.name]["sites"][block.sites[0].name])
            width = model.get_submodule(block.output).weight.shape[1]
            assert width == -(-live // 8) * 8
            padded.append(width > live)
        assert physical(pruner) == pruner.counts()

    loop(model, optimizer, pruner, 500, each=each)
    assert any(padded)
    *_, x, _ = digits()
    model.eval()
    before = model(x[:32])
    final = pruner.finish()
    assert_plain(final)
    assert count(final, EXAMPLE) == pruner.counts() and {p for g in optimizer.param_groups for p in g["params"]} == set(
        final.parameters()
    )
    torch.testing.assert_close(final(x[:32]), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("measure_every", [1, 2, 3, 4, 7, 12])
def test_gradient_products_come_in_bursts_of_three_that_end_with_a_probe(measure_every, monkeypatch):
    model, optimizer, pruner = make(measure_every=measure_every, warmup=200, initial_keep_prob=0.999)
    steps = {"probe": [], "products": [], "weights": []}
    products, state = pruner.state.products, pruner.state
    probed, listened = pruner._measuring.probe, products.listen

    def probe(done, *given):
        found = probed(done, *given)
        if found is not None:
            steps["probe"].append(done)
        return found

    monkeypatch.setattr(pruner._measuring, "probe", probe)

    def listen(weights):
        steps["products"].append(state.done + 1)
        if weights:
            steps["weights"].append(state.done + 1)
        listened(weights)

    monkeypatch.setattr(products, "listen", listen)
    cycles = 4
    loop(model, optimizer, pruner, cycles * pruner.schedule.burst_every)
    assert steps["probe"] == list(range(1, cycles * pruner.schedule.burst_every + 1, measure_every))
    first = measure_every < 3  # that of the first step was called when the pruner was built
    assert (
        len(steps["products"]) in (3 * cycles, 3 * cycles - first + 1)
        and np.diff(steps["products"]).max() <= pruner.schedule.burst_every
    )
    assert steps["weights"] == steps["products"][1 - first :: 3], "at the second of each burst"
    assert (products.pools.gain.count > 1).all() and (products.pools.pull.count > 1).all()


def test_thetas_below_one_have_gates_from_the_start():
    *_, pruner = make(warmup=60, memory=10, measure_every=1, layers_per_probe=3, initial_keep_prob=0.5)
    assert pruner.started


def test_a_dead_channel_that_comes_back_to_life_is_refused():
    model, optimizer, pruner = make(width_multiple=8, seed=1)
    loop(model, optimizer, pruner, 500)
    block = next(
        b for n, b in enumerate(pruner.blocks) if pruner.kept[n] and not pruner.kept[pruner.state.present[n]].all()
    )
    with torch.no_grad():
        model.get_submodule(block.output).weight.add_(1e-3)
    with pytest.raises(RuntimeError, match="`width_multiple` must be 1"):
        pruner.finish()


def tensors(packed):
    """Every tensor in a packed state."""
    if isinstance(packed, dict | list):
        return [t for value in (packed.values() if isinstance(packed, dict) else packed) for t in tensors(value)]
    return [packed] if isinstance(packed, torch.Tensor) else []


def test_law_a_state_holds_every_field_of_its_parts(finished):
    """Serialised by fields: what is in the dataclasses is in the checkpoint, but for what follows from the settings."""
    packed = pack(finished.pruner.state)
    assert packed.keys() == {field.name for field in dataclasses.fields(PrunerState)}
    for name, part in vars(finished.pruner.state).items():
        if dataclasses.is_dataclass(part):
            assert packed[name].keys() == set(saved_fields(part)) and packed[name], name
    torch.save(packed, buffer := io.BytesIO())
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors(packed), tensors(again), strict=True))


def test_a_state_is_not_shared_between_pruners():
    model, optimizer, pruner = make()
    loop(model, optimizer, pruner, 61)
    state = pruner.state_dict()
    before = copy.deepcopy(state)
    for _ in range(2):
        other, sgd, again = make(dense(3))
        again.load_state_dict(state)
        loop(other, sgd, again, 40, seed=1)
    assert state["pruner"]["keep_prob"].keys() == {ARRAY}
    assert tensors(state) and all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(before), strict=True))
    with pytest.raises(ValueError, match="`state` must be of the same network"):
        make(DenseResNet(64, 10, blocks=2, width=32, hidden=HIDDEN))[2].load_state_dict(state)


def test_a_mask_of_minus_infinity_in_a_buffer_is_restored():
    states = []
    for _ in range(2):
        model = dense()
        model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pruner = Pruner(model, torch.zeros(1, 1, 8, 8), optimizer=optimizer, nu=1.0, steps=200)
        states.append(pruner.state_dict())
    pruner.load_state_dict(states[0])
    with torch.no_grad():
        states[0]["model"]["fc.bias"][0] = torch.inf
    with pytest.raises(ValueError, match=r"model\.fc\.bias, which must be finite"):
        pruner.load_state_dict(states[0])


def test_a_state_of_another_kind_is_refused_and_the_pruner_left_alone():
    (_, _, plain), (model, _, shadow) = make(), make(shadow=500)
    earlier = {"model": {}, "state": ["undecided"], "present": [], "arrays": {}}  # as version 0.1 wrote them
    for pruner, state, message in (
        (plain, shadow.state_dict(), "got one with shadow"),
        (shadow, plain.state_dict(), "got one without shadow"),
        (shadow, earlier, "this version's Pruner; got one with model, state, present, arrays"),
    ):
        before = pruner.checksum(), pruner.shadow
        with pytest.raises(ValueError, match=rf"^`state` must [^\n]*{message}[^\n]*$"):
            pruner.load_state_dict(state)
        assert (pruner.checksum(), pruner.shadow) == before
    assert any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("read_every", "per_example"), [(1, False), (4, False), (1, True)])
@pytest.mark.parametrize("spoilt", [61, 62, 121])
def test_pixels_that_are_not_finite_move_no_theta_and_are_one_line(spoilt, read_every, per_example, bad):
    """One pixel of one image of one batch, in a loop that steps all the same; at probed, unprobed and burst steps."""
    model, optimizer, pruner = make(read_every=read_every, per_example=per_example, rate_ratio=0.5)
    source, done, thetas = batches(0), 0, []
    with pytest.raises(NotFinite, match=rf"^the loss must be finite [^\n]* at step {spoilt}\.[^\n]*$") as refused:
        while True:
            x, y = next(source)
            done += 1
            x = x.clone()
            if done == spoilt:
                x[3, 0, 2, 2] = bad
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            pruner.step()
            thetas.append((pruner.keep_prob.copy(), pruner.fate.copy()))
    assert refused.value.step == spoilt and done - spoilt < read_every
    assert np.isfinite(pruner.keep_prob).all() and (pruner.keep_prob < 1).any()
    assert (pruner.fate == thetas[-1][1]).all() and len(thetas) == done - 1
    if read_every == 1:
        assert (pruner.keep_prob == thetas[-1][0]).all()


def test_a_batch_that_the_user_leaves_out_costs_nothing():
    """A loop that looks at its loss before the optimizer's step: with skipped=True, or with no step at all."""
    ends = []
    for say in (True, False):
        model, optimizer, pruner = make()
        for number, (x, y) in zip(range(160), batches(0), strict=False):
            if number in (70, 71, 130):
                x = x * math.nan
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if loss.isfinite():
                optimizer.step()
                pruner.step()
            elif say:
                pruner.step(skipped=True)
        ends.append(pruner)
        assert np.isfinite(pruner.keep_prob).all() and (pruner.keep_prob < 1).any()
        assert all(np.isfinite(values).all() for values in pruner.state.evidence.limits())
        assert np.isfinite(pruner.state.products.pools.gain.mean).all()
    assert [pruner.state.done for pruner in ends] == [160, 157]
    assert ends[0].state.time == pytest.approx(ends[1].state.time)


def test_a_long_warm_up_begins_without_gates_and_trains_as_the_ungated_network_does():
    model, optimizer, pruner = make(warmup=60, memory=10, measure_every=1, layers_per_probe=3)
    plain = dense()
    other = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    model.train()
    plain.train()
    for step, (x, y) in zip(range(60), batches(0), strict=False):
        assert pruner.started == (step >= 20)
        if not pruner.started:
            assert_plain(model)
        for net, sgd in ((model, optimizer), (plain, other)):
            sgd.zero_grad()
            F.cross_entropy(net(x), y).backward()
            sgd.step()
        pruner.step()
    assert pruner.state.done == 60 and (pruner.keep_prob == 1.0).all()
    assert np.isfinite(pruner.limits().benefit_upper).all()
    for a, b in zip(pruner.snapshot()[0].values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "changes", "says"),
    [
        ({"maximize": True}, {}, "`optimizer` must minimize"),
        ({"momentum": 1.0}, {}, "`optimizer` must have a momentum in"),
    ],
)
def test_optimizers_whose_steps_have_another_time_are_refused(settings, changes, says):
    model = dense()
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | settings)
    with pytest.raises(ValueError, match=rf"^{says}[^\n]+; got [^\n]+$"):
        Pruner(model, EXAMPLE, optimizer=optimizer, nu=0.5, steps=100, **changes)


def test_measuring_and_reading_seldom_costs_nothing_beforehand():
    model, optimizer, pruner = make(measure_every=10**9, read_every=10**9, steps=50, warmup=0)
    assert pruner.schedule.burst == [10**9 - 2, 10**9 - 1, 10**9] and len(pruner.state.draws.rows) <= 50
    loop(model, optimizer, pruner, 2)
    assert len(pruner.state.draws.rows) < 50


def test_the_shadow_sees_filters_not_their_draws():
    model = build("resnet50", in_channels=3, classes=10, hidden_scale=0.05, stem="cifar")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    block = model.structures()[0]
    plain = [unit_norms(model, site) for site in block.sites]
    pruner = Pruner(model, torch.zeros(1, 3, 8, 8), optimizer=optimizer, nu=1.0, steps=10, initial_keep_prob=0.5)
    model.train()(torch.randn(4, 3, 8, 8))
    gated = [unit_norms(model, site) for site in pruner.blocks[0].sites]
    assert all(np.array_equal(a, b) for a, b in zip(plain, gated, strict=True))


def test_long_runs_of_many_units_record_undecided_units_at_some_checks_only(monkeypatch):
    recorded = {}
    for most in (10**6, 200):
        monkeypatch.setattr("catode.prune.checking.MOST_ROWS", most)
        model, optimizer, pruner = make(steps=200, warmup=20, check_every=10)
        rows = [row for check in loop(model, optimizer, pruner, 200) for row in check.rows]
        recorded[most] = {
            (row["step"], row["kind"], row["block"], row["site"], row["index"]): row["fate"] for row in rows
        }
    whole, part = recorded[10**6], recorded[200]
    assert part.items() < whole.items() and len(part) < len(whole) / 2
    left_out = [key for key in whole.keys() - part.keys()]
    assert all(key[1] == "unit" and whole[key] == "undecided" for key in left_out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            dict(tolerence=0.1),
            "`tolerence` must be a setting of the pruner; got tolerence=0.1. Did you mean `tolerance`?",
        ),
        (dict(qqqq=None), "`qqqq` must be a setting of the pruner; got qqqq=None. Leave it out."),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(given, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make(**given)


@pytest.mark.parametrize("name", ["nu", "steps"])
def test_what_has_no_default_must_be_given(name):
    model = dense()
    given = dict(nu=0.5, steps=10)
    del given[name]
    with pytest.raises(TypeError, match=f"`{name}` must be given"):
        Pruner(model, EXAMPLE, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **given)


# --- copies that are cut with the model, Nesterov's momentum -----------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"width_multiple": 8}, {"round_to": 4}])
def test_a_copy_is_cut_as_the_model_is(changes):
    """A copy that has the model's weights before each cut has them afterwards, parameters and buffers."""
    model, copied, cuts = dense(), dense(), []
    model, optimizer, pruner = make(model, **changes)
    carry_out = pruner._carry_out

    def take_weights_first(outcome):
        copied.load_state_dict(model.state_dict())
        return carry_out(outcome)

    def follow(cut):
        cut.apply(copied)
        state = copied.state_dict()
        assert state.keys() == model.state_dict().keys()  # no gates now
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        cuts.append(sum(p.numel() for p in copied.parameters()))

    pruner._carry_out = take_weights_first
    pruner.on_cut(follow)
    loop(model, optimizer, pruner, 500)
    copied.load_state_dict(model.state_dict())
    final = pruner.finish()
    assert len(cuts) > 2 and cuts[-1] < cuts[0]
    x = digits()[2][:16]
    assert torch.equal(copied.eval()(x), final.eval()(x))
    assert count(copied, EXAMPLE) == pruner.counts()


def test_a_copy_of_a_fresh_model_is_cut_when_a_state_is_loaded():
    model, optimizer, pruner = make()
    loop(model, optimizer, pruner, 300)
    copied = dense(7)
    _, _, restored = make(dense(7))
    restored.on_cut(lambda cut: cut.apply(copied))
    restored.load_state_dict(pruner.state_dict())
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in copied.state_dict().items()} == shapes
    assert count(copied, EXAMPLE).macs < count(dense(), EXAMPLE).macs


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_law_the_ode_time_of_a_step_is_that_of_the_flow_on_a_quadratic(nesterov, momentum):
    """On ``L = curvature x^2/2`` the flow gives ``exp(-curvature t)``: a step of SGD passes ``-log(shrinkage)/curvature``.

    The shrinkage of a step is the dominant root of the recursion: ``z^2 - (1 + m - h c) z + m (1 - h s) = 0``, h = lr
    curvature; without Nesterov c = 1, s = 0, with it c = 1 + m, s = 1.
    """
    curvature = 2.0
    errors = []
    for lr in (1e-4, 1e-5):
        h = lr * curvature
        linear, constant = 1 + momentum - h * (1 + momentum * nesterov), momentum * (1 - h * nesterov)
        root = (linear + math.sqrt(linear**2 - 4 * constant)) / 2
        x = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=lr, momentum=momentum, nesterov=nesterov)
        check_optimizer(optimizer)
        values = []
        for _ in range(400):
            optimizer.zero_grad()
            (curvature * x**2 / 2).backward()
            optimizer.step()
            values.append(x.item())
        assert values[-1] / values[-2] == pytest.approx(root, rel=1e-12)  # what PyTorch does
        errors.append(abs(-math.log(root) / curvature / ode_time(optimizer) - 1))
    assert errors[0] < 0.03 and errors[1] == pytest.approx(errors[0] / 10, rel=0.1)  # first order in lr


def test_nesterov_is_pruned_at_the_same_speed():
    times = []
    for nesterov in (False, True):
        times.append(ode_time(torch.optim.SGD(dense().parameters(), lr=0.05, momentum=0.9, nesterov=nesterov)))
    assert times[0] == times[1] == pytest.approx(0.5)
