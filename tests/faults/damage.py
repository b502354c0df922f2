"""Every file of a run is damaged in fifty ways, and every tool is used on each."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import runs
from .runs import Said, Tally

Change = Callable[[bytes, random.Random], bytes]
REFUSED, RIGHT, TOLD = "refused, file named", "result right", "other result, said so"
TRACEBACK, SILENT, UNNAMED, LOST = "traceback", "wrong in silence", "refused, file not named", "good checkpoint lost"
UNCHECKED = "other result, no checksums to tell"
GOOD = (REFUSED, RIGHT, TOLD, UNCHECKED)
BAD = (TRACEBACK, SILENT, UNNAMED, LOST)
NOT_DAMAGED = re.compile(r".*\.png|report\.md")  # what a person looks at


# --- fifty ways --------------------------------------------------------------------------------------------------------


def flipped(content: bytes, draw: random.Random, bits: int = 1) -> bytes:
    """Some bits at random places turned over."""
    found = bytearray(content)
    for _ in range(bits if content else 0):
        found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def cut(content: bytes, draw: random.Random, share: float | None = None) -> bytes:
    return content[: int(len(content) * (draw.random() if share is None else share))]


def zeroed(content: bytes, draw: random.Random, size: int = 512) -> bytes:
    """A part set to zero, such as a lost block of a disk."""
    at = draw.randrange(max(1, len(content) - size + 1))
    return content[:at] + bytes(len(content[at : at + size])) + content[at + size :]


def lines(content: bytes, draw: random.Random, how: str) -> bytes:
    """Two neighbouring lines swapped, or one doubled or dropped."""
    parts = content.splitlines(keepends=True)
    if len(parts) < 3:
        return content + content
    at = draw.randrange(1, len(parts) - 1)
    parts[at : at + 2] = {
        "swap": parts[at : at + 2][::-1],
        "double": [parts[at], *parts[at : at + 2]],
        "drop": parts[at : at + 1],
    }[how]
    return b"".join(parts)


def column(content: bytes, draw: random.Random, how: str) -> bytes:
    """A column of a table dropped, or two exchanged; of other files every so-manieth byte."""
    rows = [line.split(b",") for line in content.split(b"\r\n")]
    if len(rows[0]) < 3:
        return content[::2]
    at = draw.randrange(len(rows[0]) - 1)
    for row in rows:
        if len(row) > at + 1:
            row[at : at + 2] = row[at : at + 1] if how == "drop" else row[at : at + 2][::-1]
    return b"\r\n".join(b",".join(row) for row in rows)


def replaced(content: bytes, draw: random.Random, pattern: bytes, by: bytes | Callable[[bytes], bytes]) -> bytes:
    """One match of a pattern, chosen at random, replaced; the content and this text where there is none."""
    found = list(re.finditer(pattern, content))
    if not found:
        return content + (by if isinstance(by, bytes) else b"?")
    match = draw.choice(found)
    return content[: match.start()] + (by if isinstance(by, bytes) else by(match[0])) + content[match.end() :]


DIGIT, NUMBER, VALUE = rb"\d", rb"-?\d+\.\d+(?:e-?\d+)?|-?\d+", rb"(?<=: )[^\n,\[{]+|(?<=,)[^,\r\n]+(?=,)"


def another_digit(digit: bytes) -> bytes:
    return b"%d" % ((int(digit) + 1) % 10)


CHANGES: dict[str, Change] = {
    **{f"one bit flipped, {i}": flipped for i in range(10)},
    "ten bits flipped": partial(flipped, bits=10),
    "empty": lambda content, draw: b"",
    "one byte left": lambda content, draw: content[:1],
    "half left": partial(cut, share=0.5),
    "last byte missing": lambda content, draw: content[:-1],
    **{f"truncated, {i}": cut for i in range(2)},
    "zeros": lambda content, draw: bytes(len(content)),
    "a block of zeros": zeroed,
    "16 zeros": partial(zeroed, size=16),
    "random bytes": lambda content, draw: draw.randbytes(len(content)),
    "rubbish appended": lambda content, draw: content + draw.randbytes(99),
    "a line appended": lambda content, draw: content + b"rubbish\r\n",
    "a NUL appended": lambda content, draw: content + b"\0",
    "itself appended": lambda content, draw: content + content,
    "a byte-order mark": lambda content, draw: b"\xef\xbb\xbf" + content,
    "rubbish before": lambda content, draw: draw.randbytes(9) + content,
    "first byte missing": lambda content, draw: content[1:],
    "UTF-16": lambda content, draw: content.decode("latin-1").encode("utf-16"),
    "not UTF-8": lambda content, draw: replaced(content, draw, rb"[a-z]", b"\xff"),
    "a NUL inside": lambda content, draw: replaced(content, draw, rb"[a-z]", b"\0"),
    "two lines swapped": partial(lines, how="swap"),
    "a line doubled": partial(lines, how="double"),
    "a line missing": partial(lines, how="drop"),
    "other line ends": lambda content, draw: (
        content.replace(b"\r\n", b"\n") if b"\r" in content else content.replace(b"\n", b"\r")
    ),
    "a column missing": partial(column, how="drop"),
    "two columns exchanged": partial(column, how="swap"),
    **{f"another digit, {i}": partial(replaced, pattern=DIGIT, by=another_digit) for i in range(3)},
    "nan": partial(replaced, pattern=NUMBER, by=b"NaN"),
    "inf": partial(replaced, pattern=NUMBER, by=b"Infinity"),
    "a huge number": partial(replaced, pattern=NUMBER, by=b"1e999"),
    "thousands of digits": partial(replaced, pattern=NUMBER, by=b"9" * 5000),
    "a negative number": partial(replaced, pattern=NUMBER, by=b"-7"),
    "null": partial(replaced, pattern=VALUE, by=b"null"),
    "a list": partial(replaced, pattern=VALUE, by=b"[1, 2]"),
    "a text": partial(replaced, pattern=VALUE, by=b'"x"'),
    "a quotation mark": partial(replaced, pattern=rb"[,:]", by=b'"'),
    "a name misspelt": partial(replaced, pattern=rb"[a-z]{3,}", by=lambda name: name[::-1]),
    "null alone": lambda content, draw: b"null",
    "deep nesting": lambda content, draw: b'{"a":' * 100_000,
}
SPECIAL = ("of another run", "another file of the run", "missing", "a folder", "a link to nothing")
WAYS = (*CHANGES, *SPECIAL)


def damage(file: Path, way: str, seed: str, other: Path) -> bool:
    """Damage a file; whether it is another one than before.

    Args:
        file: The file.
        way: One of `WAYS`.
        seed: Of random places.
        other: The folder of another run.
    """
    content = file.read_bytes()
    if way in CHANGES:
        found = CHANGES[way](content, random.Random(seed))
        file.write_bytes(found)
        return found != content
    if way == "another file of the run":
        names = sorted(p.name for p in file.parent.iterdir() if p.is_file() and p != file)
        shutil.copyfile(file.with_name(random.Random(seed).choice(names)), file)
    elif way == "of another run":
        like = re.sub(r"\d+", r"\\d+", re.escape(file.name))
        twin = next((p for p in sorted(other.iterdir()) if p.name == file.name), None)
        twin = twin or next((p for p in sorted(other.iterdir()) if re.fullmatch(like, p.name)), None)
        file.write_bytes(twin.read_bytes() if twin else b"of another run")
    else:
        file.unlink()
        if way == "a folder":
            file.mkdir()
        elif way == "a link to nothing":
            file.symlink_to("nothing")
        return True
    return file.read_bytes() != content


# --- the tools ---------------------------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def weights(model: Any) -> str:
    state = model.state_dict()
    return digest(repr(model), [(name, tensor.numpy().tobytes()) for name, tensor in state.items()])


def asked(folder: Path, work: Callable[[Path], Any]) -> Said:
    """Call a function of the library; a ValueError or OSError of one line is a refusal."""

    def main(argv: list[str]) -> int:
        try:
            print(digest(work(folder)))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return runs.call(main, [])


def loaded(folder: Path) -> str:
    from catode import load

    return weights(load(folder))


def report(folder: Path) -> Said:
    said = runs.catode("report", folder)
    text = (folder / "report.md").read_text() if said.status == 0 else ""
    notes = [line for line in text.splitlines() if line.startswith("- ") and "missing" in line]
    return Said(said.status, " ".join([digest(text), *notes]), said.err)


def export(folder: Path) -> Said:
    """The export, but for PyTorch's part of it."""
    from catode import export as module

    module.write = lambda model, example, path, **settings: print(weights(model), example.shape, settings) or 0.0
    return runs.catode("export", folder, "--format=torch-export")


