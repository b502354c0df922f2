"""Real images: the pruned network, the dense one, and rivals of the same epochs and seeds.

Rivals are narrowed or shortened from the start, or trained, pruned and fine-tuned by `benchmarks.rival`.

python -m benchmarks.cifar run pruned --seed 0 --data-dir DIR --out FOLDER
python -m benchmarks.cifar condense FOLDER [FOLDER ...] --to benchmarks/records
python -m benchmarks.cifar table benchmarks/records
python -m benchmarks.cifar shadow FOLDER [FOLDER ...] --out FOLDER
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import copies
from benchmarks.common import (
    CONFIDENCE,
    QUICK,
    add_quick,
    differences,
    each,
    guarded,
    machine,
    markdown,
    overrides,
    publish,
    run_quick,
    spread,
)
from catode import export
from catode.decisions import shadow
from catode.records import (
    PLACE,
    read_config,
    read_decisions,
    read_json,
    read_result,
    read_rows,
    read_structures,
    structure_key,
)
from catode.report import compare
from catode.structures.fates import PRUNED_TOLERANCE, PRUNED_ZERO, REMOVED
from catode.theory.plotting import new_figure
from catode.train import data, run
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config

KINDS = {"pruned": {}, "dense": {"nu": 0.0}, "narrow": {"nu": 0.0}, "short": {"nu": 0.0, "arch": "resnet14"}}
SHORTENED = {"resnet14": "resnet20"}
ALIKE = 0.1  # relative difference of MACs up to which networks are rivals of equal MACs
LIMIT = 200 * 1024
EXACT = ("keep_prob", "tolerance")  # their order must survive rounding


def task(config: dict[str, Any], env: dict[str, Any] | None = None) -> tuple[str, str, int]:
    """What runs must share to be compared: data set, architecture that is pruned or shortened, epochs.

    Args:
        config: config.json.
        env: env.json, which identifies the copy of the data set; without it the setting or folder names the data set.
    """
    arch = config["arch"]
    name = copies.plain_name(config["dataset"], config["data_dir"]) if env is None else copies.name_of(config, env)
    return name, SHORTENED.get(arch, arch), config["epochs"]


@dataclass(frozen=True)
class Record:
    """Files of a finished run.

    Args:
        config: config.json.
        result: result.json.
        env: env.json.
        last: The last row of every structure in structures.csv, which holds its decision.
    """

    config: dict[str, Any]
    result: dict[str, Any]
    env: dict[str, Any]
    last: list[dict[str, str]]

    @property
    def kind(self) -> str:
        """A key of `KINDS`."""
        if "rival" in self.config:
            return "rival"
        if self.config["nu"] > 0 or self.config.get("target_macs") is not None:
            return "pruned"
        if self.config["hidden_scale"] != 1.0:
            return "narrow"
        return "short" if self.config["arch"] == "resnet14" else "dense"

    @property
    def variant(self) -> str:
        """The kind with the settings that set it apart from the preset; the rival's full name is in its config."""
        notes = differences(self.config)
        kind = "Torch-Pruning" if self.kind == "rival" else self.kind
        return f"{kind} {self.config['arch']}" + (f" ({notes})" if notes else "")

    @property
    def task(self) -> tuple[str, str, int]:
        """What runs must share to be compared."""
        return task(self.config, self.env)

    @property
    def accuracy(self) -> float:
        """Test accuracy at the final epoch, percent."""
        return 100 * self.result["test_accuracy"]


def plan(args: argparse.Namespace) -> Config:
    """The configuration of one network.

    Raises:
        ConfigError: if a setting is given that the kind or a flag sets.
    """
    flags = ("seed", "dataset", "data_dir", "out", "epochs")
    given = {**KINDS[args.kind], **overrides(args.set, flags=flags, fixed=KINDS[args.kind])}
    for name in ("epochs", "threads"):
        if getattr(args, name) is not None:
            given.setdefault(name, getattr(args, name))
    if args.quick:
        given |= QUICK
    if args.kind == "narrow":
        given.setdefault("hidden_scale", args.hidden_scale)
    return Config.from_presets(dataset=args.dataset, data_dir=args.data_dir, seed=args.seed, out=args.out, **given)


