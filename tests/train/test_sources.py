"""Networks of torchvision, timm and files: which names there are, how they are built, trained, resumed, loaded and exported."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.prunability.models import declare_operators
from catode import load
from catode.cli import main as command
from catode.prune.describe.costs import count
from catode.prune.describe.protect import described
from catode.train import loop
from catode.train.__main__ import main
from catode.train.loop import checkpoint
from catode.train.models import build as own
from catode.train.models import sources
from catode.train.settings.commandline import parse
from catode.train.settings.config import ConfigError

FILE = """
from dataclasses import dataclass

import torch
from torch import nn

HERE = __name__


@dataclass
class Sizes:
    width: int


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.n = nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)
        self.b, self.m = nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.m(self.b(self.n(self.a(x)).relu()))


def make_model(classes, in_channels=3, width=4):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1), Residual(width), Residual(width),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    )


def by_other_names(num_classes, in_chans, img_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * img_size * img_size, num_classes))


def without_any():
    return make_model(10, 1)


def needs_more(classes, depth):
    return make_model(classes)


def returns_text():
    return "a network"


def fails():
    raise RuntimeError("no such luck\\nand more")


def wrong_classes():
    return make_model(7, 1)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make_model(10, 1)

    def forward(self, x):
        return self.inner(x), x if self.training else self.inner(x)


def pair():
    return Pair()
