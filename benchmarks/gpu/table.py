"""The records as a short Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common import markdown
from benchmarks.gpu.records import BEGUN, FAILED, MEASURED, NOTED, PASSED, SKIPPED, Records
from benchmarks.gpu.training import NAMES, PART
from benchmarks.gpu.units import load

MiB, M = 2**20, 1e6


def page(records: Records) -> str:
    """The page: machine, checks by name, ratios with memory, trainings."""
    every = records.read()
    machines = [one for one in every if one["part"] == "machine"]
    lines = [*(f"- {line}" for one in machines for line in one["lines"])]
    for one in every:
        if one["part"] == "images":
            lines.append(f"- images: {one.get('what') or one.get('reason')}")
    lines += ["", *_checks(records), "", *_ratios(records), "", *_trainings(every)]
    return "\n".join(_once(lines))


def _once(lines: Sequence[str]) -> list[str]:
    """Lines without list items that came before, as those of a second call on the same machine."""
    seen, kept = set(), []
    for line in lines:
        if not (line.startswith("- ") and line in seen):
            kept.append(line)
        seen.add(line)
    return kept


def _numbers(numbers: dict[str, Any]) -> str:
    """Numbers that say something, in one line."""
    limits = numbers.get("limits", {})
    parts = []
    for name, value in numbers.items():
        if name == "limits" or (value == 0 and limits.get(name) == 0):
            continue
        text = f"{value:.2g}" if isinstance(value, float) else str(value)
        parts.append(f"{name} {text}" + (f" (at most {limits[name]:g})" if name in limits else ""))
    return "; ".join(parts)


def _checks(records: Records) -> list[str]:
    last = records.last("checks")
    found, counts = [], {PASSED: 0, FAILED: 0, SKIPPED: 0}
    for name in load()["checks"]:
        one = last.get(name)
        status = "not run" if one is None else "cut off" if one["status"] == BEGUN else one["status"]
        counts[status] = counts.get(status, 0) + 1
        told = ""
        if one is not None:
            told = one.get("reason") or (
                one["error"][-1][:160] if one.get("error") else _numbers(one.get("numbers", {}))
            )
        found.append(f"- {status if status == PASSED else status.upper()}: {name}" + (f": {told}" if told else ""))
    head = "Checks: " + ", ".join(f"{number} {status}" for status, number in counts.items() if number) + "."
    return [head, "", *found]


def _quartiles(values: Sequence[float], form: str) -> str:
    low, middle, high = (form.format(v) for v in values)
    return f"{middle} ({low}-{high})"


def _ratios(records: Records) -> list[str]:
    last, rows = records.last("ratios"), []
    for name in load()["ratios"]:
        one = last.get(name)
        if one is None or one["status"] != MEASURED:
            status = "not run" if one is None else "cut off" if one["status"] == BEGUN else one["status"]
            told = "" if one is None else one.get("reason") or (one["error"][-1][:160] if one.get("error") else "")
            rows.append([name, *[""] * 6, f"{status} {told}".strip().replace("|", "/")])
            continue
        n = one["numbers"]
        memory = [
            f"{n[f'{kind}, peak bytes'] / MiB:.0f}" if f"{kind}, peak bytes" in n else "" for kind in ("plain", "gated")
        ]
        times = [_quartiles(n[f"{kind}, ms a step"], "{:.2f}") for kind in ("plain", "gated")]
        precision = "fp32 is TF32 in convolutions" if n["tf32"] and name.endswith("fp32") else ""
        rows.append(
            [name, n["n"], n["images in a step"], *times, _quartiles(n["ratio"], "{:.3f}"), "/".join(memory), precision]
        )
    header = [
        "gated step / plain step",
        "n",
        "images",
        "plain, ms",
        "gated, ms",
        "ratio",
        "peak MiB plain/gated",
        "note",
    ]
    return ["Medians (quartiles) over n rounds, all measuring of the pruner included.", "", markdown(header, rows)]


def _trainings(every: Sequence[dict[str, Any]]) -> list[str]:
    rows, notes = [], []
    for name in NAMES:
        own = [one for one in every if one["part"] == PART and one["name"] == name]
        epochs = [one for one in own if "epoch" in one]
        ends = [one for one in own if one["status"] in (MEASURED, FAILED)]
        whats = [one["what"] for one in own if one["status"] == NOTED and "what" in one]
        notes += [f"- {name}: {what}." for what in whats[-1:]]
        row = [name, epochs[-1]["epoch"] if epochs else 0]
        if ends and ends[-1]["status"] == MEASURED:
            n = ends[-1]["numbers"]
            found = [f"{100 * n['test_accuracy']:.2f}", f"{n['macs'] / M:.1f}", f"{n['seconds']:.0f}"]
            validation = "" if n["validation_accuracy"] is None else f"{100 * n['validation_accuracy']:.2f}"
            rows.append([*row, validation, *found, "finished"])
            continue
        n = epochs[-1]["numbers"] if epochs else {}
        cells = [f"{100 * n['validation_accuracy']:.2f}" if "validation_accuracy" in n else "", ""]
        cells += [f"{n['macs'] / M:.1f}" if "macs" in n else "", f"{n['seconds']:.0f}" if "seconds" in n else ""]
        failed = bool(ends) and own[-1]["status"] == FAILED
        told = f"failed: {ends[-1]['error'][-1][:160]}" if failed else "goes on" if epochs else "not begun"
        rows.append([*row, *cells, told.replace("|", "/")])
    header = ["ResNet-56", "epochs", "validation %", "test %", "MACs M", "seconds", ""]
    one = "One run each, no interval; all at the same time on one device, so that seconds are not those of a run alone."
    return [one, "", markdown(header, rows), "", *notes]
