"""Several processes are one: same numbers as one process with the whole batch, one voice, and a clean end when one dies."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from catode.prune.devices.distributed import Disagreement, Group, SyncBatchNorm, current, synchronise_norms
from catode.prune.pruner import Pruner
from catode.train import data, loop
from catode.train.__main__ import main
from catode.train.loop import checkpoint
from catode.train.models import Architecture, ResNet

SMALL = ["--arch=resnet14", "--threads=1", "--layers-per-probe=6", "--memory=10", "--width-multiple=4", "--nu=20"]
SMALL += ["--epochs=2", "--batch-size=120", "--warmup-epochs=0.5", "--hidden-scale=0.25", "--check-every=5"]
SMALL += ["--measure-every=2", "--lr=0.05", "--sync-bn"]
STEPS = 27


def child(pipe, function, rank, size, store, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    pipe.send_bytes(pickle.dumps(function(*args)))
    dist.destroy_process_group()


def together(folder, function, *args, size=2):
    """What `function(*args)` returns in each of some processes that have joined; `args` may differ: one tuple each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["catode.train.loop.preflight", "sklearn.datasets", "hypothesis", "pytest"])
    store, running = folder / f"store{time.monotonic_ns()}", []
    for rank in range(size):
        own = [a[rank] if isinstance(a, tuple) else a for a in args]
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(theirs, function, rank, size, store, own))
        process.start()
        theirs.close()
        running.append((process, ours))
    results = [pickle.loads(pipe.recv_bytes()) for _, pipe in running]
    for process, _ in running:
        process.join()
    return results


def several(function, cases):
    return [function(*case) for case in cases]


# the pieces


@given(st.integers(1, 5), st.integers(0, 30), st.integers(0, 4))
def test_law_the_rows_of_all_processes_are_the_rows_of_one(size, begin, each):
    batch = torch.arange(size * (begin + each + 1))
    groups = [Group(rank, size) for rank in range(size)]
    parts = [g.share(batch)[g.rows(begin, each * size)] for g in groups]
    assert {len(part) for part in parts} == {each}
    assert sorted(torch.cat(parts).tolist()) == list(range(begin, begin + each * size))


def test_one_process_changes_nothing():
    group, x = Group(), torch.randn(4)
    assert group.sum(x) is x and group.mean(x) is x and group.share(x) is x and group.gather(x) == [x]
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    loss = torch.tensor(3.0, requires_grad=True)
    assert group.join([weight], loss) == 3.0 and torch.equal(weight.grad, torch.ones(2))


def normalised(shape, kind, more):
    """Output, gradients and buffers of a norm in this process."""
    group = current()
    torch.manual_seed(0)
    model = nn.Sequential(kind(shape[1], **more).double())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    x, direction = group.share(torch.randn(shape).double()), group.share(torch.randn(shape).double())
    x.requires_grad_()
    if group.size > 1:
        synchronise_norms(model)
        assert type(model[0]) is SyncBatchNorm
    for _ in range(2):
        y = model(x)
    (y * direction).sum().backward()
    own = {name: group.sum(p.grad) for name, p in model.named_parameters()}
    inside = {name: b.clone() for name, b in model.named_buffers()}
    return y.detach(), x.grad, own, inside, model.eval()(x).detach()


NORMS = [
    ([8, 3, 5, 4], nn.BatchNorm2d, {}),
    ([8, 3, 5, 4], nn.BatchNorm2d, {"affine": False, "momentum": None}),
    ([6, 4], nn.BatchNorm1d, {"track_running_stats": False, "eps": 0.1}),
]


