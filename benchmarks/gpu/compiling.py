"""Checks of networks that are compiled or captured in CUDA graphs; they take longest, and come last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu import checks, runs
from benchmarks.gpu.units import Finding, Place, unit


@unit("checks", "captured CUDA graph", 40, needs_cuda=True)
def captured_graph(place: Place) -> Finding:
    """Forward and backward pass of a gated network in one captured graph, replayed at other draws, against eager passes.

    The pruner itself is not in it: its hooks and probes run on the host.
    """
    model, (x, y) = checks.network(place), checks.batch(place)
    own, x = checks.to_device(place, model, x)
    y, gates = y.to(place.device), checks.gated(own)
    draws = [checks.random_draw(model, seed).to(place.device) for seed in range(3)]

    def step() -> torch.Tensor:
        loss = F.cross_entropy(own(x), y)
        loss.backward()
        return loss

    def clear() -> None:
        own.zero_grad(set_to_none=True)
        gates.draw.grad = None

    with checks.tf32(False):
        expected = []
        for draw in draws:
            clear()
            gates.set(None, draw)
            expected.append((step().detach().clone(), gates.draw.grad.clone(), own.conv1.weight.grad.clone()))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                clear()
                step()
        torch.cuda.current_stream().wait_stream(side)
        clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        numbers = {"loss": 0.0, "derivative in the gates": 0.0, "gradient": 0.0}
        for draw, wanted in zip(draws, expected, strict=True):
            with torch.no_grad():
                gates.draw.copy_(draw)
            graph.replay()
            found = loss, gates.draw.grad, own.conv1.weight.grad
            for name, one, other in zip(numbers, found, wanted, strict=True):
                numbers[name] = max(numbers[name], checks.difference(one, other))
    return checks.passed(numbers, **dict.fromkeys(numbers, checks.SINGLE))


def _compiled(place: Place, mode: str | None) -> Finding:
    options = {"backend": "aot_eager"} if place.smoke else {"mode": mode}
    torch.compiler.reset()
    calls: dict[str, Callable] = {}

    def compiled(model: nn.Module) -> Callable:
        calls["it"] = torch.compile(model, **options)
        return calls["it"]

    mark = torch.compiler.cudagraph_mark_step_begin if place.cuda else lambda: None

    def every(step: int) -> Any:
        mark()
        return nullcontext()

    with checks.tf32(False):
        eager = checks.trained(place.device, checks.FEW, dense=True, check_every=10**4, **checks.EXACT_ESTIMATORS)
        run = checks.trained(
            place.device,
            checks.FEW,
            dense=True,
            check_every=10**4,
            call=compiled,
            every=every,
            **checks.EXACT_ESTIMATORS,
        )
        model = run.pruner.finish()
        x = torch.randn(5, 3, 8, 8, device=place.device)
        model.eval()
        with torch.no_grad():
            mark()
            compact = checks.difference(calls["it"](x).clone(), model(x))
    numbers = {
        "thetas": checks.apart(run, eager),
        "compact network": compact,
        **checks.sound(run),
    }
    return checks.passed(numbers, thetas=1e-3, **{name: checks.SINGLE for name in numbers if name != "thetas"})


@unit("checks", "torch.compile", 150)
def compiled(place: Place) -> Finding:
    """Thetas of a compiled gated network against those of the eager one, and the compact network when gates are gone."""
    return _compiled(place, None)


@unit("checks", "torch.compile, reduce-overhead", 150, needs_cuda=True)
def reduce_overhead(place: Place) -> Finding:
    """The same with CUDA graphs by PyTorch's compiler."""
    return _compiled(place, "reduce-overhead")


@unit("checks", "trainer, compiled", 150, needs_cuda=True)
def trainer_compiled(place: Place) -> Finding:
    """A dense run whose steps are compiled."""
    return runs.whole(place, nu=0.0, compile=True, epochs=1)