"""
VIT = "timm:vit_tiny_patch16_224(patch_size=2, depth=2, embed_dim=16, num_heads=2, mlp_ratio=2)"
TINY = ["--epochs", "2", "--batch-size", "64", "--threads", "1", "--warmup-epochs", "0.2"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    declare_operators()
    path = tmp_path_factory.mktemp("networks") / "own nets (1).py"
    path.write_text(FILE)
    return path


def made(text, channels=1, classes=10, size=(8, 8)):
    return sources.build(text, channels=channels, classes=classes, size=size)


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "name", "file", "arguments"),
    [
        ("resnet20", "own", "resnet20", "", {}),
        ("torchvision:vgg11_bn", "torchvision", "vgg11_bn", "", {}),
        ("timm:vit_tiny_patch16_224.augreg_in21k", "timm", "vit_tiny_patch16_224.augreg_in21k", "", {}),
        (
            "timm:a(depth=6, ratio=-0.5, name='x:y(z', sizes=(1, 2), on=True, no=None)",
            "timm",
            "a",
            "",
            {"depth": 6, "ratio": -0.5, "name": "x:y(z", "sizes": (1, 2), "on": True, "no": None},
        ),
        ("a.py/b (1).py:make(width=3)", "file", "make", "a.py/b (1).py", {"width": 3}),
        ("C:\\nets\\b.py:make", "file", "make", "C:\\nets\\b.py", {}),
        ("torchvision:vgg11()", "torchvision", "vgg11", "", {}),
    ],
)
def test_a_name_is_taken_apart(text, kind, name, file, arguments):
    found = sources.parse(text)
    assert (found.kind, found.name, found.file, found.arguments) == (kind, name, file, arguments)


@pytest.mark.parametrize(
    "text",
    [
        "torchvision:",
        "timm:4x",
        "nets.py:",
        "nets.py:a.b",
        "nets.py:a b",
        "timm:a(b)",
        "timm:a(b=c)",
        "timm:a(b=f(1))",
        "timm:a(b=__import__('os'))",
        "timm:a(**{})",
        "timm:a(b=1",
        "timm:a(b=1)(c=2)",
        "timm:a(1)",
        "timm:a(b=1) + 1",
        "nope",
        "nope.py",
        "torchvision-resnet18",
        None,
        "",
    ],
)
def test_a_wrong_form_is_refused_in_one_line_before_anything_is_imported(text):
    with pytest.raises(ValueError, match=r"^`arch` must [^\n]+; got (arch=)?[^\n]+\. [^\n]+\.$"):
        parse(["--arch", text]) if text else loop.prepare(parse([]).__class__(arch=text))


def test_names_and_flags_load_neither_pytorch_nor_a_package():
    code = (
        "import sys; from catode.train.settings.commandline import parse; c = parse(['--arch', 'timm:vit_x', '--keep', 'a']);"
        "assert not {'torch', 'timm', 'torchvision'} & set(sys.modules), c"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("resnet20", "resnet20"),
        ("torchvision:mobilenet_v2", "torchvision-mobilenet_v2"),
        ("timm:vit_tiny.a(depth=3, x='/..')", "timm-vit_tiny.a"),
        ("/far/away/own nets (1).py:make_model(width=3)", "own_nets_1_-make_model"),
        ("../x/ä b.py:make", "_b-make"),
    ],
)
def test_a_run_has_a_legal_folder_whose_tag_tells_the_rest(text, folder):
    config = parse(["--arch", text])
    assert config.out.startswith(f"runs/digits-{folder}-") and re.fullmatch(r"[\w./-]+", config.out, re.ASCII)
    assert config.shortcut is None or text == "resnet20"


def test_the_identity_holds_arguments_files_and_what_is_protected():
    tags = [
        parse(words).tag
        for words in (
            ["--arch", "timm:vit_x"],
            ["--arch", "timm:vit_x(depth=3)"],
            ["--arch", "timm:vit_x(depth=4)"],
            ["--arch", "a/b.py:make"],
            ["--arch", "c/b.py:make"],
            ["--arch", "timm:vit_x", "--keep", "head"],
            ["--arch", "timm:vit_x", "--keep", "head", "blocks.0"],
            ["--arch", "timm:vit_x", "--least", "head=3"],
        )
    ]
    assert len(set(tags)) == len(tags) and tags[0] == parse([]).tag == "default"
    config = parse(["--arch", "timm:vit_x", "--keep", "a", "--keep", "b", "--least", "c=2"])
    assert config.keep == ("a", "b") and config.from_json(config.to_json()) == config


@pytest.mark.parametrize(("flag", "value"), [("shortcut", "A"), ("stem", "imagenet"), ("hidden_scale", 0.5)])
def test_settings_of_the_own_networks_are_refused_for_others(flag, value):
    with pytest.raises(ConfigError, match=rf"^`{flag}` must be left out with a network [^\n]+; got {flag}={value!r} "):
        parse([f"--{flag.replace('_', '-')}", str(value), "--arch", "timm:vit_x"])


# --- building -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("resnet21", "be one of resnet14, [^\n]+ Did you mean resnet20\\?"),
        (
            "torchvision:mobilenetv2",
            "name a classifier of torchvision; [^\n]+ Did you mean torchvision:mobilenet_v2\\?",
        ),
        ("torchvision:fasterrcnn_resnet50_fpn", "name a classifier of torchvision"),
        ("timm:vit_tiny_patch16_225", "name a classifier of timm; [^\n]+ Did you mean timm:vit_tiny_patch16_224\\?"),
        ("FILE:make_modle", "name a function in [^\n]+ Did you mean make_model\\?"),
        ("FILE:HERE", "name a function in "),
        ("missing.py:make", "name a function in a file that exists; "),
        ("BROKEN:make", "name a file whose code runs, and it fails with ZeroDivisionError: division by zero; "),
        ("QUITTING:make", "name a file whose code runs, and it fails with SystemExit: 3; "),
    ],
)
def test_what_is_not_there_is_refused_in_one_line_before_data_are_read(text, says, file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("catode.train.data.load", lambda *_, **__: pytest.fail("the data were read"))
    for name, content in (("BROKEN", "1 / 0"), ("QUITTING", "raise SystemExit(3)")):
        (tmp_path / f"{name}.py").write_text(content)
        text = text.replace(name, str(tmp_path / f"{name}.py"))
    text = text.replace("FILE", str(file))
    with pytest.raises(ValueError, match=f"^`arch` must {says}"):
        sources.check(text)
    assert main(["--arch", text, "--out", str(tmp_path / "run")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: runs the code of ")]
    assert len(said) == 1 and said[0].startswith("error: `arch` must ") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_missing_package_or_one_that_does_not_work_is_one_line(name, monkeypatch):
    declare_operators()
    find, load_module = sources.importlib.util.find_spec, sources.importlib.import_module

    def broken(module, *rest):
        if module == name:
            raise RuntimeError("operator torchvision::nms does not exist")
        return load_module(module, *rest)

    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda module: None if module == name else find(module))
    with pytest.raises(
        ValueError, match=rf"whose package is installed, {name} is not; [^\n]+ pip install 'catode\[models\]'"
    ):
        sources.check(f"{name}:resnet18")
    monkeypatch.undo()
    monkeypatch.setattr(sources.importlib, "import_module", broken)
    with pytest.raises(
        ValueError, match=r"nms does not exist\); got [^\n]+ Install the torchvision that belongs to it\.$"
    ):
        sources.check(f"{name}:resnet18")


@pytest.mark.parametrize(
    ("text", "shape", "says"),
    [
        ("torchvision:resnet18", (1, 8, 8), "take images of 1 channels; torchvision's networks take 3; "),
        ("torchvision:resnet18(width=3)", (3, 32, 32), "be a network that can be built; [^\n]+ fails: TypeError: "),
        ("torchvision:vit_b_16", (3, 30, 30), "be a network that can be built; [^\n]+ fails: "),
        ("timm:vit_tiny_patch16_224", (1, 8, 8), "be a network that "),
        ("FILE:needs_more", (1, 8, 8), "name a function that needs no other arguments than classes, num_classes, "),
        ("FILE:make_model(depth=3)", (1, 8, 8), "name a function that needs no other arguments than "),
        ("FILE:returns_text", (1, 8, 8), "name a function that returns a torch.nn.Module; got arch='str'"),
        ("FILE:fails", (1, 8, 8), "be a network that can be built; [^\n]+ fails: RuntimeError: no such luck. "),
        ("torchvision:alexnet", (3, 8, 8), r"be a network that takes images of shape 3x8x8; [^\n]+, which fails in "),
        (
            "FILE:wrong_classes",
            (1, 8, 8),
            r"be a network that returns logits of shape \(images, 10\), [^\n]+, which returns \(2, 7\) ",
        ),
        (
            "FILE:pair",
            (1, 8, 8),
            r"be a network that returns logits of shape [^\n]+, which returns tuple for 2 images of shape 1x8x8 in train ",
        ),
    ],
)
def test_what_cannot_be_built_or_run_is_one_line(text, shape, says, file):
    with pytest.raises(ValueError, match=rf"^`arch` must {says}[^\n]*$"):
        model = made(text.replace("FILE", str(file)), shape[0], 10, shape[1:])
        sources.check_output(text, model, torch.zeros(1, *shape), 10)


def test_torchvision_s_networks_have_this_many_classes_and_fresh_weights():
    declare_operators()
    import torchvision

    for name, size in (("mobilenet_v2", 32), ("googlenet", 64), ("inception_v3", 96), ("vit_b_32", 64)):
        model = made(f"torchvision:{name}", 3, 7, (size, size))
        assert type(model) is type(
            torchvision.models.get_model(name, **({"image_size": size} if "vit" in name else {}))
        )
        sources.check_output(name, model, torch.zeros(1, 3, size, size), 7)
    assert made("torchvision:mobilenet_v2(width_mult=0.5)", 3, 7, (32, 32)).features[1].conv[1].out_channels == 8


def test_timm_s_networks_have_the_channels_and_size_of_the_images():
    declare_operators()
    model = made(VIT)
    assert model.patch_embed.proj.weight.shape == (16, 1, 2, 2) and model.pos_embed.shape == (1, 17, 16)
    sources.check_output(VIT, model, torch.zeros(1, 1, 8, 8), 10)
    model = made("timm:test_resnet", 2, 5, (32, 48))
    sources.check_output("test_resnet", model, torch.zeros(1, 2, 32, 48), 5)


def test_a_function_is_called_with_what_it_has_parameters_for(file, capsys):
    sources._SAID.clear()
    model = made(f"{file}:make_model(width=6)", classes=9)
    assert (model[0].in_channels, model[0].out_channels, model[-1].out_features) == (1, 6, 9)
    assert made(f"{file}:by_other_names", 2, 9, (8, 8))[1].weight.shape == (9, 128)
    assert made(f"{file}:without_any")[-1].out_features == 10
    assert type(made(f"{file}:make_model")[1]) is type(model[1])  # the file's code is run once
    assert capsys.readouterr().err == f"note: runs the code of {file}\n"


def test_a_network_is_checked_on_a_copy_and_draws_nothing():
    declare_operators()
    model = made("torchvision:mobilenet_v2", 3, 10, (32, 32))
    before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    sources.check_output("x", model, torch.zeros(1, 3, 32, 32), 10)
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# --- protecting -----------------------------------------------------------------------------------------------------------


def test_what_is_kept_of_a_network_that_describes_itself():
    model, example = own("resnet14", in_channels=1, classes=10), torch.zeros(1, 1, 8, 8)
    blocks = described(model, example, ["layer1.*", "layer2.0.conv1", "fc"], {"layer3.*": 5, "layer2.1": 10**6})
    assert {block.name: (block.removable, len(block.sites)) for block in blocks} == {
        "layer2.1": (True, 1),
        "layer3.0": (True, 1),
        "layer3.1": (True, 1),
    }
    assert blocks.least == {"layer3.0.conv1": 5, "layer3.1.conv1": 5, "layer2.1.conv1": 32}
    assert {str(refusal) for refusal in blocks.refused} >= {
        "branch `layer1.0`: kept by 'layer1.*'",
        "width `layer2.0.conv1` (32): kept by 'layer2.0.conv1'",
        "branch `layer2.0`: kept by 'layer2.0.conv1'",
    }
    assert list(described(model, example)) == model.structures()
    partly = described(own("resnet50", in_channels=3, classes=10), torch.zeros(1, 3, 32, 32), ["*.conv1"])
    assert not any(block.removable for block in partly) and {s.name for b in partly for s in b.sites} == {
        f"{block.name}.conv2" for block in partly
    }


@pytest.mark.parametrize(
    ("keep", "least", "says"),
    [
        (["layer9"], {}, "`keep` must hold patterns of module paths of the network; got keep='layer9'"),
        (["layer*"], {}, "`keep` must leave something that can go; got keep="),
        ([], {"nothing": 3}, "`least` must hold patterns of module paths of the network; got least='nothing'"),
    ],
)
def test_patterns_that_name_nothing_or_everything_are_refused(keep, least, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        described(own("resnet14", in_channels=1, classes=10), torch.zeros(1, 1, 8, 8), keep, least)


# --- runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(file, tmp_path_factory):
    """Finished runs of a convolutional network of a file and of timm's transformer, by name."""
    declare_operators()
    root = tmp_path_factory.mktemp("runs")
    names = {"file": (f"{file}:make_model(width=8)", ["--keep", "2"]), "timm": (VIT, ["--optimizer", "adamw"])}
    for name, (arch, more) in names.items():
        assert main(["--arch", arch, *TINY, "--target-macs", "0.6", *more, "--out", str(root / name)]) in (0, 3)
    return root