def start(args: argparse.Namespace) -> None:
    """Train one network."""
    folder = (run_quick if args.quick else run)(plan(args), progress=sys.stderr.isatty())
    record = read(folder)
    macs, seconds = record.result["macs"] / 1e6, record.result["seconds"]
    print(f"{record.variant}, seed {args.seed}: {record.accuracy:.2f} %, {macs:.2f} M MACs, {seconds:.0f} s")


def read(folder: Path) -> Record:
    """The record of a finished run.

    Raises:
        FileNotFoundError: if the run is not finished.
    """
    if not (folder / "result.json").is_file():
        raise FileNotFoundError(f"`folder` must hold a finished run; got {str(folder)!r} without result.json.")
    written = read_json(folder / "config.json")
    config = read_config(folder, dict(dataset=str, arch=str, epochs=int, seed=int, nu=float, hidden_scale=float))
    config.setdefault(
        "derived", [name for name, value in config.items() if written.get(name, 0) is None and value is not None]
    )
    result = read_result(folder, dict(test_accuracy=float, macs=float, macs_dense=float, params=float))
    rows = _structures(folder)
    last = [rows[i] for i in sorted(_last(rows).values())]
    return Record(config, result, read_json(folder / "env.json"), last)


def _structures(folder: Path) -> list[dict[str, str]]:
    header, rows = read_structures(folder)
    return [dict(zip(header, row, strict=True)) for row in rows]


def condense(folder: Path, target: Path, limit: int = LIMIT, latency: bool = False) -> int:
    """Write a run's record as small files, without paths of this machine.

    Args:
        folder: The run.
        target: Folder for the records; the run gets a folder of its own name there.
        limit: Most bytes written. The last row of every structure, which holds its decision, always stays; of the
            checks every k-th; where that is not enough, measured numbers have two or three digits instead of four.
            Of a shadow run all rows between a derived decision and its outcome stay as they are; where these are too
            many, those that hold the decision or a largest value after it, which is all that `catode.report.compare`
            looks at.
        latency: Measure latencies again, on this machine, instead of copying those of the run.

    Returns:
        Bytes written.

    Raises:
        FileNotFoundError: if the run is not finished.
        ValueError: if a file is damaged; nothing is written then.
    """
    record, to = read(folder), target / folder.name
    env = record.env | _fingerprint(record)
    config = {**record.config, "out": folder.name}
    if config["data_dir"] is not None:
        config["data_dir"] = Path(config["data_dir"]).name
    result = record.result
    if latency:
        _, ((dense, compact), (dense_128, compact_128)) = export.measure(folder, seconds=10.0)
        result = {**result, "latency_dense_ms": dense, "latency_ms": compact}
        result |= {"latency_dense_ms_128": dense_128, "latency_ms_128": compact_128}
    tables = {"metrics.csv": _packed(_rounded(read_rows(folder / "metrics.csv")))}
    rows, decisions = _structures(folder), []
    if config.get("shadow"):
        decisions = read_decisions(folder, ("rule", *PLACE, "step", "outcome_step"))
        tables[shadow.FILE] = _packed(decisions)
    files = {f"{name}.gz": content for name, content in tables.items()}
    for name, content in (("config", config), ("result", result), ("env", env)):
        files[f"{name}.json"] = (json.dumps(content, indent=2) + "\n").encode()
    if (folder / "structure.json").is_file():  # the only file that lists units without a gate
        structure = json.loads((folder / "structure.json").read_text())
        files["structure.json"] = (json.dumps(structure, separators=(",", ":")) + "\n").encode()
    left = limit - sum(map(len, files.values()))
    files["structures.csv.gz"] = _condensed(rows, decisions, left)
    to.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (to / name).write_bytes(content)
    return sum(map(len, files.values()))


