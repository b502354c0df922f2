"""Prices by measured step times: closed forms, laws of the tables, a real measurement, a run and its resumption."""

from __future__ import annotations

import csv
import functools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import catode
from catode.prune.checking import PruningWarning
from catode.prune.describe import steptime
from catode.prune.describe.costs import describe
from catode.prune.describe.steptime import GRID, MeasuredComplexity, Table
from catode.structures.description import Block, Site
from catode.train import loop
from catode.train.__main__ import main
from catode.train.models import DenseResNet, build

EXAMPLE = torch.zeros(1, 1, 8, 8)
NETWORKS = ["resnet14", "dense", "bottleneck"]


@functools.cache
def network(name, bottleneck_net):
    """A network and its complexity."""
    if name == "bottleneck":
        model = bottleneck_net()
    else:
        model = DenseResNet(64, 10, hidden=9) if name == "dense" else build(name, in_channels=1, classes=10)
    return model, describe(model, model.structures(), EXAMPLE)


def tables_of(model, plain, time):
    """Tables whose times are a function of term, inner and outer width."""
    modules, found = dict(model.named_modules()), []
    for term in steptime.timed_terms(plain):
        inner, outer = steptime._widths(modules[term.name], term, plain)
        times = [[time(term, i, o) for o in outer] for i in inner]
        found.append(Table(term.name, inner, outer, np.array(times, float)))
    return found


def proportional(term, inner, outer):
    """MACs of a layer, from its term: a fixed width is in the coefficient already."""
    return term.macs * (1 if term.inner is None else inner) * (1 if term.outer is None else outer)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), beta=st.floats(0, 1), scale=st.floats(1e-6, 1e3))
def test_times_proportional_to_macs_give_the_prices_of_macs(name, seed, beta, scale, bottleneck_net):
    model, plain = network(name, bottleneck_net)
    measured = MeasuredComplexity(plain, tables_of(model, plain, lambda *a: scale * proportional(*a)))
    assert measured.removable_ms == pytest.approx(scale * plain.removable_macs)
    theta = np.random.default_rng(seed).random(plain.size)
    for point in (theta, np.round(theta), np.ones(plain.size), np.zeros(plain.size)):
        assert measured.index(point, beta) == pytest.approx(plain.index(point, beta), abs=1e-12)
        knobs = dict(nu=2.0, alpha=0.3, beta=beta)
        assert measured.prices(point, **knobs) == pytest.approx(plain.prices(point, **knobs), abs=1e-12)
        assert measured.macs(point) == plain.macs(point) and measured.params(point) == plain.params(point)


def random_times(seed):
    random = np.random.default_rng(seed)
    return lambda *_: random.exponential() + 1e-3


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_prices_of_any_table_are_the_slopes_of_j_and_never_negative(name, seed, bottleneck_net):
    model, plain = network(name, bottleneck_net)
    measured = MeasuredComplexity(plain, tables_of(model, plain, random_times(seed)))
    theta = 0.05 + 0.9 * np.random.default_rng(seed).random(plain.size)
    gradient = measured.gradient(theta, 0.25)
    assert (gradient >= 0).all() and (measured.gradient(np.ones(plain.size), 0.0) >= 0).all()
    assert measured.index(np.ones(plain.size), 0.25) == pytest.approx(1.0)
    assert measured.index(np.zeros(plain.size), 0.25) == 0.0
    for s in np.random.default_rng(seed).choice(plain.size, 6, replace=False):
        step = np.where(np.arange(plain.size) == s, 1e-7, 0.0)
        slope = (measured.index(theta + step, 0.25) - measured.index(theta - step, 0.25)) / 2e-7
        assert slope == pytest.approx(gradient[s], abs=1e-6)


@settings(max_examples=25)
@given(arrays(float, (GRID, GRID), elements=st.floats(-5, 100)))
def test_tables_become_monotone_and_monotone_ones_stay(times):
    table = Table("a", (1, 2, 3, 4), (1, 2, 3, 4), times)
    assert (np.diff(table.ms, axis=0) >= -1e-9).all() and (np.diff(table.ms, axis=1) >= -1e-9).all()
    assert (table.ms >= 0).all() and table.ms.mean() == pytest.approx(np.maximum(times, 0).mean())
    assert replace(table, measured=table.ms).ms == pytest.approx(table.ms)


