"""Run files read back: what each function refuses in one line, and that files of earlier versions read as if written today."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path

import pytest

from catode import records
from catode.structures import fates

STRUCTURE = ("step", *records.PLACE, "keep_prob", "price")


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def write_table(path: Path, header, rows, *, packed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path = path.with_name(f"{path.name}.gz")
    with (gzip.open if packed else open)(path, "wt", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


# --- one JSON object ------------------------------------------------------------------------------------------------


def test_a_json_object_is_read_as_it_is(tmp_path):
    write_json(tmp_path / "a.json", {"accuracy": 1, "name": "ä", "rest": [1, 2]})
    assert records.read_json(tmp_path / "a.json") == {"accuracy": 1, "name": "ä", "rest": [1, 2]}
    assert records.read_json(tmp_path / "a.json", {"accuracy": float, "name": str}, {"tol": float})["name"] == "ä"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.json must hold valid JSON"),
        ("[1]", "a.json must hold a JSON object; got list"),
        ({}, "a.json must have the key 'epochs'; got none"),
        ({"epochs": None}, "a.json must have an integer at 'epochs'; got epochs=None"),
        ({"epochs": 1.5}, "a.json must have an integer at 'epochs'; got epochs=1.5"),
        ({"epochs": True}, "a.json must have an integer at 'epochs'; got epochs=True"),
        ({"epochs": 1, "tol": "much"}, "a.json must have a number at 'tol'; got tol='much'"),
        ({"epochs": 1, "tol": math.nan}, "a.json must have a number at 'tol'"),
        ({"epochs": 1, "tol": 10**400}, "a.json must have a number at 'tol'"),
        ({"epochs": 1, "shadow": 0}, "a.json must have true or false at 'shadow'; got shadow=0"),
        ({"epochs": 1, "arch": 20}, "a.json must have a string at 'arch'; got arch=20"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_one_line(tmp_path, content, message):
    write_json(tmp_path / "a.json", content)
    with pytest.raises(ValueError) as caught:
        records.read_json(tmp_path / "a.json", {"epochs": int}, {"tol": float, "shadow": bool, "arch": str})
    assert message in str(caught.value) and "\n" not in str(caught.value)


UNREADABLE = {
    "deep": b"[" * 100_000,
    "deep but whole": b'{"a":' * 500 + b"1" + b"}" * 500,
    "null": b"null",
    "a list": b"[1, 2]",
    "no UTF-8": b'{"a": "\xff"}',
    "thousands of digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a folder": None,
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_json_object_at_all_is_one_line_with_the_file(tmp_path, kind):
    if UNREADABLE[kind] is None:
        (tmp_path / "a.json").mkdir()
    else:
        (tmp_path / "a.json").write_bytes(UNREADABLE[kind])
    with pytest.raises(ValueError) as caught:
        records.read_json(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'} must ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_folder_in_place_of_a_table_is_one_line_with_its_name(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"^{tmp_path / name} must be a file that can be read; got: Is a directory"):
        records.read_table(tmp_path / "t.csv")


def test_optional_keys_may_be_missing_or_null(tmp_path):
    write_json(tmp_path / "a.json", {"tol": None})
    assert records.read_json(tmp_path / "a.json", {}, {"tol": float, "shadow": bool}) == {"tol": None}


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda folder: records.read_config(folder), "config.json"),
        (lambda folder: records.read_result(folder), "result.json"),
        (lambda folder: records.read_structures(folder), "structures.csv"),
        (lambda folder: records.read_decisions(folder), "shadow.csv"),
        (lambda folder: records.read_rows(folder / "metrics.csv"), "metrics.csv"),
    ],
)
def test_a_missing_file_is_named_with_its_folder(tmp_path, read, name):
    for folder in (tmp_path, tmp_path / "nowhere", Path(__file__)):  # the last is a file, not a folder
        with pytest.raises(FileNotFoundError) as caught:
            read(folder)
        assert str(caught.value).startswith(f"`folder` must hold {name},") and str(folder) in str(caught.value)


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_table_is_read_compressed_or_not(tmp_path, packed):
    write_table(tmp_path / "t.csv", ("a", "b"), [("1", "x, y"), ("", "z")], packed=packed)
    assert records.read_table(tmp_path / "t.csv", ("b",)) == (["a", "b"], [["1", "x, y"], ["", "z"]])
    assert records.read_rows(tmp_path / "t.csv") == [{"a": "1", "b": "x, y"}, {"a": "", "b": "z"}]
    assert records.packed(tmp_path / "t.csv").name == ("t.csv.gz" if packed else "t.csv")


def test_a_file_without_even_a_header_has_the_required_columns_and_no_rows(tmp_path):
    (tmp_path / "t.csv").write_text("")
    assert records.read_table(tmp_path / "t.csv", ("a", "b")) == (["a", "b"], [])


def test_of_both_forms_the_compressed_one_is_read(tmp_path):
    write_table(tmp_path / "t.csv", ("a",), [("plain",)])
    write_table(tmp_path / "t.csv", ("a",), [("packed",)], packed=True)
    assert records.read_rows(tmp_path / "t.csv") == [{"a": "packed"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"a,b\n1,2\n3\n", "t.csv must have 2 values in every row; row 3 has 1"),
        ("t.csv", b"b,c\n1,2\n", "t.csv must have the column 'a'; its header is b,c"),
        ("t.csv", b"a\n\xff\xfe\n", "t.csv must be a whole file"),
        ("t.csv.gz", b"no gzip", "t.csv.gz must be a whole file"),
        ("t.csv.gz", gzip.compress(b"a\n1\n", mtime=0)[:-6], "t.csv.gz must be a whole file"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        records.read_table(tmp_path / "t.csv", ("a",))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_a_table(tmp_path):
    assert records.number(tmp_path, "step", "1e-3") == 1e-3
    assert math.isnan(records.number(tmp_path, "step", "")) and math.isnan(records.number(tmp_path, "step", "None"))
    with pytest.raises(ValueError, match="must hold numbers in column 'step'; got 'ten'"):
        records.number(tmp_path / "t.csv", "step", "ten")


def test_the_key_of_a_structure_is_its_place():
    row = dict(step="1", kind="unit", block="b", site="s", index="3", keep_prob="1")
    assert records.structure_key(row) == ("unit", "b", "s", "3")


# --- config.json ----------------------------------------------------------------------------------------------------


def write_config(folder: Path, steps_per_epoch: int, epochs: int = 20, seen: int = 20, **changed) -> dict:
    config = {"epochs": epochs, "decide_until": 0.8, "memory": None, "check_every": None, "nu": 1.0} | changed
    write_json(folder / "config.json", config)
    rows = [(epoch, epoch * steps_per_epoch) for epoch in range(1, seen + 1)]
    write_table(folder / "metrics.csv", ("epoch", "step"), rows)
    return config


@pytest.mark.parametrize(
    ("steps_per_epoch", "seen", "memory"),
    [
        (22, 20, 200),  # short: the least memory
        (390, 20, 200),  # CIFAR-10: 6,240 steps of deciding, the longest for which it suffices
        (3120, 20, 800),  # eight times as long: four times the memory, as the power 2/3 of the length
        (3120, 5, 800),  # cut off: the steps of the whole run count
    ],
)
def test_a_memory_that_the_length_of_the_run_gave_is_resolved(tmp_path, steps_per_epoch, seen, memory):
    write_config(tmp_path, steps_per_epoch, seen=seen)
    config = records.read_config(tmp_path)
    assert (config["memory"], config["check_every"]) == (memory, memory // 4)


def test_a_resolved_config_is_left_as_it_is(tmp_path):
    written = write_config(tmp_path, 22, memory=300, check_every=10)
    (tmp_path / "metrics.csv").unlink()  # not needed
    assert records.read_config(tmp_path) == written | {"validation_share": 0.0}
    write_json(tmp_path / "config.json", {"nu": 0.0, "validation_share": 0.2})
    assert records.read_config(tmp_path) == {"nu": 0.0, "validation_share": 0.2}


def test_a_run_that_ended_before_its_first_epoch_has_the_least_memory(tmp_path):
    write_config(tmp_path, 22, seen=0)
    assert records.read_config(tmp_path)["memory"] == 200


# --- structures.csv -------------------------------------------------------------------------------------------------

UNITS = {
    "0": ("committed", 1.0, "committed"),
    "1": ("pruned_tolerance", 0.1, "pruned_tolerance"),
    "2": ("forced", 0.7, "kept_out_of_time"),
    "3": ("forced", 0.3, "removed_out_of_time"),
    "4": ("forced", 0.2, "kept_for_width"),
    "5": ("promoted", 0.9, "removed_with_block"),
    "6": ("undecided", 0.9, "undecided"),
    "7": ("pruned_zero", 0.0, "pruned_zero"),
}
"""Units of a run from before 0.2: index, state, theta at the end, and the fate as it is called now."""

KEPT = [0, 2, 4, 6]


def write_earlier(folder: Path, units=UNITS, kept=KEPT, *, packed: bool = False, **config) -> None:
    """A run's structures.csv of before 0.2, each unit undecided first, with structure.json unless `kept` is None."""
    rows = [(10, "unit", "b", "s", index, 0.95, 0.1, "undecided") for index in units]
    rows += [(20, "unit", "b", "s", index, theta, 0.1, state) for index, (state, theta, _) in units.items()]
    rows += [(20, "layer", "gone", "", "", 0.4, 0.1, "forced"), (20, "unit", "gone", "t", "0", 0.9, 0.1, "promoted")]
    write_table(folder / "structures.csv", (*STRUCTURE, "state"), rows, packed=packed)
    write_json(folder / "config.json", {"nu": 1.0, "round_to": 2} | config)
    if kept is not None:
        blocks = {"b": {"kept": True, "sites": {"s": kept}}, "gone": {"kept": False, "sites": {"t": []}}}
        write_json(folder / "structure.json", {"blocks": blocks})


