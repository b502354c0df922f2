"""What training tells about every structure: pooled means with confidence limits, gradient products, drift.

Numbers of structures are those of `catode.complexity`; arrays have shape (n,). Everything forgets exponentially, because
the network changes while it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import nn

from catode.train.structure import Block
from catode.train.transfer import at_once, exact, upload

LEAST_EVIDENCE = 8.0  # effective observations of benefit and gain before a theta moves or anything is decided


class Pool:
    """Exponentially weighted mean and variance of repeated observations of n quantities.

    Args:
        size: Number of quantities.
        window: Observations after which a weight has fallen to 1/e, one number or shape (n,).
    """

    def __init__(self, size: int, window: float | NDArray):
        self._forget = 1.0 - 1.0 / window
        self._w, self._w2, self._s, self._s2 = np.zeros((4, size))

    def state(self) -> torch.Tensor:
        """Everything remembered, shape (4, n)."""
        return torch.from_numpy(np.stack([self._w, self._w2, self._s, self._s2]))

    def restore(self, state: torch.Tensor) -> None:
        """Take up a `state`."""
        self._w, self._w2, self._s, self._s2 = state.numpy().copy()

    def add(self, values: NDArray, seen: NDArray[np.bool_]) -> None:
        """Take in one observation of each quantity in `seen`."""
        for total, value in ((self._w, 1.0), (self._s, values), (self._s2, np.square(values))):
            np.copyto(total, self._forget * total + value, where=seen)
        np.copyto(self._w2, self._forget**2 * self._w2 + 1.0, where=seen)

    @property
    def count(self) -> NDArray:
        """Effective number of observations, at most about twice the window."""
        return np.divide(self._w**2, self._w2, out=np.zeros_like(self._w), where=self._w2 > 0)

    @property
    def weight(self) -> NDArray:
        """Memory in observations: as many as were seen at first, the window in the end."""
        return self._w

    @property
    def mean(self) -> NDArray:
        """Weighted mean; 0 where nothing was seen."""
        return np.divide(self._s, self._w, out=np.zeros_like(self._w), where=self._w > 0)

    @property
    def variance(self) -> NDArray:
        """Variance of one observation; infinite below two effective observations."""
        count = self.count
        spread = np.divide(self._s2, self._w, out=np.zeros_like(self._w), where=self._w > 0) - self.mean**2
        enough = count > 1.5
        return np.where(enough, np.maximum(spread, 0.0) * count / np.maximum(count - 1.0, 0.5), np.inf)

    @property
    def error(self) -> NDArray:
        """Standard error of the mean, observations taken as independent; infinite where unknown."""
        return np.sqrt(self.variance / np.maximum(self.count, 1e-12))


class Evidence:
    """What the estimates of L1 - L0 tell about the benefits: level, noise, trend and wandering.

    Args:
        window: Memory of each structure's pools, in estimates, shape (n,).
        curvature_window: Memory of the curvature's pool, in probes.
        corrected: Structures whose estimates contain half the pooled curvature, shape (n,).
        risk: Risk of the confidence limits.

    Attributes:
        curvature: Pool of d2L/dxi2, filled by the probes.
    """

    def __init__(self, window: NDArray, *, curvature_window: float, corrected: NDArray[np.bool_], risk: float):
        n = len(window)
        self.z = float(ndtri(1.0 - risk))
        self.corrected = corrected
        self._benefit, self._slow, self._when, self._slow_when = (
            Pool(n, w) for w in (window, 3 * window, window, 3 * window)
        )
        self._elapsed = Pool(n, window)
        self._estimate, self._successive = Pool(n, window), Pool(n, window)
        self._last = np.full(n, np.nan)
        self.curvature = Pool(n, curvature_window)

    def _pools(self) -> list[Pool]:
        level, trend = [self._benefit, self._slow], [self._when, self._slow_when]
        return [*level, *trend, self._elapsed, self._estimate, self._successive, self.curvature]

    def state(self) -> dict:
        """Everything remembered."""
        return {"pools": [pool.state() for pool in self._pools()], "last": torch.from_numpy(self._last.copy())}

    def restore(self, state: dict) -> None:
        """Take up a `state`."""
        for pool, own in zip(self._pools(), state["pools"], strict=True):
            pool.restore(own)
        self._last = state["last"].numpy().copy()

    def add(self, estimate: NDArray, seen: NDArray[np.bool_], time: float, elapsed: NDArray) -> None:
        """Take in one estimate of L1 - L0 of each structure in `seen`.

        Args:
            estimate: Estimates, nats, shape (n,).
            seen: Which structures have one, shape (n,).
            time: ODE time.
            elapsed: ODE time since each structure's last estimate, shape (n,).
        """
        self._estimate.add(estimate, seen)
        follows = seen & ~np.isnan(self._last)
        self._successive.add(np.where(follows, estimate * self._last, 0.0), follows)
        self._last = np.where(seen, estimate, self._last)
        self._elapsed.add(elapsed, seen)
        now = np.full_like(elapsed, time)
        for pool, value in (
            (self._benefit, -estimate),
            (self._slow, -estimate),
            (self._when, now),
            (self._slow_when, now),
        ):
            pool.add(value, seen)

    @property
    def enough(self) -> NDArray[np.bool_]:
        """Whether there are estimates enough to act on."""
        return self._benefit.count >= LEAST_EVIDENCE

    @property
    def benefit(self) -> NDArray:
        """Pooled benefit, nats."""
        return self._benefit.mean

    @property
    def step_time(self) -> NDArray:
        """Mean ODE time between two estimates."""
        return self._elapsed.mean

    def memory(self) -> NDArray:
        """Time constant of the pooled benefit, ODE time."""
        return self._estimate.weight * self._elapsed.mean

    def limits(self) -> tuple[NDArray, NDArray]:
        """Lower and upper limits of the benefits at the stated risk, shape (n,) each."""
        error = np.sqrt(self._benefit.error**2 + np.where(self.corrected, 0.25 * self.curvature.error**2, 0.0))
        return self._benefit.mean - self.z * error, self._benefit.mean + self.z * error

    def variance(self) -> NDArray:
        """Upper limit of the variance of one estimate."""
        return self._estimate.variance * (1.0 + self.z * np.sqrt(2.0 / np.maximum(self._estimate.count, 1.0)))

    def benefit_noise(self) -> NDArray:
        """Upper limit of the benefit's own diffusion sigma_b, nats per sqrt(time), from its realised wandering.

        The draws' noise is independent from step to step, the benefit is not: the covariance of successive estimates is
        the variance of the benefit within the pool's memory T, sigma_b^2 T / 2 for a random walk. It contains what the
        noise of *all* weights does to the benefit.
        """
        wander = self._successive.mean - self._estimate.mean**2 + self.z * self._successive.error
        elapsed = self._elapsed.mean
        return np.sqrt(2.0 * np.maximum(wander, 0.0) / np.maximum(self._estimate.weight * elapsed, 1e-12))

    def slope(self) -> tuple[NDArray, NDArray]:
        """Growth of the benefits, nats/time, and its standard error, from a fast and a slow pool."""
        span = self._when.mean - self._slow_when.mean
        known = span > 0.0
        span = np.where(known, span, 1.0)
        error = np.where(known, np.hypot(self._benefit.error, self._slow.error) / span, np.inf)
        return np.where(known, (self._benefit.mean - self._slow.mean) / span, 0.0), error


class GradientProducts:
    """Unbiased squared gradient norms of every structure from products of *different* batches.

    ``g_t . g_{t+1}`` of two independent batches has mean |grad L|^2, while |g_t|^2 would contain the noise. ``w . g``
    gives the decay of the benefit.

    Args:
        size: Number of structures.
        window: Memory of the pools, in bursts of three steps.
        put: What to do with a function and the tensors of the device whose numbers it wants; see `catode.train.transfer`.
    """

    def __init__(self, size: int, window: float, put: Callable[..., None] = at_once):
        self.size, self._put = size, put
        self.gain, self.weight_gradient = Pool(size, window), Pool(size, window)
        self._parameters: list[nn.Parameter] = []
        self._layers: list[tuple[int, slice]] = []
        self._axes: list[list[tuple[int, torch.Tensor]]] = []
        self.begin()

    def attach(self, model: nn.Module, blocks: Sequence[tuple[int, Block]], units: Sequence[Sequence[NDArray]]) -> None:
        """Learn which weight belongs to which structures. The model must be plain at this moment.

        Args:
            model: The network.
            blocks: The blocks that are still there, with their layer's number.
            units: For each of them and each of its sites, the numbers of the units now present.
        """
        self._parameters, self._layers, self._axes, start = [], [], [], 0
        self.begin()
        for (number, block), present in zip(blocks, units, strict=True):
            numbers = [upload(torch.from_numpy(a), next(model.parameters()).device) for a in present]
            for name, module in model.get_submodule(block.name).named_modules(prefix=block.name):
                if any(name == f or name.startswith(f + ".") for f in block.fixed):
                    continue
                for key, parameter in sorted(module.named_parameters(recurse=False)):  # gates change the order
                    axes = [(0, own) for site, own in zip(block.sites, numbers, strict=True) if name in site.producers]
                    if key == "weight":
                        axes += [
                            (1, own) for site, own in zip(block.sites, numbers, strict=True) if name in site.consumers
                        ]
                    self._parameters.append(parameter)
                    self._axes.append(axes)
            stop = sum(p.numel() for p in self._parameters)
            self._layers.append((number, slice(start, stop)))
            start = stop

    def begin(self) -> None:
        """Begin a burst of three steps."""
        self._burst: list[tuple[torch.Tensor, NDArray, NDArray]] = []
        self._weights: torch.Tensor | None = None

    def state(self) -> dict:
        """Everything remembered, the burst under way included."""
        return {
            "gain": self.gain.state(),
            "weight_gradient": self.weight_gradient.state(),
            "burst": [[gradient.cpu(), *map(torch.from_numpy, marks)] for gradient, *marks in self._burst],
            "weights": None if self._weights is None else self._weights.cpu(),
        }

    def restore(self, state: dict) -> None:
        """Take up a `state`; the network must be attached as it was then."""
        self.gain.restore(state["gain"])
        self.weight_gradient.restore(state["weight_gradient"])
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._burst = [(upload(g, device), *(mark.numpy() for mark in marks)) for g, *marks in state["burst"]]
        self._weights = None if state["weights"] is None else upload(state["weights"], device)

    def note_weights(self) -> None:
        """Remember the weights that the next step's gradient is taken at; call it after the optimizer's step."""
        if self._parameters:
            self._weights = torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def add(self, draw: NDArray) -> None:
        """Take in the gradients of one step, after the optimizer's; call it on three steps close to each other.

        Args:
            draw: Gate values of the step (their means over the batch, for gates of single examples), shape (n,). The
                gradient of a gated weight carries its gate, which is divided out.
        """
        if not self._parameters or any(p.grad is None for p in self._parameters):
            return
        on = draw > 0.5
        scale = np.where(on, draw, 1.0)
        gradient = torch.cat([p.grad.reshape(-1) for p in self._parameters])
        wide = exact(gradient.device)
        if self._weights is not None:
            take = partial(self._take, self.weight_gradient, on, 1.0, [scale])
            self._put(take, self._sum(self._weights.to(wide) * gradient.to(wide)))
            self._weights = None
        self._burst.append((gradient, on, scale))
        if len(self._burst) == 3:
            gradients, (on1, on2, on3), (s1, s2, s3) = zip(*self._burst, strict=True)
            g1, g2, g3 = (g.to(wide) for g in gradients)
            take = partial(self._take, self.gain, on1 & on2 & on3, 3.0)
            if all((s == 1.0).all() for s in (s1, s2, s3)):
                self._put(partial(take, [1.0]), self._sum(g1 * g2 + g2 * g3 + g1 * g3))
            else:
                scales = [s1 * s2, s2 * s3, s1 * s3]
                self._put(partial(take, scales), *map(self._sum, (g1 * g2, g2 * g3, g1 * g3)))
            self._burst = []

    def _take(
        self, pool: Pool, seen: NDArray[np.bool_], number: float, scales: Sequence[NDArray], *sums: NDArray
    ) -> None:
        """Pool the mean of `number` products; a gradient that overflowed tells nothing."""
        values = sum(part / scale for part, scale in zip(sums, scales, strict=True)) / number
        pool.add(values, seen & np.isfinite(values))

    def _sum(self, products: torch.Tensor) -> torch.Tensor:
        """Sums over the weights of each structure, shape (n,); in the same order every time."""
        sums = products.new_zeros(self.size)
        for number, weights in self._layers:
            sums[number] = products[weights].sum()
        parts = products.split([p.numel() for p in self._parameters])
        for part, parameter, axes in zip(parts, self._parameters, self._axes, strict=True):
            for axis, numbers in axes:
                other = [k for k in range(parameter.dim()) if k != axis]
                sums.index_add_(0, numbers, part.view(parameter.shape).sum(other) if other else part)
        return sums


def summary(
    evidence: Evidence,
    products: GradientProducts,
    *,
    keep_prob: NDArray,
    price: NDArray,
    rate_ratio: NDArray,
    weight_decay: float,
) -> dict[str, NDArray]:
    """Every quantity of THEORY section 5 that a decision needs, conservative at the evidence's risk.

    Args:
        evidence: About the benefits.
        products: About the gradients.
        keep_prob: theta, shape (n,).
        price: Positive prices, nats, shape (n,).
        rate_ratio: Speeds of theta, 1/(nats time), shape (n,).
        weight_decay: The least of the optimizer's groups, 1/time.

    Returns:
        Arrays of shape (n,) by the names of a run's structures.csv; infinite where nothing is known yet.
    """
    z, (lower, upper), (slope, slope_error) = evidence.z, evidence.limits(), evidence.slope()
    gain = np.maximum(products.gain.mean, 0.0) + z * products.gain.error
    # growth of the benefit beyond what the gain of its own weights explains
    own = keep_prob * np.maximum(products.gain.mean - z * products.gain.error, 0.0)
    drift = np.maximum(slope + z * slope_error - np.where(np.isfinite(own), own, 0.0), 0.0)
    pull = products.weight_gradient
    decay = weight_decay * np.maximum(-(pull.mean + z * pull.error), 0.0) / np.maximum(upper, price)
    elapsed = evidence.step_time
    return {
        "keep_prob": keep_prob,
        "benefit": evidence.benefit,
        "benefit_upper": upper,
        "benefit_lower": lower,
        "price": price,
        "gain": gain,
        "decay": np.where(decay * price > drift, decay, 0.0),  # a lower limit; 0 is always one
        "rate_ratio": rate_ratio,
        "noise": rate_ratio * np.sqrt(np.where(elapsed > 0.0, elapsed, 1.0) * evidence.variance()),
        "benefit_noise": evidence.benefit_noise(),
        "drift": drift,
        "step_time": elapsed,
    }
