"""The report of a run: its facts, its pictures, and what it says when something is missing."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from catode.report import history, looks, phase, pictures, report
from catode.structures import fates
from catode.structures.fates import (
    COMMITTED,
    KEPT_OUT_OF_TIME,
    PRUNED_TOLERANCE,
    PRUNED_ZERO,
    REMOVED,
    REMOVED_OUT_OF_TIME,
    REMOVED_WITH_BLOCK,
    UNDECIDED,
)
from catode.theory.plotting import PALETTE, new_figure, phase_portrait
from catode.theory.systems import BenefitSystem

STRUCTURE_COLUMNS = [
    *("step", "time", "kind", "block", "site", "index", "keep_prob", "benefit", "benefit_upper", "benefit_lower"),
    *("price", "gain", "decay", "rate_ratio", "noise", "benefit_noise", "drift", "step_time", "risk", "separatrix"),
    *("tolerance", "fate"),
]
METRIC_COLUMNS = [
    *(
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
    ),
    *("layers_kept", "units_kept", "undecided", "seconds", "wait_share"),
]
PICTURES = {"accuracy.png", "theta.png", "structure.png", "complexity.png", "phase.png"}
STEPS_PER_CHECK, STEP_TIME = 50, 0.05


def write_run(
    folder: Path,
    *,
    blocks: int = 3,
    units: int = 8,
    checks: int = 12,
    epochs: int = 6,
    gated: bool = True,
    rows_after_removal: bool = False,
    seed: int = 0,
) -> dict:
    """Write the folder of an invented run in the format of the conventions; return what result.json holds.

    Half of the structures are useless (benefit far below the price) and obey `theta' = rho (b - price)` with a little
    noise until they reach their tolerance; the others are useful and are committed half-way, but for one unit whose
    benefit is its price: it is rounded at the end. The middle block goes as a whole and takes its units with it, one of
    them committed before. As in a real run there is a row as long as a structure was undecided before the check, with
    the theta from before it, unless `rows_after_removal`.
    """
    rng = np.random.default_rng(seed)
    rows, kept, layer_kept, final = [], {}, {}, {}
    middle = blocks // 2
    structures = [("layer", b, None) for b in range(blocks)]
    structures += [("unit", b, u) for b in range(blocks) for u in range(units)]
    dt = STEPS_PER_CHECK * STEP_TIME
    block_gone_at = None
    for kind, b, u in structures if gated else []:
        block = f"layer{b + 1}.0"
        unit = kind == "unit"
        site = f"{block}.conv1" if unit else ""
        price = 1e-3 * (1 + b) if unit else 2e-2
        useless = (u + b) % 2 == 0 if unit else b == middle
        rounded, early = unit and (b, u) == (0, units - 1), unit and (b, u) == (middle, units - 2)
        gain, decay, drift = 0.8 * price, 0.01, 2e-4 * price
        rate_ratio = (0.12 + 0.08 * rng.random()) / price * 12 / checks
        noise, benefit_noise = 0.02, 0.02 * price
        mu = (-decay + math.sqrt(decay**2 + 4 * rate_ratio * gain)) / 2
        worth = price * (rng.uniform(0.05, 0.3) if useless and not early else rng.uniform(1.5, 6.0))
        theta, fate, alive = 1.0, UNDECIDED, True
        for check in range(1, checks + 1):
            measured = worth * (0.4 + 0.6 * theta) * (1 - math.exp(-check / 2)) + 0.04 * price * rng.standard_normal()
            if rounded:
                measured = price * (1 + 0.05 * rng.standard_normal())
            separatrix = (price * (mu + decay) - drift - mu * max(measured, 0)) / gain if check > 1 else math.nan
            tolerance = separatrix - 0.1
            before, recorded = fate, theta
            if alive and unit and b == middle and check == block_gone_at:
                fate, theta, alive = REMOVED_WITH_BLOCK, 0.0, False
            elif fate == UNDECIDED:
                move = dt * rate_ratio * (measured - price) + 0.02 * rng.standard_normal()
                theta = recorded = float(np.clip(theta + move, 0, 1))
                if measured < price and theta == 0:
                    fate, alive = PRUNED_ZERO, False
                elif measured < price and theta <= tolerance:
                    fate, theta, alive = PRUNED_TOLERANCE, 0.0, False
                    if not unit:
                        block_gone_at = check
                elif early or (check > checks // 2 and measured > price and not rounded):
                    fate, theta = COMMITTED, 1.0
                elif check == checks:
                    alive, theta = theta >= 0.5, float(theta >= 0.5)
                    fate = KEPT_OUT_OF_TIME if alive else REMOVED_OUT_OF_TIME
            values = (
                check * STEPS_PER_CHECK, check * dt, kind, block, site, "" if u is None else u, recorded, measured,
                measured + 0.1 * price, measured - 0.1 * price, price, gain, decay, rate_ratio, noise, benefit_noise,
                drift, STEP_TIME, 0.05, separatrix, tolerance, fate,
            )  # fmt: skip
            rows.append(dict(zip(STRUCTURE_COLUMNS, values, strict=True)) | {"written": before == UNDECIDED})
        final[kind, block, u] = fate
        if unit:
            kept.setdefault(b, []).extend([u] if alive else [])
        else:
            layer_kept[b] = alive
    if not gated:
        kept, layer_kept = {b: list(range(units)) for b in range(blocks)}, dict.fromkeys(range(blocks), True)
    rows.sort(key=lambda row: row["step"])

    per_unit, fixed = 4000, 9000
    dense = fixed + per_unit * blocks * units
    total = checks * STEPS_PER_CHECK
    metrics = []
    for epoch in range(1, epochs + 1):
        step = total * epoch // epochs
        upto = [row for row in rows if row["step"] <= step]
        last = {(row["kind"], row["block"], row["index"]): row for row in upto}
        units_left = blocks * units - sum(row["kind"] == "unit" and row["fate"] in REMOVED for row in last.values())
        layers_left = blocks - sum(row["kind"] == "layer" and row["fate"] in REMOVED for row in last.values())
        mean = np.mean(
            [0 if r["fate"] in REMOVED else r["keep_prob"] for r in last.values() if r["kind"] == "unit"] or [1]
        )
        progress = 1 - math.exp(-4 * epoch / epochs)
        values = (
            epoch, step, step * STEP_TIME, 0.1, 2.4 * (1 - 0.97 * progress), 0.9 * progress, 2.5 * (1 - 0.9 * progress),
            0.96 * progress,
            float(mean) if gated else "", fixed + per_unit * units_left, 100 + 30 * units_left, layers_left, units_left,
            sum(row["fate"] == UNDECIDED for row in last.values()), 2.5 * epoch, 0.01,
        )  # fmt: skip
        metrics.append(dict(zip(METRIC_COLUMNS, values, strict=True)))

    units_kept = sum(len(indices) for b, indices in kept.items() if layer_kept[b])
    result = {
        "test_accuracy": 0.95,
        "validation_accuracy": metrics[-1]["validation_accuracy"],
        "validation_accuracy_history": [row["validation_accuracy"] for row in metrics],
        "macs": fixed + per_unit * units_kept,
        "macs_executed": fixed + per_unit * units_kept + 1234,
        "macs_dense": dense,
        "params": 100 + 30 * units_kept,
        "params_dense": 100 + 30 * blocks * units,
        "expected_complexity": units_kept / (blocks * units) if gated else None,
        "layers_kept": sum(layer_kept.values()),
        "layers_total": blocks,
        "units_kept": units_kept,
        "units_total": blocks * units,
        "decisions": {fate: list(final.values()).count(fate) for fate in sorted(set(final.values()))},
        "decided_by_rule": 1 - sum(fate in fates.NOT_BY_RULE for fate in final.values()) / len(final)
        if final
        else None,
        "macs_removed_by_tolerance": per_unit * list(final.values()).count(PRUNED_TOLERANCE),
        "seconds": 83.4,
        "units_kept_for_rounding": 3,
        "latency_ms": 1.871,
        "latency_dense_ms": 3.024,
        "latency_ms_128": 41.5,
        "latency_dense_ms_128": 96.25,
        "seed": seed,
    }
    structure = {
        "arch": "resnet8",
        "blocks": {
            f"layer{b + 1}.0": {
                "kept": layer_kept[b],
                "sites": {f"layer{b + 1}.0.conv1": kept[b] if layer_kept[b] else []},
            }
            for b in range(blocks)
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": {
            "arch": "resnet8",
            "dataset": "digits",
            "nu": 0.5 if gated else 0.0,
            "alpha": 0.5,
            "beta": 0.0,
            "tol": None,
        },
        "env.json": {"python": "3.11.7", "device": "cpu", "threads": 1, "versions": {"numpy": np.__version__}},
        "result.json": result,
        "structure.json": structure,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    for name, columns, content in (
        ("metrics.csv", METRIC_COLUMNS, metrics),
        ("structures.csv", STRUCTURE_COLUMNS, rows),
    ):
        with (folder / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(
                {k: row[k] for k in columns} for row in content if row.get("written", True) or rows_after_removal
            )
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("run")
    result = write_run(folder)
    path = report.write(folder)
    assert path == folder / "report.md"
    return folder, result, path.read_text(encoding="utf-8")


def table_row(text: str, label: str) -> str:
    """Return the value beside a label in the table of headline numbers."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label}")]
    return line.split("|")[2].strip()


