"""The report of a run: report.md and its pictures.

It is made only from the files of the run's folder (docs/conventions.md, "A run's folder"), so it can be made again on any
machine, without the model or the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catode.decisions.target import missed
from catode.report.history import Run, SiteWidth, final_sites, read, read_metrics
from catode.report.looks import Picture
from catode.report.phase import phase_picture
from catode.report.pictures import accuracy_picture, complexity_picture, structure_picture, theta_picture
from catode.structures.fates import MEANINGS, NOT_BY_RULE
from catode.theory.plotting import house_style

__all__ = ["markdown_table", "missed_target", "waiting", "write"]

_MAKERS: tuple[Callable[[Run], Picture | None], ...] = (
    accuracy_picture,
    theta_picture,
    structure_picture,
    complexity_picture,
    phase_picture,
)


def write(folder: Path) -> Path:
    """Write report.md and its pictures into a run's folder.

    All files are read and checked before anything is written.

    Args:
        folder: A run's folder with config.json, env.json, metrics.csv, structures.csv and result.json. structure.json
            is used where it exists.

    Returns:
        Path of report.md. The pictures are in the same folder: accuracy.png always, and theta.png, structure.png,
        complexity.png and phase.png if the run had gates.

    Raises:
        FileNotFoundError: if one of the files is missing.
        ValueError: if one of the files is malformed.
    """
    run = read(Path(folder))
    pictures: list[Picture] = []
    for make in _MAKERS:
        with house_style():
            picture = make(run)
        if picture is not None:
            pictures.append(picture)
    text = _markdown(run, pictures)
    for picture in pictures:
        with house_style():
            picture.figure.savefig(run.folder / f"{picture.name}.png")
    path = run.folder / "report.md"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be no UTF-8
    return path


def _markdown(run: Run, pictures: list[Picture]) -> str:
    parts = [f"# {_title(run)}", _headline(run), _meanings(run)]
    if shortfall := missed_target(run.config, run.result):
        parts.insert(1, f"**Target missed: {shortfall}.**")
    if run.notes:
        parts.append("**Notes**\n\n" + "\n".join(f"- {note}" for note in run.notes))
    if run.traces:
        parts.append(_structure_table(run))
    for picture in pictures:
        parts.append(f"## {picture.title}\n\n![{picture.title}]({picture.name}.png)\n\n{picture.caption}")
    parts.append("## Configuration\n\nAs resolved from presets and flags.\n\n" + _key_table(run.config))
    parts.append("## Environment\n\n" + _key_table(run.env))
    return "\n\n".join(filter(None, parts)) + "\n"


def _meanings(run: Run) -> str:
    """Meanings of the fates that occur, as text."""
    seen = {trace.fate for trace in run.traces} | set(run.result.get("decisions") or {})
    listed = "; ".join(f"`{fate}`: {meaning}" for fate, meaning in MEANINGS.items() if fate in seen)
    return f"Fates. {listed}." if listed else ""


def _title(run: Run) -> str:
    arch = run.config.get("arch") or (run.structure or {}).get("arch")
    dataset = run.config.get("dataset")
    gated = "pruned while training" if run.traces else "without gates"
    what = " on ".join(str(name) for name in (arch, dataset) if name) or run.folder.resolve().name
    return f"{what}, {gated}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _headline(run: Run) -> str:
    result = run.result
    rows = [
        ("Test accuracy, final epoch", _format(result, "test_accuracy", lambda value: f"{100 * value:.2f} %")),
        (
            "Validation accuracy, final epoch",
            _format(result, "validation_accuracy", lambda value: f"{100 * value:.2f} %"),
        ),
        ("MACs per image, dense → compact", _shrunk(result, "macs_dense", "macs")),
        ("MACs executed (with channels kept only for speed)", _format(result, "macs_executed", "{:,}".format)),
        ("Parameters, dense → compact", _shrunk(result, "params_dense", "params")),
        ("Expected complexity J of the removable part", _format(result, "expected_complexity", "{:.4f}".format)),
        ("Price level nu at the end, nats", _format(result, "nu", "{:.4g}".format)),
        ("Layers kept", _of(result, "layers_kept", "layers_total")),
        ("Units kept", _of(result, "units_kept", "units_total")),
        ("Of these kept only to round widths (`round_to`)", _format(result, "units_kept_for_rounding", str)),
        ("Structures by fate", _decisions(result)),
        (
            f"Decided by the rule (structures whose fate is none of {', '.join(NOT_BY_RULE)}, and that did not go with a block "
            "whose time was out)",
            _format(result, "decided_by_rule", lambda value: f"{100 * value:.1f} %"),
        ),
        (
            "MACs removed by tolerance alone",
            _format(result, "macs_removed_by_tolerance", lambda value: _part(value, result.get("macs_dense"))),
        ),
        ("Latency, batch 1, dense → compact", _latency(result, "latency_dense_ms", "latency_ms")),
        ("Latency, batch 128, dense → compact", _latency(result, "latency_dense_ms_128", "latency_ms_128")),
        ("Training time", _format(result, "seconds", _duration)),
        ("Share of the step time spent waiting for images", _waiting(run.metrics)),
        ("Seed", _format(result, "seed", str)),
    ]
    return markdown_table(("", "this run"), rows)


_ABSENT = "not recorded"


def waiting(folder: Path) -> str:
    """Share of the step time that a run spent waiting for images, mean over its epochs, as text."""
    return _waiting(read_metrics(folder))


def _waiting(metrics: dict[str, np.ndarray]) -> str:
    shares = metrics["wait_share"]
    return f"{100 * shares.mean():.1f} %" if shares.size else _ABSENT


def missed_target(config: dict[str, Any], result: dict[str, Any]) -> str:
    """What is left of the network instead of the target that its run was given, as text; empty for none, and where it was met.

    Args:
        config: The run's config.json.
        result: Its result.json.
    """
    for quantity, name in (("macs", "MACs"), ("params", "parameters")):
        share, dense = config.get(f"target_{quantity}"), result.get(f"{quantity}_dense")
        if share is not None and dense and missed(share, left := result[quantity] / dense):
            return f"{left:.1%} of the {name} are left instead of {share:.1%}"
    return ""


def _format(result: dict[str, Any], key: str, form: Callable[[Any], str]) -> str:
    value = result.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _ABSENT
    try:
        return form(value)
    except (TypeError, ValueError):
        raise ValueError(f"result.json must hold a number under {key!r}; got {value!r}.") from None


def _shrunk(result: dict[str, Any], dense: str, compact: str) -> str:
    if not result.get(dense) or result.get(compact) is None:
        return f"{_format(result, dense, '{:,}'.format)} → {_format(result, compact, '{:,}'.format)}"
    share = 100 * result[compact] / result[dense]
    return f"{result[dense]:,} → {result[compact]:,} ({share:.1f} % left, {100 - share:.1f} % removed)"


def _part(value: float, whole: float | None) -> str:
    return f"{value:,} ({100 * value / whole:.1f} % of the dense network's)" if whole else f"{value:,}"


def _of(result: dict[str, Any], part: str, whole: str) -> str:
    return f"{_format(result, part, str)} of {_format(result, whole, str)}"


def _decisions(result: dict[str, Any]) -> str:
    decisions = result.get("decisions")
    if decisions is None:
        return _ABSENT
    return ", ".join(f"{fate} {count}" for fate, count in decisions.items()) or "none (no gates)"


def _latency(result: dict[str, Any], dense: str, compact: str) -> str:
    text = f"{_format(result, dense, '{:.3f} ms'.format)} → {_format(result, compact, '{:.3f} ms'.format)}"
    if result.get(dense) and result.get(compact):
        text += f" ({result[compact] / result[dense]:.2f} of the time)"
    return text


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    spelled = f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
    return f"{seconds:.1f} s ({spelled})"


def _structure_table(run: Run) -> str:
    layers = {trace.block: trace for trace in run.of("layer")}
    rows = []
    blocks: dict[str, list[SiteWidth]] = {}
    for site in final_sites(run):
        blocks.setdefault(site.block, []).append(site)
    for block, sites in blocks.items():
        widths = []
        for site in sites:
            if site.total is not None or site.kept:
                name = f"{site.site.removeprefix(block + '.')}: " if len(sites) > 1 else ""
                widths.append(f"{name}{site.kept} of {'?' if site.total is None else site.total}")
        layer = layers.get(block)
        if layer is None:
            decision = "no layer gate"
        else:
            decision = f"{layer.fate}, θ = {layer['keep_prob'][layer.rows][-1]:.3g}"
            if layer.removed_at is not None:
                decision += f" at step {layer['step'][layer.removed_at]:.0f}"
        rows.append((block, "kept" if sites[0].alive else "removed", ", ".join(widths) or "-", decision))
    return "## Final structure\n\n" + markdown_table(
        ("block", "in the end", "hidden channels kept", "fate of the block's gate"), rows
    )


def _key_table(values: dict[str, Any]) -> str:
    if not values:
        return "Nothing was recorded."
    return markdown_table(("key", "value"), [(f"`{key}`", _plain(value)) for key, value in _flat(values)])


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