def test_a_norm_over_two_processes_is_the_norm_over_the_whole_batch(tmp_path):
    for rank, each in enumerate(together(tmp_path, several, normalised, NORMS)):
        for found, case in zip(each, NORMS, strict=True):
            expected = normalised(*case)
            for i in (0, 1):
                torch.testing.assert_close(found[i], expected[i][rank::2], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found[2:4], expected[2:4], rtol=1e-12, atol=1e-12)
            if case[2].get(
                "track_running_stats", True
            ):  # else eval mode, too, takes the statistics of the share at hand
                torch.testing.assert_close(found[4], expected[4][rank::2], rtol=1e-12, atol=1e-12)


def joined_up(gradients, loss, checksum):
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    parameters[1].grad = torch.tensor(gradients)
    try:
        mean = current().join(parameters, torch.tensor(loss), checksum=checksum, step=7)
    except Disagreement as error:
        return str(error)
    assert mean.untyped_storage().nbytes() == 4  # one number, which does not keep the gradients it travelled with
    return float(mean), parameters[0].grad, parameters[1].grad.tolist()


def test_joining_averages_gradients_and_loss_and_finds_disagreement(tmp_path):
    first = [([1.0, 2.0, 3.0], 1.0, 2**24 - 1), ([1.0, 2.0, 3.0], 1.0, 5), ([1.0, 2.0, 3.0], 1.0, 5)]
    second = [([3.0, 2.0, 1.0], 2.0, 2**24 - 1), ([math.nan] * 3, math.nan, 5), ([1.0, 2.0, 3.0], 1.0, 6)]
    for mean, spoilt, refused in together(tmp_path, several, joined_up, (first, second)):
        assert mean == (1.5, None, [2.0, 2.0, 2.0])
        assert math.isnan(spoilt[0]) and all(map(math.isnan, spoilt[2]))
        assert "must be the same in all processes; got different ones in processes 0 and 1 before step 7" in refused


# the pruner


