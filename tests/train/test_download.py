"""The official archives from a server: whole, cut, damaged, absent."""

import dataclasses
import hashlib
import http.server
import os
import shutil
import signal
import tarfile
import threading
from pathlib import Path

import pytest
from test_data import write_cifar10

from catode.train.__main__ import main
from catode.train.data import DataError, cifar, download, load


class Server(http.server.ThreadingHTTPServer):
    """Serves one content under every path; `cuts` are the bytes after which the next answers break off."""

    def __init__(self, content, ranges=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.cuts, self.asked = content, ranges, [], []
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-10-python.tar.gz"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start and start >= len(server.content):
            self.send_error(416)
            return
        rest = server.content[start:]
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: server.cuts.pop(0)] if server.cuts else rest)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    write_cifar10(root / "cifar-10-batches-py", per_batch=30)
    with tarfile.open(root / "archive.tar.gz", "w:gz") as packed:
        packed.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    return (root / "archive.tar.gz").read_bytes()


@pytest.fixture
def serve(archive, monkeypatch):
    """Starts a server with the archive and makes it the official one."""
    started = []

    def start(content=archive, md5=None, **options):
        md5 = md5 or hashlib.md5(archive).hexdigest()
        started.append(Server(content, **options))
        spec = dataclasses.replace(cifar.CIFAR["cifar10"], url=started[-1].url, md5=md5)
        monkeypatch.setitem(cifar.CIFAR, "cifar10", spec)
        return started[-1]

    yield start
    for server in started:
        server.stop()


