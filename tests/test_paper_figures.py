"""Figures from runs written by hand: what is drawn, what is refused, and that expected and counted complexity must agree."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import copies
from catode.prune.gated import cut
from catode.structures.fates import COMMITTED, PRUNED_TOLERANCE, PRUNED_ZERO, REMOVED_WITH_BLOCK, UNDECIDED
from catode.train import Config, count, models
from catode.train.loop import checkpoint
from paper_figures import _common, animation, complexity, runs
from paper_figures.__main__ import FIGURES, INDEX, main, write_index

EPOCHS, EVERY = 30, 22
(JPEG,) = (pixels for pixels, copy in copies.KNOWN.items() if copy.name == "CIFAR-10, JPEG copy")
COLUMNS = ("keep_prob", "benefit", "benefit_upper", "benefit_lower", "price", "gain", "decay", "rate_ratio", "noise")
COLUMNS += ("benefit_noise", "drift", "step_time", "risk", "separatrix", "tolerance")


def write_run(out: Path, config) -> Path:
    """A finished run on made-up paths: layer1.1 goes, and every third unit of the other blocks; the rest is committed."""
    out.mkdir(parents=True)
    rng = np.random.default_rng(0)
    model = models.build("resnet20", in_channels=1, classes=10, hidden_scale=config.hidden_scale)
    example, blocks = torch.zeros(1, 1, 8, 8), model.structures()
    dense = count(model, example)
    kept = {
        b.name: {
            "kept": b.name != "layer1.1" or config.nu == 0,
            "sites": {s.name: [i for i in range(s.width) if i % 3 or config.nu == 0] for s in b.sites},
        }
        for b in blocks
    }
    for block in kept.values():
        block["sites"] = {name: units if block["kept"] else [] for name, units in block["sites"].items()}
    cut.restrict(model, blocks, kept)
    counts = count(model, example)
    described = dict(arch="resnet20", in_channels=1, classes=[str(i) for i in range(10)], image_shape=[1, 8, 8])
    described |= dict(hidden_scale=config.hidden_scale, mean=[0.0], std=[1.0], blocks=kept)
    checkpoint.save(out, model.state_dict(), described)
    rows = []
    for block in blocks if config.nu > 0 else []:
        for site, index, there in [("", "", kept[block.name]["kept"])] + [
            (s.name, i, i in kept[block.name]["sites"][s.name]) for s in block.sites for i in range(s.width)
        ]:
            gone_with_block = site != "" and not kept[block.name]["kept"]
            for check in range(1, 11):
                theta = 1.0 if there else 1.0 - 0.09 * check
                last = COMMITTED if there else REMOVED_WITH_BLOCK if gone_with_block else PRUNED_TOLERANCE
                values = (theta, 0.01 * rng.random(), 0.02, 0.0, 0.1 if site == "" else 0.03, 0.2, 0.0, 0.05, 0.01)
                values += (0.01, 0.0, 5.0, 0.05, 0.3, 0.2)
                row = dict(step=44 * check, time=4.0 * check, kind="unit" if site else "layer", block=block.name)
                row |= dict(site=site, index=index, **dict(zip(COLUMNS, values, strict=True)))
                rows.append(row | {"fate": last if check == 10 else UNDECIDED})
    _table(out / "structures.csv", sorted(rows, key=lambda row: row["step"]))
    done = [epoch * EVERY >= 440 or config.nu == 0 for epoch in range(1, EPOCHS + 1)]
    metrics = [
        dict(epoch=e, step=e * EVERY, time=e, lr=0.1, loss=1 / e, train_accuracy=0.9, validation_loss=1 / e,
             validation_accuracy=0.9, expected_complexity=0.5,
             macs=counts.macs if end else dense.macs, params=counts.params if end else dense.params, wait_share=0.0)
        for e, end in enumerate(done, 1)
    ]  # fmt: skip
    _table(out / "metrics.csv", metrics)
    units = sum(len(ids) for block in kept.values() for ids in block["sites"].values())
    whole = count(models.build("resnet20", in_channels=1, classes=10), example)
    result = dict(accuracy=0.98, macs=counts.macs, macs_dense=whole.macs, params=counts.params)
    result |= dict(params_dense=whole.params, layers_kept=8, layers_total=9, units_kept=units, units_total=336)
    result |= dict(decided_by_rule=1.0, seed=config.seed)
    for name, content in (("config", dataclasses.asdict(config)), ("env", {}), ("result", result)):
        (out / f"{name}.json").write_text(json.dumps(content))
    if config.shadow:
        _table(out / "shadow.csv", _decisions(rows))
    return out


def _decisions(rows):
    keys = {(row["kind"], row["block"], row["site"], row["index"]) for row in rows if row["fate"] == PRUNED_TOLERANCE}
    for rule, step in (("derived", 396), ("fixed 0.5", 264), ("zero", 484)):
        for number, (kind, block, site, index) in enumerate(sorted(keys, key=str)):
            outcome = (
                "undecided" if rule == "zero" else "regret" if rule == "fixed 0.5" and number == 0 else "confirmed"
            )
            numbers = dict(
                time=1.0, keep_prob=0.2, benefit=0.0, benefit_upper=0.01, price=0.1, tolerance=0.3, escape=0.03
            )
            yield dict(rule=rule, kind=kind, block=block, site=site, index=index, step=step, **numbers, outcome=outcome,
                       outcome_step=484, outcome_time=9.0)  # fmt: skip


def _table(path: Path, rows) -> None:
    rows = list(rows)
    with path.open("w", newline="") as stream:
        if rows:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All planned runs, finished; those of one structure are copies with their own configuration and result."""
    root = tmp_path_factory.mktemp("figures") / "runs"
    alike: dict[tuple, Path] = {}
    for out, config in runs.plan(root, runs.GROUPS).items():
        key = config.nu > 0, config.hidden_scale, config.shadow
        if key not in alike:
            alike[key] = write_run(out, config)
        else:
            shutil.copytree(alike[key], out)
            _change(out / "config.json", **dataclasses.asdict(config))
            _change(out / "result.json", seed=config.seed, test_accuracy=0.98 - 0.002 * config.seed)
    return root