def table_label(text: str, label: str) -> str:
    """Return the whole label that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label}")]
    return line.split("|")[1].strip()


def test_the_invented_run_has_every_way_out(run):
    _, result, _ = run
    assert set(result["decisions"]) >= {COMMITTED, PRUNED_TOLERANCE, REMOVED_WITH_BLOCK, KEPT_OUT_OF_TIME}
    assert 0 < result["units_kept"] < result["units_total"]
    assert result["layers_kept"] == 2


def test_headline_numbers_are_those_of_the_result(run):
    _, result, text = run
    assert table_row(text, "Test accuracy") == f"{100 * result['test_accuracy']:.2f} %"
    assert table_row(text, "MACs per image").startswith(f"{result['macs_dense']:,} → {result['macs']:,} (")
    assert f"{100 * result['macs'] / result['macs_dense']:.1f} % left" in table_row(text, "MACs per image")
    assert table_row(text, "MACs executed") == f"{result['macs_executed']:,}"
    assert table_row(text, "Parameters").startswith(f"{result['params_dense']:,} → {result['params']:,} (")
    assert table_row(text, "Expected complexity") == f"{result['expected_complexity']:.4f}"
    assert table_row(text, "Decided by the rule") == f"{100 * result['decided_by_rule']:.1f} %"
    assert table_row(text, "MACs removed by tolerance").startswith(f"{result['macs_removed_by_tolerance']:,} (")
    assert table_row(text, "Layers kept") == f"{result['layers_kept']} of {result['layers_total']}"
    assert table_row(text, "Units kept") == f"{result['units_kept']} of {result['units_total']}"
    assert table_row(text, "Of these kept only to round widths") == str(result["units_kept_for_rounding"])
    assert table_row(text, "Latency, batch 1,") == "3.024 ms → 1.871 ms (0.62 of the time)"
    assert table_row(text, "Latency, batch 128") == "96.250 ms → 41.500 ms (0.43 of the time)"
    assert table_row(text, "Share of the step time spent waiting for images") == "1.0 %"
    assert table_row(text, "Training time") == "83.4 s (1 min 23 s)"
    assert table_row(text, "Seed") == str(result["seed"])
    assert "none of kept_out_of_time, removed_out_of_time" in table_label(text, "Decided by the rule")
    for fate, count in result["decisions"].items():
        assert f"{fate} {count}" in table_row(text, "Structures by fate")
        assert f"`{fate}`: {fates.MEANINGS[fate]}" in text


def test_final_structure_is_that_of_structure_json(run):
    folder, _, text = run
    for block, described in json.loads((folder / "structure.json").read_text())["blocks"].items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {block} |")]
        _, _, end, widths, decision, _ = (cell.strip() for cell in line.split("|"))
        assert end == ("kept" if described["kept"] else "removed")
        assert widths == f"{len(described['sites'][f'{block}.conv1'])} of 8"
        assert decision.startswith(COMMITTED if described["kept"] else PRUNED_TOLERANCE)


def test_every_picture_exists_is_shown_and_is_not_blank(run):
    folder, _, text = run
    assert {path.name for path in folder.glob("*.png")} == PICTURES
    for name in PICTURES:
        assert text.count(f"]({name})") == 1
        pixels = imread(folder / name)
        assert 250 <= pixels.shape[0] <= 900 and 500 <= pixels.shape[1] <= 1600, name
        assert pixels[..., :3].std() > 0.05, name


def test_a_committed_unit_that_went_with_its_block_counts_as_gone(run):
    folder, _, text = run
    with (folder / "structures.csv").open(newline="") as stream:
        unit = [row for row in csv.DictReader(stream) if row["site"] == "layer2.0.conv1" and row["index"] == "6"]
    assert unit[-1]["fate"] == COMMITTED
    traces = {(trace.site, trace.index): trace for trace in history.read(folder).traces}
    assert traces["layer2.0.conv1", "6"].fate == REMOVED_WITH_BLOCK and traces["layer2.0.conv1", "6"].removed
    assert "1 of 27 structures were not decided by a measurement of their own: kept_out_of_time 1." in text


def test_every_fate_and_kind_that_is_read_can_be_drawn():
    assert set(looks.LOOKS) == set(fates.COLORS) == set(fates.FATES) and set(looks.KIND_TITLES) == set(history.KINDS)
    assert {fate: look.color for fate, look in looks.LOOKS.items()} == {
        fate: PALETTE[name] for fate, name in fates.COLORS.items()
    }
    assert len({look.marker for look in looks.LOOKS.values()}) == len(fates.FATES)
    assert len({look.color for look in looks.LOOKS.values()}) == len(fates.FATES)


def test_the_measured_field_is_the_mean_motion_in_each_bin():
    window = (0.0, 2.0), (0.0, 1.0)
    down = np.array([0.0, 10.0, 20.0]), np.array([0.25, 0.25, 0.25]), np.array([0.9, 0.8, 0.7])
    left = np.array([0.0, 10.0]), np.array([0.45, 0.05]), np.array([0.85, 0.85])  # the same bin, by its middle
    still = np.array([0.0, 10.0]), np.array([1.75, 1.75]), np.array([1.0, 1.0])  # on the upper edge
    away = np.array([0.0, 10.0]), np.array([3.0, 2.5]), np.array([0.5, 0.4])
    centres, velocities = phase.measured_field([down, left, still, away], window, bins=(4, 2), least=1)
    np.testing.assert_allclose(centres, [[0.25, 0.75], [1.75, 0.75]])
    np.testing.assert_allclose(velocities, [[-0.02 / 3, -0.02 / 3], [0.0, 0.0]], atol=1e-15)
    assert len(phase.measured_field([down, left, still, away], window, bins=(4, 2), least=3)[0]) == 1
    assert len(phase.measured_field([], window)[0]) == 0
    ax = new_figure(4, 3).subplots()
    phase.draw_field(ax, centres, velocities, window)
    (arrows,) = ax.collections
    np.testing.assert_allclose(arrows.U, -phase.ARROW * 2.0 / 2**0.5)  # of equal length in shares of the window
    np.testing.assert_allclose(arrows.V, -phase.ARROW / 2**0.5)
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1.75]]


def test_configuration_and_environment_are_listed(run):
    _, _, text = run
    for line in (
        "| `nu` | 0.5 |",
        "| `tol` | null |",
        "| `arch` | resnet8 |",
        "| `versions.numpy` |",
        "| `threads` | 1 |",
    ):
        assert line in text


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Return a function that writes a report with some of the pictures alone, to save time, and returns its text."""

    def write(folder: Path, *makers) -> str:
        monkeypatch.setattr(report, "_MAKERS", makers)
        return report.write(folder).read_text(encoding="utf-8")

    return write