def read_fates(folder: Path) -> dict[tuple[str, str], str]:
    """The last fate of every structure, by block and index."""
    header, rows = records.read_structures(folder)
    named = [dict(zip(header, row, strict=True)) for row in rows]
    return {(row["block"], row["index"]): row["fate"] for row in named}


@pytest.mark.parametrize("packed", [False, True])
def test_the_states_of_an_older_run_read_as_the_fates_of_today(tmp_path, packed):
    write_earlier(tmp_path, packed=packed)
    header, rows = records.read_structures(tmp_path, ("step", "keep_prob", "price"))
    assert header == [*STRUCTURE, "fate"] and len(rows) == 2 * len(UNITS) + 2
    found = read_fates(tmp_path)
    assert {index: found["b", index] for index in UNITS} == {index: fate for index, (*_, fate) in UNITS.items()}
    assert (found["gone", ""], found["gone", "0"]) == ("removed_out_of_time", "removed_with_block")
    assert {row[-1] for row in rows[: len(UNITS)]} == {"undecided"}
    assert set(found.values()) <= set(fates.FATES)


def test_with_a_target_what_stayed_was_kept_at_it(tmp_path):
    units = {
        "0": ("forced", 0.7, fates.KEPT_AT_TARGET),
        "1": ("forced", 0.3, fates.KEPT_AT_TARGET),
        "2": ("forced", 0.3, fates.REMOVED_OUT_OF_TIME),
        "3": ("committed", 0.95, fates.COMMITTED),
        "4": ("forced", 0.95, fates.COMMITTED),  # as the first versions called it, even where result.json does not
        "5": ("forced", 0.95, fates.REMOVED_OUT_OF_TIME),
    }
    for name in ("target_macs", "target_params"):
        write_earlier(tmp_path / name, units, [0, 1, 3, 4], **{name: 0.5})
        found = read_fates(tmp_path / name)
        assert {i: found["b", i] for i in units} == {i: fate for i, (*_, fate) in units.items()}
    write_earlier(tmp_path / "none", units, [0, 1, 3], target_macs=None)
    assert read_fates(tmp_path / "none")["b", "0"] == fates.KEPT_OUT_OF_TIME