@pytest.mark.parametrize("name", ["file", "timm"])
def test_a_run_of_a_foreign_network_leaves_what_every_run_does(name, runs):
    folder = runs / name
    result, structure = (json.loads((folder / f"{n}.json").read_text()) for n in ("result", "structure"))
    model = load(folder)
    counted = count(model, torch.zeros(1, 1, 8, 8))
    assert (counted.macs, counted.params) == (result["macs"], result["params"])
    assert result["macs"] / result["macs_dense"] <= 0.61 and result["units_kept"] < result["units_total"]
    assert "shortcut" not in structure and "stem" not in structure and structure["image_shape"] == [1, 8, 8]
    blocks = {row["block"] for row in csv.DictReader((folder / "structures.csv").open())}
    assert blocks == {name for name, block in structure["blocks"].items() if block["sites"] or name != "rest"}
    if name == "file":
        assert structure["keep"] == ["2"] and set(structure["blocks"]) == {"1"} and result["layers_total"] == 1
        assert model[2].a.out_channels == 16 and model[2].b.in_channels == 16
    report = (folder / "report.md").read_text()
    for picture in re.findall(r"\((\w+\.png)\)", report):
        assert (folder / picture).stat().st_size > 0
    assert "structure.png" in report


@pytest.mark.parametrize("name", ["file", "timm"])
def test_a_run_loads_into_the_user_s_own_object(name, runs, file):
    folder, x = runs / name, torch.randn(3, 1, 8, 8)
    arch = json.loads((folder / "structure.json").read_text())["arch"]
    model, alone = made(arch), load(folder)
    assert load(folder, model=model) is model and not model.training
    assert torch.equal(model(x), alone(x)) and type(model) is type(alone)
    names = set(made(arch).state_dict())
    assert set(model.state_dict()) <= names
    with pytest.raises(ValueError, match=r"matching structure.json, and `model` be of its architecture; got [^\n]+$"):
        load(folder, model=own("resnet14", in_channels=1, classes=10))


