"""The one configuration of a run, from which flags, help, ranges, presets, run identity and `config.json` derive.

To add a setting, add one field to `Config`; to tune one, edit `PRESETS`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catode import _validate
from catode.train.models.catalogue import ARCHITECTURES, SHORTCUTS, STEMS

__all__ = ["GROUPS", "PRESETS", "Config", "ConfigError", "check_device", "check_out", "nearest"]

_REAL_IMAGES: dict[str, Any] = dict(
    nu=1.2, epochs=20, batch_size=128, lr=0.1, weight_decay=5e-4, warmup_epochs=5.0, probe_size=8
)
_IMAGENET_NETS = [name for name, architecture in ARCHITECTURES.items() if architecture.stem == "imagenet"]
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    **{("*", name): dict(shortcut=own.shortcut, stem=own.stem) for name, own in ARCHITECTURES.items()},
    ("digits", "*"): dict(
        augment="shift",
        nu=3.0,
        alpha=0.75,
        memory=400,
        epochs=60,
        batch_size=64,
        lr=0.1,
        weight_decay=5e-4,
        warmup_epochs=5.0,
        probe_size=32,
        layers_per_probe=3,
        measure_every=4,
        check_every=10,
        width_multiple=1,
    ),
    ("cifar10", "*"): {**_REAL_IMAGES, "nu": 2.4},
    ("cifar100", "*"): {**_REAL_IMAGES, "nu": 2.4},
    ("folder", "*"): _REAL_IMAGES,
    **{
        ("folder", name): dict(nu=0.24, beta=0.5, epochs=90, batch_size=256, weight_decay=1e-4, probe_size=None)
        for name in _IMAGENET_NETS
    },
}
"""Values by (data set, architecture) in place of the field defaults.

