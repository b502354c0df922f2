"""Which copy of a data set a record was made with, identified by its pixels.

    python -m benchmarks.copies --dataset cifar10 --data-dir DIR [--records FOLDER ...]

Prints the fingerprint of the images there and the name of that copy; with `--records` it is also written to the env.json of
these records. Copies of one data set that went through a lossy format give other accuracies than the original. The pixels of a
JPEG depend on its decoder, too: the fingerprints here are those of Pillow with libjpeg-turbo.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import guarded
from catode import _checksums
from catode.records import read_json
from catode.train import data
from catode.train.data.images import pixel_fingerprint
from catode.train.loop import checkpoint
from catode.train.settings.commandline import CommandLine

MOST_IMAGES = 200_000
"""Larger data sets get no fingerprint: all images would have to be decoded."""
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
OWN = ("digits",)
"""Data sets that a dependency ships, of which there are no copies."""


@dataclass(frozen=True)
class Copy:
    """A known copy of a data set.

    Attributes:
        name: Name in tables.
        note: One sentence printed beside every table with it.
    """

    name: str
    note: str


KNOWN = {
    "0b16fb1db97c94813457ecde0b4dc02aeb45e0c746b4c898f717206c9baa5184": Copy(
        "CIFAR-10, JPEG copy",
        "its images were once saved as JPEG (quality 75, colours subsampled), so accuracies are lower than on the official "
        "files and must not be set beside published ones.",
    ),
    "babffdc1b769135b46d81367934c24e61d05ec578b0ca451f2d43bd6bd5e9c8d": Copy(
        "Tiny-ImageNet, subset",
        "200 training and 25 test images of each of the 200 classes, a fixed random choice of the original 64 x 64 files, so "
        "accuracies must not be set beside published ones.",
    ),
}
"""Copies by `catode.train.data.images.pixel_fingerprint`."""


def fingerprint(images: data.ImageData) -> str | None:
    """The fingerprint of the pixels; None of data sets with more than `MOST_IMAGES` images."""
    number = (
        len(images.train_labels) + len(images.test_labels) + (len(images.validation_labels) if images.validated else 0)
    )
    return pixel_fingerprint(images) if number <= MOST_IMAGES else None


def plain_name(dataset: str, data_dir: str | None) -> str:
    """The name of a data set as a setting; images in class folders go by the name of theirs."""
    return Path(data_dir or dataset).name if dataset == "folder" else dataset


def name(dataset: str, data_dir: str | None, pixels: str | None) -> str:
    """Name of the data in tables.

    Args:
        dataset: Name of the data set as a setting.
        data_dir: Its folder.
        pixels: Their fingerprint, if it is known.
    """
    if dataset in OWN:
        return dataset
    if pixels in KNOWN:
        return KNOWN[pixels].name
    plain = plain_name(dataset, data_dir)
    return f"{DATASETS.get(plain, plain)}, unknown copy"


def name_of(config: Mapping[str, Any], env: Mapping[str, Any]) -> str:
    """The same of a run, from its config.json and env.json."""
    return name(config["dataset"], config["data_dir"], env.get("pixels"))


def notes(names: Iterable[str]) -> list[str]:
    """A Markdown list with one sentence for each known copy among the names, in their order."""
    told = {copy.name: copy.note for copy in KNOWN.values()}
    return [f"- {each}: {told[each]}" for each in dict.fromkeys(names) if each in told]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.copies", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", help="digits, cifar10, cifar100 or folder")
    parser.add_argument("--data-dir", help="folder that holds the data")
    parser.add_argument("--image-size", type=int, help="for folder: side to which images are resized and cropped")
    parser.add_argument("--records", type=Path, nargs="+", default=[], help="records made with these images")
    args = parser.parse_args(argv)
    envs = {}
    for folder in args.records:
        config, envs[folder] = (read_json(folder / f"{each}.json") for each in ("config", "env"))
        there, own = plain_name(config["dataset"], config["data_dir"]), plain_name(args.dataset, args.data_dir)
        if there != own:
            raise ValueError(f"`records` must be of {own}; got {str(folder)!r} of {there}. Leave it out.")
    pixels = fingerprint(data.load(args.dataset, args.data_dir, image_size=args.image_size))
    for folder, env in envs.items():
        (folder / "env.json").write_text(json.dumps(env | {"pixels": pixels}, indent=2) + "\n")
        if (folder / _checksums.FILE).exists():
            checkpoint.seal(folder, "env.json")
        print(f"written: {folder / 'env.json'}", file=sys.stderr)
    print(f"{pixels}  {name(args.dataset, args.data_dir, pixels)}")


if __name__ == "__main__":
    guarded(main)
