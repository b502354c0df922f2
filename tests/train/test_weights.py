"""Starting from weights that were trained before: what fits is taken as it is, what does not is refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from catode.train import count, load, loop
from catode.train.__main__ import main
from catode.train.models import Architecture, ResNet, build
from catode.train.models.weights import fill, read
from catode.train.settings.commandline import parse

TINY = Architecture("basic", (1, 1), 4, "B", "cifar")


def tiny(classes=5, seed=0):
    torch.manual_seed(seed)
    return ResNet(TINY, 3, classes)


def saved(path, content):
    torch.save(content, path)
    return path


def assert_same(model, state):
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


WRAPPED = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "distributed": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "half": lambda state: {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()
    },
}


@pytest.mark.parametrize("form", WRAPPED)
def test_a_state_dict_comes_back(form, tmp_path):
    source, model = tiny(seed=1), tiny(seed=2)
    if form == "half":
        source = source.half().float()
    with torch.no_grad():
        source.bn1.running_mean.uniform_()
        source.bn1.running_mean.copy_(source.bn1.running_mean.half())
    path = saved(tmp_path / "weights.pt", WRAPPED[form](source.state_dict()))
    assert fill(model, read(path), str(path)) == []
    assert_same(model, source.state_dict())


def test_a_file_without_the_norms_counters_is_taken():
    source, model = tiny(seed=1), tiny(seed=2)
    state = {name: tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    assert len(state) < len(source.state_dict()) and fill(model, state, "old.pth") == []
    assert_same(model, source.state_dict())


def test_a_classifier_for_other_classes_is_left_fresh_with_a_note():
    source, model = tiny(classes=1000, seed=1), tiny(seed=2)
    fresh = {name: tensor.clone() for name, tensor in model.fc.state_dict().items()}
    (note,) = fill(model, source.state_dict(), "big.pth")
    assert "big.pth is for 1000 classes, these images have 5" in note
    assert_same(model.fc, fresh)
    assert_same(model.layer2, source.layer2.state_dict())


def without(name):
    return lambda state: state.pop(name)


def reshaped(name, *shape):
    return lambda state: state.update({name: torch.zeros(*shape)})


WRONG = {
    "missing": (without("layer2.0.bn1.bias"), "which lacks layer2.0.bn1.bias. Choose"),
    "many missing": (
        lambda s: [s.pop(n) for n in list(s) if "layer1" in n and "num" not in n],
        "bias and 7 more. Choose",
    ),
    "headless": (lambda s: [s.pop(n) for n in ("fc.weight", "fc.bias")], "which lacks fc.weight, fc.bias. Choose"),
    "more": (reshaped("layer3.0.conv1.weight", 1), "which also has layer3.0.conv1.weight. Choose"),
    "another width": (
        reshaped("layer2.0.conv1.weight", 5, 4, 3, 3),
        "which has layer2.0.conv1.weight of shape 5x4x3x3 instead of 8x4x3x3. Choose",
    ),
    "another channel number": (
        reshaped("conv1.weight", 4, 1, 3, 3),
        "weights for images of 3 channels; got init='x' for 1.",
    ),
    "another stem": (reshaped("conv1.weight", 4, 3, 7, 7), "conv1.weight of shape 4x3x7x7 instead of 4x3x3x3"),
    "another head": (reshaped("fc.weight", 5, 16), "fc.weight of shape 5x16 instead of 5x8"),
    "another head and classes": (reshaped("fc.weight", 7, 16), "fc.weight of shape 7x16 instead of 5x8"),
    "half a head": (reshaped("fc.bias", 7), "fc.bias of shape 7 instead of 5"),
    "a scalar": (lambda s: s.update({"fc.bias": torch.tensor(1.0)}), "fc.bias of shape () instead of 5"),
    "not finite": (reshaped("bn1.weight", 4), None),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_changed(name):
    change, said = WRONG[name]
    state, model = dict(tiny(seed=1).state_dict()), tiny(seed=2)
    change(state)
    if said is None:
        state["bn1.weight"][2] = torch.inf
        said = "values that are not finite in bn1.weight."
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^`init` must [^\n]+; got init='x'[^\n]+\.$") as caught:
        fill(model, state, "x")
    assert said in str(caught.value)
    assert_same(model, before)


class Touch:
    """Something whose unpickling would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def flip(path, name):
    """Flip a bit of a tensor's bytes in a whole file."""
    state = tiny().state_dict()
    content = bytearray(saved(path, state).read_bytes())
    content[content.index(state[name].numpy().tobytes()) + 3] ^= 64
    path.write_bytes(content)