def test_without_its_file_a_run_loads_into_a_model_that_is_given(runs, file, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    structure = json.loads((runs / "file" / "structure.json").read_text()) | {"arch": "gone.py:make_model(width=8)"}
    (folder / "model.pt").write_bytes((runs / "file" / "model.pt").read_bytes())
    (folder / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(
        ValueError, match=r"^`arch` must name a function in a file that exists; [^\n]+ Or pass model=, [^\n]+$"
    ):
        load(folder)
    x = torch.randn(2, 1, 8, 8)
    given = load(folder, model=made(f"{file}:make_model(width=8)"))
    assert torch.equal(given(x), load(runs / "file")(x))


@pytest.mark.parametrize("name", ["file", "timm"])
def test_a_foreign_network_is_exported(name, runs, tmp_path, capsys):
    from catode.export import main as export

    assert export([str(runs / name), "--format", "torch-export", "--out", str(tmp_path / "a.pt2")]) == 0
    program = torch.export.load(tmp_path / "a.pt2").module()
    x = torch.randn(5, 1, 8, 8)
    assert torch.allclose(program(x), load(runs / name)(x), atol=1e-4)
    assert export([str(runs / name), "--latency"]) == 0 and "compact" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["file", "timm"])
def test_a_foreign_network_resumes_bit_by_bit(name, runs, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    config = json.loads((runs / name / "config.json").read_text())
    protect = ["--keep", *config["keep"]] if config["keep"] else ["--optimizer", "adamw"]
    words = ["--arch", config["arch"], *TINY, "--target-macs", "0.6", *protect, "--out", str(folder)]
    words += ["--checkpoint-every", "7"]
    save = checkpoint.save_state

    class Cut(Exception):
        pass

    def cut_off(where, state, keep):
        save(where, state, keep)
        if state["step"] >= 28:
            raise Cut

    monkeypatch.setattr(checkpoint, "save_state", cut_off)
    with pytest.raises(Cut):
        main(words)
    monkeypatch.setattr(checkpoint, "save_state", save)
    assert main(["--resume", str(folder)]) in (0, 3)
    for table in ("structures.csv", "metrics.csv"):
        ours, theirs = (list(csv.DictReader((path / table).open())) for path in (folder, runs / name))
        for row in (*ours, *theirs):
            row.pop("seconds", None), row.pop("wait_share", None)
        assert ours == theirs and ours
    ours, theirs = (torch.load(path / "model.pt", weights_only=True) for path in (folder, runs / name))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_initial_weights_of_any_network(file, tmp_path, capsys):
    declare_operators()
    source = made(VIT, classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    config = parse(["--arch", VIT, "--pretrained", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "run")])
    setup = loop.prepare(config)
    for name, tensor in setup.model.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, source.state_dict()[name])
    assert any("for 7 classes, these images have 10" in note for note in setup.notes)
    other = f"{file}:make_model"
    with pytest.raises(
        ValueError, match=r"^`init` must hold the weights of this network; got init=[^\n]+, which lacks "
    ):
        loop.prepare(parse(["--arch", other, "--init", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "run")]))