def theory(folder: Path) -> Said:
    from catode.theory.plotting import new_figure

    type(new_figure(1.0, 1.0)).savefig = lambda self, path, **settings: None
    return runs.catode("theory", "--from-run", folder, f"--out={folder}.png")


def records(name: str, *arguments: str) -> Callable[[Path], Said]:
    """A reader of `catode.records`."""

    def tool(folder: Path) -> Said:
        import catode.records

        return asked(folder, lambda folder: getattr(catode.records, name)(folder, *arguments))

    return tool


def table(name: str) -> Callable[[Path], Said]:
    def tool(folder: Path) -> Said:
        from catode.records import read_json, read_table

        read = read_json if name.endswith(".json") else read_table
        return asked(folder, lambda folder: read(folder / name))

    return tool


def resume(folder: Path) -> Said:
    """Going on with a run; says what its end is."""
    said = runs.catode("train", f"--resume={folder}", "--threads=1")
    if said.status == 0:
        found = runs.outcome(folder)
        del found["files"]  # a folder in place of a file stays
        return Said(0, json.dumps(found), said.err)
    return Said(said.status, "", said.err)


READERS = {
    "report": report,
    "compare": lambda folder: runs.catode("compare", folder),
    "theory --from-run": theory,
    "records.read_config": records("read_config"),
    "records.read_structures": records("read_structures"),
    "records.read_result": records("read_result"),
    "records.read_table": table("metrics.csv"),
    "records.read_json": table("env.json"),
}
NETWORKS = {"export": export, "catode.load": lambda folder: asked(folder, loaded)}
RESUME = {"train --resume": resume}  # the last: it changes the folder