def _fingerprint(record: Record) -> dict[str, str | None]:
    """The fingerprint of a run's images for its env.json, if it is missing and the images are available."""
    config = record.config
    if "pixels" in record.env:
        return {}
    try:
        images = data.load(config["dataset"], config["data_dir"], image_size=config.get("image_size"))
    except data.DataError as error:
        print(
            f"note: no fingerprint of the images: {error} Use python -m benchmarks.copies --records.", file=sys.stderr
        )
        return {}
    return {"pixels": copies.fingerprint(images)}


def _condensed(rows: list[dict[str, str]], decisions: list[dict[str, str]], limit: int) -> bytes:
    """The rows of structures.csv to keep, compressed."""
    observed = _observed(rows, decisions)
    whole = {i for span in observed for i in span}
    least = {i for span in observed for i in _decisive(rows, span)}
    last = set(_last(rows).values())
    for kept, digits in ((whole, 4), (least, 4), (least, 3), (least, 2)):
        short, every = _rounded(rows, kept, digits), 1
        content = _packed(short)
        while len(content) > limit and every < len(rows):
            every *= 2
            content = _packed(_thinned(short, every, kept | last))
        if len(content) <= limit:
            break
    return content


def _last(rows: list[dict[str, str]]) -> dict[tuple[str, ...], int]:
    """Number of each structure's last row."""
    return {structure_key(row): i for i, row in enumerate(rows)}


def _observed(rows: list[dict[str, str]], decisions: list[dict[str, str]]) -> list[list[int]]:
    """Numbers of the rows from each derived decision on to its outcome, or to the end where it has none."""
    traces: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        traces[structure_key(row)].append(i)
    spans = []
    for line in decisions:
        if line["rule"] == shadow.DERIVED:
            begin, end = int(line["step"]), int(line["outcome_step"] or sys.maxsize)
            spans.append([i for i in traces[structure_key(line)] if begin <= int(rows[i]["step"]) <= end])
    return spans


def _decisive(rows: list[dict[str, str]], span: list[int]) -> list[int]:
    """Of the rows after a decision, its own and those with the largest value of each bound, and of benefit over price."""

    def value(i: int, name: str) -> float:
        number = float(rows[i][name] or "nan") / (float(rows[i]["price"]) if name == "benefit_upper" else 1.0)
        return -math.inf if math.isnan(number) else number

    names = (*compare.ASSUMED, "benefit_upper") if len(span) > 1 else ()
    return span[:1] + [max(span[1:], key=lambda i: value(i, name)) for name in names]


def _thinned(rows: list[dict[str, str]], every: int, keep: set[int]) -> list[dict[str, str]]:
    """Rows of every k-th check, and those to be kept."""
    steps = {step: i for i, step in enumerate(dict.fromkeys(row["step"] for row in rows))}
    if every >= len(steps):  # not even the first check
        return [row for i, row in enumerate(rows) if i in keep]
    return [row for i, row in enumerate(rows) if i in keep or steps[row["step"]] % every == 0]


def _rounded(rows: list[dict[str, str]], keep: Collection[int] = (), digits: int = 4) -> list[dict[str, str]]:
    """Rows with measured numbers to a few digits, but for those to be kept as they are."""
    return [
        row if i in keep else {name: value if name in EXACT else _short(value, digits) for name, value in row.items()}
        for i, row in enumerate(rows)
    ]


def _packed(rows: list[dict[str, str]]) -> bytes:
    """Rows as compressed CSV; the same rows give the same bytes."""
    if not rows:
        return gzip.compress(b"", mtime=0)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return gzip.compress(text.getvalue().encode(), 9, mtime=0)


def _short(value: str, digits: int) -> str:
    try:
        number = float(value)
    except ValueError:
        return value
    return value if number.is_integer() else f"{number:.{digits}g}"


