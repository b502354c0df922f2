"""Settings of the data and the network of a run."""

from __future__ import annotations

from dataclasses import dataclass

from catode.train.models import sources
from catode.train.models.catalogue import ARCHITECTURES, SHORTCUTS, STEMS
from catode.train.settings.setting import ConfigError, SettingsGroup, helpers

number, text, switch = helpers("data")


def _is_foreign(value: object) -> bool:
    """Whether a value has the form of a network that is not the trainer's own; a wrong form is refused."""
    return sources.is_foreign(value) and sources.parse(value).kind != "own"


@dataclass(frozen=True, kw_only=True)
class DataSettings(SettingsGroup):
    """Data set and network."""

    dataset: str = text(
        "digits",
        "data set: digits ships with scikit-learn; cifar10 and cifar100 are the official python files; "
        "folder is train/<class>/... and test/ or val/ next to it; with both, val/ is for validation",
        choices=("digits", "cifar10", "cifar100", "folder"),
        identity=False,
    )
    data_dir: str | None = text(
        None,
        "folder that holds the data; needed for every data set but digits",
        optional=True,
        identity=False,
        hint="Give the folder that holds the data.",
    )
    validation_share: float = number(
        0.1,
        float,
        "share of the training images of every class that is held out for validation: what is shown and chosen while training is "
        "measured on it, and the test images are read once, at the end; a folder with both test/ and val/ has these images in "
        "val/; 0 trains on all images and measures nothing on others until the end",
        low=0,
        high=0.5,
        hint="Use 0.1 if in doubt, 0 for none.",
    )
    split_seed: int = number(
        0,
        int,
        "seed of the choice of the validation images; the same for all runs that are compared, whatever their --seed",
        low=0,
        high=2**32 - 1,
        hint="Leave it out for the usual split.",
    )
    image_size: int | None = number(
        None,
        int,
        "resize the images to this many pixels a side; of a folder the shorter side, and the centre is cropped; needed if images "
        "differ in size",
        low=4,
        optional=True,
        hint="Use the side in pixels, such as 64.",
    )
    download: bool = switch(
        False,
        "for cifar10 and cifar100: download the official archive into --data-dir if the data are missing, resuming a "
        "partial download; its checksum is verified",
        identity=False,
    )
    array_gib: float | None = number(
        None,
        float,
        "for folder: if the decoded images take more GiB than this, worker processes decode them at every use instead of keeping "
        "them in memory; training images for resized-crop to --image-size always are; default: a quarter of the memory",
        low=0,
        optional=True,
        identity=False,
        hint="Leave it out for a quarter of the memory.",
    )
    workers: int | None = number(
        None,
        int,
        "for folder: worker processes that decode images ahead, 0 to decode in the main process; results do not depend on "
        "it; default: one for each core",
        low=0,
        high=1024,
        optional=True,
        identity=False,
        hint="Leave it out for one for each core.",
    )
    arch: str = text(
        "resnet20",
        "residual network, of those for CIFAR (resnet14, a shallow baseline, to resnet110) or for ImageNet (resnet18, 34, 50 "
        "and 101); or torchvision:NAME, timm:NAME, or FILE.py:FUNCTION, which runs the file's code and calls its function with "
        "those of classes, in_channels and image_size that it has parameters for; arguments may follow, as in "
        "'timm:vit_tiny_patch16_224(patch_size=4, depth=6)'",
        choices=tuple(ARCHITECTURES),
        besides=_is_foreign,
        forms=sources.FORMS,
        identity=False,
    )
    shortcut: str | None = text(
        "A",
        "shortcut where the shape changes: A pads with zeros and strides, B is a 1x1 convolution with batch norm",
        choices=SHORTCUTS,
        optional=True,
    )
    stem: str | None = text(
        "cifar",
        "first layers: cifar is a 3x3 convolution at full resolution; imagenet is a 7x7 convolution of stride 2 and a "
        "max-pooling of stride 2, which leave a sixteenth of the pixels",
        choices=STEMS,
        optional=True,
    )
    init: str | None = text(
        None,
        "file of initial weights, saved by torch.save: a state dict of this network, such as torchvision's; a classifier for "
        "another number of classes is not loaded",
        optional=True,
        path=True,
        hint="Give a file of weights, or leave it out for random ones.",
    )
    hidden_scale: float = number(
        1.0,
        float,
        "scale of the hidden width of every block, for a narrow baseline",
        low=0,
        high=1,
        low_open=True,
        hint="Use 1 for the full width.",
    )

    def check(self) -> None:
        if self.dataset == "digits" and self.data_dir is not None:
            raise ConfigError(
                f"`data_dir` must be left out for dataset='digits', which needs no files; got data_dir={self.data_dir!r}. "
                "Leave it out, or choose another --dataset."
            )
        if self.dataset != "digits" and self.data_dir is None:
            raise ConfigError(
                f"`data_dir` must be given for dataset={self.dataset!r}; got data_dir=None. "
                "Add --data-dir with the folder that holds the data."
            )
        if self.download and self.dataset not in ("cifar10", "cifar100"):
            raise ConfigError(
                f"`download` must be left out unless dataset is cifar10 or cifar100; got download=True with "
                f"dataset={self.dataset!r}. Leave it out."
            )
        if sources.is_foreign(self.arch):
            for name, unset in (("shortcut", None), ("stem", None), ("hidden_scale", 1.0)):
                if getattr(self, name) != unset:
                    raise ConfigError(
                        f"`{name}` must be left out with a network that is not the trainer's own; got "
                        f"{name}={getattr(self, name)!r} with arch={self.arch!r}. Leave it out."
                    )
        for name in ("array_gib", "workers"):
            if self.dataset != "folder" and getattr(self, name) is not None:
                raise ConfigError(
                    f"`{name}` must be left out unless dataset='folder'; got {name}={getattr(self, name):g} with "
                    f"dataset={self.dataset!r}. Leave it out."
                )