def test_a_price_is_the_time_that_the_next_removal_saves():
    """One conv reads 16 units in 1, 2, 6, 6 ms at 4, 8, 12, 16 of them; nothing else takes time."""
    model, plain = network("resnet14", None)
    first = next(t.name for t in steptime.timed_terms(plain) if t.name.endswith("conv2"))
    steps = {4: 1.0, 8: 2.0, 12: 6.0, 16: 6.0}
    times = lambda term, inner, outer: steps[inner] if term.name == first else 0.0  # noqa: E731
    measured = MeasuredComplexity(plain, tables_of(model, plain, times))
    slopes = {16: 0.0, 14: 0.0, 12: 4.0 / 4, 10: 4.0 / 4, 8: 1.0 / 4, 4: 1.0 / 4, 1: 1.0 / 4}
    for width, slope in slopes.items():
        theta = np.ones(plain.size)
        theta[plain.inventory.layers + width : plain.inventory.layers + 16] = 0.0
        gradient = measured.gradient(theta, 0.0)
        assert gradient[plain.inventory.layers] == pytest.approx(slope / 6.0)
        assert gradient[0] == pytest.approx(np.interp(width, [0, *steps], [0, *steps.values()]) / 6.0)
        assert not gradient[1 : plain.inventory.layers].any()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_real_measurement_covers_every_layer_and_survives_its_file(name, tmp_path, bottleneck_net):
    model, plain = network(name, bottleneck_net)
    state = torch.get_rng_state()
    tables = steptime.measure(model, plain, EXAMPLE, batch=4)
    assert torch.equal(torch.get_rng_state(), state)
    inside = {n for n, m in model.named_modules() if not list(m.children()) and list(m.parameters())}
    inside = {n for n in inside if any(n.startswith(b.name + ".") and n not in b.fixed for b in model.structures())}
    assert [t.layer for t in tables] == [t.name for t in steptime.timed_terms(plain)]
    assert {t.layer for t in tables} == inside and all((t.measured > 0).all() for t in tables)
    (tmp_path / steptime.FILE).write_text(steptime.text(tables))
    again = steptime.read(tmp_path / steptime.FILE, model, plain)
    for one, other in zip(tables, again, strict=True):
        assert (one.layer, one.inner, one.outer) == (other.layer, other.inner, other.outer)
        assert np.array_equal(one.measured, other.measured)


FLAGS = ["--arch=resnet14", "--epochs=2", "--nu=20", "--cost=latency", "--round-to=8", "--threads=1"]
FLAGS += [
    "--batch-size=128",
    "--sink-share=0.2",
    "--check-every=5",
    "--measure-every=1",
    "--memory=10",
    "--warmup-epochs=0.2",
]


def ends(folder):
    weights = torch.load(folder / "model.pt", weights_only=True)
    return (folder / "structures.csv").read_text(), (folder / "structure.json").read_text(), weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run priced by step times, its state after the first of two epochs kept aside."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*FLAGS, "--out", str(folder)]) == 0
    return folder