@dataclass(frozen=True)
class Place:
    """A run's folder whose files are damaged.

    Attributes:
        name: What it is.
        folder: As it is before.
        other: The folder of another run.
        tools: What is used on it.
        pictures: Whether reports are made with pictures.
        checked: Whether it has checksums.
    """

    name: str
    folder: Path
    other: Path
    tools: dict[str, Callable[[Path], Said]]
    pictures: bool = False
    checked: bool = True

    def files(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if not NOT_DAMAGED.fullmatch(p.name))


def places(folder: Path) -> list[Place]:
    """A finished run, one that was killed, and a finished one as earlier versions left it, without checksums."""
    images = runs.make_images(folder / "images")
    for name, seed in (("one", "--seed=0"), ("two", "--seed=1")):
        said = runs.forked(partial(runs.whole, images, folder / name / "finished", seed))
        assert said.status == 0, said.err
        runs.killed(images, folder / name / "killed", 15, seed)
        earlier = Path(shutil.copytree(folder / name / "finished", folder / name / "earlier"))
        (earlier / "checksums.json").unlink(missing_ok=True)
    made = {name: (folder / "one" / name, folder / "two" / name) for name in ("finished", "killed", "earlier")}
    everything = {**READERS, **NETWORKS, **RESUME}
    return [
        Place("a finished run", *made["finished"], everything),
        Place("a killed run", *made["killed"], {**NETWORKS, **RESUME}),
        Place("a finished run without checksums", *made["earlier"], everything, pictures=True, checked=False),
    ]