@pytest.mark.parametrize(
    "said", ["`structures()` must be right; got wrong. Leave it out.", "the gate of unit 3 must act; it does not."]
)
def test_what_the_self_check_finds_is_one_line(said, file, tmp_path, capsys, monkeypatch):
    def finds(*_, **__):
        raise ValueError(said)

    monkeypatch.setattr("catode.prune.selfcheck.check", finds)
    assert main(["--arch", f"{file}:make_model", *TINY, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {said}"
    assert not (tmp_path / "run").exists()


def test_dead_channels_that_would_come_back_to_life_are_refused_before_the_first_step(tmp_path, capsys):
    nets = tmp_path / "nets.py"
    nets.write_text(
        "from torch import nn\n\n\ndef make(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), "
        "nn.Linear(32, classes))\n"
    )
    run, flags = tmp_path / "run", ["--arch", f"{nets}:make", "--epochs", "1", "--nu", "1", "--threads", "1"]
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert main([*flags, "--out", str(run), "--width-multiple", "8"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: `width_multiple` must be 1 where ")
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    assert main([*flags, "--out", str(run), "--width-multiple", "1"]) == 0


# --- catode describe --------------------------------------------------------------------------------------------------------


def test_describe_prints_shares_that_are_those_of_the_cut_network(file, tmp_path, capsys):
    picture = tmp_path / "parts.png"
    words = ["describe", f"{file}:make_model(width=8)", "--image-size", "8", "--channels", "1", "--draw", str(picture)]
    assert command(words) == 0
    said = capsys.readouterr().out
    model = made(f"{file}:make_model(width=8)")
    whole, example = count(model, torch.zeros(1, 1, 8, 8)), torch.zeros(1, 1, 8, 8)
    model[1] = nn.Identity()
    left = count(model, example)
    row = next(line.split() for line in said.splitlines() if line.startswith("1 "))
    assert row[:2] == ["1", "branch"] and row[2:] == [
        f"{1 - left.macs / whole.macs:.2%}",
        f"{1 - left.params / whole.params:.2%}",
    ]
    assert f"{whole.macs:,} MACs, {whole.params:,} parameters" in said
    assert "2 branches and 32 units in 2 widths can go" in said and picture.read_bytes()[:4] == b"\x89PNG"
    assert "cannot go:" in said and "the residual stream" in said


def test_describe_groups_what_was_refused_and_tells_the_least(capsys):
    declare_operators()
    words = ["timm:vit_tiny_patch16_224(patch_size=4, depth=3, embed_dim=32, num_heads=2)", "--image-size", "16"]
    assert command(["describe", *words, "--keep", "blocks.1", "--least", "blocks.0.mlp*=9"]) == 0
    said = capsys.readouterr().out
    refused = said.partition("cannot go:\n")[2].splitlines()
    assert len(refused) < 8 and sum("kept by 'blocks.1'" in line for line in refused) == 2
    assert re.search(r"^blocks\.0\.attn\.qkv +heads +2 ", said, re.M)
    assert re.search(r"^blocks\.0\.mlp\.fc1 +width +128 .* at least 9 stay$", said, re.M)
    assert not re.search(r"^blocks\.1", said, re.M)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "`arch` must be given"),
        (["resnet21"], "`arch` must be one of resnet14, "),
        (["resnet20", "--image-size", "x"], "`image_size` must be an integer"),
        (["resnet20", "--classes", "0"], "`classes` must be an integer of at least 1"),
        (["resnet20", "--channels", "-1"], "`channels` must be "),
        (
            ["resnet20", "--keep", "layer7"],
            "`keep` must hold patterns of module paths of the network; got keep='layer7'",
        ),
        (["resnet20", "--least", "layer1"], "`least` must be PATTERN=NUMBER "),
        (["resnet20", "--draw", "a.gif"], "`draw` must be a .png in an existing folder"),
        (["resnet20", "--draw", "nowhere/a.png"], "`draw` must be a .png in an existing folder"),
        (["torchvision:alexnet", "--image-size", "8"], "`arch` must be a network that takes images of shape 3x8x8"),
    ],
)
def test_describe_refuses_in_one_line(words, says, capsys):
    declare_operators()
    assert command(["describe", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {says}") and said.err.count("\n") == 1 and not said.out


def test_describe_is_a_program_of_the_package():
    words = [sys.executable, "-m", "catode", "describe", "resnet14", "--classes", "10"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "6 branches and 224 units in 6 widths can go" in done.stdout
    assert str(Path(sys.executable)) not in done.stdout
