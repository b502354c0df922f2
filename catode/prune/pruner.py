"""The pruner: gates, prices, theta steps, measurement and decisions around a training loop that the user owns.

    pruner = Pruner(model, example_input, optimizer=optimizer, nu=0.5, rate_ratio=..., steps=...)
    for x, y in batches:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        pruner.step()
    model = pruner.finish()        # a compact, plain nn.Module

Source: THEORY sections 2-5 (prices, theta step, tolerance, commitment), CONTRACT item 3 (states).
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode._validate import check_choice, check_int, check_interval, check_positive
from catode.decisions import rules, shadow
from catode.decisions.evidence import LEAST_EVIDENCE, Evidence
from catode.decisions.limits import summary
from catode.decisions.outcomes import COMMITTED, FORCED, PROMOTED, UNDECIDED, Outcome, Outcomes
from catode.decisions.priors import PRIORS
from catode.decisions.shadow import Shadow
from catode.decisions.target import Target
from catode.prune import cut
from catode.prune.describe.protocol import Counts, Prunable, describe
from catode.prune.distributed import Group, norms_are_shared
from catode.prune.gates import Gates
from catode.prune.growth import GradientProducts
from catode.prune.probes import ESTIMATORS, Probe, curvature_corrected, straight_through
from catode.prune.steptime import MeasuredComplexity, Table
from catode.prune.transfer import Later, upload
from catode.structures.complexity import Complexity
from catode.structures.description import Block, Site

ROW_FIELDS = [
    "step",
    "time",
    "kind",
    "block",
    "site",
    "index",
    "keep_prob",
    "benefit",
    "benefit_upper",
    "benefit_lower",
    "price",
    "gain",
    "decay",
    "rate_ratio",
    "noise",
    "benefit_noise",
    "drift",
    "step_time",
    "risk",
    "separatrix",
    "tolerance",
    "state",
]

LEAD = 4  # memories before the thetas may move, from which on there are gates and measurements
LEAST_OF_MEAN = 0.05  # of the mean price of its kind: below it, a structure's theta is slower than `rate_ratio`
MOST_ROWS = 1_000_000  # of structures.csv, about: a ResNet-50 over 90 epochs of ImageNet would have 50 million, 11 GB
LEAST_PROBE = 12  # examples, where the batch has as many
_ARRAYS = ("keep_prob", "kept", "rate_ratio", "_zero", "_pending", "_rounded_up")
_SCALARS = ("nu", "done", "time", "started", "finished")


@dataclass(frozen=True)
class Check:
    """What one check found and did.

    Attributes:
        rows: One record for every structure that was undecided before it or changed its state, keys `ROW_FIELDS`. In
            runs of very many checks and units, undecided units are recorded at some of the checks only (`MOST_ROWS`).
        warnings: One line each.
        removed: Number of structures removed, promoted ones included.
    """

    rows: list[dict]
    warnings: list[str] = field(default_factory=list)
    removed: int = 0


@dataclass(frozen=True)
class _Probed:
    """A probe whose numbers are still on the device.

    Attributes:
        structures: Those whose paired differences it took; None if it took the curvature, or nothing.
        numbers: Whether all logits were finite, whether the loss fits, and what was found.
    """

    structures: list[int] | None
    numbers: tuple[torch.Tensor, ...]


class Pruner:
    """Gates a model, moves its keep probabilities, and removes what is safe to remove.

    The loss must be a mean softmax cross-entropy over the batch (soft targets welcome): the pruner recovers the targets
    from the logits and their gradient, so that its ``step()`` needs no arguments.

    Args:
        model: A network with a method ``structures()`` (see `catode.prune.describe.protocol`); gated in place.
        example_input: One input batch; only its shape matters.
        optimizer: The model's optimizer, SGD with one learning rate and momentum, which set the ODE time of a step; its
            state follows every compaction. Where groups differ in weight decay, the least one counts.
        nu: Nats that the whole network may cost, > 0. With a target it holds until the first check that sets it.
        rate_ratio: Speed of every theta, 1/time: a useless structure sinks from 1 to 0 within ``1 / rate_ratio`` of ODE
            time (the sum over steps of lr / (1 - momentum)). Divided by a structure's price at the start it is its
            effective rate ratio. None: a tenth of `steps` at the optimizer's present learning rate.
        steps: Steps after which the deciding phase ends and what is still undecided is rounded.
        alpha: Layers (1) against units (0).
        beta: Parameters (1) against MACs (0).
        risk: Accepted probability of removing what would not have gone by itself, in (0, 0.5).
        tolerance: A fixed tolerance on theta in place of the derived one.
        prior: One of `catode.decisions.priors.PRIORS`. The tolerances and commitments are those of `flattening`; its rivals
            take a fixed `tolerance`, and what does not sink below it is rounded in the end.
        images: Number of training images, which `bernoulli` needs.
        target_macs: Share of the MACs to end at, in (0, 1); sets nu while training (see `catode.decisions.target`).
        target_params: The same for parameters.
        warmup: Steps before any theta moves. The first part of a long one is trained without gates (if thetas start at 1):
            measuring begins four memories before its end, earlier where many layers share the paired probes.
        initial_keep_prob: Where every theta starts, in (0, 1].
        estimator: Estimator of the units' benefits, one of `catode.prune.probes.ESTIMATORS`.
        layer_estimator: The same for layers.
        per_example: Draw gates for each example instead of each batch; costs passes over activations. The curvature
            correction then uses the batch means of draw and curvature, taken as uncorrelated.
        probe_size: Examples in a probe; None: a tenth of the batch, at least 12. More where images are small.
        layers_per_probe: Structures (layers by default) whose paired difference one probe takes.
        measure_every: Steps between probes; probes of curvature and of paired differences take turns.
        check_every: Steps between checks.
        read_every: Steps after which the host reads what was measured, waiting for the device, moves the thetas step by
            step and checks; 1 on a CPU, about 10 elsewhere. In between thetas stand still.
        memory: Steps over which measurements are pooled, at least 10.
        width_multiple: While training, a site that loses units keeps dead channels up to a multiple of this width, which
            is faster than an odd one. They count nowhere and `finish` takes them out. Needs an activation that maps 0 to
            0 between the site's producers and consumers.
        round_to: Units leave a site only in groups that leave a multiple of this many, or none; those that wait for a
            group stay gated. What still waits when nothing else is undecided at the site is kept for the width alone, its
            keep probability folded into its weights, so that the network does not change, and trained on without a gate.
        step_times: Price by these measured times (see `catode.prune.steptime`) in place of MACs.
        shadow: Decide, but remove nothing before its theta is 0; the attribute `shadow` then holds what several rules
            would have removed and what became of it (see `catode.decisions.shadow`). Decisions end after `steps`; what is
            open then is watched, gated, up to this step. None: remove. Not with a target or `round_to`.
        seed: Seed of the gate draws.
        group: Processes that train together, each on its share of every batch (see `catode.prune.distributed`); None for
            this one alone. Gradients must be averaged over them before the optimizer's step. A probe takes its images
            from all shares together; from each share where a batch norm knows its own share only.

    Attributes:
        complexity: The network's complexity polynomial.
        keep_prob: theta, shape (n,); layers first, then units site by site.
        state: State of every structure, shape (n,).
        started: Whether gates are in the model (until it is `finished`).
        finished: Whether everything is decided and the model plain.

    Raises:
        ValueError: for arguments out of range or a model without ``structures()``.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: torch.Tensor,
        *,
        optimizer: torch.optim.Optimizer,
        nu: float,
        steps: int,
        rate_ratio: float | None = None,
        alpha: float = 0.5,
        beta: float = 0.0,
        risk: float = 0.05,
        tolerance: float | None = None,
        prior: str = "flattening",
        images: int | None = None,
        target_macs: float | None = None,
        target_params: float | None = None,
        warmup: int = 0,
        initial_keep_prob: float = 1.0,
        estimator: str = "curvature",
        layer_estimator: str = "paired",
        per_example: bool = False,
        probe_size: int | None = None,
        layers_per_probe: int = 1,
        measure_every: int = 2,
        check_every: int = 50,
        read_every: int = 1,
        memory: int = 200,
        width_multiple: int = 1,
        round_to: int = 1,
        step_times: Sequence[Table] | None = None,
        shadow: int | None = None,
        seed: int = 0,
        group: Group | None = None,
    ):
        if not isinstance(model, Prunable):
            raise ValueError(
                f"`model` must have a method structures(); got {type(model).__name__}. See catode.prune.describe.protocol for the protocol."
            )
        _check_optimizer(optimizer)
        self.nu = check_positive("nu", nu, hint="Leave the pruner out for the ungated network.")
        self.alpha = check_interval("alpha", alpha, 0.0, 1.0)
        self.beta = check_interval("beta", beta, 0.0, 1.0)
        self.risk = check_interval("risk", risk, 0.0, 0.5, low_open=True, high_open=True)
        self.tolerance = None if tolerance is None else check_interval("tolerance", tolerance, 0.0, 1.0)
        self.prior = check_choice("prior", prior, PRIORS)
        if prior != "flattening" and (
            tolerance is None or shadow is not None or (target_macs, target_params) != (None, None)
        ):
            raise ValueError(
                f"`prior` must be flattening without a fixed tolerance, with a target or with shadow; got prior={prior!r}. "
                "The derived tolerances hold for it alone."
            )
        if prior == "concrete" and initial_keep_prob == 1.0:
            raise ValueError(
                "`initial_keep_prob` must be below 1 with prior='concrete', which never leaves 1; got 1.0. Use 0.9."
            )
        self.images = None if images is None else check_int("images", images, low=1)
        if prior == "bernoulli" and images is None:
            raise ValueError(
                "`images` must be given with prior='bernoulli'; got None. It is the number of training images."
            )
        self.steps = check_int("steps", steps, low=1)
        if rate_ratio is None:
            if _step_time(optimizer) == 0.0:
                raise ValueError(
                    "`rate_ratio` must be given where the learning rate begins at 0; got None. Try 10 / (ODE time)."
                )
            rate_ratio = 10.0 / (self.steps * _step_time(optimizer))
        self._clock = check_positive("rate_ratio", rate_ratio)
        self.warmup = check_int("warmup", warmup, low=0)
        check_interval("initial_keep_prob", initial_keep_prob, 0.0, 1.0, low_open=True)
        self.estimators = (
            check_choice("layer_estimator", layer_estimator, ESTIMATORS),
            check_choice("estimator", estimator, ESTIMATORS),
        )
        self.per_example = per_example
        self.probe_size = None if probe_size is None else check_int("probe_size", probe_size, low=2)
        self.layers_per_probe = check_int("layers_per_probe", layers_per_probe, low=1)
        self.measure_every = check_int("measure_every", measure_every, low=1)
        self.check_every = check_int("check_every", check_every, low=1)
        self.read_every = check_int("read_every", read_every, low=1)
        check_int("memory", memory, low=10)
        self.width_multiple = check_int("width_multiple", width_multiple, low=1)
        self.round_to = check_int("round_to", round_to, low=1)
        if self.warmup >= self.steps:
            raise ValueError(
                f"`warmup` must be below steps={self.steps}, or nothing is ever decided; got warmup={self.warmup}. Shorten it."
            )

        self.model, self.optimizer = model, optimizer
        self.blocks = model.structures()
        self.complexity = describe(model, self.blocks, example_input)
        self.target = Target.choose(self.complexity, target_macs, target_params)
        if step_times is not None:
            self.complexity = MeasuredComplexity(self.complexity, step_times)
        if shadow is not None and (self.target is not None or self.round_to > 1):
            raise ValueError(
                "`shadow` must be None with a target or round_to, whose removals depend on each other; got "
                f"shadow={shadow}. Leave the target and round_to out."
            )
        n, layers = self.complexity.size, len(self.blocks)
        self.shadow = None if shadow is None else Shadow(n)
        self._watch_until = self.steps if shadow is None else check_int("shadow", shadow, low=self.steps)
        self._outcomes = Outcomes(self.complexity, self.round_to, self.target)
        self.is_layer = self.complexity.is_layer
        self.gated = np.where(self.is_layer, self.alpha > 0, self.alpha < 1)
        self.state = np.where(self.gated, UNDECIDED, COMMITTED).astype("<U16")
        self.keep_prob = np.where(self.gated, initial_keep_prob, 1.0)
        self.kept = np.ones(n, dtype=bool)
        self._zero, self._rounded_up = np.zeros((2, n), dtype=bool)
        self.present = list(self.complexity.sites)  # units that are there physically, the dead ones too
        self.rate_ratio = rate_ratios(self.complexity, nu=self.nu, alpha=self.alpha, beta=self.beta, clock=self._clock)

        self.done, self.time = 0, 0.0
        self.finished = False
        self._pending = np.zeros(n)  # ODE time since the last estimate
        self._evidence = Evidence(
            np.where(self.is_layer, max(memory / 10, LEAST_EVIDENCE), memory),
            curvature_window=max(memory / (2 * self.measure_every), 10),
            corrected=np.where(self.is_layer, *(name == "curvature" for name in self.estimators)),
            risk=self.risk,
        )
        self._later = Later()
        self._products = GradientProducts(n, max(memory / self._burst_every, 20), self._later.put)
        self._turn = {True: 0, False: 0}
        self._generator = torch.Generator().manual_seed(seed)
        self._device = next(model.parameters()).device
        self._labels = torch.Generator(self._device).manual_seed(seed + 1)
        self._drawn: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the steps to come, on the host and on the device
        self._chances = torch.from_numpy(self.keep_prob).float()  # theta when they were drawn
        self._captured: dict[str, torch.Tensor] | None = None
        self._probing = False
        self.group = group or Group()
        self._shared = norms_are_shared(model)
        self.gates = Gates(model, self.blocks, n, self.group if self._shared else None)
        self._hooks = []
        round_of_layers = 2 * self.measure_every * -(-layers // self.layers_per_probe)
        lead = LEAD * max(memory, round_of_layers * LEAST_EVIDENCE / 2)
        self._begin = max(self.warmup - math.ceil(lead), 0) if initial_keep_prob == 1.0 else 0
        self.started = False
        if self._begin == 0:
            self._start()

    # --- what a user asks -------------------------------------------------------------------------------------------

    @property
    def _burst_every(self) -> int:
        return self.measure_every * max(-(-8 // self.measure_every), 2)

    @property
    def _burst(self) -> list[int]:
        """Steps of a cycle whose gradients are multiplied: three without a probe, so that no step bears both."""
        return list(islice((p for p in count() if self.measure_every == 1 or p % self.measure_every), 3))

    @property
    def expected_complexity(self) -> float:
        """J at the current thetas, in [0, 1]."""
        return self.complexity.index(self.keep_prob, self.beta)

    @property
    def expected_macs(self) -> float:
        """Expected MACs of the whole network at the current thetas."""
        return self.complexity.macs(self.keep_prob)

    @property
    def undecided(self) -> int:
        """Structures without a decision."""
        return int((self.state == UNDECIDED).sum())

    @property
    def layers_kept(self) -> int:
        """Residual branches that are physically there."""
        return int(self.kept[self.is_layer].sum())

    @property
    def units_kept(self) -> int:
        """Units that are physically there."""
        return int(self.kept[~self.is_layer].sum())

    @property
    def kept_for_rounding(self) -> int:
        """Units that are there only because of `round_to`; their state is `forced`."""
        return int((self.kept & self._rounded_up).sum())

    @property
    def decided_by_rule(self) -> float:
        """Share of the gated structures decided otherwise than by `forced` rounding."""
        decided = self.gated & ~np.isin(self.state, (UNDECIDED, FORCED))
        return float(decided.sum() / self.gated.sum())

    def keep_prob_by_kind(self) -> dict[str, NDArray]:
        """theta of the gated layers and of the gated units."""
        kinds = (("layers", self.is_layer), ("units", ~self.is_layer))
        return {name: self.keep_prob[kind & self.gated] for name, kind in kinds if (kind & self.gated).any()}

    def decisions(self) -> dict[str, int]:
        """Number of gated structures in each state."""
        return dict(sorted(Counter(self.state[self.gated].tolist()).items()))

    def counts(self) -> Counts:
        """MACs and parameters of the network as it physically stands."""
        kept = self.kept.astype(float)
        return Counts(round(self.complexity.macs(kept)), round(self.complexity.params(kept)))

    def macs_removed(self, state: str) -> int:
        """MACs that the whole network would lose by the structures in `state` alone, and what their going promotes."""
        kept = self.complexity.close(self.state != state)
        return round(self.complexity.macs(np.ones(self.complexity.size)) - self.complexity.macs(kept.astype(float)))

    def structure(self) -> dict:
        """Kept blocks and units in the original numbering, as in structure.json."""
        record, site = {}, 0
        for number, block in enumerate(self.blocks):
            sites = {}
            for spec in block.sites:
                sites[spec.name] = (
                    [int(u - self.complexity.sites[site][0]) for u in self.present[site] if self.kept[u]]
                    if self.kept[number]
                    else []
                )
                site += 1
            record[block.name] = {"kept": bool(self.kept[number]), "sites": sites}
        return record

    def checksum(self) -> int:
        """Checksum of what must be the same in all processes: thetas, masks, and the state of the gate draws.

        A `read`, and with it a `snapshot` or `state_dict`, between two readings moves the thetas of its process alone: call
        ``read()`` in all of them first.
        """
        return zlib.crc32(self._generator.get_state().numpy(), zlib.crc32(self.kept, zlib.crc32(self.keep_prob)))

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict]:
        """State dict of the compact network in mean field (theta folded into the weights), and its structure."""
        self.read()
        state = self.gates.folded_state()
        for _, site, spec in self._sites():
            live = self.kept[self.present[site]]
            if not live.all():
                cut.keep_units_of_state(state, spec, np.flatnonzero(live))
        return state, self.structure()

    def state_dict(self) -> dict:
        """Everything that a pruner on a fresh model needs to go on exactly as this one would: tensors, numbers and text.

        The optimizer's state is not in it.
        """
        self.read()
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in _ARRAYS}
        return {
            "model": self.gates.plain_state(),
            "state": self.state.tolist(),
            "present": [torch.from_numpy(units) for units in self.present],
            "evidence": self._evidence.state(),
            "arrays": arrays,
            "products": self._products.state(),
            "turn": [self._turn[True], self._turn[False]],
            "generators": [self._generator.get_state(), self._labels.get_state()],
            "draws": torch.stack([draw for draw, _ in self._drawn]) if self._drawn else None,
            "chances": self._chances.clone(),
            "scalars": {name: getattr(self, name) for name in _SCALARS},
            "shadow": self.shadow.state() if self.shadow else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up the `state_dict` of a pruner with the same arguments; the model must be fresh and whole.

        The model is cut down to what it was; the optimizer's parameters follow, its state must be restored after this.

        Raises:
            ValueError: if the state is of another network.
        """
        if len(state["state"]) != self.complexity.size or len(state["present"]) != len(self.present):
            raise ValueError(
                f"`state` must be of the same network; got one of {len(state['state'])} structures instead of "
                f"{self.complexity.size}. Build the model and the pruner with the same arguments."
            )
        self.gates.remove()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name in _ARRAYS:
            setattr(self, name, state["arrays"][name].numpy().copy())
        self.state = np.array(state["state"], dtype=self.state.dtype)
        for name, value in state["scalars"].items():
            setattr(self, name, value)
        self._slice(np.ones_like(self.kept), stay=[units.numpy() for units in state["present"]])
        self.model.load_state_dict(state["model"])
        self._evidence.restore(state["evidence"])
        if self.shadow:
            self.shadow.restore(state["shadow"])
        self._turn = dict(zip((True, False), state["turn"], strict=True))
        if self.started and not self.finished:
            self._start()
        self._products.restore(state["products"])
        self._generator.set_state(state["generators"][0])
        if (
            state["generators"][1].shape == self._labels.get_state().shape
        ):  # another kind of device has another generator
            self._labels.set_state(state["generators"][1])
        self._chances = state["chances"].clone()
        if state["draws"] is not None:
            self._hold(state["draws"].clone())
            self.gates.set(self._theta(), self._drawn[0][1])

    # --- the training loop ------------------------------------------------------------------------------------------

    def step(self, grad_scale: float | torch.Tensor = 1.0, skipped: bool | torch.Tensor = False) -> Check | None:
        """Follow one optimizer step: measure, and every `read_every` steps move the thetas, and now and then decide.

        Args:
            grad_scale: Factor that the loss was multiplied with before ``backward()`` (a gradient scaler's).
            skipped: Whether the optimizer left the weights alone because the gradient overflowed; then no time passes
                for the thetas either. Both may be tensors of the device.

        Returns:
            The check, if this step had one.

        Raises:
            RuntimeError: if no backward pass through the gated model came before.
        """
        if self.finished:
            return None
        step_time = _step_time(self.optimizer)
        if not isinstance(skipped, torch.Tensor):
            skipped = torch.full((), float(skipped), device=self._device)
        if not self.started:
            self.done += 1
            self._later.put(partial(self._pass, step_time), skipped)
            if self.done % self.read_every == 0:
                self.read()
            if self.done >= self._begin:
                self._start()
            return None
        draw, derivative = self._derivative(grad_scale)
        self.done += 1
        probed = self._probe(self.state == UNDECIDED) if self._captured else None
        take = partial(self._take, self.done, step_time, draw, probed)
        self._later.put(take, skipped, derivative, *(probed.numbers if probed else ()))
        place = (self.done - 1) % self._burst_every
        if place == 0:
            self._products.begin()
        if place in self._burst:
            self._products.add(draw)
        if place == self._burst[1] - 1:
            self._products.note_weights()
        check, final = None, self.done >= self.steps
        due = self.done in (self.steps, self._watch_until)
        if due or self.done % self.read_every == 0:
            self.read()
            passed = self.done // self.check_every > (self.done - self.read_every) // self.check_every
            if due or (passed and self.done > self.warmup):
                check = self._check(step_time, final)
        if not self.finished:
            del self._drawn[0]
            self._draw()
        return check

    def read(self) -> None:
        """Take in what the device has measured since the last time; ``step()`` does so every `read_every` steps."""
        self._later.read()
        self.gates.keep_prob.copy_(self._theta())

    def finish(self) -> nn.Module:
        """Decide what is still undecided by rounding, take gates and dead channels out, return the compact, plain model.

        Train a little further after it: the running statistics of the batch norms still know what was removed last.
        """
        if not self.finished:
            self.read()
            self._watch_until = self.done
            self._check(_step_time(self.optimizer), final=True)
        self._slice(self.kept)
        return self.model

    def _start(self) -> None:
        """Put the gates in and begin to measure."""
        self.started = True
        self._install()
        self._hooks = self._root_hooks()
        self._draw()

    def _theta(self) -> torch.Tensor:
        """theta for the gates, shape (n,), on the device."""
        return upload(torch.from_numpy(self.keep_prob).float(), self._device)

    def _hold(self, draws: torch.Tensor) -> None:
        """Hold the draws of the steps to come, shape (steps, n), on the host and on the device."""
        self._drawn = list(zip(draws, upload(draws, self._device), strict=True))

    def _draw(self) -> None:
        """Set the gates of the next step, drawn for all steps up to the next reading; whether it is measured is known."""
        theta = None
        if not self._drawn:
            theta, self._chances = self._theta(), torch.from_numpy(self.keep_prob).float()
            number = self.read_every - self.done % self.read_every
            number = min(number, max(self._watch_until - self.done, 1))
            self._hold(torch.stack([torch.bernoulli(self._chances, generator=self._generator) for _ in range(number)]))
        self.gates.set(theta, self._drawn[0][1])
        self._captured = {} if self.done % self.measure_every == 0 else None

    def _root_hooks(self) -> list:
        def before(module, args):
            if self._probing:
                return
            if not module.training or not torch.is_grad_enabled():
                self.gates.rows = None
                return
            if self.per_example:
                chances = self._chances.expand(len(args[0]) * self.group.size, -1)
                self._drawn_rows = torch.bernoulli(chances, generator=self._generator)
                self.gates.rows = upload(self.group.share(self._drawn_rows), self._device).requires_grad_()

        def after(module, args, output):
            if self._probing or not module.training or not torch.is_grad_enabled():
                return
            if self._captured is not None:
                if not isinstance(output, torch.Tensor) or output.dim() != 2:
                    raise TypeError("`model` must return logits of shape (batch, classes); got something else")
                captured = self._captured
                captured["inputs"], captured["logits"] = args[0].detach(), output.detach()
                output.register_hook(lambda gradient: captured.__setitem__("gradient", gradient))

        return [self.model.register_forward_pre_hook(before), self.model.register_forward_hook(after)]

    def _derivative(self, grad_scale: float | torch.Tensor) -> tuple[NDArray, torch.Tensor]:
        """Draw and, still on the device, dL/dxi of this step, each of shape (n,)."""
        rows = self.gates.rows
        source = rows if rows is not None else self.gates.draw
        if source.grad is None:
            raise RuntimeError(
                "`step()` must follow a backward pass through the gated model in train mode; there was none"
            )
        self.gates.rows = None
        derivative, draw = source.grad / grad_scale, self._drawn[0][0]
        if rows is not None:
            derivative, draw = derivative.sum(0), self._drawn_rows.detach().mean(0)
        derivative = self.group.mean(derivative)
        self._scale = grad_scale
        return draw.double().numpy(), derivative

    def _pass(self, step_time: float, skipped: NDArray) -> None:
        """Let the time of one step pass, unless the optimizer skipped it."""
        if not skipped:
            self.time += step_time

    def _take(
        self, done: int, step_time: float, draw: NDArray, probed: _Probed | None, skipped: NDArray, *numbers: NDArray
    ) -> None:
        """Take in one step: its number, ODE time, draw and probe, known before, and what the device measured in it."""
        self._pass(step_time, skipped)
        if skipped:
            return
        self._pending += step_time
        derivative, *numbers = numbers
        open_ = self.state == UNDECIDED
        paired = self._probed(probed, open_, *numbers) if probed else {}
        estimate, seen = self._estimates(open_, draw, derivative, paired)
        self._move(estimate, seen, done)

    def _estimates(
        self, open_: NDArray[np.bool_], draw: NDArray, derivative: NDArray, paired: dict[int, float]
    ) -> tuple[NDArray, NDArray[np.bool_]]:
        """Estimates of L1 - L0 and which structures have one at a step."""
        estimate, seen = np.zeros_like(draw), np.zeros_like(open_)
        for kind, name in zip((self.is_layer, ~self.is_layer), self.estimators, strict=True):
            where = kind & open_
            if name == "curvature":
                # a closed layer may leave the ReLU behind it exactly on its kink, where autograd's derivative is not one-sided
                where &= (self._evidence.curvature.count > 0) & (~self.is_layer | (draw > 0.5))
                values = curvature_corrected(derivative, draw, self._evidence.curvature.mean)
            elif name == "straight-through":
                values = straight_through(derivative, draw)
            else:
                values = np.zeros_like(draw)
                values[list(paired)] = [-b for b in paired.values()]
                where = where & np.isin(np.arange(len(draw)), list(paired))
            where = where & np.isfinite(values)
            estimate[where], seen = values[where], seen | where
        return estimate, seen

    def _probe(self, open_: NDArray[np.bool_]) -> _Probed | None:
        """Run a probe on part of the captured batch; its numbers stay on the device."""
        captured = self._captured
        if "gradient" not in captured:
            return None
        batch = len(captured["logits"])
        part, group = self._part(batch)
        targets, fit = _targets(captured["logits"][part], captured["gradient"][part], batch * 1.0 / self._scale)
        flaws = torch.stack([~captured["logits"].isfinite().all(), ~fit]).long()
        finite, fit = (self.group.sum(flaws) == 0).unbind()
        # curvature and paired probes take turns, so that no step bears both
        curved = open_[self.is_layer].any() and self.estimators[0] == "curvature"
        curved |= open_[~self.is_layer].any() and self.estimators[1] == "curvature"
        chosen = [s for layers in (True, False) for s in self._next(layers, open_)]
        if not curved and not chosen:
            return _Probed(None, (finite, fit))
        turn = (self.done // self.measure_every) % 2 == 0
        self._probing = True
        try:
            probe = Probe(self.model, self.gates, captured["inputs"][part], targets, self._labels, group)
            if curved and (turn or not chosen):
                return _Probed(None, (finite, fit, probe.curvature(self.estimators[0] == "curvature")))
            self._turn[True] += self.layers_per_probe
            self._turn[False] += self.layers_per_probe
            return _Probed(chosen, (finite, fit, probe.paired(chosen)))
        finally:
            self._probing = False

    def _probed(self, probed: _Probed, open_: NDArray[np.bool_], finite, fit, *found: NDArray) -> dict[int, float]:
        """Take in the numbers of a probe; returns the paired benefits that it found.

        Raises:
            RuntimeError: if the loss is not a mean softmax cross-entropy.
        """
        if not finite:
            return {}
        if not fit:
            raise RuntimeError(
                "the loss must be a mean softmax cross-entropy over the batch; the gradient of the logits is not one's. "
                "Use reduction='mean' and pass the loss scale, if any, to step(grad_scale=...)."
            )
        for values in found:
            if probed.structures is not None:
                return {s: b for s, b in zip(probed.structures, values.tolist(), strict=True) if np.isfinite(b)}
            self._evidence.curvature.add(values, open_ & np.isfinite(values))
        return {}

    def _part(self, batch: int) -> tuple[slice, Group]:
        """The rows that a probe takes of this process's `batch` examples, and the processes by the order of their rows."""
        processes = self.group.size if self._shared else 1
        batch *= processes
        size = min(batch, self.probe_size or max(LEAST_PROBE, batch // 10))
        size += -size % processes
        begin = (self.done // self.measure_every * size) % max(batch - size + 1, 1)
        if not self._shared:
            return slice(begin, begin + size), self.group
        return self.group.rows(begin, size), replace(self.group, rank=(self.group.rank - begin) % self.group.size)

    def _next(self, layers: bool, open_: NDArray[np.bool_]) -> list[int]:
        """The structures of one kind whose turn it is for a paired difference."""
        candidates = np.flatnonzero(open_ & (self.is_layer == layers))
        if self.estimators[0 if layers else 1] != "paired" or not len(candidates):
            return []
        count = min(self.layers_per_probe, len(candidates))
        return [int(candidates[(self._turn[layers] + i) % len(candidates)]) for i in range(count)]

    def _move(self, estimate: NDArray, seen: NDArray[np.bool_], done: int) -> None:
        """SGD step of theta under its prior, of training step `done`, with the prices of this moment; pools the evidence."""
        self._evidence.add(estimate, seen, self.time, self._pending)
        if done > self.warmup:
            upper = self._evidence.limits()[1]
            moving = seen & ~self._zero & self._evidence.enough & np.isfinite(upper)
            force, step = (upper - self.prices())[moving], (self.rate_ratio * self._pending)[moving]
            self.keep_prob[moving] = PRIORS[self.prior](self.keep_prob[moving], force, step, self.images)
            self._zero |= moving & (self.keep_prob == 0.0)  # absorbed: removed at the next check
            if self.shadow:
                self.shadow.passed(done, self.time, self.keep_prob, moving)
        self._pending[seen] = 0.0

    def prices(self) -> NDArray:
        """Price of every structure at the current thetas, nats, shape (n,)."""
        return self.complexity.prices(self.keep_prob, nu=self.nu, alpha=self.alpha, beta=self.beta)

    # --- deciding ---------------------------------------------------------------------------------------------------

    def measured(self) -> dict[str, NDArray]:
        """Everything measured about every structure, arrays of shape (n,); infinite where nothing is known yet."""
        return summary(
            self._evidence,
            self._products,
            keep_prob=self.keep_prob,
            price=np.maximum(self.prices(), rules.LEAST_PRICE),
            rate_ratio=self.rate_ratio,
            weight_decay=min(group["weight_decay"] for group in self.optimizer.param_groups),
        )

    def _check(self, step_time: float, final: bool = False) -> Check:
        """Decide what can be decided; compact what was removed."""
        open_ = self.state == UNDECIDED
        found = self.measured()
        enough = open_ & self._evidence.enough & (self._products.gain.count >= LEAST_EVIDENCE)
        separatrix, tolerance = rules.tolerances(
            found, enough, memory=self._evidence.memory(), risk=self.risk, fixed=self.tolerance
        )
        known = open_ & ~np.isnan(separatrix)
        zero = open_ & self._zero
        safe = known & ~zero & (found["benefit_upper"] < found["price"]) & (self.keep_prob <= tolerance)
        decided = safe & (self.shadow is not None)
        if self.shadow and self.done > self.steps:  # nothing is decided any more
            safe = np.zeros_like(safe)
        elif self.shadow:
            self._watch(found, known & ~zero, safe, tolerance)
            safe = np.zeros_like(safe)
        elif not final:
            left = [units[self.kept[units]] for units in self.complexity.sites]
            safe = rules.ration(safe, found, self.is_layer, left, self.round_to)
        progress = (self.done - self.warmup) / max(self.steps - self.warmup, 1)
        certain = np.zeros_like(open_)
        if self.prior == "flattening":
            certain = rules.certain(
                found,
                known,
                slope=self._evidence.slope(),
                progress=progress,
                steps_left=max(self.steps - self.done, 1),
                step_time=step_time,
                risk=self.risk,
            )
        watching = np.zeros_like(open_)
        if self.shadow and self.done < self._watch_until:
            watching = self.shadow.watching()
        outcome = self._outcomes.of(
            self.state, self.kept, found, zero=zero, safe=safe, certain=certain, watching=watching, final=final
        )
        noted = (outcome.state != self.state) | decided | self._due_for_a_row(open_, final)
        removed = self._carry_out(outcome)
        rows = self._rows(found, separatrix, tolerance, np.flatnonzero(noted))
        warnings = []
        if outcome.everything:
            warnings.append(
                f"everything would go at step {self.done}: `nu`={self.nu:g} is too large. Pruning stops here and the network "
                "as it stands is kept; choose a smaller nu."
            )
        if (final and not outcome.watched.any()) or not self.undecided:
            self._leave()
        elif self.target is not None:
            self._aim(enough & (self.state == UNDECIDED), self.nu * found["benefit"] / found["price"], progress)
        return Check(rows, warnings, removed)

    def _carry_out(self, outcome: Outcome) -> int:
        """Take over what a check ended with; returns the number of structures removed."""
        before, changed = self.kept, (outcome.state != self.state).any()
        self.state, self.kept = outcome.state, outcome.kept
        if self.shadow:
            self.shadow.end(shadow.REGRET, outcome.certain, self.done, self.time)
            self.shadow.end(shadow.PROMOTED, self.state == PROMOTED, self.done, self.time)
        self._rounded_up |= outcome.folded
        fold = np.where(outcome.folded, self.keep_prob, 1.0)
        self.keep_prob = np.where(self.kept, np.where(self.state == UNDECIDED, self.keep_prob, 1.0), 0.0)
        if changed:
            self._compact(before, fold)
        return int((before & ~self.kept).sum())

    def _watch(
        self, found: dict[str, NDArray], known: NDArray[np.bool_], safe: NDArray[np.bool_], tolerance: NDArray
    ) -> None:
        """Let the shadow's rules decide."""
        sizes = np.full((2, len(known)), np.inf)
        for _, site, spec in self._sites():
            sizes[:, self.present[site]] = cut.unit_norms(self.model, spec)
        self.shadow.decide(
            self.done,
            self.time,
            found,
            known,
            safe=safe,
            tolerance_values=tolerance,
            memory=self._evidence.memory(),
            sizes=dict(zip((shadow.FILTER, shadow.SCALE), sizes, strict=True)),
        )

    def names(self) -> list[dict]:
        """kind, block, site and index of every structure, as in structures.csv."""
        layers = [{"kind": "layer", "block": block.name, "site": "", "index": ""} for block in self.blocks]
        sites = [(block.name, site.name) for block in self.blocks for site in block.sites]
        units = zip(self.complexity.unit_site, range(len(self.blocks), self.complexity.size), strict=True)
        return layers + [
            {"kind": "unit", "block": sites[k][0], "site": sites[k][1], "index": int(s - self.complexity.sites[k][0])}
            for k, s in units
        ]

    def _aim(self, known: NDArray[np.bool_], worth: NDArray, progress: float) -> None:
        """Set nu to what the target takes; a useless structure goes on sinking at the same speed."""
        level = self.target.level(self.kept, known, worth, progress)
        if self.target.lags(self.keep_prob, self.kept, progress):
            passed = (self.done - self._checked_before()) * _step_time(self.optimizer)
            level = max(level or 0.0, self.nu * math.exp(min(self._clock * passed, 1.0)))
        if not level:
            return
        self.rate_ratio *= self.nu / level
        self.nu = level

    def _checked_before(self) -> int:
        """The step at which the check before this one was due: at the first reading after a multiple of `check_every`."""
        due = (self.done - self.read_every) // self.check_every * self.check_every
        return -(-due // self.read_every) * self.read_every

    def _due_for_a_row(self, open_: NDArray[np.bool_], final: bool) -> NDArray[np.bool_]:
        """Of what is undecided, layers at every check; units at so many that a run has about `MOST_ROWS` rows."""
        checks = self._watch_until / self.check_every
        every = max(1, round(len(open_) * checks / MOST_ROWS))
        return open_ & (self.is_layer | final | (self.done // self.check_every % every == 0))

    def _rows(self, found: dict[str, NDArray], separatrix: NDArray, tolerance: NDArray, which: NDArray) -> list[dict]:
        rows, names = [], self.names()
        for s in which:
            values = {k: float(v[s]) for k, v in found.items()}
            rows.append(
                {"step": self.done, "time": self.time}
                | names[s]
                | values
                | {"risk": self.risk, "separatrix": float(separatrix[s]), "tolerance": float(tolerance[s])}
                | {"state": str(self.state[s])}
            )
        return rows

    # --- the physical network ---------------------------------------------------------------------------------------

    def _compact(self, before: NDArray[np.bool_], fold: NDArray) -> None:
        """Make the network physically what `self.kept` says, its gates anew, and let the optimizer follow."""
        self.gates.remove()
        self._slice(before, self.width_multiple, fold=fold)
        self._install()

    def _slice(
        self,
        before: NDArray[np.bool_],
        multiple: int = 1,
        *,
        stay: Sequence[NDArray[np.int64]] | None = None,
        fold: NDArray | None = None,
    ) -> None:
        """Cut the plain network down to `self.kept`.

        Args:
            before: What was kept before, shape (n,).
            multiple: Widths are rounded up to a multiple of this by dead channels.
            stay: Instead, the units that stay at each site, dead ones among them.
            fold: Factors of the weights that read each unit, shape (n,).
        """
        change = cut.Change()
        for number, block in enumerate(self.blocks):
            if before[number] and not self.kept[number]:
                cut.drop_block(self.model, block, change)
        for block, site, spec in self._sites():
            live = self.kept[self.present[site]]
            dead = np.flatnonzero(~live)
            cut.check_dead(self.model, spec, np.flatnonzero(~before[self.present[site]]))
            wanted = np.arange(len(dead)) < -int(live.sum()) % multiple
            fill = dead[wanted if stay is None else np.isin(self.present[site][dead], stay[site])]
            i = block.sites.index(spec)
            if fold is not None and (fold[self.present[site]] != 1.0).any():
                cut.fold_units(self.model, block, i, fold[self.present[site]], change)
            if len(fill):
                cut.silence_units(self.model, block, i, fill.tolist(), change)
            left = np.union1d(np.flatnonzero(live), fill)
            if len(left) < len(live):
                cut.keep_units(self.model, block, i, left.tolist(), change)
            self.present[site] = self.present[site][left]
        change.follow(self.optimizer)

    def _sites(self) -> Iterator[tuple[Block, int, Site]]:
        """The sites that are physically there: their block, number and description."""
        site = 0
        for number, block in enumerate(self.blocks):
            for spec in block.sites:
                if self.kept[number]:
                    yield block, site, spec
                site += 1

    def _install(self) -> None:
        alive, present, layers, sites, site = [], [], [], [], 0
        open_ = self.state == UNDECIDED
        for number, block in enumerate(self.blocks):
            here = self.present[site : site + len(block.sites)]
            site += len(block.sites)
            if self.kept[number]:
                alive.append((number, block))
                present.append(here)
            layers.append(bool(open_[number] and self.kept[number]))
            sites += [torch.from_numpy(u) if self.kept[number] and open_[u].any() else None for u in here]
        self._products.attach(self.model, alive, present)
        self.gates.install(layers, sites)

    def _leave(self) -> None:
        """Take everything out of the model: it is plain from here on."""
        self.finished = True
        self.gates.remove()
        for hook in self._hooks:
            hook.remove()


def rate_ratios(complexity: Complexity, *, nu: float, alpha: float, beta: float, clock: float) -> NDArray:
    """Rate ratio of every structure at the start: useless ones sink from 1 to 0 in 1 / `clock` of ODE time, shape (n,).

    Raises:
        ValueError: if a price is too small to be divided by.
    """
    full = complexity.prices(np.ones(complexity.size), nu=nu, alpha=alpha, beta=beta)
    for kind in (complexity.is_layer, ~complexity.is_layer):  # a price of next to nothing must not make a theta jump
        full[kind] = np.maximum(full[kind], LEAST_OF_MEAN * full[kind].mean())
    with np.errstate(over="ignore"):
        ratios = np.divide(clock, full, out=np.ones(complexity.size), where=full > 0)
    if not np.isfinite(ratios).all():
        raise ValueError(
            f"`nu` must give every gated structure a price that rate_ratio can be divided by; got nu={nu:g}, "
            f"alpha={alpha:g}, rate_ratio={clock:g}. Use a larger nu, or 0 or 1 for an alpha next to them."
        )
    return ratios


def _targets(
    logits: torch.Tensor, gradient: torch.Tensor, scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target distribution behind a mean softmax cross-entropy: softmax(z) - N dL/dz.

    Returns:
        The targets, and whether they were a distribution, as they are not with another loss.
    """
    targets = logits.float().softmax(1) - gradient.float() * scale
    tolerance = 0.05 if logits.dtype != torch.float32 else 1e-3
    fit = ((targets.sum(1) - 1.0).abs().max() <= 10 * tolerance) & (targets.min() >= -tolerance)
    targets = targets.clamp_min(0.0)
    return targets / targets.sum(1, keepdim=True), fit


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers whose steps have no one ODE time."""
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"`optimizer` must be torch.optim.SGD, whose steps have an ODE time; got {type(optimizer).__name__}. Use SGD."
        )
    for name in ("dampening", "maximize"):
        if any(group[name] for group in optimizer.param_groups):
            raise ValueError(
                f"`optimizer` must have no {name}, which ODE time knows nothing of; got one with it. Leave it out."
            )
    for name in ("lr", "momentum"):
        values = {float(group[name]) for group in optimizer.param_groups}
        if len(values) > 1:
            raise ValueError(f"`optimizer` must have one {name}; got {sorted(values)}. Use the same in every group.")


def _step_time(optimizer: torch.optim.Optimizer) -> float:
    """ODE time of one step at the present learning rate, lr / (1 - momentum)."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / (1.0 - group["momentum"])
