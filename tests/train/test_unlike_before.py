"""What changed behind a run's back, or would fail only later, is said before anything is computed with it."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from catode import export
from catode.prune.devices.precision import tf32
from catode.report import describe as describe_command
from catode.train import load, loop
from catode.train.__main__ import main
from catode.train.loop import checkpoint
from catode.train.loop.average import Average
from catode.train.loop.evaluation import evaluated_at_once
from catode.train.models import build, sources
from catode.train.models.answer import alike, answer, answer_of_any
from catode.train.settings.run import WRITTEN

NETS = """from torch import nn


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 24), nn.BatchNorm1d(24), nn.Linear(24, classes)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        {start}
        return self.second(self.dropout(self.norm(self.first(x.flatten(1))).{act}())){end}


def make(classes):
    return Net(classes)
"""
FLAGS = [
    "--epochs=2",
    "--nu=0.3",
    "--threads=1",
    "--batch-size=64",
    "--warmup-epochs=0.2",
    "--memory=10",
    "--check-every=5",
]


def nets(path, start="pass", act="relu", end=""):
    """Write a file with a network, whose code is run anew."""
    path.write_text(NETS.format(start=start, act=act, end=end))
    for name in [name for name in sys.modules if name.startswith("catode_arch_")]:
        del sys.modules[name]
    return ["--arch", f"{path}:make"]


@pytest.fixture
def run(tmp_path):
    assert main([*nets(tmp_path / "nets.py"), *FLAGS, "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def test_a_finished_run_is_read_only_with_the_code_that_made_it(run, capsys):
    path, images = run.parent / "nets.py", torch.randn(5, 1, 8, 8)
    expected = load(run)(images)
    path.write_text(path.read_text().replace("return self.second", "# a comment\n        return self.second"))
    nets(path)  # the same network
    assert torch.equal(load(run)(images), expected)
    nets(path, act="tanh")
    said = r"must be read with the network that it was made by; got [^\n]+: the code behind its name, or a package, has changed"
    with pytest.raises(ValueError, match=said):
        load(run)
    capsys.readouterr()
    assert export.main([str(run), "--format", "torch-export"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: `folder` must be read with the network that it was made by; got ")
    with pytest.raises(ValueError, match="`model`, or a package, has changed"):
        load(run, model=sources.build(f"{path}:make", channels=1, classes=10, size=(8, 8)))
    structure = json.loads((run / "structure.json").read_text())
    assert len(structure.pop("answer")) == 20
    (run / "structure.json").write_text(json.dumps(structure))  # as of a run that was cut off
    (run / "checksums.json").unlink()
    assert not torch.allclose(load(run)(images), expected)


def test_what_has_no_count_is_a_note_of_the_run(tmp_path, capsys, recwarn):
    path = tmp_path / "nets.py"
    flags = nets(path, start="x = torch.fft.fft(x.flatten(1)).real")
    path.write_text("import torch\n" + path.read_text())
    assert main([*flags, *FLAGS, "--out", str(tmp_path / "run")]) == 0
    said = (
        "the MACs leave out what `Net` (Net) executes by aten._fft_r2c.default, which is not counted and has no price."
    )
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in lines if "leave out" in line] == [f"note: {said}"]
    assert not [warning for warning in recwarn if "leave out" in str(warning.message)]


def test_a_fault_inside_a_step_is_no_refusal(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr("catode.prune.pruner.Pruner.step", fail)
    with pytest.raises(ValueError, match="^operands could not be broadcast together$"):
        main(["--arch=resnet14", "--hidden-scale=0.5", *FLAGS, "--out", str(tmp_path / "run")])


def test_a_run_goes_on_only_with_the_code_that_it_began_with(tmp_path, capsys, monkeypatch):
    path, folder = tmp_path / "nets.py", tmp_path / "run"
    prune = loop.Trainer.prune

    def stopped(own, *given):
        prune(own, *given)
        if own.step == 25:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Trainer, "prune", stopped)
    assert main([*nets(path), *FLAGS, "--out", str(folder)]) == 128 + signal.SIGTERM
    monkeypatch.setattr(loop.Trainer, "prune", prune)
    nets(path, act="tanh")
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("error: `resume` must find the network that the run began with; got ")
        and "nets.py:make" in error
    )
    nets(path)
    env = json.loads((folder / "env.json").read_text())
    (folder / "env.json").write_text(json.dumps({**env, "torch": "1.0", "device": "cuda"}))
    checkpoint.seal(folder, "env.json")
    assert main(["--resume", str(folder)]) == 0
    said = capsys.readouterr().err
    for name, before, now in (("torch", "1.0", torch.__version__), ("device", "cuda", "cpu")):
        assert f"note: the run had {name} {before} and goes on with {now}: its results will not be those" in said
    after = json.loads((folder / "env.json").read_text())
    assert after.pop("before") == [{**env, "torch": "1.0", "device": "cuda"}] and after == env


def test_an_answer_is_that_of_a_network_in_eval_mode_and_changes_nothing():
    torch.manual_seed(3)
    model, before = build("resnet14", in_channels=1, classes=10), torch.get_rng_state()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = answer(model, (1, 8, 8))
    assert len(told) == 20 and told == answer(model, (1, 8, 8)) and model.training
    other = build("resnet14", in_channels=1, classes=10)
    assert alike(answer_of_any(model, (1, 8, 8)), answer_of_any(other, (1, 8, 8))), "of one architecture"
    assert not alike(told, answer(other, (1, 8, 8))) and not alike(told, told[:-1])
    torch.set_rng_state(before)
    answer(model, (1, 8, 8)), answer_of_any(model, (1, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert alike(told, answer(model.double(), (1, 8, 8)))
    largest = max(map(abs, told))
    assert alike([told[0] + 0.009 * largest, *told[1:]], told) and not alike(
        [told[0] + 0.011 * largest, *told[1:]], told
    )


def test_an_answer_of_a_cuda_device_is_not_rounded_to_tf32(monkeypatch):
    """Others compare it, such as `catode.load` on a CPU; without a device, at what the context does."""
    backends, seen = (torch.backends.cudnn, torch.backends.cuda.matmul), []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    model.register_forward_hook(lambda *_: seen.append([own.allow_tf32 for own in backends]))
    with tf32(True):
        told = answer(model, (1, 8, 8))
        assert seen == [[True, True]] * 2, "a CPU has none"
        monkeypatch.setattr("catode.train.models.answer.cuda_devices", lambda model: ["cuda:0"])
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
        assert answer(model, (1, 8, 8)) == told and seen[2:] == [[False, False]] * 2
        assert [own.allow_tf32 for own in backends] == [True, True]


class Zero(nn.Module):
    """A branch that begins at 0."""

    def __init__(self, act=F.relu):
        super().__init__()
        self.act, self.fc, self.out = act, nn.Linear(64, 6), nn.Linear(6, 10)
        self.scale = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        z = self.fc(x.flatten(1))
        return self.out(z + self.scale * self.act(z))


def test_an_answer_with_random_weights_sees_what_begins_at_0():
    shape = (1, 8, 8)
    one, other = Zero(), Zero(torch.sigmoid)
    other.load_state_dict(one.state_dict())
    assert alike(answer(one, shape), answer(other, shape))
    assert not alike(answer_of_any(one, shape), answer_of_any(other, shape))


class Odd(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.fc, self.change = nn.Linear(64, 10), change

    def forward(self, x):
        return self.change(self.fc(x.flatten(1)))


def fails(z):
    raise RuntimeError("not here")


@pytest.mark.parametrize(
    "model",
    [Odd(lambda z: F.dropout(z, 0.5)), Odd(lambda z: z / 0), Odd(fails), Odd(nn.Identity()).bfloat16()],
    ids=["random", "not finite", "fails", "bf16"],
)
def test_a_network_of_which_an_answer_tells_nothing_has_none(model):
    assert answer(model, (1, 8, 8)) == [] and alike([], [1.0]) and alike([1.0], [])


def test_a_network_that_is_random_in_eval_mode_is_trained_and_read(tmp_path):
    path = tmp_path / "nets.py"
    flags = nets(path, end=" + self.second.bias * torch.rand(1)")
    path.write_text("import torch\n" + path.read_text())
    assert main([*flags, *FLAGS, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "structure.json").read_text())["answer"] == []
    assert load(tmp_path / "run")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"start": "x = x.flatten(1); self.first(x).detach()", "end": ".detach() + self.second.bias"}, "must "),
        (
            {"end": ".masked_fill(self.second.bias.detach() == self.second.bias.detach().max(), -float('inf'))"},
            "finite",
        ),
    ],
    ids=["detached", "masked"],
)
@pytest.mark.parametrize("dry", [False, True])
def test_what_the_pruner_cannot_measure_is_refused_before_the_first_step(
    where, says, dry, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop.Trainer, "train", lambda *_: pytest.fail("training began"))
    flags = [*nets(tmp_path / "nets.py", **where), *FLAGS, "--out", str(tmp_path / "run"), *(["--dry-run"] * dry)]
    assert main(flags) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in error
    assert not (tmp_path / "run").exists()


def test_what_the_pruner_refuses_later_is_one_line_with_its_step(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("`loss` must be another; got this. Change it.")

    monkeypatch.setattr("catode.prune.pruner.Pruner.step", refuse)
    flags = ["--arch=resnet14", "--hidden-scale=0.5", *FLAGS, "--out", str(tmp_path / "run")]
    assert main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: `loss` must be another; got this. Change it. At step 1."


@pytest.mark.parametrize("more", [["--alpha=1"], ["--width-multiple=8"], ["--target-macs=0.0001"]])
def test_a_dry_run_refuses_what_the_run_would(more, tmp_path, capsys):
    flags = [*nets(tmp_path / "nets.py", act="sigmoid"), *FLAGS, *more, "--out", str(tmp_path / "run")]
    if "--target" in more[0]:
        flags.remove("--nu=0.3")
    ends = []
    for dry in ([], ["--dry-run"]):
        ends.append((main([*flags, *dry]), capsys.readouterr().err.splitlines()[-1]))
    assert ends[0] == ends[1] and ends[0][0] == 2
    assert not (tmp_path / "run").exists()


def test_what_a_run_writes_is_known(run):
    assert main(["--resume", str(run)]) == 2  # it is finished
    names = {path.name for path in run.iterdir()}
    assert names - {"config.json"} <= {*WRITTEN} and "phase.png" in names


def test_a_checkpoint_of_somebody_else_is_none_of_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-best.pt").write_text("mine")
    assert main(["--arch=resnet14", *FLAGS, "--dry-run", "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("name", [*WRITTEN, "checkpoint-12.pt"])
def test_nothing_that_a_run_writes_is_overwritten(name, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    assert main(["--arch=resnet14", *FLAGS, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: `out` must be a folder without files that a run writes; got ")
        and f"holds {name}." in error
    )
    assert error.count("\n") == 1 and (tmp_path / "run" / name).read_text() == "mine"


def test_a_wrong_file_of_weights_is_found_before_the_images_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop.setup.data, "load", lambda *_, **__: pytest.fail("images were read"))
    assert main(["--arch=resnet14", *FLAGS, "--init", str(tmp_path / "none.pt"), "--out", str(tmp_path / "run")]) == 2
    assert "`init` must be" in capsys.readouterr().err


# --- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "images"), [(2, 8), (8, 32), (64, 256), (128, 256), (256, 256), (512, 512)])
def test_evaluation_takes_at_most_four_times_the_images_of_a_part_at_once(part, images):
    assert evaluated_at_once(part) == images


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_memory_that_pytorch_lacks_costs_one_line(error, tmp_path, capsys, monkeypatch):
    def lacks(*_, **__):
        raise error

    monkeypatch.setattr("catode.train.loop.trainer.take_gradient", lacks)
    flags = ["--arch=resnet14", "--hidden-scale=0.5", *FLAGS, "--out", str(tmp_path / "run")]
    assert main(flags) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: not enough memory: ") and said.endswith(f"continue with --resume {tmp_path / 'run'}")
    monkeypatch.setattr(describe_command, "_describe", lacks)
    assert describe_command.main(["resnet14", "--image-size", "4096"]) == 1
    assert capsys.readouterr().err == "error: `image_size` must fit into the memory; got 4096. Use a smaller one.\n"


@pytest.mark.parametrize("one", [True, False])
def test_latencies_that_do_not_fit_into_the_memory_cost_no_run(one, tmp_path, capsys, monkeypatch):
    def lacks(networks, example, batches=(1, 128)):
        if 128 in batches or not one:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [[4.0, 2.0]]

    monkeypatch.setattr("catode.train.loop.result.latency_ms", lacks)
    flags = ["--arch=resnet14", "--hidden-scale=0.5", *FLAGS, "--out", str(tmp_path / "run")]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert [f"latency  not measured at batch {size}: not enough memory" in said for size in (1, 128)] == [not one, True]
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (
        found["latency_dense_ms_128"] is None
        and found["latency_ms"] == (2.0 if one else None)
        and found["test_accuracy"] > 0
    )
    assert (tmp_path / "run" / "report.md").exists()


# --- running statistics at the end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "anew"),
    [
        (["--decide-until=0.1"], []),  # 14 of 140 steps
        (["--decide-until=1"], ["trained"]),
        (["--decide-until=1", "--shadow"], ["trained"]),
        (["--decide-until=0.1", "--ema=0.99"], []),  # (14/140)^9 of it is older
        (["--decide-until=0.8", "--ema=0.99"], ["trained", "averaged"]),  # (112/140)^9 is 0.13
        (["--decide-until=0.8", "--ema=0.99", "--batch-size=16"], ["averaged"]),  # 448 of 560 steps
        (["--decide-until=0.8", "--ema=0.9", "--batch-size=16"], []),
    ],
)
def test_statistics_that_may_know_of_gates_are_computed_anew(more, anew, tmp_path, monkeypatch):
    found, exchanged, ending = [], [False], [False]
    finish, exchange = loop.Trainer.finish, Average._exchange

    def end(own):
        ending[0] = True
        return finish(own)

    def turn(own):
        exchanged[0] = not exchanged[0]
        exchange(own)

    def note(model, batches, group):
        assert ending[0] and sum(1 for _ in batches) in (20, 80)
        found.append("averaged" if exchanged[0] else "trained")

    monkeypatch.setattr(loop.Trainer, "finish", end)
    monkeypatch.setattr(Average, "_exchange", turn)
    monkeypatch.setattr("catode.train.loop.trainer.recalibrate_norms", note)
    monkeypatch.setattr("catode.train.loop.result.latency_ms", lambda *_: [[1.0], [1.0]])
    monkeypatch.setattr("catode.report.report.write", lambda folder: None)
    kept = [flag for flag in FLAGS if flag not in ("--epochs=2", "--nu=0.3")] + [
        "--nu=8",
        "--sink-share=1",
        "--epochs=7",
    ]
    assert main(["--arch=resnet14", "--hidden-scale=0.25", *kept, *more, "--out", str(tmp_path / "run")]) in (0, 3)
    assert found == anew