def test_the_report_is_the_same_when_made_again(run, tmp_path, only):
    _, _, text = run
    write_run(tmp_path)
    again = only(tmp_path)
    assert again == only(tmp_path)
    assert again.split("## Configuration") == [text.split("## Accuracy")[0], text.split("## Configuration")[1]]


def test_rows_after_removal_change_nothing(tmp_path, only):
    write_run(tmp_path / "short")
    write_run(tmp_path / "long", rows_after_removal=True)
    short, long = (only(tmp_path / name) for name in ("short", "long"))
    assert short == long


def test_without_structure_json_the_widths_come_from_the_fates(run, tmp_path, only):
    _, _, text = run
    write_run(tmp_path)
    (tmp_path / "structure.json").unlink()
    again = only(tmp_path)
    assert "structure.json is missing" in again
    tables = [t.split("## Final structure")[1].split("\n## ")[0] for t in (again, text)]
    assert tables[0] == tables[1]


def test_ungated_run_shows_curves_only_and_says_so(tmp_path):
    result = write_run(tmp_path, gated=False)
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png"}
    assert "this run had no gates" in text
    assert table_row(text, "Test accuracy") == f"{100 * result['test_accuracy']:.2f} %"
    assert table_row(text, "Structures by fate") == "none (no gates)"
    assert table_row(text, "Expected complexity") == "not recorded"