def table(records: list[Record]) -> str:
    """Records grouped by variant with spread over seeds, then differences paired by seed, as Markdown.

    Raises:
        ValueError: if records of one task were trained on different images.
    """
    shares: dict[tuple, float] = {}
    for record in records:
        own = record.config["validation_share"]
        if (first := shares.setdefault(record.task, own)) != own:
            raise ValueError(
                f"`records` must have one validation_share for each task; got {first:g} and {own:g} for {record.task}. "
                "Make a table of each."
            )
    lines = [
        f"Final epoch. Accuracy and differences: mean and {CONFIDENCE:.0%} t-interval over n seeds, which for n = 2 is so wide "
        "that only large effects show, and not corrected for the number of differences below. All else: mean (and each seed's "
        "value, in their order). MACs: M, and percent of the dense network. Decided by rule: of all gates, by the end of the "
        "deciding phase (decide_until, 80 % of the run by default). Latency: one forward pass of 128 images against the dense "
        "network's in the same run.",
        "",
        *copies.notes(sorted({r.task[0] for r in records})),
        "",
    ]
    groups: dict[tuple, list[Record]] = defaultdict(list)
    order = [*KINDS, "rival"]
    for record in sorted(records, key=lambda r: (r.task, order.index(r.kind), r.variant, r.config["seed"])):
        groups[*record.task, record.variant].append(record)
    rows = []
    for (dataset, arch, epochs, variant), group in groups.items():
        first, results = group[0], [r.result for r in group]
        pruned = first.kind == "pruned"
        dense = max(r.result["macs_dense"] for r in records if r.task == (dataset, arch, epochs))
        rows.append(
            [
                dataset,
                variant,
                epochs,
                ", ".join(str(r.config["seed"]) for r in group),
                spread([r.accuracy for r in group]),
                each([r["macs"] / 1e6 for r in results]),
                each([100 * r["macs"] / dense for r in results], "{:.1f}"),
                each([r["params"] / 1e3 for r in results], "{:.0f}"),
                "/".join(str(r["layers_kept"]) for r in results) + f" of {results[0]['layers_total']}",
                "/".join(str(r["units_kept"]) for r in results) + f" of {results[0]['units_total']}",
                each([100 * r["decided_by_rule"] for r in results], "{:.1f}") if pruned else "",
                each([r["latency_ms_128"] / r["latency_dense_ms_128"] for r in results]) if pruned else "",
                each([r["seconds"] / 60 for r in results], "{:.0f}"),
                each([r["cpu_seconds"] / 60 for r in results], "{:.0f}") if "cpu_seconds" in results[0] else "",
            ]
        )
    header = ["data", "network", "epochs", "seeds", "accuracy %", "MACs M", "MACs %", "params k", "layers", "units"]
    lines.append(markdown([*header, "decided by rule %", "latency", "minutes", "CPU minutes"], rows))
    rows = []
    for (*task, variant), group in groups.items():
        for (*other, rival), rivals in groups.items():
            if group[0].kind != "pruned" or other != task or rivals is group or not _comparable(group, rivals):
                continue
            matched = {r.config["seed"]: r for r in rivals}
            both = [(r, matched[r.config["seed"]]) for r in group if r.config["seed"] in matched]
            if both:
                rows.append(
                    [
                        f"{task[0]}, {variant} - {rival}",
                        task[2],
                        spread([a.accuracy - b.accuracy for a, b in both], "{:+.2f}"),
                        each([100 * a.result["macs"] / b.result["macs"] for a, b in both], "{:.1f}"),
                    ]
                )
    if rows:
        header = ["difference, paired by seed", "epochs", "accuracy, points", "MACs, % of the rival's"]
        lines += ["", markdown(header, rows)]
    pruned = [_decisions(r) for r in records if r.last]
    if pruned:
        header = ["pruned", "seed", "95 % decided by step", "all by step", "layers that stayed: benefit / price"]
        lines += ["", markdown([*header, "layers removed by rule: benefit / price"], pruned)]
    machines = sorted({f"{machine(r.env)}; amp {r.config['amp']}" for r in records})
    return "\n".join([*lines, "", *machines])


def _comparable(group: list[Record], rivals: list[Record]) -> bool:
    """Whether a difference is meaningful: to the dense network, or at about equal MACs (a pair of pruned ones once)."""
    a, b = (sum(r.result["macs"] for r in g) / len(g) for g in (group, rivals))
    once = rivals[0].kind != "pruned" or group[0].variant < rivals[0].variant
    return rivals[0].kind == "dense" or (abs(a - b) <= ALIKE * b and once)