def _change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def data(folder):
    nothing = folder.parent / "records"
    nothing.mkdir()
    return runs.Data(folder, nothing)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_what_it_needs_and_is_made_from_that(name, data):
    assert set(FIGURES[name].NEEDS) <= set(runs.GROUPS)
    made = FIGURES[name].make(data)
    assert made.title and made.caption.endswith(".") and "nan" not in made.caption + made.table
    assert isinstance(made.figure, Figure) and made.figure.axes
    assert any(ax.get_title(loc="left") for ax in made.figure.axes)


def test_shadow_records_have_a_row_for_each_data_set_network_and_length(folder, tmp_path):
    for number, (dataset, epochs) in enumerate((("cifar10", 20), ("digits", 60), ("digits", 60))):
        record = shutil.copytree(folder / f"digits-shadow-s{number}", tmp_path / "shadow" / str(number))
        _change(record / "config.json", dataset=dataset, epochs=epochs)
        _change(record / "env.json", pixels=JPEG)
    data = runs.Data(folder, tmp_path)
    rows = {name: len(found) for name, found in data.shadows().items()}
    lengths = ((f"digits, {runs.SHORT['epochs']}", 3), ("CIFAR-10, JPEG copy, 20", 1), ("digits, 60", 2))
    assert rows == {f"resnet20, {name} epochs, risk 0.05": number for name, number in lengths}
    assert next(iter(rows.values())) == 3 and len(data.own_shadows()) == 3
    made = FIGURES["regrets"].make(data)
    assert all(name in made.table for name in rows)
    assert "cifar10" not in made.table + made.caption
    assert made.caption.count("in runs where hardly anything comes back: of all") == 3


