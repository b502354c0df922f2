"""Self-check: what a description says about a network is tried on a copy of it before the first step.

With every gate of what is removed at 0, a network must be the one that is left when all of that has been cut. Both are
run in double precision with random parameters and running statistics, which hide nothing, as branches that begin at 0 do.

    print(check(model, example))
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune.describe import consistency, dead
from catode.prune.describe.costs import called, describe
from catode.prune.describe.executed import batch_size, check_counted, executed_by
from catode.prune.describe.protocol import gated_modules
from catode.prune.describe.trial import (
    BatchNorm,
    Lowest,
    bytes_of,
    cuda_devices,
    difference,
    drew,
    evaluating,
    failing_module,
    first_line,
    floats,
    random_like,
    randomise,
    training,
    training_norms,
)
from catode.prune.gated.cut import restrict
from catode.prune.gated.gates import Gates
from catode.prune.gated.heads import adopt
from catode.prune.measure import nests
from catode.prune.measure.probes import tracking_norms
from catode.structures.complexity import Complexity
from catode.structures.description import Block

EXACT = 1e-8  # largest relative difference of what is computed in double precision
# of random weights until every unit was seen to act: in a network without norms, in others, and more while further ones are
LEAST_ROUNDS, ROUNDS, MOST_ROUNDS = 2, 4, 12


@dataclass(frozen=True)
class SelfCheck:
    """Result of a self-check that found nothing wrong.

    Attributes:
        difference: Largest relative difference between a gated network and the one that was cut.
        seconds: Duration.
        model_bytes: Memory of the model's parameters and buffers.
        copied_bytes: Most memory of the parameters and buffers of copies at one time.
        notes: What could not be checked, or only roughly, one line each.
    """

    difference: float
    seconds: float
    model_bytes: int
    copied_bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.copied_bytes / self.model_bytes
        text = f"self-check: differences up to {self.difference:.1e}, {self.seconds:.2f} s, {share:.1f} times the model's memory"
        return "; ".join([text, *self.notes])


class Unchecked(UserWarning):
    """A model that a self-check could not check."""


def check(
    model: nn.Module, example: Any, blocks: Sequence[Block] | None = None, *, padded: int = 1, seed: int = 0
) -> SelfCheck:
    """Check the description of a network on copies of it; the network and the global random state stay as they are.

    Three networks are cut out of it (half of every site; half of the layers, either half; a random part) and compared
    with the gated one, in eval and train mode, in outputs, parameters and MACs. Every gate alone must have an effect.

    Args:
        model: The whole network, without gates.
        example: What it is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        blocks: Its description; None: that of its method ``structures()``.
        padded: Multiple that dead channels are to round up widths to; above 1 they must stay dead.
        seed: Seed of the random weights and inputs.

    Returns:
        What was found. A model that cannot be copied or run like this is not checked: a warning says so, and the notes.

    Raises:
        ValueError: in one line, with the block, site or module that the description gets wrong.
    """
    begin = time.perf_counter()
    blocks = list(model.structures() if blocks is None else blocks)
    consistency.check(model, blocks)
    adopt(model, blocks)
    complexity = describe(model, blocks, example)
    size = bytes_of(model)
    with torch.random.fork_rng(cuda_devices(model)):
        trial = _Trial(model, example, blocks, complexity, seed)
        most = 0.0
        try:
            trial.prepare()
        except _CannotCheck as reason:
            trial.notes.append(f"not checked: {reason}")
            warnings.warn(f"the description of the model is {trial.notes[-1]}.", Unchecked, stacklevel=3)
        else:
            trial.check_calls()
            trial.check_effects()
            if padded > 1:
                run = partial(trial._run, trial.whole, trial.modes[-1], differentiated=True)
                dead.check(trial.whole, trial.inventory, run, padded)
                randomise(trial.whole, seed)
            most = trial.compare_all()
    return SelfCheck(most, time.perf_counter() - begin, size, trial.most_bytes, tuple(trial.notes))


class _CannotCheck(Exception):
    """Why a model cannot be checked."""


class _Trial:
    """Copies of a network, gated and cut, with the same random numbers in them."""

    def __init__(self, model: nn.Module, example: Any, blocks: list[Block], complexity: Complexity, seed: int):
        self.model, self.example, self.blocks, self.complexity = model, example, blocks, complexity
        self.inventory, self.seed = complexity.inventory, seed
        self.dtype, self.tolerance, self.modes = torch.float64, EXACT, (evaluating, training)
        self.whole: nn.Module | None = None
        self.most_bytes, self.notes = 0, []
        self.expected: dict[tuple[bytes, Callable], list[torch.Tensor]] = {}

    def prepare(self) -> None:
        """Find out how the model can be run.

        Raises:
            _CannotCheck: if it cannot be.
        """
        patched = next((name for name, module in self.model.named_modules() if "forward" in vars(module)), None)
        if patched is not None:
            raise _CannotCheck(
                f"a copy would share the forward() that was put into `{patched or type(self.model).__name__}`"
            )
        try:
            self.whole = whole = self._copy()
        except Exception as error:
            raise _CannotCheck(f"it cannot be copied ({first_line(error)})") from None
        try:
            with Lowest() as lowest:
                one = self._run(whole, evaluating)
        except Exception as error:
            self.dtype = next(p.dtype for p in self.model.parameters())
            self.tolerance = torch.finfo(self.dtype).eps ** 0.5
            self.notes.append(f"checked in {self.dtype}, as it does not run in double precision ({first_line(error)})")
            self.whole = whole = self._copy()
            try:
                one = self._run(whole, evaluating)
            except Exception as again:
                raise _CannotCheck(f"a copy with random weights does not run ({first_line(again)})") from None
        else:
            if lowest.dtype is not None:
                self.tolerance = torch.finfo(lowest.dtype).eps ** 0.5
                self.notes.append(f"checked up to {self.tolerance:.0e}, as it computes in {lowest.dtype} inside")
        if not one or not all(tensor.isfinite().all() for tensor in one):
            raise _CannotCheck("with random weights it returns nothing, or numbers that are not finite")
        if difference(one, self._run(whole, evaluating, 1)) > 0:
            raise _CannotCheck("in eval mode it returns something else each time")
        try:
            one = self._run(whole, training)
            random = drew(cuda_devices(self.model)) or difference(one, self._run(whole, training, 1)) > self.tolerance
        except Exception:
            random = True
        if random:
            self.modes = (evaluating, training_norms)
            self.notes.append("random in train mode: there, only the batch norms were checked")

    def check_calls(self) -> None:
        """Make sure that the described modules run, in order, and as often as their blocks.

        Raises:
            ValueError: if not.
        """
        order, hooks = [], []
        parts = [
            (block, {*gated_modules([block]), *(name for site in block.sites for name in site.producers)})
            for block in self.blocks
        ]
        for name in {name for block, inner in parts for name in (block.place, *inner)}:
            hooks.append(self.whole.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name)))
        self._run(self.whole, evaluating)
        for hook in hooks:
            hook.remove()
        for block, inner in parts:
            for name in (block.place, *sorted(inner)):
                if name not in order:
                    raise ValueError(
                        f"`structures()` must name modules that run when the model is called; `{name}` does not. Call the module "
                        "itself, instead of using its weight."
                    )
                if order.count(name) != order.count(block.place):
                    raise ValueError(
                        f"block `{block.name}` must run each of its modules once; `{name}` runs {order.count(name)} times. Use "
                        "modules of their own, or leave the block out."
                    )
        named = [block for block in self.blocks if block.removable]
        ran = sorted(
            named, key=lambda block: order.index(block.reader or block.output if block.branch else block.place)
        )
        if ran != named:
            first, second = next((a.name, b.name) for a, b in zip(named, ran, strict=True) if a is not b)
            raise ValueError(
                f"`structures()` must list the blocks in the order of the forward pass; got `{first}` before `{second}`. Sort them."
            )

    def check_effects(self) -> None:
        """Make sure that every gate alone changes the output.

        Raises:
            ValueError: if one does not.
        """
        silent, normed = self.inventory.removable.copy(), len(tracking_norms(self.whole)) > 0
        gates = self._gates()
        before = 0
        for round in range(MOST_ROUNDS):
            if round:
                randomise(self.whole, self.seed + round, again=True)
            # train mode in every other round: batch norms leave no unit closed by a ReLU for every example
            silent &= ~self._acting(gates, training_norms if round % 2 else evaluating, round)
            # without norms some are closed each time; their slices are those of the others
            if not normed and round + 1 >= LEAST_ROUNDS:
                for units in self.inventory.units:
                    silent[units] &= silent[units].mean() >= 0.5
            if not silent.any() or (round + 1 >= ROUNDS and silent.sum() == before):
                break
            before = silent.sum()
        if round:
            randomise(self.whole, self.seed)
        for number in np.flatnonzero(silent):
            if self._changes(gates, number):
                continue
            name = self.inventory.names()[number]
            unit = f"unit {name['index']} of site `{name['site']}`"
            what = unit if name["kind"] == "unit" else f"block `{name['block']}`"
            raise ValueError(
                f"the gate of {what} must change what the model returns; it does not. Name the modules that read the units as "
                "consumers, and the branch's last module with a weight as output."
            )
        gates.remove()

    def compare_all(self) -> float:
        """Compare gated and cut networks; returns the largest relative difference.

        Raises:
            ValueError: if one is too large, or a count is wrong.
        """
        vertices, most = self._vertices(), 0.0
        with torch.random.fork_rng(cuda_devices(self.whole)):
            every = np.ones(self.inventory.size)
            check_counted(self.model, self.whole, self._example_for, self.complexity.macs(every))
        self._expect(vertices)
        for kept in vertices:
            found = self._compare(kept)
            if isinstance(found, str) or found > self.tolerance:
                self._blame(found)
            most = max(most, found)
        return most

    def _vertices(self) -> list[NDArray[np.bool_]]:
        inventory = self.inventory
        half = np.ones(inventory.size, dtype=bool)
        for units in inventory.units:
            half[units[1::2]] = False
        layers = [np.ones(inventory.size, dtype=bool) for _ in range(2)]
        for first in (0, 1):
            layers[first][first : inventory.layers : 2] = False
        some = np.random.default_rng(self.seed).random(inventory.size) < np.where(inventory.is_layer, 0.7, 0.6)
        every = {kept.tobytes(): kept for kept in map(inventory.close, (half, *layers, some))}
        every.pop(np.ones(inventory.size, dtype=bool).tobytes(), None)  # nothing goes, as of layers where no branch can
        return list(every.values())

    def _expect(self, vertices: Sequence[NDArray[np.bool_]]) -> None:
        """Run the gated network at some vertices."""
        self.whole = self.whole or self._copy()
        gates = self._gates()
        for kept in vertices:
            values = torch.from_numpy(kept.astype(np.float32)).to(gates.draw.device)
            gates.set(values, values)
            for mode in self.modes:
                self.expected[kept.tobytes(), mode] = self._run(self.whole, mode)
        gates.remove()
        self.whole = None  # before the next copy is made

    def _compare(self, kept: NDArray[np.bool_]) -> float | str:
        """Largest relative difference between the gated network at a vertex and the cut one, or what is wrong with the latter."""
        most, small = 0.0, self._copy()
        whole_params = sum(p.numel() for p in small.parameters())
        try:
            restrict(small, self.blocks, self.inventory.record(kept))
            for mode in self.modes:
                with failing_module(small) as failing:
                    found = self._run(small, mode)
                most = max(most, difference(found, self.expected[kept.tobytes(), mode]))
        except Exception as error:
            place = f" at `{failing[0]}`" if "failing" in locals() and failing else ""
            return f"the network fails{place} ({first_line(error)})"
        every, left = np.ones(self.inventory.size), kept.astype(float)
        counted = self.complexity.params(every) - self.complexity.params(left)
        removed = whole_params - sum(p.numel() for p in small.parameters())
        if round(counted) != removed:
            return f"{removed} parameters go, but {round(counted)} are counted"
        executed, expected = self._executed(small), self.complexity.macs(left)
        if abs(executed - expected) > 0.5 + 1e-9 * expected:
            return f"{executed:,} MACs are executed, but {round(expected):,} are counted"
        return most

    def _executed(self, model: nn.Module) -> int:
        """MACs per example that a copy executes."""
        with torch.random.fork_rng(cuda_devices(model)):
            return round(executed_by(model, self._example_for(model)).macs / batch_size(self.example))

    def _example_for(self, model: nn.Module) -> Any:
        """The example in the precision of a model, on its device."""
        like = next(model.parameters())

        def change(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(like.device, like.dtype) if tensor.is_floating_point() else tensor.to(like.device)

        return nests.mapped(self.example, change)

    def _blame(self, found: float | str) -> None:
        """Find the block or site that is to blame, and raise.

        Raises:
            ValueError: always.
        """
        inventory, single = self.inventory, []
        for place in inventory.places:
            kept = np.ones(inventory.size, dtype=bool)
            kept[place.units[1::2] if len(place.units) > 1 else place.units] = False
            single.append((place.site.name, inventory.close(kept)))
        layers = []
        for number, block in enumerate(self.blocks):
            if not block.removable:
                continue
            kept = np.ones(inventory.size, dtype=bool)
            kept[number] = False
            layers.append((block, inventory.close(kept)))
        for block, kept in layers:
            wrong = self._alone(kept)
            if wrong:
                if block.branch:
                    what = block.addend or ", ".join(path for path, _ in block.absent)
                    raise ValueError(
                        f"block `{block.name}` must be `{block.place}` without `{what}` when the gate of its output "
                        f"`{block.output}` is 0; {wrong}. Name the branch's last module with an affine as output."
                    )
                raise ValueError(
                    f"block `{block.name}` must be its shortcut_only() when the gate of its output `{block.output}` is 0; {wrong}. "
                    "Name the branch's last module with an affine as output, and return what is left from shortcut_only()."
                )
        for name, kept in single:
            wrong = self._alone(kept)
            if wrong:
                raise ValueError(
                    f"site `{name}` must name all modules that make or read its units; with half of them cut {wrong}. Add what is "
                    "missing to its producers or consumers, or its parts, or leave the site out."
                )
        raise ValueError(
            f"`structures()` must describe what can be removed; with some blocks and units cut together {_said(found)}. Leave "
            "out what shares modules with others."
        )

    def _alone(self, kept: NDArray[np.bool_]) -> str:
        """What is wrong if this alone is kept, as text; empty for nothing."""
        self._expect([kept])
        found = self._compare(kept)
        return _said(found) if isinstance(found, str) or found > self.tolerance else ""

    def _acting(self, gates: Gates, mode: Callable, round: int) -> NDArray[np.bool_]:
        """Structures whose gates change what their blocks return, by one derivative in each block; shape (n,)."""
        ones = torch.ones_like(gates.keep_prob).requires_grad_()
        gates.draw = gates.keep_prob = ones
        found, busy, hooks = torch.zeros_like(ones), [], []

        def add(ends: list[torch.Tensor]) -> None:
            with torch.enable_grad():
                value = sum((end * torch.randn_like(end)).sum() for end in ends if end.requires_grad)
            if isinstance(value, torch.Tensor):
                (gradient,) = torch.autograd.grad(value, ones)
                found.add_(gradient.abs().nan_to_num(0.0))

        def differentiate(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if busy:
                return
            busy.append(block)
            with torch.enable_grad():
                ends = floats(block(*args, **kwargs))
            busy.clear()
            add(ends)

        for place in dict.fromkeys(block.place for block in self.blocks if block.place):
            module = self.whole.get_submodule(place)
            hooks.append(module.register_forward_hook(differentiate, with_kwargs=True))
        if hooks:
            self._run(self.whole, mode, seed=round)
        for hook in hooks:
            hook.remove()
        if not all(block.place for block in self.blocks):
            add(self._run(self.whole, mode, seed=round, differentiated=True))
        gates.draw = gates.keep_prob = ones.detach()
        return (found > 0).cpu().numpy()

    def _changes(self, gates: Gates, number: int) -> bool:
        """Whether closing one gate changes what the model returns."""
        ones = torch.ones_like(gates.keep_prob)
        other = ones.clone()
        other[number] = 0.0
        for mode in self.modes:
            for seed in range(ROUNDS):
                gates.set(ones, ones)
                before = self._run(self.whole, mode, seed=seed)
                gates.set(other, other)
                if difference(before, self._run(self.whole, mode, seed=seed)) > 0:
                    return True
        return False

    def _gates(self) -> Gates:
        """Gates in the whole copy."""
        gates = Gates(self.whole, self.inventory)
        gates.draw = gates.keep_prob
        gates.install([True] * len(self.blocks), [torch.from_numpy(units) for units in self.inventory.units])
        return gates

    def _copy(self) -> nn.Module:
        """A copy of the model with random parameters and running statistics."""
        own = copy.deepcopy(self.model).requires_grad_(False)
        if next(own.parameters()).device.type not in ("cpu", "cuda"):  # others may have no double precision
            own = own.cpu()
        own = own.to(self.dtype)
        randomise(own, self.seed)
        self.most_bytes = max(self.most_bytes, bytes_of(own))
        return own

    def _run(
        self, model: nn.Module, mode: Callable, number: int = 0, seed: int = 0, differentiated: bool = False
    ) -> list[torch.Tensor]:
        """What a model returns for random examples; its running statistics stay as they are.

        Args:
            model: The model.
            mode: Puts it into a mode.
            number: Another number gives other random numbers inside the model.
            seed: Seed of the examples.
            differentiated: Whether what it returns is to be differentiated.
        """
        mode(model)
        norms = [module for module in model.modules() if isinstance(module, BatchNorm) and module.training]
        tracking = [norm.track_running_stats for norm in norms]
        inputs = random_like(self.example, self.dtype, next(model.parameters()).device, self.seed + seed)
        torch.manual_seed(number)
        buffers = [(b, b._version, b.clone()) for b in model.buffers()]  # spectral norms go on in train mode
        for norm in norms:
            norm.track_running_stats = False
        try:
            with torch.set_grad_enabled(differentiated):
                found = floats(called(model, inputs))
            return found if differentiated else [tensor.detach() for tensor in found]
        finally:
            for norm, flag in zip(norms, tracking, strict=True):
                norm.track_running_stats = flag
            with torch.no_grad():
                for buffer, version, before in buffers:
                    if buffer._version != version:
                        buffer.copy_(before)


def _said(found: float | str) -> str:
    return found if isinstance(found, str) else f"what it returns differs by {found:.1e} of its size"