def _decisions(record: Record) -> list[Any]:
    """When a pruned run's structures were decided, and the benefit over price of its layers then."""
    steps = sorted(int(row["step"]) for row in record.last)
    layers = [row for row in record.last if row["kind"] == "layer"]
    worth = {True: [], False: []}
    for row in layers:
        if (by_rule := row["fate"] in (PRUNED_TOLERANCE, PRUNED_ZERO)) or row["fate"] not in REMOVED:
            worth[by_rule].append(float(row["benefit"]) / float(row["price"]))
    ranges = [f"{min(w):.2g} to {max(w):.2g}" if len(w) > 1 else "".join(f"{v:.2g}" for v in w) for w in worth.values()]
    return [record.variant, record.config["seed"], steps[int(0.95 * len(steps))], steps[-1], *reversed(ranges)]


def watched(folders: Sequence[Path], out: Path | None) -> None:
    """What became of the decisions of shadow runs (`catode.report.compare`), with the data called by the name of the copy.

    Args:
        folders: Finished runs, or records of such.
        out: Folder for compare.md and compare.png; None to print only.
    """
    envs = [read_json(folder / "env.json") for folder in folders]
    runs = compare.read_all(folders)
    names = [copies.name_of(one.config, env) for one, env in zip(runs, envs, strict=True)]
    runs = [
        dataclasses.replace(one, config=one.config | {"dataset": name}) for one, name in zip(runs, names, strict=True)
    ]
    told = "".join(f"{note}\n\n" for note in copies.notes(names)) + compare.text(runs)
    print(told, end="")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.md").write_text(told, encoding="utf-8")
        groups = compare.groups(runs)
        figure = new_figure(14.0, 5.4 * len(groups))
        parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
        for part, (title, own) in zip(parts, groups.items(), strict=True):
            compare.draw(part, own)
            part.suptitle(title)
        figure.savefig(out / "compare.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.cifar", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("run", help="train one network with the data set's preset")
    one.add_argument("kind", choices=tuple(KINDS))
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--dataset", default="cifar10", choices=("cifar10", "cifar100", "folder"))
    one.add_argument("--data-dir", required=True, help="folder that holds the images")
    one.add_argument("--out", required=True, help="folder of the run")
    one.add_argument("--hidden-scale", type=float, default=0.58, help="narrow: factor on every hidden width (0.58)")
    one.add_argument("--epochs", type=int, help="epochs (those of the preset)")
    one.add_argument("--threads", type=int, help="CPU threads")
    one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting; repeatable")
    add_quick(one)
    one.set_defaults(do=start)
    small = commands.add_parser("condense", help="write runs' records as small files")
    small.add_argument("folders", type=Path, nargs="+")
    small.add_argument("--to", type=Path, required=True)
    small.add_argument("--latency", action="store_true", help="measure latencies again; run nothing else meanwhile")
    small.set_defaults(do=_condense_all)
    show = commands.add_parser("table", help="print records, or finished runs, as Markdown")
    show.add_argument("records", type=Path, nargs="+", help="folders of runs, or folders of such folders")
    show.add_argument("--write", action="store_true", help="write benchmarks/results/cifar.md")
    show.set_defaults(do=_show)
    became = commands.add_parser("shadow", help="print what became of the decisions of shadow runs")
    became.add_argument("folders", type=Path, nargs="+", help="finished shadow runs, or records of such")
    became.add_argument("--out", type=Path, help="folder for compare.md and compare.png")
    became.set_defaults(do=lambda args: watched(args.folders, args.out))
    args = parser.parse_args(argv)
    args.do(args)


def _condense_all(args: argparse.Namespace) -> None:
    for folder in args.folders:
        print(f"{args.to / folder.name}: {condense(folder, args.to, latency=args.latency) / 1024:.0f} KiB")


def _show(args: argparse.Namespace) -> None:
    patterns = ("result.json", "*/result.json")
    found = [path.parent for root in args.records for pattern in patterns for path in sorted(root.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"`records` must hold finished runs; got {', '.join(map(str, args.records))}.")
    publish("cifar", table([read(folder) for folder in found]), args.write)


if __name__ == "__main__":
    guarded(main)