@functools.cache
def pruned(synchronised, per_example, tamper=None):
    """Train and prune a small network in double precision; thetas of every step, states, weights, momentum."""
    group, digits = current(), load_digits()
    torch.manual_seed(0)
    x = torch.from_numpy(digits.images / 16.0)[:, None]
    y = torch.from_numpy(digits.target)
    model = ResNet(Architecture("basic", (1, 1, 1), 4, "A", "cifar"), 1, 10).double()
    if synchronised and group.size > 1:
        synchronise_norms(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    pruner = Pruner(
        model,
        x[:2],
        optimizer=optimizer,
        nu=6.0,
        steps=STEPS,
        warmup=10,
        rate_ratio=0.3,
        per_example=per_example,
        probe_size=8,
        memory=10,
        check_every=8,
        group=group,
    )
    thetas, removed, order = [], 0, torch.Generator().manual_seed(1)
    for step in range(STEPS):
        batch = torch.randint(len(x), (32,), generator=order)
        loss = F.cross_entropy(model(group.share(x[batch])), group.share(y[batch]))
        optimizer.zero_grad()
        loss.backward()
        try:
            group.join(model.parameters(), loss, checksum=pruner.checksum(), step=step + 1)
        except Disagreement as error:
            return str(error)
        optimizer.step()
        check = pruner.step()
        removed += check.removed if check and step + 1 < STEPS else 0
        if step + 1 == tamper and group.rank == 1:
            pruner.keep_prob[3] = np.nextafter(pruner.keep_prob[3], 0.0)
        thetas.append(pruner.keep_prob.copy())
    group.settle(model, step=STEPS)
    momentum = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return np.array(thetas), pruner.fate.tolist(), removed, model.state_dict(), momentum


@pytest.mark.parametrize("per_example", [False, True])
def test_two_processes_with_common_norms_are_one(per_example, tmp_path):
    thetas, state, removed, weights, momentum = pruned(True, per_example)
    assert removed > 0 and (thetas[-2] < 1.0).any()
    for found in together(tmp_path, pruned, True, per_example):
        np.testing.assert_allclose(found[0], thetas, atol=2e-6)  # dL/dxi is in single precision
        assert found[1:3] == (state, removed)
        torch.testing.assert_close(found[3], weights, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(found[4], momentum, rtol=1e-8, atol=1e-9)


def test_two_processes_with_norms_of_their_own_agree_bit_by_bit(tmp_path):
    (thetas, *one), (others, *other) = together(tmp_path, pruned, False, False)
    assert np.array_equal(thetas, others) and one[:2] == other[:2] and one[1] > 0
    assert all(torch.equal(one[2][name], other[2][name]) for name in one[2])
    assert all(map(torch.equal, one[3], other[3]))
    assert not np.allclose(thetas[-2], pruned(True, False)[0][-2], atol=1e-6)  # not what one process does


def test_a_theta_that_differs_in_its_last_bit_is_found_at_the_next_step(tmp_path):
    for message in together(tmp_path, pruned, True, False, 12):
        assert "thetas, masks and gate draws must be the same" in message and "0 and 1 before step 13" in message


def left_out(averages, wrapped, same):
    """A user's loop in processes that have joined, without a word about them to the pruner; its thetas, or what went wrong."""
    rank = dist.get_rank()
    torch.manual_seed(0 if same else rank)
    model = ResNet(Architecture("basic", (1, 1), 4, "A", "cifar"), 1, 10)
    ddp = nn.parallel.DistributedDataParallel(model) if wrapped == "given" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    given = dict(nu=1.0, steps=STEPS, warmup=8, rate_ratio=0.3, probe_size=8, memory=10, check_every=5)
    try:
        pruner = Pruner(ddp or model, torch.zeros(1, 1, 8, 8), optimizer=optimizer, **given)
        call = nn.parallel.DistributedDataParallel(model) if wrapped == "called" else model
        thetas, digits = [], load_digits()
        x, y = torch.from_numpy(digits.images / 16.0).float()[:, None], torch.from_numpy(digits.target)
        order = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (32,), generator=order)[rank::2]
            loss = F.cross_entropy(call(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            if averages:
                pruner.group.join(model.parameters(), loss)
            optimizer.step()
            pruner.step()
            thetas.append(pruner.keep_prob.copy())
        return np.array(thetas), pruner.group.size
    except (ValueError, Disagreement) as error:
        return str(error)


def test_processes_are_found_where_the_group_is_left_out(tmp_path):
    (one, size), (other, _) = together(tmp_path, left_out, True, "", True)
    assert size == 2 and np.array_equal(one, other) and (one[-1] < 1).any()


@pytest.mark.parametrize(
    ("averages", "wrapped", "same", "message"),
    [
        (
            False,
            "",
            True,
            "weights must be the same in all processes; got different ones in processes 0 and 1 at step 10",
        ),
        (
            True,
            "",
            False,
            "weights must be the same in all processes; got different ones in processes 0 and 1 at step 0",
        ),
        (
            False,
            "given",
            True,
            "must be the plain network, whose parameters may change their shapes; got DistributedDataParallel",
        ),
        (False, "called", True, "must not be in DistributedDataParallel"),
    ],
    ids=[
        "gradients that are not averaged",
        "other weights",
        "DistributedDataParallel",
        "DistributedDataParallel later",
    ],
)
def test_what_several_processes_cannot_do_is_refused_in_all_of_them(averages, wrapped, same, message, tmp_path):
    for found in together(tmp_path, left_out, averages, wrapped, same):
        assert message in found and "\n" not in found


# the command line


def command(argv):
    """Exit status, output and errors of the trainer in this process; latencies and figures, which cost some, left out."""
    out, err = io.StringIO(), io.StringIO()
    quick = (
        mock.patch.object(loop.result, "latency_ms", return_value=[[1.0], [1.0]]),
        mock.patch("catode.report.report.write"),
    )
    with quick[0], quick[1], contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    return status, out.getvalue(), err.getvalue()


def precisely(argv):
    """The same in double precision.

    In single precision a run of one process whose batches are turned round differs by 1e-4 after ten steps.
    """
    batches = functools.partial(data.Batches, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(loop.trainer.data, "Batches", batches):
            return command(argv)
    finally:
        torch.set_default_dtype(torch.float32)


def end(folder):
    """What a finished run left, without times."""
    result = json.loads((folder / "result.json").read_text())
    result = {k: v for k, v in result.items() if "seconds" not in k and "latency" not in k}
    with (folder / "structures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return result, rows, torch.load(folder / "model.pt", weights_only=True)


def assert_close_end(found, expected):
    (result, rows, weights), (known, known_rows, known_weights) = found, expected
    for name in ("macs", "params", "decisions", "layers_kept", "units_kept"):
        assert result[name] == known[name]
    assert [(r["step"], r["block"], r["index"], r["fate"]) for r in rows] == [
        (r["step"], r["block"], r["index"], r["fate"]) for r in known_rows
    ]
    for name in ("keep_prob", "benefit", "gain"):
        ours, theirs = (np.array([float(r[name]) for r in table]) for table in (rows, known_rows))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights, known_weights, rtol=1e-7, atol=1e-8)
    assert result["validation_accuracy_history"] == known["validation_accuracy_history"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process that those of several must equal."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert precisely([*SMALL, "--out", str(folder)])[0] == 0
    widths = [int(row["units_kept"]) for row in csv.DictReader((folder / "metrics.csv").open())]
    assert 0 < widths[-1] < widths[0] < 56
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same of two processes, its checkpoints kept, and what they printed."""
    base = tmp_path_factory.mktemp("two")
    return base / "run", together(base, kept, [*SMALL, "--out", str(base / "run")])


def kept(argv):
    with mock.patch.object(loop.checkpoint, "drop_states"):
        return precisely(argv)


def test_two_processes_train_as_one_and_one_of_them_talks(one, two):
    folder, printed = two
    assert_close_end(end(folder), end(one))
    assert [status for status, _, _ in printed] == [0, 0]
    assert "accuracy" in printed[0][1] and "step/s" in printed[0][2] and printed[1][1:] == ("", "")
    assert {p.name for p in folder.iterdir() if "checkpoint" not in p.name} == {p.name for p in one.iterdir()}
    assert json.loads((folder / "env.json").read_text())["processes"] == 2


def test_two_processes_add_up_parts_and_clip_as_one(tmp_path):
    flags = [*SMALL, "--accumulate=2", "--clip-grad=0.3"]
    assert precisely([*flags, "--out", str(tmp_path / "one")])[0] == 0
    [(status, *_), _] = together(tmp_path, precisely, [*flags, "--out", str(tmp_path / "two")])
    assert status == 0
    assert_close_end(end(tmp_path / "two"), end(tmp_path / "one"))


BAD = [
    (["--batch-size=63", "--accumulate=3"], "number of processes times accumulate, at least two images for each part"),
    (["--batch-size=63"], "`batch_size` must be a multiple of the number of processes"),
    (["--batch-size=2"], "at least two images for each; got batch_size=2 with 2 processes"),
    (["--nu=-1"], "`nu` must be >= 0"),
    (
        ["--layout=auto"],
        "`layout` must be channels-last or channels-first for several processes; got layout='auto' with 2",
    ),
    (["--device=mps"], "`device` must be"),
    ((["--threads=1"], ["--dataset=cifar10", "--data-dir=nowhere"]), "`data_dir` must be an existing folder"),
    ((["--seed=1"], ["--seed=2"]), "must begin with the same settings"),
]


def test_bad_input_is_told_once_and_nothing_is_left(tmp_path):
    lines = [[*(own if isinstance(own, list) else own[rank])] for own, _ in BAD for rank in range(2)]
    lines = [([*line, "--out", str(tmp_path / "run")],) for line in lines]
    told, silent = together(tmp_path, several, command, (lines[::2], lines[1::2]))
    for (status, out, err), (_, message) in zip(told, BAD, strict=True):
        assert status == 2 and out == "" and message in err and err.count("\n") == 1
    assert silent == [(2, "", "")] * len(BAD)
    assert not (tmp_path / "run").exists()


def test_another_number_of_processes_goes_on_only_with_common_norms(one, two, tmp_path):
    common, own = tmp_path / "common", tmp_path / "own"
    shutil.copytree(two[0], common)
    (common / "result.json").unlink()
    checkpoint.states(common)[0].unlink()  # there remains that of the first of two epochs
    shutil.copytree(common, own)
    assert precisely(["--resume", str(common), "--threads=1"])[0] == 0
    assert_close_end(end(common), end(one))
    path = checkpoint.states(own)[0]
    state = torch.load(path, weights_only=True)
    torch.save({**state, "config": {**state["config"], "sync_bn": False}}, path)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "sync_bn": False}))
    (own / "checksums.json").unlink()
    status, _, err = precisely(["--resume", str(own), "--threads=1"])
    assert status == 2 and "as many processes as the run started with, 2; got 1" in err


def workers(launcher):
    """The processes that a launcher has started, by rank."""
    found = {}
    for number in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        found |= {int(e[5:]): int(number) for e in environment if e.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_process_takes_the_job_down_and_the_run_goes_on_to_the_same_end(tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    flags = [*SMALL, "--read-every=4", "--checkpoint-every=3"]  # checkpoints between two readings
    together(tmp_path, command, [*flags, "--out", str(whole)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    argv = ["catode.train", *flags, "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(launch + argv, env=environment, stderr=subprocess.PIPE, text=True) as job:
        while not list(folder.glob("checkpoint-*.pt")) and job.poll() is None:
            time.sleep(0.02)
        assert job.poll() is None
        os.kill(workers(job.pid)[1], signal.SIGKILL)
        _, err = job.communicate(timeout=120)
    assert job.returncode != 0
    assert f"Continue with --resume {folder}" in err and "SIGKILL" in err
    resumed = together(tmp_path, command, ["--resume", str(folder), "--threads=1"])
    assert [status for status, _, _ in resumed] == [0, 0]
    (result, rows, weights), (known, known_rows, known_weights) = end(folder), end(whole)
    assert result == known and rows == known_rows
    assert all(torch.equal(weights[name], known_weights[name]) for name in known_weights)


def evaluated(shape, batch):
    """Score of a fixed network over test images shared among the processes, and which of them this one had."""
    images, labels = (
        torch.arange(math.prod(shape)).remainder(251).to(torch.uint8).view(shape),
        torch.arange(shape[0]) % 3,
    )
    torch.manual_seed(0)
    network, group = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 3)), current()
    batches = data.Batches(
        images.repeat(6, 1, 1, 1), labels.repeat(6), 6, (0.5,), (0.2,), shard=(group.rank, group.size)
    )
    own = batches.evaluation(images, labels, batch) if len(labels) > group.rank else []
    own = list(own)
    (score,) = loop.evaluate(network, own, group=group)
    return score, sum(len(y) for _, y in own)


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_different_sizes_are_counted_as_one(size, tmp_path):
    """One image less on some processes, an image for one of them alone, and more batches on one than on another."""
    cases = [((count, 1, 2, 2), batch) for count in (1, 2, 3, 5, 7) for batch in (1, 2, 8)]
    alone = several(evaluated, cases)
    ours = together(tmp_path, several, evaluated, cases, size=size)
    for (shape, _), (expected, whole), *found in zip(cases, alone, *ours, strict=True):
        assert whole == shape[0] == sum(part for _, part in found)
        assert [score.accuracy for score, _ in found] == [expected.accuracy] * size
        assert [score.loss for score, _ in found] == pytest.approx([expected.loss] * size, rel=1e-6)
        assert len({part for _, part in found}) == (2 if shape[0] % size else 1)