FILES = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights"),
    "cut short": lambda path: path.write_bytes(saved(path, tiny().state_dict()).read_bytes()[:900]),
    "a bit": lambda path: flip(path, "conv1.weight"),
    "another bit": lambda path: flip(path, "fc.bias"),
    "a whole module": lambda path: torch.save(tiny(), path),
    "code": lambda path: torch.save({"fc.weight": Touch(path.with_name("touched"))}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "nothing": lambda path: torch.save({}, path),
    "numbers": lambda path: torch.save({"fc.weight": 1.0}, path),
    "numbered": lambda path: torch.save({0: torch.zeros(2)}, path),
    "another network": lambda path: torch.save(tiny().state_dict(), path),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_wrong_file_is_one_line_and_leaves_nothing(kind, tmp_path, capsys):
    path = tmp_path / "weights.pt"
    FILES[kind](path)
    assert main(["--init", str(path), "--arch", "resnet14", "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(r"error: `init` must [^\n]+; got init=[^\n]+\.\n", printed.err), printed.err
    assert "bit" not in kind or "where it fails (checksum of " in printed.err
    assert printed.out == "" and {p.name for p in tmp_path.iterdir()} <= {"weights.pt"}


def prepared(*flags):
    return loop.prepare(parse(["--arch", "resnet14", "--threads", "1", *flags]))


def test_a_run_starts_from_the_weights(tmp_path, capsys):
    torch.manual_seed(7)
    source = build("resnet14", in_channels=1, classes=10, shortcut="B")
    path = str(saved(tmp_path / "weights.pt", source.state_dict()))
    setup = prepared("--shortcut", "B", "--init", path)
    assert setup.notes == () and setup.config.init == path
    assert_same(setup.model, source.state_dict())
    with pytest.raises(
        ValueError, match=r"^`init` must hold the weights of this network; .* also has layer2.0.downsample"
    ):
        prepared("--init", path)
    saved(Path(path), build("resnet14", in_channels=1, classes=3).state_dict())
    assert main(["--arch", "resnet14", "--init", path, "--dry-run"]) == 0
    assert f"note: the classifier in {path} is for 3 classes, these images have 10" in capsys.readouterr().out


def images(root):
    random = np.random.default_rng(0)
    for split, number in (("train", 24), ("val", 4)):
        for k, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = random.integers(0, 128, (16, 16, 3), dtype=np.uint8) + np.uint8(100 * k)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_a_resnet50_starts_from_weights_prunes_is_cut_off_resumed_and_loaded(tmp_path, monkeypatch, capsys):
    """Bottlenecks with projections from end to end; the weights are not asked for again once there is a checkpoint."""
    path = saved(tmp_path / "w.pt", build("resnet50", in_channels=3, classes=3, hidden_scale=0.08).state_dict())
    flags = ["--dataset=folder", f"--data-dir={images(tmp_path / 'images')}", "--arch=resnet50", "--hidden-scale=0.08"]
    flags += [f"--init={path}", "--threads=1", "--epochs=3", "--batch-size=8", "--lr=0.01", "--warmup-epochs=1.5"]
    flags += ["--nu=200", "--sink-share=0.02", "--layer-estimator=curvature", "--memory=10", "--measure-every=1"]
    flags += ["--check-every=4", "--probe-size=8", "--width-multiple=4"]
    assert main([*flags, "--dry-run"]) == 0
    costs = capsys.readouterr().out
    assert len(re.findall(r"^layer1\.\d +5\+5 ", costs, re.M)) == 3 and costs.count("+41 ") == 3
    folder = tmp_path / "run"
    save_state = loop.Trainer.save_state

    def interrupted(self):
        save_state(self)
        if self.epochs_done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "save_state", interrupted)
    assert main([*flags, "--out", str(folder)]) == 130
    assert "is for 3 classes, these images have 2" in capsys.readouterr().err
    monkeypatch.undo()
    path.unlink()
    assert main(["--resume", str(folder), "--threads=1"]) == 0
    found, model = json.loads((folder / "result.json").read_text()), load(folder)
    structure = json.loads((folder / "structure.json").read_text())
    assert (structure["shortcut"], structure["stem"]) == ("B", "imagenet")
    kept = {name for name, block in structure["blocks"].items() if block["kept"]}
    assert {block.name for block in model.structures()} == kept and 0 < len(kept) == found["layers_kept"] < 16
    assert found["layers_total"] == 16 and found["units_kept"] < found["units_total"] == 596
    example = torch.zeros(1, 3, 16, 16)
    counted = count(model, example)
    assert (counted.macs, counted.params) == (found["macs"], found["params"])
    assert counted.params == sum(p.numel() for p in model.parameters()) < found["params_dense"]
    assert found["macs"] < found["macs_dense"] and model(example).shape == (1, 2)
    report = (folder / "report.md").read_text()
    assert all(f"{name} | {'kept' if name in kept else 'removed'}" in report for name in structure["blocks"])
