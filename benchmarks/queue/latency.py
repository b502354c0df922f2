"""Latencies of all final networks in one sitting: one memory format, one thread, each in turn with its whole network.

What a run measures at its end is measured beside other runs, and not in the same memory format for all kinds of rows. Networks are
built anew from the records: latency does not depend on the values of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cifar import Record
from benchmarks.common import hardware, load
from benchmarks.queue.book import Book
from benchmarks.queue.rows import ROWS
from catode.prune.describe.costs import count
from catode.prune.devices.timing import latency_ms
from catode.prune.gated import cut
from catode.records import read_json
from catode.train.models import build
from catode.train.models.resnets import PadShortcut

FILE = "latency.json"
IMAGES = 128
SECONDS = 10.0
TABLES = ("headline", "parts", "resnet56")
"""Tables that show latencies."""


def network(record: Record, structure: Mapping[str, Any] | None) -> nn.Module:
    """A network of the size that a run ended with; its weights are drawn at random.

    Args:
        record: The run.
        structure: Its structure.json; None if the record has the widths of all convolutions.

    Raises:
        ValueError: if its MACs are not those of the record.
    """
    model = build(record.config["arch"], in_channels=3, classes=10)
    if structure is not None:
        cut.restrict(model, model.structures(), structure["blocks"])
    else:
        _resize(model, record.env["widths"])
    macs = count(model, torch.zeros(1, 3, 32, 32)).macs
    if macs != record.result["macs"]:
        raise ValueError(
            f"`record` must hold what its network is made of; got {record.result['macs']} MACs, not {macs}."
        )
    return model


def _resize(model: nn.Module, widths: Mapping[str, list[int]]) -> None:
    """Give every convolution, and the batch norm behind it, its output and input channels."""
    for path, (outputs, inputs) in widths.items():
        whole = model.get_submodule(path)
        made = nn.Conv2d(inputs, outputs, whole.kernel_size, whole.stride, whole.padding, bias=whole.bias is not None)
        model.set_submodule(path, made)
        head, _, name = path.rpartition(".")
        model.set_submodule(f"{head}.{name}".strip(".").replace("conv", "bn"), nn.BatchNorm2d(outputs))
    model.fc = nn.Linear(outputs, model.fc.out_features)
    for block in model.modules():
        if isinstance(getattr(block, "downsample", None), PadShortcut):
            block.downsample.channels = block.conv2.out_channels - block.conv1.in_channels


def measure(records: Path, seconds: float = SECONDS) -> dict[str, Any]:
    """Time all finished networks of `TABLES` against whole ones.

    Args:
        records: Folder of the records.
        seconds: Time for each pair.

    Returns:
        What `FILE` holds: the `machine`, its `load` at both ends, and in `runs` the milliseconds of the whole network and of the
        run's own.
    """
    book, runs, before = Book(records), {}, load()
    torch.set_num_threads(1)
    for row in (row for row in ROWS.values() if row.table in TABLES):
        for seed, record in book.results(row.name).items():
            structure = None if "widths" in record.env else book.structure(row.run(seed))
            pair = [build(record.config["arch"], in_channels=3, classes=10), network(record, structure)]
            pair = [model.to(memory_format=torch.channels_last) for model in pair]
            example = torch.zeros(1, 3, 32, 32)
            runs[row.run(seed)] = [
                round(ms, 3) for ms in latency_ms(pair, example, batches=(IMAGES,), seconds=seconds)[0]
            ]
    return {"machine": hardware(), "load": [before, load()], "images": IMAGES, "runs": runs}


def write(records: Path, seconds: float = SECONDS) -> Path:
    """Measure, and write `FILE` into the folder of the records."""
    found = measure(records, seconds)
    if not found["runs"]:
        raise ValueError(
            f"`to` must hold a finished run of {', '.join(TABLES)}; got none in {records}. Make one first."
        )
    (records / FILE).write_text(json.dumps(found, indent=1) + "\n")
    return records / FILE


def read(records: Path) -> dict[str, Any]:
    """`FILE`; without `runs` where nothing was measured yet."""
    return read_json(records / FILE) if (records / FILE).exists() else {"runs": {}}
