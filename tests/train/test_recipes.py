"""Optimizers, clipping and accumulation: what they do to the weights, and that pruning goes on as it should."""

from __future__ import annotations

import csv
import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

from catode.prune.describe import steptime
from catode.train import data, loop
from catode.train.__main__ import main
from catode.train.loop.optimization import make_optimizer, optimizer_state, restore_optimizer
from catode.train.settings.config import Config
from catode.train.settings.training import learning_rates

FLAGS = [
    "--arch=resnet14",
    "--hidden-scale=0.5",
    "--batch-size=240",
    "--epochs=6",
    "--warmup-epochs=1.4",
    "--memory=10",
]
FLAGS += ["--measure-every=1", "--layers-per-probe=3", "--check-every=3", "--threads=1", "--width-multiple=1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Neither latencies nor pictures are of interest here."""
    monkeypatch.setattr("catode.train.loop.result.latency_ms", lambda *args: [[1.0], [1.0]])
    monkeypatch.setattr("catode.report.report.write", lambda folder: None)


def table(folder, name):
    return list(csv.DictReader((folder / name).open()))


def trained(kind, steps, begin=None):
    """A layer after some steps on fixed gradients; its optimizer."""
    config = Config.from_presets(optimizer=kind)
    model = nn.Linear(2, 1)
    nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
    optimizer = make_optimizer(model, config)
    if begin is not None:
        source, state = begin
        model.load_state_dict(source.state_dict())
        restore_optimizer(model, optimizer, state)
    for step in range(*steps):
        model.weight.grad = torch.tensor([[1.0 + step, -2.0]])
        model.bias.grad = torch.tensor([0.5])
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizer_goes_on_from_its_state_bit_by_bit(kind):
    whole, _ = trained(kind, (0, 5))
    half, optimizer = trained(kind, (0, 2))
    state = optimizer_state(half, optimizer)
    assert state.keys() == {"weight", "bias"}
    resumed, _ = trained(kind, (2, 5), (half, state))
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)


def test_the_first_step_of_adamw_is_its_rate_after_its_decay():
    model, _ = trained("adamw", (0, 1))
    rate, decayed = 3e-3, 1.0 - 3e-3 * 0.05
    assert model.weight.flatten().tolist() == pytest.approx([decayed - rate, decayed + rate], rel=1e-6)


def test_weight_decay_on_matrices_alone_leaves_out_norms_biases_embeddings_and_tables():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.table = nn.Parameter(torch.zeros(1, 5, 4)), nn.Embedding(5, 4)
            self.conv, self.norm, self.head = nn.Conv2d(1, 4, 2), nn.LayerNorm(4), nn.Linear(4, 3)

    model, names = Net(), {}
    for kind in ("sgd", "adamw"):
        config = Config.from_presets(optimizer=kind, decay_on="matrices", weight_decay=0.25)
        groups = make_optimizer(model, config).param_groups
        own = {parameter: name for name, parameter in model.named_parameters()}
        names[kind] = {own[p]: group["weight_decay"] for group in groups for p in group["params"]}
        assert {group["lr"] for group in groups} == {config.lr}
    assert (
        names["sgd"]
        == names["adamw"]
        == {name: 0.0 for name in own.values()}
        | {
            "conv.weight": 0.25,
            "head.weight": 0.25,
        }
    )


def test_a_warm_cosine_rises_over_a_tenth_and_falls_to_zero():
    rates = learning_rates("warm-cosine", 2.0, 1000)
    position = (np.arange(1000) + 0.5) / 1000
    assert rates[:100] == pytest.approx(20.0 * position[:100]) and rates.argmax() in (99, 100)
    assert rates[100:] == pytest.approx(1.0 + np.cos(np.pi * (position[100:] - 0.1) / 0.9))
    assert 0 < rates[-1] < 1e-5 and rates.sum() == pytest.approx(1000, rel=1e-3)


def test_foreign_networks_have_presets_of_their_own_under_adamw():
    foreign, own = (Config.from_presets(optimizer="adamw", arch=arch) for arch in ("timm:vit_x", "resnet20"))
    names = ("lr", "weight_decay", "schedule", "clip_grad", "decay_on")
    assert [getattr(foreign, name) for name in names] == [1e-3, 0.05, "warm-cosine", 1.0, "matrices"]
    assert [getattr(own, name) for name in names] == [3e-3, 0.05, "one-cycle", None, "all"]
    assert Config.from_presets(arch="timm:vit_x").schedule == "one-cycle" and foreign.tag != "default"


@pytest.mark.parametrize("change", [dict(exp_avg_sq=-torch.ones(1, 2)), dict(step=torch.tensor(-1.0))])
def test_a_state_that_adamw_cannot_have_is_refused(change):
    model, optimizer = trained("adamw", (0, 1))
    state = optimizer_state(model, optimizer)
    state["weight"] = {**state["weight"], **change}
    with pytest.raises(ValueError, match=rf"its optimizer's {next(iter(change))} of weight is negative"):
        restore_optimizer(model, make_optimizer(model, Config.from_presets(optimizer="adamw")), state)


def test_adamw_prunes_in_its_own_time(tmp_path):
    folder = tmp_path / "run"
    assert main([*FLAGS, "--nu=8", "--optimizer=adamw", "--lr=0.01", "--out", str(folder)]) == 0
    config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
    assert (config["optimizer"], config["momentum"], config["weight_decay"]) == ("adamw", 0.0, 0.05)
    rows = table(folder, "metrics.csv")
    rates = learning_rates("one-cycle", 0.01, int(rows[-1]["step"]))
    assert float(rows[-1]["time"]) == pytest.approx(rates.sum(), rel=1e-5)
    assert config["rate_ratio"] == pytest.approx(1.0 / (config["sink_share"] * rates.sum()), rel=1e-9)
    assert result["units_kept"] < result["units_total"] and result["macs"] < result["macs_dense"]
    assert sum(n for fate, n in result["decisions"].items() if fate in ("pruned_tolerance", "pruned_zero")) > 20