def test_every_record_of_cifar10_is_called_a_jpeg_copy(folder, tmp_path):
    for name, changed in (("pruned-s0", {}), ("dense-s0", {"nu": 0.0})):
        record = shutil.copytree(folder / f"digits-{name}", tmp_path / name)
        base = Config.from_presets(dataset="cifar10", data_dir="images", epochs=20, **changed)
        _change(record / "config.json", **dataclasses.asdict(base))
        _change(record / "env.json", pixels=JPEG)
    data = runs.Data(folder, tmp_path)
    for name in ("thetas", "rivals", "widths", "knobs"):
        made = FIGURES[name].make(data)
        drawn = [ax.get_title(loc="left") for ax in made.figure.axes]
        told = " ".join([made.caption, made.table, *drawn])
        assert "CIFAR-10, JPEG copy" in told and "cifar10" not in told
        assert name == "knobs" or any("CIFAR-10, JPEG copy" in title for title in drawn)


def test_a_record_in_which_hardly_anything_was_decided_is_not_drawn(folder, tmp_path):
    record = shutil.copytree(folder / "digits-pruned-s0", tmp_path / "slow")
    _change(record / "config.json", epochs=60)
    _change(record / "result.json", decided_by_rule=0.49)
    assert runs.Data(folder, tmp_path).record_reports() == []
    _change(record / "result.json", decided_by_rule=0.5)
    assert [run.folder for run in runs.Data(folder, tmp_path).record_reports()] == [record]


def test_bars_go_from_the_least_to_the_largest_value():
    assert _common.span([1.0, 2.0, 6.0]).tolist() == [[2.0], [3.0]]


def test_the_command_writes_png_vector_and_an_index_that_keeps_other_sections(tmp_path, folder, capsys):
    write_index(tmp_path, {"thetas": "## Old", "basins": "## Older"}, "svg")
    given = ["--only", "widths", "--runs", folder, "--out", tmp_path, "--records", tmp_path, "--vector", "svg"]
    assert main(list(map(str, given))) == 0 and capsys.readouterr().out.strip() == str(tmp_path / INDEX)
    assert (tmp_path / "widths.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "widths.svg").read_text()
    text = (tmp_path / INDEX).read_text()
    assert (
        "- CIFAR-10, JPEG copy: its images were once saved as JPEG" in text
        and "must not be set beside published" in text
    )
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Older",
        "## Old",
        "## Final widths over seeds",
    ]
    assert "![Final widths over seeds](widths.png)" in text and "python -m paper_figures --only widths" in text


def test_expected_and_counted_complexity_agree_and_a_contradiction_is_refused(tmp_path, data):
    run = data.reports("pruned")[0]
    found = complexity.check(run)
    assert (found.expected[-1] == found.counted[-1]).all() and (found.expected[0] == found.dense).all()
    assert found.layers["layer1.1.conv1"][1:] == (0.0, 0) and found.layers["layer1.0.conv1"][2] > 0
    assert (
        sum(is_ for _, _, is_ in found.layers.values()) < found.counted[-1, 0]
    )  # norms are counted in the whole alone
    trace = next(t for t in run.traces if t.fate == COMMITTED and t.kind == "unit")
    lying = dataclasses.replace(trace, fates=[*trace.fates[:-1], PRUNED_ZERO])
    run = dataclasses.replace(run, traces=[lying if t is trace else t for t in run.traces])
    with pytest.raises(ValueError, match="must have the expected"):
        complexity.check(run)


def test_a_run_can_be_shown_as_an_animation(tmp_path, data):
    from PIL import Image

    animation.write(data.reports("pruned")[0], tmp_path / "a.gif", frames=2)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.format == "GIF" and image.n_frames >= 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--only", "bassins"], "`only` must be one of"),
        (["--vector", "gif"], "`vector` must be one of"),
        (["--processes", "0"], "`processes` must be >= 1"),
        (["--records", "nowhere"], "`records` must be an existing folder"),
        (["--out", __file__], "`out` must be a folder"),
        (["--runs", __file__], "`runs` must be a folder"),
        (["--outt", "x"], "Did you mean --out?"),
    ],
)
def test_bad_input_is_one_line_and_status_2(given, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_runs_of_another_plan_are_refused(tmp_path, capsys):
    planned, config = next(iter(runs.plan(tmp_path, ["pruned"]).items()))
    planned.mkdir()
    (planned / "config.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(config, epochs=7))))
    assert main(["--only", "thetas", "--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "with epochs=7 in place of 30" in capsys.readouterr().err