def test_a_run_keeps_its_table_and_goes_on_with_it(whole, tmp_path, monkeypatch, capsys):
    before, tables = loop.Trainer.epoch, (whole / steptime.FILE).read_text()

    def interrupt(self, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return before(self, epoch)

    # the whole run's table instead of a measurement of its own, so that the two must end alike
    same = steptime.read(whole / steptime.FILE, *network("resnet14", None))
    monkeypatch.setattr(steptime, "measure", lambda *a, **k: same)
    monkeypatch.setattr(loop.Trainer, "epoch", interrupt)
    folder = tmp_path / "run"
    assert main([*FLAGS, "--out", str(folder)]) == 130
    monkeypatch.undo()
    row = tables.splitlines()[1]
    sums = (folder / "checksums.json").read_text()
    for text, said in (
        ("", f"error: {folder / steptime.FILE} must be as the run wrote it; got the checksum "),
        (
            tables.replace(row, re.sub(r"\d$", lambda digit: str((int(digit[0]) + 1) % 10), row)),
            "must be as the run wrote it; got the checksum ",
        ),
        ("", "error: `resume` must name a run with the latency_table.csv that it started with; got "),
        (tables + "fc,1,1,1.0,1.0\n", "it has other rows"),
    ):
        if "checksum" not in said:
            (folder / "checksums.json").unlink(missing_ok=True)
        (folder / steptime.FILE).write_text(text)
        capsys.readouterr()
        assert main(["--resume", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    (folder / steptime.FILE).write_text(tables)
    (folder / "checksums.json").write_text(sums)
    monkeypatch.setattr("catode.report.report.write", lambda folder: None)  # pictures take longer than the training
    assert main(["--resume", str(folder)]) == 0
    *texts, weights = ends(folder)
    *expected, expected_weights = ends(whole)
    assert texts == expected and (folder / steptime.FILE).read_text() == tables
    assert all(torch.equal(weights[k], expected_weights[k]) for k in expected_weights)


def test_widths_of_a_run_are_round_and_its_prices_those_of_its_table(whole):
    structure, result = (json.loads((whole / name).read_text()) for name in ("structure.json", "result.json"))
    widths = [len(u) for block in structure["blocks"].values() for u in block["sites"].values()]
    assert result["units_kept"] == sum(widths) < result["units_total"] and not any(w % 8 for w in widths)
    assert 0 <= result["units_kept_for_rounding"] <= 7 * len(widths)
    model, plain = network("resnet14", None)
    cost = MeasuredComplexity(plain, steptime.read(whole / steptime.FILE, model, plain))
    prices = cost.prices(np.ones(cost.size), nu=20, alpha=0.75, beta=0.0)
    with (whole / "structures.csv").open() as file:
        first = [row for row in csv.DictReader(file) if row["step"] == "5"]
    assert len(first) == cost.size
    assert [float(r["price"]) for r in first] == pytest.approx(np.maximum(prices, 1e-12), rel=0.2)


def test_a_dry_run_shows_prices_by_time_and_writes_nothing(tmp_path, capsys):
    flags = ["--arch=resnet14", "--cost=latency", "--batch-size=8", "--threads=1", "--dry-run"]
    assert main([*flags, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "prices by time: " in printed and "layer3.1" in printed and not list(tmp_path.iterdir())


def test_times_that_do_not_grow_with_the_widths_are_told_and_no_unit_goes_for_them():
    torch.manual_seed(0)
    model = DenseResNet(64, 10, hidden=9)
    plain = describe(model, model.structures(), EXAMPLE)
    flat = tables_of(model, plain, lambda *a: 1.0)  # what noise leaves of small layers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    loader = [(torch.randn(16, 1, 8, 8), torch.randint(10, (16,))) for _ in range(40)]
    more = dict(nu=1.0, steps=200, epoch_steps=40, memory=10, check_every=10, step_times=flat)
    with pytest.warns(PruningWarning, match="structures are free at first .* do not grow with their widths"):
        pruner = catode.Pruner(model, EXAMPLE, optimizer=optimizer, loss=loss, **more)
    assert (pruner.prices()[~pruner.is_layer] == 0).all() and (pruner.prices()[pruner.is_layer] > 0).all()
    for step in range(60):
        x, y = loader[step % 40]
        optimizer.zero_grad()
        loss(model, (x, y)).backward()
        optimizer.step()
        pruner.step((x, y))
    alive = pruner.kept[pruner.is_layer][pruner.inventory.unit_layer]
    assert alive.any() and pruner.kept[~pruner.is_layer][alive].all() and np.isfinite(pruner.keep_prob).all()


def test_units_that_are_slices_or_lie_in_no_branch_are_refused_in_one_line():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3), torch.nn.Flatten())
    traced = describe(model, catode.describe(model, EXAMPLE), EXAMPLE)
    held = [Block("held", "", (Site("0", 6, ("0",), ("2",)),), removable=False)]
    for plain, words in (
        (traced, "site `0` is described by `parts`"),
        (describe(model, held, EXAMPLE), "site `0` lies in no"),
    ):
        for call in (
            lambda plain=plain: steptime.measure(model, plain, EXAMPLE, batch=2),
            lambda plain=plain: MeasuredComplexity(plain, []),
        ):
            with pytest.raises(ValueError, match=words) as refused:
                call()
            assert "\n" not in str(refused.value) and str(refused.value).endswith("Price by MACs.")