def test_structures_csv_without_even_a_header_means_no_gates(tmp_path, only):
    write_run(tmp_path, gated=False)
    (tmp_path / "structures.csv").write_text("")
    assert "this run had no gates" in only(tmp_path, *report._MAKERS)


def test_one_kind_of_gate_alone(tmp_path, only):
    write_run(tmp_path)
    path = tmp_path / "structures.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if ",layer," not in line) + "\n")
    text = only(tmp_path, pictures.theta_picture, pictures.structure_picture)
    assert "Only units had gates" in text
    assert "no layer gate" in text
    path.write_text("\n".join(line for line in lines if ",unit," not in line) + "\n")
    assert "Only layers had gates" in only(tmp_path, pictures.theta_picture, pictures.structure_picture)


def test_unmeasured_values_are_admitted(tmp_path, only):
    write_run(tmp_path)
    path = tmp_path / "structures.csv"
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["gain"] = ""
        row["benefit"] = "" if row["kind"] == "layer" else row["benefit"]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, STRUCTURE_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    text = only(tmp_path, phase.phase_picture)
    assert "For no unit were all the constants" in text
    assert (tmp_path / "phase.png").exists()
    result = json.loads((tmp_path / "result.json").read_text())
    del result["latency_ms_128"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert table_row(only(tmp_path), "Latency, batch 128") == "96.250 ms → not recorded"


@pytest.mark.parametrize("name", ["config.json", "env.json", "metrics.csv", "structures.csv", "result.json"])
def test_a_missing_file_is_named_and_nothing_is_written(tmp_path, name):
    write_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        report.write(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("name", "old", "new", "match"),
    [
        ("result.json", "{", "[", "result.json must hold valid JSON"),
        ("metrics.csv", "train_accuracy", "accuracy", "column 'train_accuracy'"),
        ("structures.csv", "layer1.0,,", "layer1.0,", "values in every row"),
        ("structures.csv", "committed", "kept", "column 'fate'; got 'kept'"),
        ("structures.csv", ",unit,", ",neuron,", "column 'kind'; got 'neuron'"),
        ("structures.csv", "300,", "many,", "numbers in column 'step'; got 'many'"),
    ],
)
def test_malformed_files_are_refused_in_one_line(tmp_path, name, old, new, match):
    write_run(tmp_path)
    path = tmp_path / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=match) as caught:
        report.write(tmp_path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_phase_portrait_returns_its_axes_and_draws_the_paths():
    system = BenefitSystem(price=0.1, gain=0.5, decay=0.05, rate_ratio=1.0, drift=0.0)
    ax = new_figure(5, 4).subplots()
    path = (np.array([0.01, 0.02, 0.03]), np.array([0.3, 0.2, 0.1]))
    assert phase_portrait(ax, system, paths=[path], path_colors=["#123456"], nullclines=True) is ax
    drawn = [line for line in ax.lines if line.get_color() == "#123456"]
    np.testing.assert_array_equal(drawn[0].get_xydata(), np.column_stack(path))
    (price,) = [line for line in ax.lines if line.get_label() == "price: θ at rest"]
    assert price.get_xdata()[0] == 0.1
    (edge,) = [line for line in ax.lines if line.get_label() == "separatrix"]
    finite = np.isfinite(edge.get_ydata())
    np.testing.assert_allclose(edge.get_ydata()[finite], system.separatrix(edge.get_xdata()[finite]))


@pytest.mark.parametrize("bad", [{"benefit_max": -1.0}, {"path_colors": ["red"]}])
def test_phase_portrait_refuses_bad_arguments(bad):
    system = BenefitSystem(price=0.1, gain=0.5, decay=0.05, rate_ratio=1.0, drift=0.0)
    with pytest.raises(ValueError, match="must"):
        phase_portrait(new_figure(4, 3).subplots(), system, **bad)