`*` holds for every data set or architecture; what holds for the data set goes over what holds for the architecture, and
an exact entry over both.
"""

READ_EVERY = 10  # steps on an accelerator
LEAST = 1e-20  # size of a number that is not 0

GROUPS = {  # of `--help`, in this order
    "data": "data and network",
    "pruning": "what is pruned, and when",
    "gates": "gates and measuring",
    "training": "training",
    "run": "the run",
}


class ConfigError(ValueError):
    """A setting that cannot be used; one line: argument, constraint, value, hint."""


@dataclass(frozen=True)
class Setting:
    """What is known of one field of `Config` beside its default.

    Args:
        kind: `float`, `int`, `bool` or `str`.
        help: Text for `--help`.
        group: Heading in `--help`, a key of `GROUPS`.
        choices: Admitted values; empty for no such list.
        low: Lower end of the range.
        high: Upper end of the range.
        low_open: The lower end is not in the range.
        high_open: The upper end is not in the range.
        optional: None is admitted.
        identity: The setting changes what is computed and so enters the name of the run.
        negatable: A boolean also gets a flag `--no-...`.
        hint: What to do instead of a wrong value.
    """

    kind: type
    help: str
    group: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    optional: bool = False
    identity: bool = True
    negatable: bool = False
    hint: str | None = None

    @property
    def range(self) -> str:
        """The admitted numbers in words; empty for anything but a number."""
        if self.kind not in (int, float) or (self.low == -math.inf and self.high == math.inf):
            return ""
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        if self.kind is int:
            return f"in [{self.low}, {self.high}]"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"

    def check(self, name: str, value: Any) -> Any:
        """Return the converted value.

        Raises:
            ValueError: if it is not admitted.
        """
        if value is None and self.optional:
            return None
        if self.choices:
            return _validate.check_choice(name, value, self.choices, hint=_suggest(value, self.choices))
        if self.kind is bool:
            return _validate.check_bool(name, value, hint=self.hint or "Use one of the two.")
        if self.kind is str:
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if not isinstance(value, str) or not value:
                _validate.fail(name, "be a non-empty text", value, hint=self.hint)
            return value
        if self.kind is int:
            value = _validate.check_int(name, value, hint=self.hint)
        else:
            value = _validate.check_real(name, value, hint=self.hint)
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        if not (above and below):
            verb = "lie" if self.range.startswith("in ") else "be"
            shown = int(value) if value == int(value) else value
            _validate.fail(name, f"{verb} {self.range}", shown, hint=self.hint)
        if 0 < abs(value) < LEAST:
            _validate.fail(name, f"be 0 or at least {LEAST:g} in size, or quotients overflow", value, hint=self.hint)
        return value


def nearest(value: Any, names: Iterable[str]) -> str | None:
    """The one of `names` most like `value`, if any is; of several, that which begins like it."""
    value = str(value).lower()
    near = difflib.get_close_matches(value, names, n=5, cutoff=0.6)
    return max(
        near,
        key=lambda name: (
            difflib.SequenceMatcher(None, name, value).ratio(),
            len(os.path.commonprefix([name, value])),
        ),
        default=None,
    )


def _suggest(value: Any, choices: Iterable[str]) -> str:
    """The sentence that points to the nearest of `choices`."""
    near = nearest(value, choices)
    return f"Did you mean {near!r}?" if near else "Use one of these names."


def _number(default: Any, kind: type, group: str, help: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"setting": Setting(kind, help, group, **more)})


def _text(default: Any, group: str, help: str, **more: Any) -> Any:
    return _number(default, str, group, help, **more)


def _switch(default: bool, group: str, help: str, **more: Any) -> Any:
    return _number(default, bool, group, help, **more)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run, checked and resolved.

    Built directly, a field that is not given takes its own default; `Config.from_presets` and `parse` put the preset of
    the data set and architecture over it. `derive_tol`, `read_every` and `out` are resolved on construction: give
    `out=None` to `dataclasses.replace` for a folder named anew.

    Raises:
        ConfigError: if a value is not admitted, or two values do not go together.
    """

    dataset: str = _text(
        "digits",
        "data",
        "images to learn: digits ships with scikit-learn; cifar10 and cifar100 are the official python files; "
        "folder is train/<class>/... with test/ or val/ beside it",
        choices=("digits", "cifar10", "cifar100", "folder"),
        identity=False,
    )
    data_dir: str | None = _text(
        None,
        "data",
        "folder that holds the data; needed for every data set but digits",
        optional=True,
        identity=False,
        hint="Give the folder that holds the data.",
    )
    image_size: int | None = _number(
        None,
        int,
        "data",
        "for folder: resize the shorter side to this many pixels and crop the centre; needed where images differ in size",
        low=4,
        optional=True,
        hint="Use the side in pixels, such as 64.",
    )
    download: bool = _switch(
        False,
        "data",
        "for cifar10 and cifar100: fetch the official archive into --data-dir if the data are not there, going on with what "
        "an earlier try left; its checksum is compared",
        identity=False,
    )
    array_gib: float | None = _number(
        None,
        float,
        "data",
        "for folder: images that take more GiB than this when decoded are not kept in memory but decoded by worker processes "
        "at every use, as training images for resized-crop to --image-size always are; without it a quarter of the memory",
        low=0,
        optional=True,
        identity=False,
        hint="Leave it out for a quarter of the memory.",
    )
    workers: int | None = _number(
        None,
        int,
        "data",
        "for folder: processes that decode images ahead of the step, 0 to decode in between; no result depends on it; "
        "without it one for each core",
        low=0,
        optional=True,
        identity=False,
        hint="Leave it out for one for each core.",
    )
    arch: str = _text(
        "resnet20",
        "data",
        "residual network, of those for CIFAR (resnet14, a shortened rival, to resnet110) or for ImageNet (resnet18, 34, 50 "
        "and 101)",
        choices=tuple(ARCHITECTURES),
        identity=False,
    )
    shortcut: str = _text(
        "A",
        "data",
        "shortcut where the shape changes: A pads with zeros and strides, B is a 1x1 convolution with batch norm",
        choices=SHORTCUTS,
    )
    stem: str = _text(
        "cifar",
        "data",
        "how the network begins: cifar with a 3x3 convolution at full resolution; imagenet with a 7x7 one of stride 2 and a "
        "maximum of stride 2, a sixteenth of the pixels",
        choices=STEMS,
    )
    init: str | None = _text(
        None,
        "data",
        "file of weights to start from, saved by torch.save: a state dict of this network, such as torchvision's; a "
        "classifier for another number of classes is left fresh",
        optional=True,
        hint="Give a file of weights, or leave it out for random ones.",
    )
    hidden_scale: float = _number(
        1.0,
        float,
        "data",
        "scale of the hidden width of every block, for a narrowed rival",
        low=0,
        high=1,
        low_open=True,
        hint="Use 1 for the full width.",
    )

    nu: float = _number(
        0.1,
        float,
        "pruning",
        "price of the network's whole expected complexity, nats; larger prunes more, 0 is the ungated network",
        low=0,
        hint="Use 0 for the ungated network.",
    )
    alpha: float = _number(
        0.5,
        float,
        "pruning",
        "share of the price that layers carry, the rest is on units; 0 leaves layers ungated, 1 units",
        low=0,
        high=1,
        hint="Use 0.5 to price units and layers alike.",
    )
    beta: float = _number(
        0.0,
        float,
        "pruning",
        "weight of parameters against MACs in the complexity",
        low=0,
        high=1,
        hint="Use 0 to price MACs alone.",
    )
    cost: str = _text(
        "macs",
        "pruning",
        "what the complexity counts beside parameters: macs, or latency, the time of a training step in each layer measured "
        "on this device before the run and kept in latency_table.csv",
        choices=("macs", "latency"),
    )
    risk: float = _number(
        0.05,
        float,
        "pruning",
        "aimed-at share of removals that would have recovered by themselves; several limits use it, each as if alone",
        low=0,
        high=0.5,
        low_open=True,
        high_open=True,
        hint="Use 0.05 if in doubt.",
    )
    derive_tol: bool = _switch(
        False,
        "pruning",
        "derive the tolerance of each structure from measured quantities; so it is unless --tol is given",
    )
    tol: float | None = _number(
        None,
        float,
        "pruning",
        "one fixed tolerance on the keep probability instead of the derived ones",
        low=0,
        high=1,
        optional=True,
        hint="Leave it out to derive tolerances.",
    )
    target_macs: float | None = _number(
        None,
        float,
        "pruning",
        "share of the MACs to end at; sets nu while training",
        low=0,
        high=1,
        low_open=True,
        high_open=True,
        optional=True,
        hint="Use 0.5 for half of them, or leave it out to set --nu.",
    )
    target_params: float | None = _number(
        None,
        float,
        "pruning",
        "share of the parameters to end at; sets nu while training",
        low=0,
        high=1,
        low_open=True,
        high_open=True,
        optional=True,
        hint="Use 0.5 for half of them, or leave it out to set --nu.",
    )
    initial_keep_prob: float = _number(
        1.0,
        float,
        "pruning",
        "keep probability of every structure at the start",
        low=0,
        high=1,
        low_open=True,
        hint="Use 1 to start from the full network.",
    )
    warmup_epochs: float = _number(
        0.0,
        float,
        "pruning",
        "epochs before any keep probability moves; a preset's value shrinks with --epochs",
        low=0,
        hint="Use 0 for no warm-up.",
    )
    decide_until: float = _number(
        0.8,
        float,
        "pruning",
        "share of the run in which structures are decided by rule; what is undecided then is forced to the nearer state",
        low=0,
        high=1,
        low_open=True,
        hint="Use 0.8 if in doubt.",
    )
    rate_ratio: float | None = _number(
        None,
        float,
        "pruning",
        "speed of every theta, 1/time: a useless structure sinks from 1 to 0 within 1/rate_ratio of ODE time; the effective "
        "rate ratio of a structure is rate_ratio/price at the start; without it 1/(sink_share x ODE time of the run)",
        low=0,
        low_open=True,
        optional=True,
        hint="Leave it out to derive it from sink_share.",
    )
    sink_share: float = _number(
        0.1,
        float,
        "pruning",
        "share of the run's ODE time in which a useless structure sinks from 1 to 0; not used with --rate-ratio",
        low=0,
        high=1,
        low_open=True,
        hint="Use 0.1 if in doubt.",
    )

    prior: str = _text(
        "flattening",
        "pruning",
        "prior of the gates: the flattening hyper-prior, or a rival of it to compare with, which needs --tol: a fixed "
        "Bernoulli prior, or thetas that are sigmoids as in hard-concrete L0 gates",
        choices=("flattening", "bernoulli", "concrete"),
    )
    shadow: bool = _switch(
        False,
        "pruning",
        "decide, but remove nothing before its theta is 0: shadow.csv then tells what the tolerances and other rules would "
        "have removed and what became of it (python -m catode.report.compare)",
    )
    round_to: int = _number(
        1,
        int,
        "pruning",
        "make the final width of every pruned site a multiple of this: units leave in whole groups, and what is left over "
        "in the end is kept",
        low=1,
        hint="Use 1 for any width.",
    )

    estimator: str = _text(
        "curvature",
        "gates",
        "estimator of the units' benefits; straight-through is blind at open gates",
        choices=("curvature", "paired", "straight-through"),
    )
    layer_estimator: str = _text(
        "paired",
        "gates",
        "estimator of the layers' benefits; paired compares the loss with and without a layer",
        choices=("paired", "curvature", "straight-through"),
    )
    per_example_gates: bool = _switch(
        False, "gates", "draw gates for each example instead of once a step", negatable=True
    )
    probe_size: int | None = _number(
        None,
        int,
        "gates",
        "images of a batch on which benefits are probed; without it a tenth of the batch, at least 12",
        low=2,
        optional=True,
        hint="Leave it out for a tenth of the batch.",
    )
    layers_per_probe: int = _number(
        1, int, "gates", "layers whose paired difference one probe takes", low=1, hint="Use 1 if in doubt."
    )
    measure_every: int = _number(
        2, int, "gates", "steps from one measurement of the benefits to the next", low=1, hint="Use 1 for every step."
    )
    memory: int | None = _number(
        None,
        int,
        "gates",
        "steps over which measurements are pooled; without it 200, and in long runs 200 (deciding steps/6240)^(2/3)",
        low=10,
        optional=True,
        hint="Leave it out for one that fits the run's length.",
    )
    check_every: int | None = _number(
        None,
        int,
        "gates",
        "steps from one check for removals to the next; without it a quarter of the memory",
        low=1,
        optional=True,
        hint="Leave it out for a quarter of the memory.",
    )

    epochs: int = _number(60, int, "training", "passes over the training images", low=1, hint="Use at least one epoch.")
    batch_size: int = _number(64, int, "training", "images in a step", low=2, hint="Use at least two images.")
    lr: float = _number(0.1, float, "training", "peak learning rate", low=0, low_open=True, hint="Use 0.1 if in doubt.")
    momentum: float = _number(
        0.9, float, "training", "momentum of SGD", low=0, high=1, high_open=True, hint="Use 0.9 if in doubt."
    )
    weight_decay: float = _number(
        5e-4,
        float,
        "training",
        "weight decay of every parameter, norm layers included",
        low=0,
        hint="Use 0 for none.",
    )
    schedule: str = _text(
        "one-cycle", "training", "course of the learning rate", choices=("one-cycle", "cosine", "constant")
    )
    augment: str = _text(
        "crop-flip",
        "training",
        "random changes to training images: shift by a pixel, crop-flip mirrors, pads 4 pixels and crops, resized-crop mirrors "
        "and stretches a box of 8 to 100 % of the picture",
        choices=("none", "shift", "crop-flip", "resized-crop"),
    )
    mixup: float = _number(
        0.0,
        float,
        "training",
        "mix each training batch with itself, labels too, by a share drawn from Beta(mixup, mixup); 0 is off",
        low=0,
        high=100,
        hint="Use 0.2 if in doubt, 0 for none.",
    )
    label_smoothing: float = _number(
        0.0, float, "training", "label smoothing", low=0, high=1, high_open=True, hint="Use 0 for none."
    )
    amp: str = _text(
        "off",
        "training",
        "automatic mixed precision; fp16 scales the loss and is for CUDA devices",
        choices=("off", "bf16", "fp16"),
    )
    sync_bn: bool = _switch(
        False,
        "training",
        "with several processes (torchrun), let batch norms normalise the whole batch as one process would, instead of each "
        "process's share",
        negatable=True,
    )
    channels_last: bool = _switch(
        True, "training", "keep images in the channels-last memory format", negatable=True, identity=False
    )

    seed: int = _number(
        0, int, "run", "seed of everything random", low=0, high=2**32 - 1, identity=False, hint="Use 0 if in doubt."
    )
    device: str = _text(
        "cpu", "run", "where to compute: cpu, cuda, cuda:N or mps", identity=False, hint="Use --device cpu."
    )
    read_every: int | None = _number(
        None,
        int,
        "run",
        "steps after which the host waits for the device, takes in what was measured and moves the keep probabilities; "
        "without it 1 on a CPU, 10 elsewhere",
        low=1,
        optional=True,
        identity=False,
        hint="Use 1 for every step.",
    )
    width_multiple: int = _number(
        8,
        int,
        "run",
        "while training, round a pruned width up to a multiple of this by dead channels, which is faster than an odd one; "
        "they count nowhere and are gone in the end",
        low=1,
        identity=False,
        hint="Use 1 for none.",
    )
    compile: bool = _switch(
        False,
        "run",
        "torch.compile the training step while there are no gates: with nu = 0, early in a long warm-up, and when all is "
        "decided; a gated network changes its shapes too often",
        negatable=True,
        identity=False,
    )
    tensorboard: bool = _switch(
        False,
        "run",
        "also write the metrics and histograms of the keep probabilities for TensorBoard, into the run's tensorboard/",
        negatable=True,
        identity=False,
    )
    threads: int | None = _number(
        None,
        int,
        "run",
        "CPU threads; without it PyTorch's own choice",
        low=1,
        optional=True,
        identity=False,
        hint="Leave it out for PyTorch's own choice.",
    )
    out: str | None = _text(
        None,
        "run",
        "folder of the run; without it runs/<dataset>-<arch>-<tag>-s<seed>, where the tag stands for every setting that "
        "differs from the preset",
        optional=True,
        identity=False,
        hint="Leave it out for a folder under runs/.",
    )
    checkpoint_every: int = _number(
        500,
        int,
        "run",
        "steps of an epoch from one checkpoint to the next; there is one at the end of every epoch too",
        low=1,
        identity=False,
        hint="Use as many steps as may be lost.",
    )
    keep_checkpoints: int = _number(
        2,
        int,
        "run",
        "checkpoints kept while the run goes on; the newest good one is gone on from",
        low=1,
        identity=False,
        hint="Use 2 to survive the loss of one.",
    )
    resume: str | None = _text(
        None,
        "run",
        "folder of a run that was cut off, to go on from its newest good checkpoint; every other setting is the run's own, "
        "only what does not change its course may be given: --threads, --device, --compile, --tensorboard, --data-dir, "
        "--array-gib, --workers, --checkpoint-every, --keep-checkpoints",
        optional=True,
        identity=False,
        hint="Leave it out to start a run.",
    )
    dry_run: bool = _switch(
        False, "run", "check everything, print the costs and stop before the first step", identity=False
    )

    def __post_init__(self) -> None:
        for name, setting in settings().items():
            try:
                value = setting.check(name, getattr(self, name))
            except ValueError as error:
                raise ConfigError(str(error)) from None
            object.__setattr__(self, name, value)
        self._check_together()
        check_device(self.device)
        if self.read_every is None:
            object.__setattr__(self, "read_every", 1 if self.device == "cpu" else READ_EVERY)
        object.__setattr__(self, "derive_tol", self.tol is None)
        if self.out is None:
            object.__setattr__(self, "out", f"runs/{self.dataset}-{self.arch}-{self.tag}-s{self.seed}")

    def _check_together(self) -> None:
        if self.derive_tol and self.tol is not None:
            raise ConfigError(
                f"`tol` must be left out with derive_tol; got tol={self.tol:g} and derive_tol=True. Give one of the two."
            )
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
        if self.dataset != "folder" and self.image_size is not None:
            raise ConfigError(
                f"`image_size` must be left out unless dataset='folder'; got image_size={self.image_size} with "
                f"dataset={self.dataset!r}. Leave it out."
            )
        if self.download and self.dataset not in ("cifar10", "cifar100"):
            raise ConfigError(
                f"`download` must be left out unless dataset is cifar10 or cifar100; got download=True with "
                f"dataset={self.dataset!r}. Leave it out."
            )
        for name in ("array_gib", "workers"):
            if self.dataset != "folder" and getattr(self, name) is not None:
                raise ConfigError(
                    f"`{name}` must be left out unless dataset='folder'; got {name}={getattr(self, name):g} with "
                    f"dataset={self.dataset!r}. Leave it out."
                )
        if self.prior != "flattening" and (
            self.tol is None or self.shadow or (self.target_macs, self.target_params) != (None, None)
        ):
            raise ConfigError(
                f"`prior` must be flattening without --tol, with a target or with shadow; got prior={self.prior!r}. "
                "The derived tolerances hold for it alone: add --tol 0.01."
            )
        if self.prior == "concrete" and self.initial_keep_prob == 1.0:
            raise ConfigError(
                "`initial_keep_prob` must be below 1 with prior=concrete, which never leaves 1; got initial_keep_prob=1. Use 0.9."
            )
        if self.shadow and (
            self.nu == 0 or self.round_to > 1 or (self.target_macs, self.target_params) != (None, None)
        ):
            raise ConfigError(
                f"`shadow` must be left out with nu=0, a target or round_to; got nu={self.nu:g}, round_to={self.round_to}, "
                f"target_macs={self.target_macs}, target_params={self.target_params}. Leave one of them out."
            )
        if self.amp == "fp16" and not self.device.startswith("cuda"):
            raise ConfigError(
                f"`amp` must be off or bf16 on device={self.device!r}, where fp16 has no use; got amp='fp16'. Use --amp bf16."
            )
        if self.resume is not None and self.out != self.resume:
            raise ConfigError(
                f"`out` must be the same folder as resume; got out={self.out!r} and resume={self.resume!r}. Leave it out."
            )
        if self.target_macs is not None and self.target_params is not None:
            raise ConfigError(
                f"`target_macs` must be left out with target_params; got target_macs={self.target_macs:g} and "
                f"target_params={self.target_params:g}. Give one of the two."
            )
        for name in ("target_macs", "target_params"):
            if getattr(self, name) is not None and self.nu == 0:
                raise ConfigError(
                    f"`{name}` must be left out for the ungated network, nu=0; got {name}={getattr(self, name):g}. "
                    "Leave out --nu."
                )
        deciding = self.decide_until * self.epochs
        if self.nu > 0 and self.warmup_epochs >= deciding:
            raise ConfigError(
                f"`warmup_epochs` must be < decide_until x epochs = {deciding:g}, or nothing is ever decided; "
                f"got warmup_epochs={self.warmup_epochs:g}. Shorten the warm-up or train longer."
            )

    def identity(self) -> dict[str, Any]:
        """What decides the course of a run: data set, architecture, seed, and every setting that the tag stands for."""
        own = ("dataset", "arch", "seed")
        return {name: getattr(self, name) for name, setting in settings().items() if setting.identity or name in own}

    @property
    def tag(self) -> str:
        """What sets this run apart from the preset: a short hash of the settings that differ, or `default`."""
        base = _preset(self.dataset, self.arch)
        values = {name: getattr(self, name) for name, setting in settings().items() if setting.identity}
        values.pop("derive_tol")  # follows from tol
        differing = {name: value for name, value in values.items() if value != base[name]}
        if not differing:
            return "default"
        return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]

    @classmethod
    def from_presets(cls, **given: Any) -> Config:
        """Build from some values; the preset of their data set and architecture fills in the others.

        Args:
            **given: Values of fields.

        Returns:
            The resolved configuration.

        Raises:
            ConfigError: if a name or value is not admitted.
        """
        _check_names(given)
        known = settings()
        for name in ("dataset", "arch"):
            try:
                known[name].check(name, given.get(name, getattr(cls, name)))
            except ValueError as error:
                raise ConfigError(str(error)) from None
        values = _preset(given.get("dataset", cls.dataset), given.get("arch", cls.arch))
        epochs = given.get("epochs")
        if isinstance(epochs, int) and 0 < epochs < values["epochs"]:
            values["warmup_epochs"] *= epochs / values["epochs"]
        return cls(**{**values, **given})

    def to_json(self) -> str:
        """Every resolved setting as the text of `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, **changes: Any) -> Config:
        """Read `config.json` back.

        Args:
            text: Content of the file.
            **changes: Values to put over those read, such as `device="cpu"` where the run's device is not at hand.

        Returns:
            The configuration.

        Raises:
            ConfigError: if the text is not a JSON object, or names or holds something that is not admitted.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"`config.json` must be valid JSON; got an error at line {error.lineno}, column {error.colno} "
                f"({error.msg}). Restore the file from the run."
            ) from None
        if not isinstance(values, dict):
            raise ConfigError(
                f"`config.json` must hold one JSON object; got {type(values).__name__}. Restore the file from the run."
            )
        values = {**values, **changes}
        _check_names(values)
        return cls(**values)