@pytest.mark.parametrize("layer", [False, True])
def test_where_all_that_was_undecided_stayed_it_is_called_so(tmp_path, layer):
    """With no groups to wait for, nothing else stays with a theta below 1/2; a layer never waits for one."""
    units = {"0": ("forced", 0.0, ""), "1": ("forced", 0.7, ""), "2": ("committed", 1.0, "")}
    rows = [(20, "unit", "b", "s", index, theta, 0.1, state) for index, (state, theta, _) in units.items()]
    rows += [(20, "layer", "b", "", "", 0.2 if layer else 0.6, 0.1, "forced")]
    rows += [(10, "unit", "b", "s", "3", 0.3, 0.1, "forced")] if layer else []  # by a group, at a check before
    write_table(tmp_path / "structures.csv", (*STRUCTURE, "state"), rows)
    write_json(tmp_path / "config.json", {"round_to": 4 if layer else 1})
    blocks = {"b": {"kept": True, "sites": {"s": [0, 1, 2, 3]}}}
    write_json(tmp_path / "structure.json", {"blocks": blocks})
    expected = {"0": fates.KEPT_AS_LAST, "1": fates.KEPT_AS_LAST, "2": fates.COMMITTED, "": fates.KEPT_AS_LAST}
    expected |= {"3": fates.KEPT_FOR_WIDTH} if layer else {}
    assert {index: fate for (_, index), fate in read_fates(tmp_path).items()} == expected
    write_json(tmp_path / "result.json", {"decisions": {"committed": 1, "forced": len(rows) - 1}})
    assert sum(records.read_result(tmp_path)["decisions"].values()) == len(rows)


