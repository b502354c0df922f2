"""The command line, end to end in this process: a run's folder, and one clear line for everything that is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from catode.export import main as export_main
from catode.prune.describe.costs import count
from catode.train import data, load, loop
from catode.train.__main__ import main
from catode.train.models import build
from catode.train.settings.commandline import parse

METRICS = [
    "epoch",
    "step",
    "time",
    "lr",
    "loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "expected_complexity",
    "macs",
    "params",
    "layers_kept",
    "units_kept",
    "undecided",
    "seconds",
    "wait_share",
]
STRUCTURES = [
    "step",
    "time",
    "kind",
    "block",
    "site",
    "index",
    "keep_prob",
    "benefit",
    "benefit_upper",
    "benefit_lower",
    "price",
    "gain",
    "decay",
    "rate_ratio",
    "noise",
    "benefit_noise",
    "drift",
    "step_time",
    "memory",
    "risk",
    "separatrix",
    "tolerance",
    "fate",
]
RESULT = [
    "test_accuracy",
    "test_loss",
    "validation_accuracy",
    "validation_loss",
    "validation_accuracy_history",
    "test_accuracy_without_ema",
    "validation_accuracy_without_ema",
    "training_images",
    "validation_images",
    "test_images",
    "macs",
    "macs_executed",
    "macs_dense",
    "params",
    "params_dense",
    "expected_complexity",
    "layers_kept",
    "layers_total",
    "units_kept",
    "units_total",
    "nu",
    "decisions",
    "seconds",
    "latency_ms",
    "latency_dense_ms",
    "latency_ms_128",
    "latency_dense_ms_128",
    "seed",
]
SMALL = ["--arch", "resnet14", "--threads", "1", "--epochs", "2"]
UNITS = 2 * (16 + 32 + 64)


def table(path):
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return reader.fieldnames, list(reader)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def accuracy(folder, dataset="digits", data_dir=None, split="test"):
    """Share of right predictions of the loaded network on all images of a split."""
    model, config = load(folder), json.loads((folder / "config.json").read_text())
    images = data.load(dataset, data_dir, validation_share=config["validation_share"], split_seed=config["split_seed"])
    layout = data.Batches(
        images.train_images,
        images.train_labels,
        2,
        images.mean,
        images.std,
        channels_last=config["layout"] == "channels-last",
    )
    right = 0
    with torch.no_grad():
        labels = getattr(images, f"{split}_labels")
        for x, y in layout.evaluation(getattr(images, f"{split}_images"), labels, 256):
            right += int((model(x).argmax(1) == y).sum())
    return right / len(labels)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    flags = ["--check-every", "5", "--measure-every", "1", "--nu", "30", "--sink-share", "0.2", "--seed", "3"]
    assert main([*SMALL, *flags, "--out", str(folder)]) == 0
    return folder


def test_the_folder_holds_what_the_contract_lists(finished):
    names = {p.name for p in finished.iterdir()}
    wanted = {
        "config.json",
        "env.json",
        "metrics.csv",
        "structures.csv",
        "result.json",
        "model.pt",
        "structure.json",
        "report.md",
    }
    assert wanted <= names and any(n.endswith(".png") for n in names)
    assert not any(n.endswith((".part", ".tmp")) for n in names)
    fields, rows = table(finished / "metrics.csv")
    assert fields == METRICS and [row["epoch"] for row in rows] == ["1", "2"]
    assert [int(row["step"]) for row in rows] == [20, 40]
    assert all(0 <= float(row["wait_share"]) <= 1 for row in rows)
    fields, rows = table(finished / "structures.csv")
    assert fields == STRUCTURES and {row["kind"] for row in rows} == {"layer", "unit"}
    assert sum(row["step"] == rows[0]["step"] for row in rows) == 6 + UNITS
    assert all(row["block"] and 0 <= float(row["keep_prob"]) <= 1 for row in rows)
    assert set(RESULT) <= result(finished).keys()
    config = json.loads((finished / "config.json").read_text())
    assert (config["arch"], config["epochs"], config["nu"], config["seed"]) == ("resnet14", 2, 30, 3)
    assert {"torch", "python", "threads", "device"} <= json.loads((finished / "env.json").read_text()).keys()


def test_result_agrees_with_the_loaded_network_exactly(finished):
    found, model = result(finished), load(finished)
    assert not model.training
    assert accuracy(finished) == found["test_accuracy"]
    history = found["validation_accuracy_history"]
    assert accuracy(finished, split="validation") == found["validation_accuracy"] == history[-1] and len(history) == 2
    assert [found[f"{split}_images"] for split in ("training", "validation", "test")] == [1294, 144, 359]
    example = torch.zeros(1, 1, 8, 8)
    counted, dense = count(model, example), count(build("resnet14", in_channels=1, classes=10), example)
    assert (found["macs"], found["params"]) == (counted.macs, counted.params)
    assert (found["macs_dense"], found["params_dense"]) == (dense.macs, dense.params)
    assert found["macs"] < found["macs_dense"] and found["macs"] <= found["macs_executed"]
    assert (
        sum(found["decisions"].values()) == 6 + UNITS and found["layers_total"] == 6 and found["units_total"] == UNITS
    )
    assert found["seed"] == 3 and min(found["latency_ms"], found["latency_dense_ms_128"], found["seconds"]) > 0


def test_structure_json_agrees_with_the_weights_and_the_result(finished):
    structure, found = json.loads((finished / "structure.json").read_text()), result(finished)
    blocks = structure["blocks"]
    assert sum(b["kept"] for b in blocks.values()) == found["layers_kept"]
    assert sum(len(u) for b in blocks.values() if b["kept"] for u in b["sites"].values()) == found["units_kept"]
    state = torch.load(finished / "model.pt", weights_only=True)
    for name, block in blocks.items():
        assert (f"{name}.conv1.weight" in state) == block["kept"]
        if block["kept"]:
            assert len(state[f"{name}.conv1.weight"]) == len(block["sites"][f"{name}.conv1"])
    _, rows = table(finished / "metrics.csv")
    assert (int(rows[-1]["macs"]), int(rows[-1]["units_kept"])) == (found["macs"], found["units_kept"])
    assert float(rows[-1]["validation_accuracy"]) == pytest.approx(found["validation_accuracy"], abs=1e-5)


def test_a_summary_is_printed_and_a_bar_shown(tmp_path, capsys):
    assert main([*SMALL[:-1], "1", "--nu", "0", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    for word in ("accuracy", "MACs", "params", "layers", "latency", "waiting", "report"):
        assert word in printed.out
    for word in ("loss", "accuracy", "expected MACs", "layers", "units"):
        assert word in printed.err
    # nu = 0 is the ungated network
    found = result(tmp_path / "run")
    assert found["macs"] == found["macs_dense"] == found["macs_executed"] and found["decisions"] == {}
    assert (found["layers_kept"], found["units_kept"], found["expected_complexity"]) == (6, UNITS, 1.0)
    assert table(tmp_path / "run" / "structures.csv") == (STRUCTURES, [])
    assert (tmp_path / "run" / "report.md").is_file()
    assert accuracy(tmp_path / "run") == found["test_accuracy"]


@pytest.mark.parametrize("there", [True, False])
def test_a_cuda_device_that_is_not_used_is_said(there, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert main([*SMALL, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    printed = "".join(capsys.readouterr())
    note = "note: the run uses the CPU, though PyTorch finds a CUDA device. For that, give --device cuda."
    assert (note in printed.splitlines()) == there


def test_dry_run_prints_the_costs_and_writes_nothing(tmp_path, capsys):
    assert main([*SMALL, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    dense = count(build("resnet14", in_channels=1, classes=10), torch.zeros(1, 1, 8, 8))
    assert f"{dense.macs:,} MACs, {dense.params:,} parameters" in printed
    assert all(f"layer{s}.{b}" in printed for s in (1, 2, 3) for b in (0, 1))
    assert list(tmp_path.iterdir()) == []


def test_config_json_holds_what_the_run_used(finished):
    config = json.loads((finished / "config.json").read_text())
    schedule = loop.learning_rates(config["schedule"], config["lr"], 40)
    assert config["rate_ratio"] == 1.0 / (0.2 * float(schedule.sum() / (1.0 - config["momentum"])))
    assert config["derived"] == ["memory", "rate_ratio"]  # the digits' preset says the others
    assert None not in (config["memory"], config["check_every"], config["probe_size"], config["read_every"])
    setup = loop.prepare(parse([*SMALL, "--dataset=digits", "--batch-size=200"]))
    free = dataclasses.replace(setup.config, memory=None, check_every=None, probe_size=None)
    free = loop.prepare(dataclasses.replace(free, derived=())).config
    assert (free.memory, free.check_every, free.probe_size) == (10, 2, 20)


BAD = {
    "dataset": ["--dataset", "imagenet"],
    "arch": ["--arch", "resnet21"],
    "nu": ["--nu", "-1"],
    "alpha": ["--alpha", "2"],
    "beta": ["--beta", "-0.5"],
    "risk": ["--risk", "0.7"],
    "tol": ["--tol", "0.1", "--derive-tol"],
    "device": ["--device", "cuda"],
    "epochs": ["--epochs", "0"],
    "batch_size": ["--batch-size", "100000"],
    "lr": ["--lr", "fast"],
    "data_dir": ["--dataset", "cifar10"],
    "--colour": ["--colour", "red"],
}


def assert_one_line(capsys, name):
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"error: `{re.escape(name)}` must [^\n]+; got [^\n]+\n", printed.err), printed.err


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("dry", [False, True])
def test_bad_input_is_one_line_and_leaves_nothing(name, dry, tmp_path, capsys):
    if name == "device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert main([*BAD[name], *(["--dry-run"] if dry else []), "--threads", "1", "--out", str(tmp_path / "run")]) == 2
    assert_one_line(capsys, name)
    assert list(tmp_path.iterdir()) == []


def pictures(root, classes=("ant", "bee"), per_class=24, size=12):
    random = np.random.default_rng(0)
    for split, number in (("train", per_class), ("test", 5)):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for j in range(number):
                pixels = random.integers(0, 128, (size, size, 3), dtype=np.uint8) + np.uint8(100 * k)
                Image.fromarray(pixels).save(root / split / name / f"{j}.png")
    return root


def cifar(root, per_batch=8):
    root.mkdir()
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {
            b"labels": random.integers(0, 10, per_batch).tolist(),
            b"data": random.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
        }
        (root / name).write_bytes(pickle.dumps(content, 2))
    (root / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % k for k in range(10)]}, 2))
    return root


def truncated(root):
    path = root / "train" / "ant" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])


def emptied(root):
    for path in (root / "train" / "bee").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncated, "3.png"),
        (emptied, "bee"),
        (lambda root: (root / "test").rename(root / "other"), "test/"),
        (lambda root: (root / "train").rename(root / "other"), "train/"),
        (lambda root: root.rename(root.with_name("moved")), "does not exist"),
    ],
    ids=["truncated", "class without images", "no test", "no train", "no folder"],
)
def test_bad_folders_are_one_line_and_leave_nothing(spoil, said, tmp_path, capsys):
    spoil(pictures(tmp_path / "images"))
    flags = ["--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--batch-size", "8"]
    assert main([*SMALL, *flags, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(r"error: `data_dir` must [^\n]+; got [^\n]+\n", printed) and said in printed
    assert not (tmp_path / "run").exists()


def test_malformed_cifar_is_one_line_and_leaves_nothing(tmp_path, capsys):
    (cifar(tmp_path / "cifar-10-batches-py") / "data_batch_3").write_bytes(b"not a pickle")
    flags = ["--dataset", "cifar10", "--data-dir", str(tmp_path), "--batch-size", "8"]
    assert main([*SMALL, *flags, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "data_batch_3" in printed and printed.startswith("error: `data_dir` must ")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused_and_kept(finished, capsys):
    before = {p: p.read_bytes() for p in finished.iterdir()}
    assert main([*SMALL, "--out", str(finished)]) == 2
    assert_one_line(capsys, "out")
    assert {p: p.read_bytes() for p in finished.iterdir()} == before


@pytest.mark.parametrize("nu", ["0", "1"])
def test_a_loss_that_is_not_finite_stops_with_status_one_and_a_good_network(nu, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*SMALL, "--lr", "1e18", "--nu", nu, "--out", str(folder)]) == 1
    assert_stopped(folder, capsys.readouterr().err)


def test_the_kept_network_is_good_when_the_last_step_of_an_epoch_broke_the_weights(tmp_path, capsys):
    """One step an epoch: the loss of the first is finite, its update is not survivable, and an epoch ends there."""
    root = pictures(tmp_path / "images")
    flags = ["--dataset", "folder", "--data-dir", str(root), "--batch-size", "48", "--lr", "1e38", "--nu", "0"]
    flags += ["--validation-share", "0"]
    folder = tmp_path / "run"
    assert main([*SMALL, *flags, "--epochs", "4", "--out", str(folder)]) == 1
    assert_stopped(folder, capsys.readouterr().err, torch.randn(4, 3, 12, 12))


def test_a_ruinous_step_of_a_gated_network_is_one_clear_line(tmp_path, capsys):
    """The loss is finite, its update is not, and the pruner's probe comes before the next loss."""
    folder = tmp_path / "run"
    assert main([*SMALL, "--lr", "1e30", "--epochs", "4", "--out", str(folder)]) == 1
    assert_stopped(folder, capsys.readouterr().err)


