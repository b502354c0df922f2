"""Tables of the queue: what they show of records made by hand, and what they do not claim."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from queue_records import cells, columns, write

from benchmarks.queue import latency, nats, returns, shapes, tables
from benchmarks.queue.book import Book
from benchmarks.queue.rows import ROWS
from benchmarks.queue.tables import measures, picture
from benchmarks.rival import widths as widths_of
from catode.prune.describe.costs import count
from catode.records import structure_key
from catode.structures.inventory import Inventory
from catode.train.models import build

ROOT = Path(__file__).parents[2]


def test_the_headline_pairs_by_seed_and_names_what_is_missing(tmp_path):
    for seed, (own, shaped) in enumerate(((0.85, 0.84), (0.86, 0.848), (0.855, 0.846), (0.85, 0.84), (0.86, 0.85))):
        write(tmp_path, "pruned", seed, accuracy=own, macs=18e6, cpu_seconds=450.0, test_accuracy_without_ema=0.8)
        write(tmp_path, "stage-shaped", seed, accuracy=shaped, macs=18e6)
        if seed < 3:
            write(tmp_path, "dense", seed, accuracy=own, cpu_seconds=500.0 + 25 * seed)
        if seed < 2:
            write(tmp_path, "rival", seed, accuracy=own - 0.01, macs=18e6)
    text = tables.page(Book(tmp_path), "headline")
    assert "CIFAR-10, JPEG copy" in text and "must not be set beside published ones" in text
    assert "3 differences are looked at, and none is corrected" in text and "all the same work, differ by 10 %" in text
    pairs = {row[0]: row[1:] for row in cells(text, "difference")}
    assert pairs["catode - stage-shaped"] == [
        "+1.02 [+0.88, +1.16], n = 5",
        "above",
        f"1.00 ({', '.join(['1.00'] * 5)})",
    ]
    assert pairs["catode - Torch-Pruning"][:2] == ["+1.00 [+1.00, +1.00], n = 2", "not ended"]
    assert pairs["catode - dense"][1] == "not ended"
    table = columns(text)
    own, shaped = table["catode"], table["stage-shaped"]
    assert own["without EMA"] == "80.00" and own["while training, %"] == "90.00"
    assert (
        own["MACs, M"] == f"18.00 ({', '.join(['18.00'] * 5)})"
        and own["MACs, %"] == f"45.0 ({', '.join(['45.0'] * 5)})"
    )
    assert shaped["without EMA"] == "" and shaped["training MACs"].startswith("0.45 (0.45,")
    assert own["training time"] == "0.86" and table["dense"]["training time"] == "1.00"  # 450 of 525 s
    assert "Not run yet: dense (3 of 5), narrowed (0 of 5), rival (2 of 5)." in text
    missing = picture.draw(Book(tmp_path), tmp_path / "p.png")
    assert (
        (tmp_path / "p.png").stat().st_size > 5000 and missing[0] == "all widths narrowed" and "catode" not in missing
    )


def test_training_time_is_compared_on_one_kind_of_machine_only(tmp_path):
    for seed in range(2):
        write(tmp_path, "dense", seed, cpu_seconds=500.0)
    write(tmp_path, "dense", 2, cpu_seconds=200.0, env={"processor": "fast"})
    write(tmp_path, "pruned", 0, macs=18e6, cpu_seconds=450.0)
    for seed in (1, 2, 3):
        write(tmp_path, "pruned", seed, macs=18e6, cpu_seconds=260.0, env={"processor": "fast"})
    write(tmp_path, "narrowed", 0, macs=18e6, cpu_seconds=100.0, env={"processor": "unknown"})
    table = columns(tables.page(Book(tmp_path), "headline"))
    assert table["catode"]["training time"] == "1.20"  # one run at 450 / 500, three at 260 / 200
    assert table["dense"]["training time"] == "1.00" and table["all widths narrowed"]["training time"] == ""
    write(tmp_path, "narrowed", 1, macs=18e6, cpu_seconds=100.0)
    text = tables.page(Book(tmp_path), "headline")
    assert columns(text)["all widths narrowed"]["training time"] == "0.20 (1 of 2 runs)"
    assert "differ by 0 % (p)." in text and "(fast)" not in text, "one dense run there"
    assert "paired with: dense-s1, narrowed-s0, narrowed-s1." in text


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([1.0, 1.2, 0.9], "above"),
        ([-1.0, -1.2, -0.9], "below"),
        ([1.0, -0.5, 0.2], "undecided"),
        ([5.0], "no interval"),
    ],
)
def test_what_an_interval_allows_to_say(differences, said):
    assert measures.verdict(differences) == measures.verdict(differences, (0.45, 0.469)) == said
    assert measures.verdict(differences, (0.45, 0.48)) == "other MACs"


def whole(arch: str) -> dict:
    inventory = Inventory(build(arch, in_channels=3, classes=10).structures())
    return inventory.record(np.ones(inventory.size, dtype=bool))


@pytest.mark.parametrize("multiple", [1, 8])
def test_training_macs_are_those_of_every_step_with_its_dead_channels(tmp_path, multiple):
    """Against networks that are cut to the widths of each part of the run and counted."""
    folder = write(tmp_path, "pruned", macs=1.0)
    config = json.loads((folder / "config.json").read_text()) | {"width_multiple": multiple}
    (folder / "config.json").write_text(json.dumps(config))
    steps = 20 * 351
    gone = [(1000, "unit", "layer1.0", unit) for unit in range(9)] + [
        (3000, "unit", "layer2.1", 4),
        (5000, "layer", "layer3.2", ""),
    ]
    gone += [(5000, "unit", "layer3.2", unit) for unit in range(64)]  # with its block
    lines = [
        f"{step},{kind},{block},{f'{block}.conv1' if kind == 'unit' else ''},{unit},removed_with_block,0"
        for step, kind, block, unit in gone
    ]
    (folder / "structures.csv").write_text("\n".join(["step,kind,block,site,index,fate,keep_prob", *lines]) + "\n")
    blocks, parts = whole("resnet20"), []
    for block, units in (("layer1.0", 7), ("layer2.1", 31), ("layer3.2", 0)):
        parts.append(shapes.macs("resnet20", blocks, (3, 32, 32), 10))
        kept = list(range(-(-units // multiple) * multiple))
        blocks = blocks | {block: {"kept": bool(kept), "sites": {site: kept for site in blocks[block]["sites"]}}}
    parts.append(shapes.macs("resnet20", blocks, (3, 32, 32), 10))
    expected = np.dot(parts, np.diff([0, 1000, 3000, 5000, steps])) / parts[0] / 351
    book = Book(tmp_path)
    own = book.finished["pruned-s0"]
    own.result["macs_dense"] = parts[0]
    assert measures.training_macs(book.epochs("pruned-s0"), own) == pytest.approx(expected)


def test_latencies_are_of_networks_of_the_recorded_size_and_take_the_place_of_the_runs_own(tmp_path):
    blocks = shapes.shaped(whole("resnet20"), {1: 2, 2: 3, 3: 1}, {1: 5, 2: 9, 3: 20})
    macs = shapes.macs("resnet20", blocks, (3, 32, 32), 10)
    (write(tmp_path, "pruned", macs=macs) / "structure.json").write_text(json.dumps({"blocks": blocks}))
    model = build("resnet20", in_channels=3, classes=10)
    widths = {name: list(m.weight.shape[:2]) for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    for name, (outputs, inputs) in widths.items():  # one channel less everywhere in the streams, hidden ones halved
        widths[name] = (
            [outputs // 2, inputs - (inputs > 3)] if name.endswith(".conv1") else [outputs - 1, -(-inputs // 2)]
        )
    widths["conv1"] = [15, 3]
    dense = count(model, torch.zeros(1, 3, 32, 32)).macs
    folder = write(tmp_path, "rival", macs=0, env={"widths": widths})
    rival = Book(tmp_path).finished["rival-s0"]
    with pytest.raises(ValueError, match="`record` must hold what its network is made of; got 0 MACs"):
        latency.network(rival, None)
    latency._resize(model, widths)
    left = count(model, torch.zeros(1, 3, 32, 32)).macs
    assert 0.3 * dense < left < 0.6 * dense
    result = json.loads((folder / "result.json").read_text()) | {"macs": left}
    (folder / "result.json").write_text(json.dumps(result))
    assert "as each run measured it" in tables.page(Book(tmp_path), "headline")
    size = shapes.narrowed("resnet20", 0.45)
    small = shapes.narrow("resnet20", **size, in_channels=3, classes=10)
    narrow_macs = count(small, torch.zeros(1, 3, 32, 32)).macs
    write(tmp_path, "narrowed", macs=narrow_macs, env={"widths": widths_of(small)})
    rebuilt = latency.network(Book(tmp_path).finished["narrowed-s0"], None)
    shapes_of = [{name: tuple(own.shape) for name, own in model.state_dict().items()} for model in (rebuilt, small)]
    assert shapes_of[0] == shapes_of[1]
    latency.write(tmp_path, seconds=1e-3)
    found = latency.read(tmp_path)["runs"]
    assert set(found) == {"pruned-s0", "rival-s0", "narrowed-s0"} and all(
        own > 0 and big > 0 for big, own in found.values()
    )
    text = tables.page(Book(tmp_path), "headline")
    table = columns(text)
    assert "all in one sitting" in text
    assert table["catode"]["latency"] == f"{found['pruned-s0'][1] / found['pruned-s0'][0]:.2f}"
    write(tmp_path, "stage-shaped", macs=macs)  # ended after the sitting
    table = columns(tables.page(Book(tmp_path), "headline"))
    assert table["stage-shaped"]["latency"] == "" and table["catode"]["latency"]


def test_a_run_that_failed_is_not_called_missing_and_one_run_has_no_spread(tmp_path):
    for seed in range(4):
        write(tmp_path, "pruned", seed, macs=18e6, decided_by_rule=0.0)
    write(tmp_path, "dense", 0)
    Book(tmp_path).fail("pruned-s4", {"error": "not finite"})
    text = tables.page(Book(tmp_path), "headline")
    assert "Ended by a loss that was not finite, and not repeated: pruned-s4." in text
    assert "Not run yet: dense (1 of 5), stage-shaped" in text and "all the same work" not in text
    table = columns(text)
    assert table["catode"]["decided by rule, %"] == "0 (0, 0, 0, 0)" and table["dense"]["decided by rule, %"] == ""


def test_choices_are_told_by_validation_alone(tmp_path):
    for number in range(1, 9):
        write(tmp_path, f"recipe-{number}", 100, accuracy=0.1234, validation=0.8 + number / 1000)
    text = tables.page(Book(tmp_path), "recipe")
    assert "12.34" not in text and [row[5] for row in cells(text, "setting")].count("yes") == 1
    assert [row[0] for row in cells(text, "setting") if row[5]] == [ROWS["recipe-6"].told]  # 80.6, within .2 of 80.8
    for number in range(1, 3):
        write(tmp_path, f"rival-choice-{number}", 100, accuracy=0.1234, macs=18e6)
    text = tables.page(Book(tmp_path), "choices")
    assert "12.34" not in text and not any(row[5] for row in cells(text, "Torch-Pruning"))  # five are not made yet


def test_schedules_are_told_by_validation_with_the_epochs_of_their_removals(tmp_path):
    folder = write(tmp_path, "r56-brief-preset", 100, accuracy=0.1234, validation=0.7)  # 3 epochs of 351 steps
    kept, gone = "committed,1", "pruned_tolerance,0.2"
    steps = {0: (1053, kept), 1: (702, gone), 2: (351, gone), 3: (526, gone), 4: (878, "pruned_zero,0"), 5: (100, kept)}
    lines = [f"{step},unit,layer1.0,conv1,{unit},{fate}" for unit, (step, fate) in steps.items()]
    (folder / "structures.csv").write_text("\n".join(["step,kind,block,site,index,fate,keep_prob", *lines]) + "\n")
    write(tmp_path, "r56-brief-dense", 100, accuracy=0.1234, validation=0.75)
    text = tables.page(Book(tmp_path), "schedule")
    assert "12.34" not in text
    assert [row[5:7] for row in cells(text, "network")] == [["1.50", "2.50"], ["", ""]]
    assert [row[1] for row in cells(text, "network")] == ["70.00", "75.00"]


def returned(decisions, back, left, foreseen, lead):
    gone = decisions - back - left
    return dict(decisions=decisions, confirmed=gone, returned=back, open=left, zeros=100, foreseen=foreseen, lead=lead)


def test_what_came_back_is_added_up_over_seeds_and_paired_by_run(tmp_path):
    pixels = {"pixels": "d" * 64}
    for seed in range(5):
        back = {
            returns.OWN: returned(200, 0, 1, 90, 13.0),
            "--tol 0.5": returned(100, 1, 0, 95, 40.0 + seed),
            "--tol 0.9": returned(50, 10 + seed, 2, 99, None),
            "--tol 0.05": returned(40, 0, 40, 1, None),
            "in one": returned(50, 50 if seed == 4 else 0, 0, 1, None),
            "none in one": returned(9 * (seed > 0), 0, 0, 1, None),
        }
        write(tmp_path, "premature-shadow", seed, env={"returns": back, **pixels})
        write(tmp_path, "premature-derived", seed, env=pixels, accuracy=0.99)
        write(tmp_path, "premature-fixed-0.9", seed, env=pixels, accuracy=0.98 + seed / 1000)
        write(tmp_path, "premature-fixed-0.5", seed, env=pixels, accuracy=0.98, macs=20e6)
    text = tables.page(Book(tmp_path), "haste")
    lines = [row[1:] for row in cells(text, "digits: rule")]
    assert lines[0] == ["1000", "90", "13", "995", "5", "0/200, 0/200, 0/200, 0/200, 0/200", "0.0 to 1.2", ""]
    assert lines[1][:3] == ["500", "95", "42"] and lines[1][-1] == "+1.00 [+1.00, +1.00], n = 5: not shown"
    assert lines[1][-2] == "0.3 to 2.3", "the pooled intervals overlap"
    assert lines[2] == [
        "250", "99", "", "180", "10", "10/50, 11/50, 12/50, 13/50, 14/50", "18.8 to 34.0",
        "+24.00 [+20.07, +27.93], n = 5: more",
    ]  # fmt: skip
    assert lines[3][-1] == "none came back in either" and lines[3][-2] == "0.0 to 100.0"
    assert lines[4][-2] == "15.2 to 25.5" and lines[4][-1].endswith("n = 5: not shown"), "apart, but by one run alone"
    assert lines[5][-1] == ""
    table = {row[0]: row[1:] for row in cells(text, "digits, 60")}
    assert len(table) == 3 and not [name for name in table if "shadow" in name]
    assert table["fixed tolerance 0.9"][1:3] == ["+0.80 [+0.60, +1.00], n = 5", "above"]
    assert table["fixed tolerance 0.5"][2] == "other MACs" and table["derived tolerance"][1:3] == ["", ""]


@pytest.mark.parametrize(
    ("place", "rules"),
    [
        ("queue/premature-shadow-s0", {returns.OWN: "derived", "--tol 0.5": "tol 0.5", "--tol 0.9": "tol 0.9"}),
        ("shadow/shadow-digits-s0", {returns.OWN: "derived"}),  # of version 0.1, which watched no fixed tolerance
    ],
)
def test_decisions_of_a_shadow_run_are_counted_from_its_rows(place, rules):
    folder = ROOT / "benchmarks" / "records" / place
    with gzip.open(folder / "shadow.csv.gz", "rt") as file:
        lines = list(csv.DictReader(file))
    found = returns.counted(folder)
    assert len(found) == (4 if "--tol 0.5" in rules else 1)
    zero = {structure_key(line) for line in lines if line["rule"] == "zero"}
    for name, rule in rules.items():
        own = [line for line in lines if line["rule"] == rule]
        leads = [int(r["outcome_step"]) - int(r["step"]) for r in own if r["outcome"] == "confirmed"]
        assert found[name] == dict(
            decisions=len(own),
            confirmed=len(leads),
            returned=sum(line["outcome"] == "regret" for line in own),
            open=sum(line["outcome"] not in ("confirmed", "regret") for line in own),
            zeros=len(zero),
            foreseen=sum(structure_key(line) in zero for line in own),
            lead=np.median(leads),
        )
        assert len(own) > 20
    if "--tol 0.9" in rules:
        assert found["--tol 0.9"]["returned"] > 0 == found["--tol 0.5"]["returned"]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.sampled_from((1, 2, 3)))
def test_what_structures_are_worth_is_summed_where_all_undecided_ones_are_listed(ends, every):
    """Structure i is undecided until check ends[i]; of the checks only every k-th and those with decisions are listed."""
    rows = []
    for check in range(1, 7):
        for i, end in enumerate(ends):
            if end == check or (end > check and check % every == 0):
                row = {"step": str(10 * check), "kind": "unit", "block": "b", "site": "s", "index": str(i)}
                fate = "committed" if end == check else "undecided"
                rows.append(row | {"benefit": f"{2**i}", "price": "3", "fate": fate})
    rows += [rows[0] | {"step": "70", "fate": "removed_with_block"}]  # with its block, after its decision
    found = {one["step"]: one for one in nats.summed(rows)}
    for check in range(1, 7):
        alive = [i for i, end in enumerate(ends) if end >= check]
        if not alive or (check % every and any(ends[i] != check for i in alive)):
            assert 10 * check not in found
            continue
        one = found.pop(10 * check)
        assert one["number"] == len(alive) and one["below"] == sum(i < 2 for i in alive)
        assert (one["benefit"], one["price"]) == (sum(2**i for i in alive), 3 * len(alive))
    assert not found


def test_of_many_checks_a_few_are_kept_and_the_nats_stand_in_the_table_of_resnet56(tmp_path):
    place = {"kind": "layer", "block": "b", "site": "", "index": ""}
    rows = [place | {"step": str(step), "benefit": "0.5", "price": "0.25", "fate": "undecided"} for step in range(100)]
    kept = nats.summed(rows)
    assert len(kept) == nats.MOST and kept[0]["step"] == 0 and kept[-1]["step"] == 99
    course = [{"step": 5265, "kind": "unit", "number": 8, "benefit": 1.5, "price": 0.081, "below": 2}]
    folder = write(tmp_path, "r56-paper-units", env={"nats": course})
    lines = (folder / "metrics.csv").read_text().splitlines()
    losses = [f"{line.rsplit(',', 2)[0]},{30 - i},0.5" for i, line in enumerate(lines[1:])]
    (folder / "metrics.csv").write_text("\n".join([lines[0], *losses]) + "\n")
    told = ROWS["r56-paper-units"].told
    table = tables.page(Book(tmp_path), "resnet56").split("What structures were worth")[1]
    assert cells(table, "network")[0] == [told, "15.0", "16.000", "8 units", "1.500", "0.081", "25"]