def test_without_structure_json_theta_tells_what_was_kept(tmp_path):
    units = {"0": ("forced", 0.5, fates.KEPT_OUT_OF_TIME), "1": ("forced", 0.49, fates.REMOVED_OUT_OF_TIME)}
    write_earlier(tmp_path, units, None)
    found = read_fates(tmp_path)
    assert {i: found["b", i] for i in units} == {i: fate for i, (*_, fate) in units.items()}
    (tmp_path / "config.json").unlink()  # without it the run is taken for one without a target
    assert read_fates(tmp_path)["b", "0"] == fates.KEPT_OUT_OF_TIME


def test_todays_fates_are_read_unchanged(tmp_path):
    rows = [(20, "unit", "b", "s", str(i), 0.5, 0.1, fate) for i, fate in enumerate(fates.FATES)]
    write_table(tmp_path / "structures.csv", (*STRUCTURE, "fate"), rows)
    assert [row[-1] for row in records.read_structures(tmp_path)[1]] == list(fates.FATES)


def test_an_ungated_run_has_no_structures(tmp_path):
    (tmp_path / "structures.csv").write_text("")
    assert records.read_structures(tmp_path, ("price",)) == ([*records.PLACE, "price", "fate"], [])


@pytest.mark.parametrize(
    ("header", "state", "message"),
    [
        ((*STRUCTURE, "fate"), "forced", "in column 'fate'; got 'forced'"),  # an old name under the new one's column
        ((*STRUCTURE, "state"), "kept", "in column 'fate'; got 'kept'"),
        ((*STRUCTURE, "end"), "committed", "structures.csv must have the column 'fate'"),
        (("step", "kind", "block", "site", "number", "keep_prob", "price", "fate"), "committed", "the column 'index'"),
        (("step", *records.PLACE, "theta", "price", "fate"), "committed", "the column 'keep_prob'"),
    ],
)
def test_a_wrong_structures_csv_is_one_line(tmp_path, header, state, message):
    write_table(tmp_path / "structures.csv", header, [(20, "unit", "b", "s", "0", 0.5, 0.1, state)])
    with pytest.raises(ValueError) as caught:
        records.read_structures(tmp_path, ("keep_prob",))
    assert message in str(caught.value) and "structures.csv" in str(caught.value) and "\n" not in str(caught.value)


