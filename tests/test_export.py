"""Exported programs compute what the compact network does, for every architecture; and every wrong argument is one line."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import re

import pytest
import torch
from torch import nn

from catode import export
from catode.prune.describe.costs import count
from catode.prune.gated.cut import restrict
from catode.train import build, load
from catode.train.loop import checkpoint
from catode.train.settings.config import settings

ARCHITECTURES = settings()["arch"].choices
IMAGE = (3, 16, 16)


@functools.cache
def compacted(arch, most_blocks=1, seed=0):
    """A network of random affines and statistics with a random few of its blocks and units, and its structure.json."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    model = build(arch, in_channels=IMAGE[0], classes=10)
    blocks = model.structures()
    kept = chance.sample(blocks, min(most_blocks, len(blocks) - 1))
    record = {
        block.name: {
            "kept": block in kept,
            "sites": {
                site.name: sorted(chance.sample(range(site.width), chance.randint(1, site.width)))
                if block in kept
                else []
                for site in block.sites
            },
        }
        for block in blocks
    }
    restrict(model, blocks, record)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for _ in range(3):
            model(torch.randn(8, *IMAGE))
    return model.eval(), record


def save(folder, arch, model, record):
    """A run's folder as far as an export needs it."""
    structure = dict(
        arch=arch, in_channels=3, classes=[f"class {k}" for k in range(10)], hidden_scale=1.0, blocks=record
    )
    structure |= dict(image_shape=list(IMAGE), mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    checkpoint.save(folder, model.state_dict(), structure)


class Together(nn.Module):
    """Several networks side by side, so that one export, whose fixed cost is seconds, covers them all."""

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        return torch.stack([network(x) for network in self.networks], 1)


def reload(path):
    """The program of a file as a function, and its metadata."""
    if path.suffix == ".pt2":
        extra = {export.EXTRA_FILE: ""}
        return torch.export.load(path, extra_files=extra).module(), json.loads(extra[export.EXTRA_FILE])
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [session.get_inputs()[0].name, session.get_outputs()[0].name]
    assert names == ["images", "logits"]
    metadata = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), metadata


@pytest.fixture(params=["torch-export", "onnx"])
def format(request):
    if any(importlib.util.find_spec(name) is None for name in export.NEEDS[request.param]):
        pytest.skip(f"the packages for {request.param} are not installed")
    return request.param


def test_every_architecture_computes_the_same_after_its_export(format, tmp_path):
    networks = [compacted(arch, seed=k)[0] for k, arch in enumerate(ARCHITECTURES)]
    path = tmp_path / f"all{export.SUFFIX[format]}"
    difference = export.write(Together(networks), torch.zeros(1, *IMAGE), path, format=format)
    run, metadata = reload(path)
    assert metadata == {} and difference <= 1e-4
    for size in (1, 3):
        x = torch.randn(size, *IMAGE)
        found = run(x)
        for arch, network, logits in zip(ARCHITECTURES, networks, found.unbind(1), strict=True):
            with torch.no_grad():
                expected = network(x)
            assert (logits - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max()), arch