# --- the verdict -------------------------------------------------------------------------------------------------------


def plain(said: Said, folder: Path) -> Said:
    """The same without the folder's name."""
    out, err = (text.replace(str(folder), "FOLDER").replace(folder.name, "FOLDER") for text in (said.out, said.err))
    return Said(said.status, out, err)


def expected(place: Place, folder: Path) -> dict[str, Said]:
    """What every tool says of an undamaged folder."""
    return use(place, folder, lambda: None)[0]


def use(place: Place, folder: Path, hurt: Callable[[], Any]) -> tuple[dict[str, Said], bool]:
    """Use every tool on a folder that is damaged before; also whether checkpoints changed though a run did not go on."""
    runs.fresh_copy(place.folder, folder)
    hurt()
    if not place.pictures:
        runs.without_pictures()
    said = {}
    for name, tool in place.tools.items():
        before = checkpoints(folder)
        said[name] = plain(tool(folder), folder)
        lost = bool(said[name].status) and before != checkpoints(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return said, lost


def checkpoints(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("checkpoint-*.pt") if p.is_file()}


def attempt(place: Place, file: str, way: str, folder: Path) -> tuple[bool, dict[str, Said], bool]:
    """Damage a file and use every tool; whether it is damaged at all, what they said, and whether checkpoints were lost."""
    changed = []
    said, lost = use(place, folder, lambda: changed.append(damage(folder / file, way, f"{file} {way}", place.other)))
    return changed[0], said, lost


def judge(place: Place, file: str, said: Said, whole: Said) -> str:
    """What became of a damaged file in one tool."""
    if not said.clean:
        return TRACEBACK
    if said.status == 0:
        if said.out == whole.out and whole.status == 0:
            return RIGHT
        if file in said.err + said.out:
            return TOLD
        return SILENT if place.checked else UNCHECKED
    if (said.status, said.err) == (whole.status, whole.err):
        return RIGHT  # refused before and after, as a finished run that is to go on
    if len(said.lines()) != 1 or not said.lines()[0].startswith("error: ") or said.status not in (1, 2):
        return UNNAMED
    if file.startswith("checkpoint-") and whole.status == 0 and "Is a directory" not in said.err:
        return LOST  # there is another one, and this one can be written anew unless a folder stands in its place
    return REFUSED if file in said.err else UNNAMED


def campaign(folder: Path, jobs: int, every: int = 1, say: Callable[[str], None] = print) -> dict[str, Tally]:
    """Damage each file in each way; one tally by file and one by tool.

    Args:
        folder: An empty folder to work in.
        jobs: Processes at a time.
        every: Only each so-manieth case.
        say: Prints a line.
    """
    by_file, by_tool = Tally(), Tally()
    for place in places(folder):
        begun = runs.clock()
        whole = runs.forked(partial(expected, place, folder / "whole"))
        cases = [(file, way) for file in place.files() for way in WAYS][::every]
        works = [partial(attempt, place, file, way, folder / f"hurt{i}") for i, (file, way) in enumerate(cases)]
        n = 0
        for i, found in runs.parallel(works, jobs):
            file, way = cases[i]
            if isinstance(found, EOFError):
                found = True, {"all": Said(None, "", str(found))}, False
            changed, said, lost = found
            if not changed:
                continue
            n += 1
            for tool, one in said.items():
                verdict = LOST if lost and tool in RESUME else judge(place, file, one, whole.get(tool, one))
                text = f"{verdict}: {place.name}, {file}: {way}: {tool}: status {one.status}: {one.err.strip()[-600:]}"
                kind = "checkpoint" if file.startswith("checkpoint-") else file
                by_file.add(f"{place.name}: {kind}", verdict, verdict in BAD, text)
                by_tool.add(f"{place.name}: {tool}", verdict, False, "")
                if verdict in BAD:
                    say(text)
        say(f"{place.name}: {n} of {len(cases)} changes made a difference, {runs.clock() - begun:.0f} s")
    return {"file": by_file, "tool": by_tool}