# --- result.json and shadow.csv -------------------------------------------------------------------------------------


def test_the_decisions_of_an_older_result_are_counted_by_todays_fates(tmp_path):
    write_earlier(tmp_path)
    counts = {"committed": 1, "forced": 4, "promoted": 2, "pruned_tolerance": 1, "pruned_zero": 1, "undecided": 1}
    write_json(tmp_path / "result.json", {"accuracy": 0.5, "decisions": counts})
    result = records.read_result(tmp_path, {"test_accuracy": float})
    assert result["test_accuracy"] == 0.5 and "accuracy" not in result
    assert result["decisions"] == {
        "committed": 1,
        "kept_for_width": 1,
        "kept_out_of_time": 1,
        "pruned_tolerance": 1,
        "pruned_zero": 1,
        "removed_out_of_time": 2,
        "removed_with_block": 2,
        "undecided": 1,
    }
    assert sum(result["decisions"].values()) == sum(counts.values())


@pytest.mark.parametrize("decisions", [None, {}, {"committed": 3, "kept_at_target": 2}])
def test_todays_result_needs_no_other_file(tmp_path, decisions):
    write_json(tmp_path / "result.json", {"accuracy": 0.5, "decisions": decisions})
    assert records.read_result(tmp_path)["decisions"] == decisions


def test_an_older_shadow_csv_reads_as_todays(tmp_path):
    outcomes = ("confirmed", "promoted", "regret", "undecided")
    rows = [("derived", "unit", "b", "s", str(i), outcome) for i, outcome in enumerate(outcomes)]
    write_table(tmp_path / "shadow.csv", ("rule", *records.PLACE, "outcome"), rows)
    found = records.read_decisions(tmp_path, ("rule", "outcome"))
    assert [row["outcome"] for row in found] == ["confirmed", fates.REMOVED_WITH_BLOCK, "regret", "undecided"]
    with pytest.raises(ValueError, match="must have the column 'escape'"):
        records.read_decisions(tmp_path, ("escape",))


def test_the_committed_records_are_read_with_known_fates_alone():
    folder = Path(__file__).parent.parent / "benchmarks" / "records"
    runs = sorted(path.parent for path in folder.rglob("result.json"))
    runs = [run for run in runs if not (run / "parts.csv").exists()]  # condensed otherwise, see benchmarks/anymodel
    assert len(runs) >= 29
    for run in runs:
        config, result = records.read_config(run), records.read_result(run)
        assert config.get("memory", 0) is not None and config.get("check_every", 0) is not None
        decisions = result.get("decisions") or {}
        assert set(decisions) <= set(fates.FATES)
        plain = records.read_json(run / "result.json").get("decisions") or {}
        assert sum(decisions.values()) == sum(plain.values()), run
        header, rows = records.read_structures(run)
        assert {row[header.index("fate")] for row in rows} <= set(fates.FATES)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, "many", True, [[1]]])
@pytest.mark.parametrize("name", ["params", "macs_dense", "seconds", "validation_accuracy_history"])
def test_a_result_that_is_no_number_is_refused_by_name(tmp_path, name, value):
    if name.endswith("history") and value == [1, 2]:
        value = [1, "two"]
    result = {
        "test_accuracy": 0.5,
        "params": 10,
        "decisions": {"committed": 1},
        "warnings": ["one"],
        "decided_by_rule": None,
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert records.read_result(tmp_path) == result
    (tmp_path / "result.json").write_text(json.dumps({**result, name: value}))
    with pytest.raises(ValueError, match=rf"result\.json must have numbers at {name!r}; got [^\n]*\. Restore the file"):
        records.read_result(tmp_path)