def test_the_command_writes_one_file_with_its_metadata(tmp_path, capsys, format):
    model, record = compacted("resnet14", seed=1)
    save(tmp_path, "resnet14", model, record)
    before = set(tmp_path.iterdir())
    assert export.main([str(tmp_path), "--format", format, "--batch", "2"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / f"model{export.SUFFIX[format]}"
    assert set(tmp_path.iterdir()) - before == {path}
    assert re.search(r"largest difference \S+\n$", printed) and str(path) in printed
    run, metadata = reload(path)
    structure = json.loads((tmp_path / "structure.json").read_text())
    assert metadata == {name: structure[name] for name in ("arch", "classes", "mean", "std", "image_shape")}
    x = torch.randn(2, *IMAGE)
    with torch.no_grad():
        assert torch.allclose(run(x), load(tmp_path)(x), atol=1e-4)
    with pytest.raises(Exception, match=r"(?i)shape|dimension|size"):
        run(torch.randn(3, *IMAGE))  # a fixed batch is fixed


def test_a_program_that_is_wrong_is_refused_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    save(tmp_path, "resnet14", *compacted("resnet14"))
    (tmp_path / "model.pt2").write_text("an older export")
    whole = torch.export.load

    def wrong(*args, **kwargs):
        program = whole(*args, **kwargs)
        program.state_dict["fc.bias"].add_(2e-4)
        return program

    monkeypatch.setattr(torch.export, "load", wrong)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert export.main([str(tmp_path), "--format", "torch-export", "--batch", "1"]) == 1
    assert re.fullmatch(r"error: the exported program must [^\n]+; got [^\n]+\n", capsys.readouterr().err)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_latency_stands_beside_the_macs(tmp_path, capsys):
    model, record = compacted("resnet14")
    save(tmp_path, "resnet14", model, record)
    before = set(tmp_path.iterdir())
    assert export.main([str(tmp_path), "--latency"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: [float(v.replace(",", "")) for v in row[1:]] for row in rows[1:]}
    for name, network in (("dense", build("resnet14", in_channels=3, classes=10)), ("compact", model)):
        counted = count(network, torch.zeros(1, *IMAGE))
        assert found[name][:2] == [counted.macs, counted.params] and min(found[name][2:]) > 0
    assert found["share"] == pytest.approx(
        [a / b for a, b in zip(found["compact"], found["dense"], strict=True)], abs=2e-3
    )
    assert set(tmp_path.iterdir()) == before


BAD = {
    "folder": [],
    "format": ["RUN"],
    "format kind": ["RUN", "--format", "tflite"],
    "opset": ["RUN", "--format", "torch-export", "--opset", "18"],
    "opset number": ["RUN", "--format", "onnx", "--opset", "new"],
    "opset old": ["RUN", "--format", "onnx", "--opset", "9"],
    "batch": ["RUN", "--format", "torch-export", "--batch", "0"],
    "batch word": ["RUN", "--format", "torch-export", "--batch", "any"],
    "out": ["RUN", "--format", "torch-export", "--out", "RUN/model.pt"],
    "out place": ["RUN", "--format", "torch-export", "--out", "RUN/nowhere/model.pt2"],
    "out alone": ["RUN", "--latency", "--out", "RUN/model.pt2"],
    "device": ["RUN", "--latency", "--device", "tpu"],
    "folder empty": ["RUN/..", "--latency"],
    "--colour": ["RUN", "--colour", "red"],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    save(run, "resnet14", *compacted("resnet14"))
    before = set(tmp_path.rglob("*"))
    assert export.main([argument.replace("RUN", str(run)) for argument in BAD[name]]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and set(tmp_path.rglob("*")) == before
    assert re.fullmatch(rf"error: `{name.split()[0]}` must [^\n]+; got [^\n]+\n", printed.err), printed.err


def test_an_opset_that_the_converter_gives_up_on_is_one_line(tmp_path, capsys):
    save(tmp_path, "resnet14", *compacted("resnet14"))
    before = set(tmp_path.iterdir())
    assert export.main([str(tmp_path), "--format", "onnx", "--opset", "99"]) == 2
    assert re.fullmatch(r"error: `opset` must be one [^\n]+; got opset=99[^\n]+\n", capsys.readouterr().err)
    assert set(tmp_path.iterdir()) == before


DAMAGES = {
    "cut": lambda state, structure: (state[:1000], structure),
    "noise": lambda state, structure: (bytes(range(256)) * 10, structure),
    "empty": lambda state, structure: (b"", structure),
    "classes": lambda state, structure: (state, structure | {"classes": 3}),
    "no classes": lambda state, structure: (state, structure | {"classes": structure["classes"][:-1]}),
    "block": lambda state, structure: (state, structure | {"blocks": {name: {} for name in structure["blocks"]}}),
    "blocks": lambda state, structure: (state, structure | {"blocks": None}),
    "shape": lambda state, structure: (state, structure | {"image_shape": "x"}),
    "scale": lambda state, structure: (state, structure | {"hidden_scale": "a"}),
    "arch": lambda state, structure: (state, structure | {"arch": "resnet7"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_one_line(damage, tmp_path, capsys):
    save(tmp_path, "resnet14", *compacted("resnet14"))
    structure = json.loads((tmp_path / "structure.json").read_text())
    state, structure = DAMAGES[damage]((tmp_path / "model.pt").read_bytes(), structure)
    (tmp_path / "model.pt").write_bytes(state)
    (tmp_path / "structure.json").write_text(json.dumps(structure))
    assert export.main([str(tmp_path), "--format", "torch-export"]) == 2
    assert re.fullmatch(r"error: `folder` must hold a complete [^\n]+; got [^\n]+\n", capsys.readouterr().err)


@pytest.mark.parametrize("text", ["", "[]", '{"arch": "resnet14"}'])
def test_a_damaged_structure_is_one_line(text, tmp_path, capsys):
    save(tmp_path, "resnet14", *compacted("resnet14"))
    (tmp_path / "structure.json").write_text(text)
    assert export.main([str(tmp_path), "--format", "torch-export"]) == 2
    assert re.fullmatch(r"error: `folder` must hold a complete structure.json; got [^\n]+\n", capsys.readouterr().err)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    save(tmp_path, "resnet14", *compacted("resnet14"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export.main([str(tmp_path), "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "without the package onnx" in error and "catode[export]" in error


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_batch_beyond_the_memory_is_one_line(error, tmp_path, monkeypatch, capsys):
    save(tmp_path, "resnet14", *compacted("resnet14"))

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(export, "write", fails)
    assert export.main([str(tmp_path), "--format=torch-export", "--batch=999999999999"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: `batch` must be a size whose images fit into the memory; got batch=999999999999")
    assert told.count("\n") == 1


class Listed(nn.Module):
    """Its forward pass depends on numbers, which no exporter can follow."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        z = self.fc(x.flatten(1))
        return z if float(z.sum()) > 1e9 else z * sum(v for v in z[0].tolist())


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_a_network_that_pytorch_cannot_write_is_one_line(format, tmp_path):
    with pytest.raises(
        export.Mismatch, match=rf"^`format` must be one in which PyTorch can write this network; got {format}: "
    ) as told:
        export.write(Listed(), torch.zeros(1, 1, 4, 4), tmp_path / "a.pt2", format=format)
    assert "\n" not in str(told.value) and list(tmp_path.iterdir()) == []