def names(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_download_leaves_the_official_files_and_asks_once(tmp_path, serve):
    server, root = serve(), tmp_path / "new" / "place"
    assert len(load("cifar10", root, download=True).train_labels) == 150
    assert names(root) == ["cifar-10-batches-py"]
    (root / ".cifar-10-python.tar.gz.lock").unlink()
    assert len(load("cifar10", root / "cifar-10-batches-py", download=True).train_labels) == 150
    assert server.asked == [None]
    assert [p.name for p in root.iterdir()] == ["cifar-10-batches-py"], "nothing is written where the files are there"


def test_the_official_folder_itself_may_be_named(tmp_path, serve):
    serve()
    assert len(load("cifar10", tmp_path / "cifar-10-batches-py", download=True).test_labels) == 30
    assert names(tmp_path) == ["cifar-10-batches-py"]


@pytest.mark.parametrize("cuts", [[1000], [1000, 5000, 1], [0x10000]])
def test_a_cut_connection_is_taken_up_where_it_ended(tmp_path, serve, cuts):
    server = serve()
    server.cuts = list(cuts)
    assert len(load("cifar10", tmp_path, download=True).train_labels) == 150
    expected = [sum(cuts[:k]) for k in range(1, len(cuts) + 1)]
    assert server.asked == [None, *(f"bytes={start}-" for start in expected)]


def test_a_part_of_an_earlier_try_is_gone_on_with(tmp_path, serve, archive):
    server = serve()
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(archive[:12345])
    load("cifar10", tmp_path, download=True)
    assert server.asked == ["bytes=12345-"] and names(tmp_path) == ["cifar-10-batches-py"]


def test_a_whole_part_is_only_checked(tmp_path, serve, archive):
    server = serve()
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(archive)
    load("cifar10", tmp_path, download=True)
    assert server.asked == [f"bytes={len(archive)}-"] and names(tmp_path) == ["cifar-10-batches-py"]


def test_a_server_without_ranges_begins_again(tmp_path, serve, archive):
    serve(ranges=False)
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(archive[:500])
    assert len(load("cifar10", tmp_path, download=True).train_labels) == 150


def test_an_archive_that_lies_there_is_used(tmp_path, serve, archive):
    server = serve()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    (tmp_path / "cifar-10-batches-py.part").mkdir()  # an unpacking that was killed
    load("cifar10", tmp_path, download=True)
    assert server.asked == [] and names(tmp_path) == ["cifar-10-batches-py"]


def test_an_incomplete_folder_is_filled(tmp_path, serve):
    server = serve()
    write_cifar10(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    assert len(load("cifar10", tmp_path, download=True).train_labels) == 150
    assert server.asked == [None] and names(tmp_path) == ["cifar-10-batches-py"]


def test_two_processes_fetch_once(tmp_path, serve):
    server = serve()
    threads = [threading.Thread(target=cifar.download, args=(tmp_path, cifar.CIFAR["cifar10"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [None] and names(tmp_path) == ["cifar-10-batches-py"]


def killed_at(step, root):
    """Download in a process of its own that is killed at a step of its work on the disk; whether it got that far."""
    process = os.fork()
    if process == 0:
        left = [step]

        def counted(function):
            def call(*arguments, **options):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return function(*arguments, **options)

            return call

        download.CHUNK = 1 << 17
        for place, name in ((os, "replace"), (os, "fsync"), (shutil, "copyfileobj"), (shutil, "rmtree")):
            setattr(place, name, counted(getattr(place, name)))
        for place, name in ((Path, "mkdir"), (Path, "rmdir"), (Path, "unlink"), (download.tqdm, "update")):
            setattr(place, name, counted(getattr(place, name)))
        try:
            cifar.download(root, cifar.CIFAR["cifar10"])
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes that begin as copies")
def test_a_download_that_is_killed_at_any_step_is_completed_by_the_next(tmp_path, serve):
    server = serve()
    expected = load("cifar10", tmp_path / "whole", download=True).fingerprint
    step = 0
    while killed_at(step, root := tmp_path / str(step)):
        before = len(server.asked)
        assert load("cifar10", root, download=True).fingerprint == expected
        assert len(server.asked) <= before + 1
        # killed after the last file had its name: the archive and an empty folder may stay, as nothing is asked for any more
        left = set(names(root)) - {"cifar-10-batches-py"}
        assert left <= {"cifar-10-batches-py.part", "cifar-10-python.tar.gz"}
        assert "cifar-10-batches-py.part" not in left or names(root / "cifar-10-batches-py.part") == []
        step += 1
    assert step > 20, "each of the files that are unpacked, at least, is a step"


STOPPED_IN = [(download.tqdm, "update"), (os, "fsync"), (os, "replace"), (shutil, "copyfileobj"), (Path, "rmdir")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("place", "name"), STOPPED_IN, ids=lambda value: getattr(value, "__name__", value))
def test_a_signal_in_a_download_is_one_line_and_the_next_start_completes_it(
    tmp_path, serve, monkeypatch, capsys, place, name, number
):
    server = serve()
    expected = load("cifar10", tmp_path / "whole", download=True).fingerprint
    flags = ["--dataset=cifar10", f"--data-dir={tmp_path / 'root'}", "--download", f"--out={tmp_path / 'run'}"]
    real = getattr(place, name)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(place, name, lambda *a, **k: (real(*a, **k), signal.raise_signal(number))[0])
        assert main(flags) == 128 + number
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line and "B/s" not in line]
    assert [x for x in told if "%|" not in x] == ["stopped before the run began; give the same command again"]
    before = len(server.asked)
    assert not (tmp_path / "run").exists()
    assert load("cifar10", tmp_path / "root", download=True).fingerprint == expected
    assert len(server.asked) <= before + 1


def refused(root, *expected):
    with pytest.raises(DataError) as caught:
        load("cifar10", root, download=True)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("`") and "; got" in message and message.endswith(".")
    assert all(text in message for text in expected), message


def test_a_wrong_checksum_is_refused_and_nothing_kept(tmp_path, serve, archive):
    serve(content=archive[:-1] + b"x")
    refused(tmp_path, "`download` must get a file of md5", "It was deleted")
    assert names(tmp_path) == []


def test_what_came_before_the_network_went_is_kept(tmp_path, serve, archive):
    server = serve()
    server.cuts = [3000, 0]
    refused(tmp_path, "`download` must be able to fetch", "connection was closed", "partial download")
    assert (tmp_path / "cifar-10-python.tar.gz.part").read_bytes() == archive[:3000]
    load("cifar10", tmp_path, download=True)
    assert server.asked[-1] == "bytes=3000-"


def test_a_silent_server_is_given_up(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.05)
    server = serve()
    server.cuts = [2000, 0]
    slow = threading.Event()
    monkeypatch.setattr(Handler, "finish", lambda self: slow.wait(20))
    try:
        refused(tmp_path, "`download` must be able to fetch", "timed out")
    finally:
        slow.set()
    assert (tmp_path / "cifar-10-python.tar.gz.part").stat().st_size == 2000


def test_no_network_is_one_line_and_leaves_nothing(tmp_path, serve, capsys):
    serve().stop()
    flags = ["--dataset", "cifar10", "--data-dir", str(tmp_path / "data"), "--download", "--out", str(tmp_path / "run")]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: `download` must be able to fetch http://127.0.0.1") and error.count("\n") == 1
    assert "refused" in error and not (tmp_path / "run").exists() and names(tmp_path / "data") == []


def test_a_missing_page_is_refused(tmp_path, serve, monkeypatch):
    serve()
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    refused(tmp_path, "`download` must be able to fetch", "Not Found")


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path, serve):
    serve()
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "below", "`data_dir` must be a folder where cifar10 can be unpacked")


def test_an_archive_without_the_files_is_refused(tmp_path, serve):
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as packed:
        packed.add(tmp_path / "x", "x")
    content = (tmp_path / "other.tar.gz").read_bytes()
    serve(content, hashlib.md5(content).hexdigest())
    refused(tmp_path / "root", "can be unpacked", "cifar-10-batches-py/data_batch_1")


def test_without_download_the_error_points_to_it(tmp_path):
    with pytest.raises(DataError, match="Add --download, or unpack"):
        load("cifar10", tmp_path)
