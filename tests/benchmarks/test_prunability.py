"""A sample of the models of `python -m benchmarks.prunability`: found, verified, counted."""

from __future__ import annotations

import importlib.util
import json

import pytest

from benchmarks.prunability import __main__ as prunability
from benchmarks.prunability import rival
from benchmarks.prunability.models import LISTS, models

SAMPLE = {  # list, model: widths, units, branches
    ("torchvision", "squeezenet1_1"): (25, 2944, 0),
    ("torchvision", "shufflenet_v2_x0_5"): (18, 1912, 0),
    ("torchvision", "mnasnet0_5"): (20, 5520, 10),
    ("torchvision", "resnet18"): (8, 1920, 8),
    ("timm", "test_vit"): (12, 1164, 12),
    ("timm", "test_efficientnet"): None,
    ("timm", "test_nfnet"): None,
    ("hf", "llama"): (4, 196, 4),
    ("hf", "gpt2"): (4, 392, 4),
    ("hf", "swin"): (8, 396, 4),
}


@pytest.mark.parametrize(("which", "name"), SAMPLE)
def test_a_sample_is_described_verified_and_counted(which, name):
    if which == "hf" and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    model = next(model for model in models(which) if model.name == name)
    record = prunability.measured(model, vertices=2, alone=2)
    assert prunability.is_verified(record), record
    assert record["counts"] is True
    if SAMPLE[which, name] is not None:
        assert (record["widths"], record["units"], record["branches"]) == SAMPLE[which, name]


def test_what_is_wrong_counts_as_not_verified_and_is_told():
    good = {"model": "a", "parameters": 10**6, "deviation": 1e-9, "counts": True, "branches": 1, "seconds": 1.0}
    wrong = [{**good, "deviation": 0.1}, {**good, "idle": ["x"]}, {"model": "b", "parameters": 1, "error": "no"}]
    assert prunability.is_verified(good) and not any(map(prunability.is_verified, wrong))
    rivals = {"a": {"parameters": 10, "left": 4}, "b": {"error": "stuck"}}
    said = prunability.summary([good, wrong[2]], rivals)
    assert said.startswith(
        "2 models: 1 described, 1 of them with branches that can go, 1 verified to 0.0001, 1 with exact"
    )
    assert said.endswith("Torch-Pruning leaves 1 of 2 running.")
    cells = dict(zip(prunability.HEADER, prunability.row(wrong[1], rivals), strict=True))
    assert (cells["Torch-Pruning"], cells["counts"], cells["remark"]) == ("runs", "exact", "gates without effect: x")
    assert prunability.row(wrong[2], rivals)[-1] == "no"


def test_every_list_has_its_models():
    assert len(models("torchvision")) == 80 and len(models("timm")) == 98
    assert LISTS == ("torchvision", "timm", "hf")


def test_the_rival_takes_what_runs_with_fewer_parameters(tmp_path):
    for name, record in {"a": {"parameters": 10, "left": 4}, "b": {"parameters": 10, "left": 10}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    found = rival.records(tmp_path)
    assert [name for name in found if rival.takes(found[name])] == ["a"]
    assert not rival.takes({"error": "not done in 1 s"})


@pytest.mark.parametrize("which", LISTS)
def test_the_tables_are_those_of_the_committed_records(which):
    found = [json.loads(path.read_text()) for path in (prunability.RECORDS / which).glob("*.json")]
    table = prunability.HOME / "results" / f"prunability{'' if which == LISTS[0] else f'_{which}'}.md"
    assert table.read_text().startswith(prunability.summary(found, rival.records() if which == LISTS[0] else {}))
