"""The end of a run, and runs that are too short: nothing is decided without a word; statistics are those of what is left."""

from __future__ import annotations

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from catode.decisions.schedule import needed_memory, needed_phase
from catode.prune.checking import PruningWarning, cannot_decide
from catode.prune.pruner import Pruner
from catode.prune.recalibration import recalibrate_norms
from catode.prune.settings import PrunerSettings
from catode.structures import fates
from catode.theory.tolerance.measured import fitting_memory, pool_memory
from catode.train.__main__ import main
from catode.train.models import Architecture, DenseResNet, ResNet

EXAMPLE = torch.zeros(1, 1, 8, 8)


def make(model=None, **settings):
    if model is None:
        torch.manual_seed(0)
        model = DenseResNet(64, 10, blocks=3, width=16, hidden=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer, Pruner(model, EXAMPLE, optimizer=optimizer, **{"epoch_steps": math.inf} | settings)


def batches(seed=1, size=64):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(size, 1, 8, 8, generator=generator)
        yield x, x.flatten(1)[:, :10].argmax(1)


def train(model, optimizer, pruner, steps):
    checks = []
    model.train()
    for _, (x, y) in zip(range(steps), batches(), strict=False):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        checks.append(pruner.step())
    return [check for check in checks if check]


def said(found):
    return [str(warning.message) for warning in found if issubclass(warning.category, PruningWarning)]


# how long a run should be


def test_a_pool_must_tell_nothing_from_the_price():
    """The figures of a ResNet-20: noise 1.6e-3 and price 1e-4 nats take 350 estimates at risk 0.05, 1,400 at 0.0005."""
    assert needed_memory(1.6e-3, 1e-4, 0.05) == pytest.approx(350, rel=0.02)
    assert needed_memory(1.6e-3, 1e-4, 0.0005) == pytest.approx(1400, rel=0.02)
    assert needed_memory(1.6e-3, 1e-4, 0.05, 0.5) == pytest.approx(3 * 346.3, rel=0.01)
    assert needed_phase(350, 50) == 3500 and needed_phase(20, 50) == 500


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_a_pool_of_that_memory_tells_them_apart_at_the_stated_risk(share, correlation):
    """Correlated draws, pooled with an exponential window: the mean passes the price as often as the risk says."""
    rng, noise, price, risk = np.random.default_rng(0), 1.0, 0.4, 0.05
    memory = float(needed_memory(noise, price, risk, correlation)) * share
    forget, steps, runs = 1 - 1 / memory, int(12 * memory), 4000
    draw, mean = rng.standard_normal(runs), np.zeros(runs)
    for _ in range(steps):
        draw = correlation * draw + np.sqrt(1 - correlation**2) * rng.standard_normal(runs)
        mean = forget * mean + (1 - forget) * noise * draw
    missed = (mean > price).mean()
    if share == 1.0:
        assert missed == pytest.approx(risk, abs=0.025)
    else:
        assert missed > 1.5 * risk if share < 1 else missed < 0.6 * risk


@pytest.mark.parametrize(
    ("steps", "warmup", "memory", "check_every", "measure_every"),
    [
        (38, 0, 10, 2, 1),
        (300, 100, 20, 5, 1),
        (1000, 0, 100, 25, 2),
        (2000, 0, 200, 50, 2),
        (20_000, 0, 435, 108, 4),
        (100_000, 0, pool_memory(100_000), 317, 8),
    ],
)
def test_memory_and_checks_scale_with_the_run(steps, warmup, memory, check_every, measure_every):
    own = PrunerSettings(nu=1.0, steps=steps, warmup=warmup)
    assert (own.memory, own.check_every, own.measure_every) == (memory, check_every, measure_every)
    assert own.memory == fitting_memory(steps, warmup)
    assert (steps - warmup) / own.check_every >= 10
    given = PrunerSettings(nu=1.0, steps=steps, warmup=warmup, memory=50, check_every=7, measure_every=3)
    assert (given.memory, given.check_every, given.measure_every) == (50, 7, 3)


def test_a_short_run_is_told_before_its_first_step():
    pool = dict(memory=10, check_every=2, risk=0.05)
    assert cannot_decide(1000, 0, prices=np.full(5, 1e-2), **pool) == ""
    by_phase = cannot_decide(60, 10, prices=np.full(5, 1e-2), **pool)
    assert "about 100 steps, ten times `memory`, 10" in by_phase and "it has 50" in by_phase and "steps=110" in by_phase
    by_pool = cannot_decide(1000, 100, prices=np.full(5, 1e-4), **pool)
    assert "about 3,464 steps, at the noise of a ResNet-20" in by_pool and "steps=3564 or a larger nu" in by_pool
    assert "about 8 epochs" in cannot_decide(1000, 100, prices=np.full(5, 1e-4), epochs=2, **pool)
    assert "steps=" not in cannot_decide(1000, 0, prices=np.full(5, 1e-7), **pool)
    assert (
        "or a larger nu" not in (tiny := cannot_decide(1000, 0, prices=np.full(5, 1e-200), **pool))
        and "use a larger nu" in tiny
    )
    free = cannot_decide(1000, 0, prices=np.array([0.0, 0.0, 1e-2]), **pool)
    assert (
        free.startswith("2 of 3 structures are free")
        and cannot_decide(1000, 0, prices=np.array([0, 1, 1.0]), **pool) == ""
    )
    with pytest.warns(PruningWarning, match="deciding phase should have about 100 steps"):
        _, _, pruner = make(nu=1.0, steps=38)
    assert len(pruner.warnings) == 1 and "\n" not in pruner.warnings[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(nu=1.0, steps=2000)[2].warnings == []


# what is decided because time is out


def test_finishing_early_says_how_many_were_decided_by_that_alone():
    model, optimizer, pruner = make(nu=1.0, steps=2000)
    train(model, optimizer, pruner, 30)
    with pytest.warns(PruningWarning) as found:
        pruner.finish()
    (line,) = said(found)
    assert line.startswith(
        "51 of 51 structures were decided because time was out, not by what was measured: 51 kept, 0 removed"
    )
    assert "after 30 steps of 2,000" in line and pruner.warnings[-1] == line
    assert pruner.out_of_time == 51 and pruner.decided_by_rule == 0.0


def test_what_goes_with_a_block_counts_as_decided_only_if_the_block_was():
    _, _, pruner = make(nu=1.0, steps=2000)  # 3 layers of 16 units
    units = [pruner.inventory.units[site] for site in range(3)]

    def share(**fate):
        pruner.state.fate[:] = fates.COMMITTED
        for structures, name in fate.values():
            pruner.state.fate[structures] = name
        return 51 * pruner.decided_by_rule

    block, with_block = 1, fates.REMOVED_WITH_BLOCK
    assert share() == pytest.approx(51)
    assert share(a=(block, fates.PRUNED_TOLERANCE), b=(units[1], with_block)) == pytest.approx(51)
    # out of time: the block and the units that went with it
    assert share(a=(block, fates.REMOVED_OUT_OF_TIME), b=(units[1], with_block)) == pytest.approx(51 - 17)
    # a block without units: they went by rule, or the last of them because time was out
    assert share(a=(block, with_block), b=(units[1], fates.PRUNED_ZERO)) == pytest.approx(51)
    by_rule, late = (units[1][:-1], fates.PRUNED_ZERO), (units[1][-1:], fates.REMOVED_OUT_OF_TIME)
    assert share(a=(block, with_block), b=by_rule, c=late) == pytest.approx(51 - 2)
    # both: one block by rule, another not
    others = {"c": (0, fates.PRUNED_ZERO), "d": (units[0], with_block)}
    assert share(a=(block, fates.REMOVED_OUT_OF_TIME), b=(units[1], with_block), **others) == pytest.approx(51 - 17)


def test_what_is_removed_near_one_for_a_target_is_never_removed_without_a_word():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model, optimizer, pruner = make(nu=0.01, steps=38, target_macs=0.5, rate_ratio=1e-3)
        checks = train(model, optimizer, pruner, 38)
    assert len(checks) >= 10, "one check in the whole run would be too few"
    removed = int((pruner.fate == fates.REMOVED_OUT_OF_TIME).sum())
    assert removed and 0 < pruner.removed_near_one <= removed
    (line,) = [line for line in said(found) if "time was out" in line]
    assert f"{removed} removed, {pruner.removed_near_one} of those with a theta of 0.9 or more" in line
    assert line in checks[-1].warnings and line in pruner.warnings


def test_nothing_is_said_where_rules_decided():
    with warnings.catch_warnings():
        warnings.simplefilter("error", PruningWarning)
        model, optimizer, pruner = make(nu=0.1, steps=300, warmup=20, memory=20, target_macs=0.5, rate_ratio=0.1)
        train(model, optimizer, pruner, 300)
    assert pruner.finished and pruner.out_of_time <= 0.1 * pruner.gated.sum() and pruner.warnings == []


def test_everything_would_go_is_said_aloud():
    with pytest.warns(PruningWarning, match="everything would go at step") as found:
        model, optimizer, pruner = make(nu=1e4, steps=200, memory=10, check_every=10, rate_ratio=0.2)
        train(model, optimizer, pruner, 200)
    (line,) = [line for line in said(found) if "everything" in line]
    assert "`nu`=10000 is too large" in line and line in pruner.warnings and pruner.layers_kept >= 1


def test_what_was_said_and_counted_survives_a_checkpoint():
    model, optimizer, pruner = make(nu=0.01, steps=38, target_macs=0.5, rate_ratio=1e-3)
    train(model, optimizer, pruner, 38)
    other = make(nu=0.01, steps=38, target_macs=0.5, rate_ratio=1e-3)[2]
    other.load_state_dict(pruner.state_dict())
    assert other.warnings == pruner.warnings and len(other.warnings) == 2
    assert other.removed_near_one == pruner.removed_near_one > 0 and other.out_of_time == pruner.out_of_time


FLAGS = ["--arch=resnet14", "--epochs=2", "--batch-size=256", "--hidden-scale=0.25", "--warmup-epochs=0", "--threads=1"]


def test_the_trainer_ends_with_what_went_because_time_was_out_and_status_three(tmp_path, capsys):
    out = tmp_path / "run"
    flags = [
        *FLAGS,
        "--memory=10",
        "--check-every=2",
        "--target-macs=0.6",
        "--nu=0.001",
        "--rate-ratio=1e-3",
        f"--out={out}",
    ]
    assert main([*flags, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("warning: the deciding phase should have about")
    assert main(flags) == 3
    shown, log = capsys.readouterr()
    last = shown.splitlines()[-1]
    result = json.loads((out / "result.json").read_text())
    assert last.startswith("warning  ") and "because time was out" in last and last[9:] == result["warnings"][-1]
    assert f"{result['removed_near_one']:,} of those with a theta of 0.9 or more" in last
    assert "warning: the deciding phase should have about" in log and "PruningWarning" not in log
    assert result["out_of_time"] >= result["removed_near_one"] > 0


# running statistics


def convolutional():
    torch.manual_seed(0)
    return ResNet(Architecture("basic", (1, 1), 4, "B", "cifar"), 1, 10)


def statistics(model):
    return {name: buffer for name, buffer in model.named_buffers() if "running" in name}


def test_recalibration_is_what_pytorch_does_for_averages():
    model = convolutional()
    inputs = [x for _, (x, _) in zip(range(5), batches(), strict=False)]
    model.train()(inputs[0] * 3)
    other = copy.deepcopy(model)
    update_bn(inputs, other)
    flags, momenta = [m.training for m in model.modules()], [getattr(m, "momentum", None) for m in model.modules()]
    recalibrate_norms(model.eval(), inputs)
    assert not any(m.training for m in model.modules()) and any(flags)
    assert [getattr(m, "momentum", None) for m in model.modules()] == momenta
    for name, buffer in statistics(model).items():
        torch.testing.assert_close(buffer, statistics(other)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["inputs", "pairs", "loss"])
def test_finish_recalibrates_to_the_statistics_of_what_is_left(form):
    model = convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss = (lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])) if form == "loss" else None
    pruner = Pruner(model, EXAMPLE, optimizer=optimizer, nu=0.5, steps=60, memory=10, rate_ratio=0.3, loss=loss)
    model.train()
    for _, (x, y) in zip(range(60), batches(), strict=False):
        value = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        pruner.step({"x": x, "y": y})
    pairs = [pair for _, pair in zip(range(4), batches(2), strict=False)]
    forms = {"inputs": [x for x, _ in pairs], "pairs": pairs, "loss": [{"x": x, "y": y} for x, y in pairs]}
    before = {name: buffer.clone() for name, buffer in statistics(model).items()}
    final = pruner.finish(recalibrate=forms[form])
    expected = copy.deepcopy(final)
    update_bn([x for x, _ in pairs], expected)
    found = statistics(final)
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, statistics(expected)[name], rtol=1e-5, atol=1e-6)
    assert any(
        buffer.shape != before[name].shape or not torch.equal(buffer, before[name]) for name, buffer in found.items()
    )


@pytest.mark.parametrize("training", [True, False])
def test_frozen_norms_are_not_recalibrated_while_the_model_trains(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5), nn.BatchNorm1d(5)).train(training)
    model[1].eval()
    inputs = [3 + 2 * torch.randn(32, 4) for _ in range(4)]
    model[1].running_mean.fill_(0.25)
    before = copy.deepcopy(model.state_dict())
    recalibrate_norms(model, inputs)
    after = model.state_dict()
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    own = [f"{place}.{name}" for place in ((3,) if training else (1, 3)) for name in ("running_mean", "running_var")]
    assert [name for name in moved if "num_batches" not in name] == own
    assert [m.training for m in model] == [training, False, training, training]
    if training:  # the statistics are those behind the frozen norm
        with torch.no_grad():
            reached = torch.stack([model[2](model[1](model[0](x))).mean(0) for x in inputs]).mean(0)
        torch.testing.assert_close(model[3].running_mean, reached)


def test_statistics_are_put_back_if_a_batch_cannot_be_used():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate_norms(model, [torch.randn(8, 4), torch.randn(8, 5)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recalibration_needs_batches_and_leaves_everything_as_it_was_without():
    model = convolutional()
    model.train()(next(batches())[0])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(ValueError, match=r"^`recalibrate` must hold at least one training batch"):
        recalibrate_norms(model, [])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    recalibrate_norms(nn.Linear(2, 2), [])  # nothing to do


def test_batches_that_may_be_of_one_epoch_are_asked_about():
    for given, told in ((None, 1), (math.inf, 0), (7.5, 0)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pruner = make(nu=0.01, steps=4000, memory=10, epoch_steps=given)[2]
        assert len(said) == len(pruner.warnings) == told
        assert not told or "`epoch_steps` should be the number of batches in an epoch" in str(said[0].message)
    fixed = make(nu=0.01, steps=4000, memory=10, epoch_steps=None, tolerance=0.05)[2]
    assert fixed.warnings == []  # no product of gradients decides anything
