"""Averaged weights: the average of the plain weights, in a network that is cut as the trained one is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from catode.prune.describe.protocol import slices
from catode.train import load, loop
from catode.train.loop.average import Average
from catode.train.models import build
from catode.train.settings.config import Config

PRUNED = dict(
    dataset="digits", arch="resnet14", hidden_scale=0.5, batch_size=256, nu=8.0, epochs=8, warmup_epochs=1.4, memory=10,
    measure_every=1, layers_per_probe=3, check_every=1, threads=1, width_multiple=1,
)  # fmt: skip


def whole_places(model: nn.Module, structure: dict) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """For each tensor of a cut network: along which dimensions it holds which entries of the whole network's tensor."""
    places: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for block in model.structures():
        for site in block.sites:
            units = structure[block.name]["sites"].get(site.name)
            if structure[block.name]["kept"] and units is not None:
                for part in slices(model, site):
                    places.setdefault(part.tensor, []).append((part.dim, torch.as_tensor(part.entries(units))))
    return places


def spread(state: dict, whole: nn.Module, structure: dict) -> dict[str, torch.Tensor]:
    """The tensors of a cut network at their places in the whole one, NaN where it has none."""
    places, found = whole_places(whole, structure), {}
    for name, tensor in whole.state_dict().items():
        found[name] = torch.full(tensor.shape, torch.nan, dtype=torch.float64)
        if name not in state:
            continue
        index = [torch.arange(size) for size in tensor.shape]
        for dim, entries in places.get(name, []):
            index[dim] = entries
        found[name][np.ix_(*index) if index else ()] = state[name].double()
    return found


def test_the_average_is_that_of_all_steps_by_hand_across_cuts(tmp_path, monkeypatch):
    monkeypatch.setattr("catode.train.loop.result.latency_ms", lambda *args: [[1.0], [1.0]])
    whole = build("resnet14", in_channels=1, classes=10, hidden_scale=0.5)
    seen, averages, update = [], [], Average.update

    def watch(self, step):
        update(self, step)
        state, average = ({n: t.clone() for n, t in m.state_dict().items()} for m in (trainer.model, self.model))
        averages[:] = [average]  # the last one; the run ends by computing running statistics anew
        seen.append((state, trainer.pruner.structure(), trainer.pruner.started))

    monkeypatch.setattr(Average, "update", watch)
    setup = loop.prepare(Config.from_presets(**PRUNED, ema=0.8, out=str(tmp_path / "run")))
    (tmp_path / "run").mkdir()
    trainer = loop.Trainer(setup, tmp_path / "run", False)
    begin = spread(trainer.average.model.state_dict(), whole, trainer.pruner.structure())
    trainer.train()
    trainer.close()
    expected = begin
    for number, (state, structure, _) in enumerate(seen, 1):
        decay = min(0.8, number / (number + 9))
        now = spread(state, whole, structure)
        expected = {name: decay * old + (1 - decay) * now[name] for name, old in expected.items()}
    final = spread(averages[0], whole, seen[-1][1])
    compared = 0
    for name, own in final.items():
        if name.endswith("num_batches_tracked"):
            continue
        assert torch.equal(own.isnan(), expected[name].isnan())
        torch.testing.assert_close(own, expected[name], rtol=1e-5, atol=1e-6, equal_nan=True)
        compared += int((~own.isnan()).sum())
    sizes = [sum(t.numel() for t in state.values()) for state, *_ in seen]
    assert len(set(sizes)) > 2 and any(started for *_, started in seen)  # it was cut more than once, under gates
    assert compared > 1000 and len(seen) == len(setup.schedule)
    # what is saved and reported is the averaged network
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    for name, tensor in trainer.average.model.state_dict().items():
        assert torch.equal(saved[name], tensor)
    assert any(not torch.equal(saved[name], tensor) for name, tensor in trainer.model.state_dict().items())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_accuracy"] == share_right(load(tmp_path / "run"), trainer, "test")
    assert result["test_accuracy_without_ema"] == share_right(trainer.model.eval(), trainer, "test")


def share_right(model: nn.Module, trainer: loop.Trainer, split: str) -> float:
    images, labels = (getattr(trainer.setup.images, f"{split}_{what}") for what in ("images", "labels"))
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in trainer.batches.evaluation(images, labels, 256)]
    return sum(map(int, right)) / len(labels)


def test_under_gates_the_mean_field_network_of_the_averaged_weights_is_validated_and_saved(tmp_path):
    config = Config.from_presets(**PRUNED | {"nu": 2.0}, ema=0.8, out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    trainer = loop.Trainer(loop.prepare(config), tmp_path / "run", False)
    for _ in range(3):
        row = trainer.advance()
    pruner = trainer.pruner
    assert pruner.started and not pruner.finished and ((pruner.keep_prob > 0) & (pruner.keep_prob < 1)).any()
    assert row["validation_accuracy"] == share_right(load(tmp_path / "run"), trainer, "validation")
    saved, average = torch.load(tmp_path / "run" / "model.pt", weights_only=True), trainer.average.model
    folded = 0
    for place in pruner.inventory.standing(pruner.kept):
        units = pruner.inventory.units[place.number][pruner.kept[pruner.inventory.units[place.number]]]
        theta = torch.from_numpy(pruner.keep_prob[units]).float()
        for name in place.site.consumers:
            own = average.get_submodule(name).weight
            torch.testing.assert_close(saved[f"{name}.weight"], own * theta.view(1, -1, 1, 1), rtol=1e-6, atol=0)
            folded += int((theta < 1).sum())
    assert folded > 0
    trainer.close()


def test_outside_its_context_the_network_is_untouched():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    average = Average(model, 0.5)
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.add_(1.0)
        model[1].num_batches_tracked.add_(3)
    before = {name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    average.update(1)  # d = 1/10
    with average.applied():
        assert model[1].weight.tolist() == pytest.approx([1.9, 1.9]) and model[
            1
        ].running_mean.tolist() == pytest.approx([0.9] * 2)
        assert model[1].num_batches_tracked == 3
    for name, tensor in model.state_dict().items():
        _, place, value = before[name]
        assert tensor.data_ptr() == place and torch.equal(tensor, value)
    average.update(1000)  # d = min(0.5, 1000/1009)
    assert average.model[1].weight.tolist() == pytest.approx([1.95, 1.95])


def test_an_average_of_equal_weights_is_these():
    model = nn.Linear(3, 2)
    average = Average(model, 0.999)
    for step in range(1, 50):
        average.update(step)
    assert torch.allclose(average.model.weight, model.weight, rtol=1e-6)
