"""A sample of failing calls and damaged files, and the right value for each kind that the whole campaign found."""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from catode import _checksums, cli, load, records
from catode.report.report import write as write_report
from catode.train import loop
from catode.train.__main__ import main as train
from catode.train.loop import lock
from catode.train.settings.setting import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.faults import __main__ as faults
from tests.faults import calls, damage, runs


@pytest.mark.smoke
@pytest.mark.skipif(sys.platform != "linux" or calls.compiler() is None, reason="needs Linux and a C compiler")
def test_a_sample_of_the_campaign_finds_nothing(capsys):
    assert faults.main(["--quick", "--jobs=2"]) == 0
    said = capsys.readouterr().out
    assert "\n0 cases that must not be" in said and "| call: error | n |" in said and "| file | n |" in said


def test_without_a_compiler_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(calls, "compiler", lambda: None)
    assert faults.main(["--quick"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: `python -m tests.faults` must run on Linux with a C compiler; got none"
    ]


@pytest.mark.skipif(sys.platform != "linux" or calls.compiler() is None, reason="needs Linux and a C compiler")
def test_the_library_lets_the_call_that_is_asked_for_fail_once(tmp_path):
    """The n-th of write, fsync, close, rename and unlink under the folder, with that errno; none elsewhere."""
    script = """
import os, sys
from pathlib import Path
from tests.faults.calls import KILL, SHORT, Shim
folder, other = Path(sys.argv[1]), Path(sys.argv[2])
def work():
    seen = []
    for place in (other, folder):
        try:
            handle = os.open(place / "a", os.O_CREAT | os.O_WRONLY)
            seen.append(os.write(handle, b"abcd"))
            os.fsync(handle)
            os.close(handle)
            os.rename(place / "a", place / "b")
            os.unlink(place / "b")
        except OSError as error:
            seen.append(error.errno)
    return seen
shim = Shim()
for n in (-1, 0, 1, 2, 3, 4, 5):
    print(n, *shim.during(folder, n, 28, work), sep="|")
print(*shim.during(folder, 1, SHORT, work)[0])
shim.during(folder, 3, KILL, work)
"""
    folder, other = tmp_path / "run", tmp_path / "running"
    folder.mkdir()
    other.mkdir()
    shim = calls.build(tmp_path)
    done = subprocess.run(
        [sys.executable, "-u", "-c", script, str(folder), str(other)],
        env={"LD_PRELOAD": str(shim), "PYTHONPATH": str(faults.ROOT)},
        capture_output=True,
        text=True,
    )
    names = ["open a", "write a", "fsync a", "close a", "rename b", "unlink b"]
    rows = [f"{n}|{[4, errno.ENOSPC] if n == 0 else [4, 4, errno.ENOSPC] if n > 1 else ''}" for n in range(6)]
    lines = done.stdout.splitlines()
    assert lines[0] == f"-1|[4, 4]|{names}"
    assert lines[1] == f"{rows[0]}|{names[:1]}"
    assert lines[2] == f"1|[4, {errno.ENOSPC}]|{names[:2]}"
    assert lines[3:7] == [f"{rows[n]}|{names[: n + 1]}" for n in range(2, 6)]
    assert lines[7] == "4 2"
    assert done.returncode == -9


def test_every_way_damages_a_table_a_text_and_an_archive(tmp_path):
    assert len(damage.WAYS) >= 50
    table = b"epoch,loss\r\n" + b"".join(b"%d,%.3f\r\n" % (i, 1 / (i + 1)) for i in range(9))
    text = json.dumps({"a": 1.5, "b": [1, 2], "name": "x y"}, indent=1).encode()
    for content in (table, text, random.Random(0).randbytes(5000)):
        for way, change in damage.CHANGES.items():
            changed = change(content, random.Random(way))
            assert changed != content or way in ("other line ends", "not UTF-8", "null"), way
            assert changed == change(content, random.Random(way)), way


def test_verdicts():
    """Each verdict on what a tool says, by hand."""
    place = damage.Place("", Path(), Path(), {})
    whole = runs.Said(0, "right", "")

    def verdict(status, out="", err=""):
        return damage.judge(place, "a.json", runs.Said(status, out, err), whole)

    assert verdict(0, "right") == damage.RIGHT
    assert verdict(0, "other") == damage.SILENT
    assert verdict(0, "other", "warning: a.json is odd\n") == damage.TOLD
    assert verdict(2, err="error: x/a.json must be\n") == damage.REFUSED
    assert verdict(2, err="error: something must be\n") == damage.UNNAMED
    assert verdict(2, err="error: a.json\nerror: twice\n") == damage.UNNAMED
    assert verdict(7, err="error: a.json\n") == damage.UNNAMED
    assert verdict(None, err="Traceback ...") == damage.TRACEBACK
    assert verdict(0, "right", "Exception ignored in: <_io.FileIO>") == damage.TRACEBACK


# --- what the campaign found ------------------------------------------------------------------------------------------

TINY = ["--arch=resnet14", "--hidden-scale=0.25", "--epochs=1", "--warmup-epochs=0", "--threads=1", "--nu=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.result, "latency_ms", lambda *given: [[1.0], [1.0]])
        patch.setattr("catode.report.report._MAKERS", ())
        assert train([*TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_finished_run_has_the_checksum_of_every_file_that_is_read(run):
    sums = json.loads((run / "checksums.json").read_text())
    names = {path.name for path in run.iterdir() if path.suffix in (".json", ".csv", ".pt")}
    assert sums.keys() == names - {"checksums.json"}
    for name, value in sums.items():
        with (run / name).open("rb") as file:
            assert _checksums.of(file) == value
    assert _checksums.of(__import__("io").BytesIO(b"123456789")) == "cbf43926"  # the check value of CRC-32


@pytest.mark.parametrize(
    "name", ["config.json", "env.json", "result.json", "structure.json", "metrics.csv", "model.pt"]
)
def test_a_changed_digit_is_not_read_in_silence(name, run, capsys):
    """A number that is another, in a file that is whole: nothing but a checksum tells."""
    before = (run / name).read_bytes()
    at = next(i for i in range(len(before) // 2, len(before)) if before[i : i + 1].isdigit())
    (run / name).write_bytes(before[:at] + b"%d" % ((int(before[at : at + 1]) + 1) % 10) + before[at + 1 :])
    tool = ["export", str(run), "--format=torch-export"] if name == "model.pt" else ["report", str(run)]
    assert cli.main(tool) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run / name} must be as the run wrote it; got the checksum ")
    assert said.endswith("if it was changed on purpose, delete checksums.json.\n") and len(said.splitlines()) == 1
    if name in ("model.pt", "structure.json"):
        with pytest.raises(ValueError, match="must be as the run wrote it"):
            load(run)


def test_whoever_deletes_the_checksums_reads_what_he_changed(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"seed": 7}))
    with pytest.raises(ValueError, match=r"config\.json must be as the run wrote it"):
        records.read_config(run)
    (run / "checksums.json").unlink()
    assert records.read_config(run)["seed"] == 7
    write_report(run)


def test_a_compressed_table_has_the_checksum_of_its_content(run):
    import gzip

    content = (run / "metrics.csv").read_bytes()
    (run / "metrics.csv").unlink()
    (run / "metrics.csv.gz").write_bytes(gzip.compress(content))
    assert len(records.read_rows(run / "metrics.csv")) == 1
    (run / "metrics.csv.gz").write_bytes(gzip.compress(content.replace(b"1,", b"2,", 1)))
    with pytest.raises(ValueError, match=r"metrics\.csv must be as the run wrote it"):
        records.read_rows(run / "metrics.csv")


@pytest.mark.parametrize("content", ["", "null", "[1]", '{"model.pt": 3}', "[" * 100_000, None])
def test_damaged_checksums_are_named(content, run, capsys):
    (run / "checksums.json").unlink()
    if content is None:
        (run / "checksums.json").mkdir()
    else:
        (run / "checksums.json").write_text(content)
    for argv in (["report", str(run)], ["train", "--resume", str(run)], ["compare", str(run)]):
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert f"{run / 'checksums.json'} must hold a checksum for each file" in said and len(said.splitlines()) == 1
    with pytest.raises(ValueError, match=r"checksums\.json must hold"):
        load(run)


def test_an_output_folder_that_cannot_be_made_says_what_to_do(tmp_path, monkeypatch, capsys):
    def refuse(self, *given, **settings):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert train([*TINY, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.endswith("Fix that, then give the same command again\n") and len(said.splitlines()) == 1


def test_a_network_that_cannot_be_written_at_the_start_is_a_line_of_its_own(tmp_path, monkeypatch, capsys):
    """The line of the progress bar is ended first."""

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device", "model.pt")

    with monkeypatch.context() as patch:
        patch.setattr("catode.train.loop.checkpoint.save", full)
        assert train([*TINY, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: [Errno 28]") and said[-1].endswith(f"--resume {tmp_path / 'run'}")


def test_a_lock_that_cannot_be_deleted_does_not_cost_a_finished_run(tmp_path, monkeypatch, capsys):
    (tmp_path / lock.FILE).write_text("")

    def refuse(self):
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    lock.drop(tmp_path)
    assert (
        capsys.readouterr().err == f"warning: the run is finished, but {tmp_path / 'lock'} stays: Input/output error\n"
    )


def test_a_folder_in_place_of_the_lock_is_named(tmp_path):
    (tmp_path / lock.FILE).mkdir()
    with pytest.raises(
        ConfigError, match=r"`out` must be a folder that can be written; got out=.*, its lock: Is a directory"
    ):
        lock.hold(tmp_path)


def test_a_run_without_its_result_and_checkpoints_names_both(run, capsys):
    (run / "result.json").unlink()
    metrics = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(metrics + metrics.splitlines()[-1] + "\n")
    assert cli.main(["train", "--resume", str(run)]) == 2
    assert "neither a checkpoint nor, if it was finished, result.json" in capsys.readouterr().err
