"""What the host reads from the device, and when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from catode.prune.devices import transfer
from catode.prune.pruner import Pruner
from catode.prune.state import pack
from catode.train import loop
from catode.train.models import DenseResNet
from catode.train.settings.config import Config

READ_EVERY = 3  # in counted_device.py


@pytest.fixture(scope="module")
def counted():
    """Steps on the CPU and on a device that counts what the host waits for."""
    file = Path(__file__).with_name("counted_device.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "reads"), [("default", 1), ("per example", 1), ("curvature", 1), ("trainer", 2)])
def test_the_host_waits_only_every_read_every_steps(counted, name, reads):
    *_, counts = counted["counted:0"][name]
    assert len(counts) > 2 * READ_EVERY
    for step, waits in enumerate(counts, start=1):
        if step == 1:  # the loss is checked, and its kind found out; the order of an epoch's images goes to the device
            assert waits
            continue
        assert waits == ["_to_copy"] * (reads if step % READ_EVERY == 0 else 0), (step, waits)


@pytest.mark.parametrize("name", ["default", "per example", "curvature", "trainer"])
def test_a_device_measures_what_the_cpu_does(counted, name):
    thetas, others, _ = counted["counted:0"][name]
    expected_thetas, expected_others, _ = counted["cpu"][name]
    np.testing.assert_allclose(thetas, expected_thetas, rtol=1e-5)
    np.testing.assert_allclose(others, expected_others, rtol=1e-5)


def test_numbers_on_a_device_are_read_at_once(counted):
    assert counted["mixed"] == [[k / 8 for k in range(9)], ["_to_copy"]]
    assert transfer.floats([]) == []


def test_later_reads_all_in_order():
    later, taken = transfer.DeferredReads(), []
    later.put(lambda a: taken.append(a.tolist()), torch.arange(3))
    later.put(lambda a, b: taken.append((a.item(), b.tolist())), torch.tensor(1.5), torch.ones(1, 2))
    later.put(lambda: taken.append("nothing"))
    assert taken == []
    later.read()
    later.read()
    assert taken == [[0, 1, 2], (1.5, [[1, 1]]), "nothing"]


def make(seed=0, *, scaler=None, **changes):
    torch.manual_seed(seed)
    model = DenseResNet(64, 10, blocks=2, width=16, hidden=8).train()
    fused = True if scaler is not None else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=fused)
    given = dict(nu=2.0, rate_ratio=0.05, steps=10**6, memory=20, check_every=10**6, measure_every=2)
    pruner = Pruner(model, torch.zeros(1, 1, 8, 8), optimizer=optimizer, **given | changes)
    return model, optimizer, pruner


def batches(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        yield torch.randn(16, 1, 8, 8, generator=generator), torch.randint(10, (16,), generator=generator)


def train(model, optimizer, pruner, data):
    thetas = []
    for x, y in data:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        thetas.append(pruner.keep_prob.copy())
    return thetas


def pools(packed):
    """Every array in a packed state, as tensors."""
    if isinstance(packed, dict):
        return [tensor for value in packed.values() for tensor in pools(value)]
    return [packed] if isinstance(packed, torch.Tensor) else []


def evidence(pruner):
    state = pruner.state_dict()["pruner"]
    return [tensor for part in (state["evidence"], state["products"]["pools"]) for tensor in pools(part)]


@settings(max_examples=5)
@given(read_every=st.integers(2, 9), number=st.integers(1, 25), keep_prob=st.sampled_from([1.0, 0.8]))
def test_law_evidence_does_not_depend_on_when_it_is_read(read_every, number, keep_prob):
    """As long as the thetas stand still, as in the warm-up, where the gates are drawn alike."""
    given = dict(initial_keep_prob=keep_prob, warmup=10**5)
    found = []
    for every in (1, read_every):
        model, optimizer, pruner = make(read_every=every, **given)
        pruner.started or pruner._start()
        train(model, optimizer, pruner, batches(number))
        found.append((pruner, evidence(pruner), [p.detach().clone() for p in model.parameters()]))
    (one, a, weights), (many, b, others) = found
    assert (one.state.done, one.state.time) == (many.state.done, many.state.time)
    for x, y in zip(a + weights, b + others, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_thetas_stand_still_between_readings_and_then_move_as_far():
    moved = {}
    for read_every in (1, 5):
        model, optimizer, pruner = make(
            read_every=read_every, memory=400, rate_ratio=0.002, layer_estimator="curvature"
        )
        thetas = np.array(train(model, optimizer, pruner, batches(40)))
        still = (np.diff(thetas, axis=0) == 0).all(axis=1)
        assert all(still[step - 2] for step in range(2, 41) if step % read_every)
        moved[read_every] = 1 - thetas[-1]
    assert moved[1].mean() > 1e-2
    assert moved[5].mean() == pytest.approx(moved[1].mean(), rel=0.1)


@pytest.mark.parametrize("check_every", [7, 25])
def test_checks_are_rounded_up_to_the_next_reading(check_every):
    model, optimizer, pruner = make(read_every=10, check_every=check_every, nu=0.1)
    checked = []
    for x, y in batches(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if pruner.step() is not None:
            checked.append(pruner.state.done)
    due = range(check_every, 61, check_every)
    assert checked == sorted({-(-step // 10) * 10 for step in due if -(-step // 10) * 10 <= 60})


@pytest.mark.parametrize("stop", [20, 27])
def test_a_state_between_two_readings_goes_on_as_the_run_would(stop):
    given = dict(read_every=10, check_every=10, steps=60, nu=20.0, rate_ratio=0.5, initial_keep_prob=0.8)
    model, optimizer, pruner = make(**given)
    train(model, optimizer, pruner, batches(stop))
    other, sgd, again = make(1, **given)
    again.load_state_dict(pruner.state_dict())
    for own, its in zip(optimizer.param_groups[0]["params"], sgd.param_groups[0]["params"], strict=True):
        sgd.state[its] = {"momentum_buffer": optimizer.state[own]["momentum_buffer"].clone()}
    ends = [train(*run, batches(60 - stop, seed=1)) for run in ((model, optimizer, pruner), (other, sgd, again))]
    assert (np.array(ends[0]) == np.array(ends[1])).all()
    assert pruner.fate.tolist() == again.fate.tolist() and pruner.undecided < pruner.complexity.size
    for a, b in zip(pruner.finish().state_dict().values(), again.finish().state_dict().values(), strict=True):
        assert torch.equal(a, b)


# --- steps that a gradient scaler skips -----------------------------------------------------------------------------


def scaled(model, optimizer, pruner, data, overflow):
    """Train with a gradient scaler; in the steps of `overflow` the gradient is not finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    skipped = []
    optimizer.register_step_pre_hook(lambda sgd, *_: skipped.append(sgd.found_inf.clone()))
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for number, (x, y) in enumerate(data):
        loss = F.cross_entropy(model(x), y) * (torch.inf if number in overflow else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scale = scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        pruner.step(grad_scale=scale, skipped=skipped[-1])
    return [bool(s) for s in skipped]


@settings(max_examples=5)
@given(st.sets(st.integers(0, 29), max_size=8), st.sampled_from([1, 4]))
def test_law_a_skipped_step_leaves_no_trace(overflow, read_every):
    given = dict(estimator="straight-through", layer_estimator="straight-through", read_every=read_every)
    found, data = [], list(batches(30))
    for which in (overflow, set()):
        model, optimizer, pruner = make(scaler=True, warmup=10**5, **given)
        pruner.started or pruner._start()
        own = data if which else [batch for number, batch in enumerate(data) if number not in overflow]
        assert sum(scaled(model, optimizer, pruner, own, which)) == len(which)
        pruner.read()
        found.append((pruner.state.time, pools(pack(pruner.state.evidence)), list(model.parameters())))
    assert found[0][0] == found[1][0]
    for x, y in zip(found[0][1] + found[0][2], found[1][1] + found[1][2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("overflow", [{0}, {0, 1, 2}])
def test_a_scale_that_is_too_high_at_first_is_told_by_the_gradient(overflow):
    """`step()` is not told whether the scaler skipped, and before its first step the optimizer tells nothing either."""
    model, optimizer, pruner = make(memory=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, (x, y) in enumerate(batches(20)):
        loss = F.cross_entropy(model(x), y) * (torch.inf if number in overflow else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        pruner.step(grad_scale=scale)
    pruner.read()
    assert pruner.state.time == pytest.approx((20 - len(overflow)) * 0.1 / (1 - 0.9))
    assert np.isfinite(pruner.keep_prob).all() and (pruner.state.evidence._benefit.count > 0).any()


def test_an_overflow_does_not_stop_measuring():
    model, optimizer, pruner = make(scaler=True, memory=10)
    skipped = scaled(model, optimizer, pruner, batches(80), set(range(3, 80, 9)))
    assert sum(skipped) == 9
    assert all(
        np.isfinite(getattr(pruner.limits(), name)).all() for name in ("benefit_upper", "noise", "decay", "drift")
    )
    products = pruner.state.products
    assert (products.pools.gain.count > 0).all() and np.isfinite(products.pools.gain.mean).all()
    assert np.isfinite(products.pools.pull.mean).all()
    assert (pruner.keep_prob < 1).any() and np.isfinite(pruner.keep_prob).all()


def test_fp16_trains_and_prunes_with_a_scaler(tmp_path, monkeypatch):
    """On a CPU, where the command line refuses it for its slowness, and with a network that is quick there."""
    monkeypatch.setattr(
        "catode.train.models.resnets.build", lambda *_, **__: DenseResNet(64, 10, blocks=2, width=16, hidden=8)
    )
    given = dict(epochs=3, batch_size=64, warmup_epochs=0.5, nu=0.5, memory=10, measure_every=1, augment="shift")
    setup = loop.prepare(Config(**given, out=str(tmp_path)))
    object.__setattr__(setup.config, "amp", "fp16")
    trainer = loop.Trainer(setup, tmp_path, progress=False)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    skipped, update = [], trainer.update
    trainer.update = lambda: skipped.append(update()) or skipped[-1]
    try:
        trainer.train()
    finally:
        trainer.close()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["test_accuracy"] > 0.2 and 0 < sum(bool(s) for _, s in skipped) < len(skipped) / 2
    assert bool(skipped[0][1]) and not bool(skipped[-1][1]) and float(skipped[-1][0]) < 2.0**30
    assert trainer.pruner.state.time < trainer.time, "no time passed in the skipped steps"