def settings() -> dict[str, Setting]:
    """The setting behind each field of `Config`, in order."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(Config)}


def _preset(dataset: str, arch: str) -> dict[str, Any]:
    """Default of every field for one data set and architecture."""
    values = {f.name: f.default for f in dataclasses.fields(Config)}
    for key in (("*", arch), (dataset, "*"), (dataset, arch)):
        values |= PRESETS.get(key, {})
    return values


def _check_names(given: dict[str, Any]) -> None:
    known = settings()
    for name, value in given.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean `{near}`?" if near else "Leave it out."
            raise ConfigError(f"`{name}` must be the name of a setting; got {name}={value!r}. {hint}")


def check_device(device: str) -> None:
    """Refuse a device that PyTorch does not know or that is not there, by a `ConfigError`."""
    if device == "cpu":
        return
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdecimal()) or device.endswith(":"):
        raise ConfigError(f"`device` must be cpu, cuda, cuda:N or mps; got device={device!r}. Use --device cpu.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"`device` must be there; got device={device!r}, but PyTorch finds no CUDA device. Use --device cpu."
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"`device` must be there; got device={device!r}, but PyTorch finds no MPS device. Use --device cpu."
        )
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if index and int(index) >= count:
        raise ConfigError(
            f"`device` must be there; got device={device!r}, but there is no {kind} device beyond {kind}:{count - 1}. "
            f"Use --device {kind}:0."
        )


def check_out(config: Config) -> None:
    """Refuse an output folder that already holds a run; writes nothing.

    Raises:
        ConfigError: if there is a run, or if the place cannot be a folder.
    """
    out = Path(config.out)
    if (out / "config.json").exists():
        raise ConfigError(
            f"`out` must be a folder without a run; got out={config.out!r}, which holds one. "
            "Choose another --out or delete the folder."
        )
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(
            f"`out` must be a folder; got out={config.out!r}, where {str(place)!r} is a file. Choose another --out."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"`out` must be writable; got out={config.out!r}, where {str(place)!r} is not. Choose another --out."
        )