def gradients(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_clipping_bounds_the_norm_that_the_optimizer_sees(tmp_path, monkeypatch):
    """And leaves the direction; gains are those of the gradient before it."""
    found = {}
    for name, more in {"free": {}, "clipped": {"clip_grad": 0.05}}.items():
        seen = found[name] = {"gradients": [], "before": []}
        config = Config.from_presets(
            arch="resnet14", hidden_scale=0.5, batch_size=240, epochs=4, warmup_epochs=0.5, memory=10, measure_every=1,
            nu=3.0, tol=1e-9, lr=1e-6, momentum=0.9, schedule="constant", threads=1, check_every=3,
            out=str(tmp_path / name), **more,
        )  # fmt: skip
        (tmp_path / name).mkdir()
        trainer = loop.Trainer(loop.prepare(config), tmp_path / name, False)
        update = trainer.update

        def watched(update=update, trainer=trainer, seen=seen):
            seen["before"].append(gradients(trainer))
            return update()

        trainer.update = watched
        trainer.optimizer.register_step_pre_hook(lambda *_, t=trainer, s=seen: s["gradients"].append(gradients(t)))
        for _ in range(3):
            trainer.advance()
        seen["gain"] = trainer.pruner.state.products.pools.gain.mean
        trainer.close()
    for before, after in zip(found["clipped"]["before"], found["clipped"]["gradients"], strict=True):
        assert before.norm() > 0.05 and after.norm() == pytest.approx(0.05, rel=1e-3)
        torch.testing.assert_close(after / after.norm(), before / before.norm(), rtol=1e-4, atol=1e-7)
    for before, after in zip(found["free"]["before"], found["free"]["gradients"], strict=True):
        assert torch.equal(before, after)
    free, clipped = found["free"]["gain"], found["clipped"]["gain"]
    known = free > 0
    assert known.sum() > 50
    assert clipped[known].tolist() == pytest.approx(free[known].tolist(), rel=0.02)


FEWER = ["--epochs=3", "--hidden-scale=0.25"]


def accumulated(folder, parts, *more, precise=True):
    """Rows of structures.csv, weights and result of a run whose batches are trained on in parts."""
    batches = functools.partial(data.Batches, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        if precise:
            patch.setattr(loop.trainer.data, "Batches", batches)
            torch.set_default_dtype(torch.float64)
        try:
            argv = [*FLAGS, f"--accumulate={parts}", *more, "--out", str(folder)]
            assert main(argv) == 0
        finally:
            torch.set_default_dtype(torch.float32)
    weights = torch.load(folder / "model.pt", weights_only=True)
    return table(folder, "structures.csv"), weights, json.loads((folder / "result.json").read_text())


def of_each_image(self, x):
    """A norm that does not couple images; a small eps would let rounding errors grow by its root in every layer."""
    return nn.functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=0.1)


@pytest.mark.parametrize("more", [[], ["--mixup=0.2", "--clip-grad=1"], ["--optimizer=adamw", "--lr=0.01"]], ids=len)
def test_parts_are_the_whole_batch_where_norms_do_not_couple_its_images(more, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "forward", of_each_image)
    rows, weights, result = accumulated(tmp_path / "1", 1, "--nu=0.3", *FEWER, *more)
    assert result["units_kept"] < result["units_total"] and rows
    for parts in (2, 4):
        own, own_weights, own_result = accumulated(tmp_path / str(parts), parts, "--nu=0.3", *FEWER, *more)
        assert [(r["step"], r["block"], r["index"], r["fate"]) for r in own] == [
            (r["step"], r["block"], r["index"], r["fate"]) for r in rows
        ]
        for name in ("keep_prob", "benefit", "gain"):
            assert [float(r[name]) for r in own] == pytest.approx([float(r[name]) for r in rows], rel=1e-4, abs=1e-6)
        torch.testing.assert_close(own_weights, weights, rtol=1e-7, atol=1e-8)
        assert own_result["validation_accuracy_history"] == result["validation_accuracy_history"]
    [last], [whole] = (table(tmp_path / n, "metrics.csv")[-1:] for n in "41")
    assert (last["train_accuracy"], float(last["loss"])) == (
        whole["train_accuracy"],
        pytest.approx(float(whole["loss"])),
    )


def test_parts_prune_like_the_whole_batch_where_norms_see_a_part_at_a_time(tmp_path):
    """Not the same network: each norm's statistics are of other images. Within a tenth of the units and operations."""
    ends = [accumulated(tmp_path / str(parts), parts, "--nu=3", precise=False)[2] for parts in (1, 2, 4)]
    units, macs = ([end[name] for end in ends] for name in ("units_kept", "macs"))
    assert units[0] < 0.8 * ends[0]["units_total"]
    assert units[1:] == pytest.approx([units[0]] * 2, abs=0.1 * ends[0]["units_total"])
    assert macs[1:] == pytest.approx([macs[0]] * 2, abs=0.1 * ends[0]["macs_dense"])


def test_the_time_of_a_part_is_what_latency_counts(tmp_path, monkeypatch):
    asked, measure = [], steptime.measure
    monkeypatch.setattr(
        steptime, "measure", lambda *args, **more: asked.append(more["batch"]) or measure(*args, **more)
    )
    config = Config.from_presets(
        arch="resnet14", hidden_scale=0.25, batch_size=16, accumulate=4, cost="latency", threads=1, out=str(tmp_path)
    )
    loop.prepare(config)
    assert asked == [4]