def assert_stopped(folder, printed, x=None):
    message = [line for line in printed.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and re.match(r"error: `loss` must stay finite; got [^\n]* at step \d+ ", message[0])
    assert str(folder) in message[0] and "--lr" in message[0]
    assert not (folder / "result.json").exists()
    model = load(folder)
    with torch.no_grad():
        assert model(torch.randn(4, 1, 8, 8) if x is None else x).isfinite().all(), (
            "the kept network must be a good one"
        )


def test_a_folder_data_set_from_end_to_end(tmp_path):
    root = pictures(tmp_path / "images")
    flags = [
        "--dataset",
        "folder",
        "--data-dir",
        str(root),
        "--batch-size",
        "8",
        "--check-every",
        "2",
        "--measure-every",
        "1",
    ]
    assert main(["--arch", "resnet14", "--threads", "1", "--epochs", "1", *flags, "--out", str(tmp_path / "run")]) == 0
    structure = json.loads((tmp_path / "run" / "structure.json").read_text())
    assert structure["classes"] == ["ant", "bee"] and structure["image_shape"] == [3, 12, 12]
    assert accuracy(tmp_path / "run", "folder", root) == result(tmp_path / "run")["test_accuracy"]


def test_cifar_files_from_end_to_end(tmp_path):
    root = cifar(tmp_path / "cifar-10-batches-py")
    flags = [
        "--dataset",
        "cifar10",
        "--data-dir",
        str(tmp_path),
        "--batch-size",
        "8",
        "--amp",
        "bf16",
        "--schedule",
        "cosine",
    ]
    assert main(["--arch", "resnet14", "--threads", "1", "--epochs", "1", *flags, "--out", str(tmp_path / "run")]) == 0
    found = result(tmp_path / "run")
    assert (
        root.is_dir()
        and found["macs_dense"] == count(build("resnet14", in_channels=3, classes=10), torch.zeros(1, 3, 32, 32)).macs
    )
    assert load(tmp_path / "run")(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_load_refuses_what_is_not_a_run(tmp_path, finished):
    with pytest.raises(FileNotFoundError, match=r"`folder` must be a run's folder"):
        load(tmp_path)
    for name in ("structure.json", "model.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    structure = json.loads((tmp_path / "structure.json").read_text())
    kept = next(b for b in structure["blocks"].values() if b["kept"])
    units = next(iter(kept["sites"].values()))
    units[:] = list(range(len(units) - 1)) or [0, 1]
    (tmp_path / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(
        ValueError, match=r"^`folder` must hold a complete model.pt and a matching structure.json; got [^\n]+$"
    ):
        load(Path(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"null", b"[1, 2]", b'{"arch": "\xff"}', dict(image_shape=["a"]), dict(mean=[None]), dict(std=[])],
)
def test_a_spoilt_structure_json_is_one_line_with_its_name(content, finished, tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes((finished / "model.pt").read_bytes())
    if isinstance(content, dict):
        content = json.dumps(json.loads((finished / "structure.json").read_text()) | content).encode()
    (tmp_path / "structure.json").write_bytes(content)
    assert export_main([str(tmp_path), "--format=torch-export"]) == 2
    error = capsys.readouterr().err
    assert (
        re.fullmatch(r"error: `folder` must hold a complete structure.json; got [^\n]+\n", error)
        and str(tmp_path) in error
    )


@pytest.mark.parametrize("place", [0.2, 0.45, 0.8])
def test_a_flipped_bit_in_the_weights_is_found_by_every_reader(place, finished, tmp_path, capsys):
    names = ("structure.json", "model.pt", "result.json")
    for name in names:
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    content = bytearray((tmp_path / "model.pt").read_bytes())
    content[int(place * len(content))] ^= 64
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^`folder` must hold a complete model.pt [^\n]+\(checksum of [^\n]+ is wrong\)"
    ):
        load(tmp_path)
    assert export_main([str(tmp_path), "--format=torch-export"]) == 2
    assert re.fullmatch(r"error: `folder` must hold a complete model.pt .+ is wrong\).+\n", capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_compile_where_it_does_not_work_is_one_line(monkeypatch, tmp_path, capsys):
    def fails(function):
        raise RuntimeError("No working C++ compiler found\nlong trace")

    monkeypatch.setattr(torch, "compile", fails)
    assert main(["--compile", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "error: `compile` must be left out" in error and "No working C++ compiler found." in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_steps_train_as_the_others_do(tmp_path):
    flags = ["--nu", "20", "--epochs", "6", "--warmup-epochs", "3", "--memory", "10", "--threads", "1"]
    found = []
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        assert main([*flags, *more, "--out", str(tmp_path / name)]) == 0
        with (tmp_path / name / "metrics.csv").open() as file:
            found.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert found[0][0] == pytest.approx(found[1][0], rel=0.02)  # rounding is amplified from step to step
    assert found[1][-1] < 0.5 * found[1][0]
