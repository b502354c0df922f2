"""Several processes that train one network together, each on its share of every batch.

All of them hold the same weights, thetas and masks and draw the same gates. After ``backward()`` one all-reduce averages
the loss and the gradients, flattened into one vector with a checksum of thetas and masks. So parameters may change (a
compaction) or stay without gradient (a block that is skipped) without wrapping the model again, and thetas and masks
are compared at every step at no further cost. `torch.nn.parallel.DistributedDataParallel` would hide the communication
behind the backward pass, but is built for one fixed set of parameters, all of which get gradients.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Disagreement(RuntimeError):
    """Processes that should hold the same thetas, masks or weights do not."""


class Lost(RuntimeError):
    """Another process died or stopped answering."""


@dataclass(frozen=True)
class Group:
    """The processes of a run. Methods over "all processes" must be called by all of them, in the same order.

    Attributes:
        rank: Number of this process.
        size: Number of processes; with one, no method communicates and tensors are returned unchanged.
        local_rank: Number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def place(self, device: str) -> None:
        """Choose this process's own CUDA device for `cuda`; one process takes the one that `device` names.

        Raises:
            ValueError: if `device` is none on which several processes can train, or there is none left for this one.
        """
        if self.size == 1 and device.startswith("cuda:"):
            torch.cuda.set_device(device)  # default device of this process
        if self.size == 1 or device == "cpu":
            return
        if device != "cuda" or not dist.is_nccl_available():
            raise ValueError(
                f"`device` must be cpu, or cuda without a number where PyTorch has NCCL, for {self.size} processes; got "
                f"device={device!r}. Each process takes the device of its own number."
            )
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"`device` must exist for every process; got device='cuda' with {torch.cuda.device_count()} CUDA devices and "
                f"process {self.local_rank} of this machine. Start as many processes as there are devices."
            )
        torch.cuda.set_device(self.local_rank)

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's rows of a batch: every `size`-th one."""
        if self.size == 1:
            return batch
        channels_last = batch.dim() == 4 and batch.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return batch[self.rank :: self.size].contiguous(memory_format=memory_format)

    def rows(self, begin: int, count: int) -> slice:
        """Where this process has the rows `begin` to ``begin + count`` of a whole batch; `count` is a multiple of `size`."""
        first = -(-(begin - self.rank) // self.size)
        return slice(first, first + count // self.size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        if self.size == 1:
            return tensor
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        with _communication():
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over all processes."""
        return tensor if self.size == 1 else self.sum(tensor) / self.size

    def gather(self, thing: Any) -> list:
        """Values of all processes, by rank."""
        things: list = [None] * self.size
        if self.size == 1:
            return [thing]
        with _communication():
            dist.all_gather_object(things, thing)
        return things

    def problem(self, problem: str, alike: Any) -> str:
        """Why the processes cannot start: the first process's problem, or that they differ; empty if they can.

        Args:
            problem: This process's problem; empty for none.
            alike: What must be the same in all, if this process has no problem.
        """
        found = self.gather((problem, alike))
        first = next((own for own, _ in found if own), "")
        if not first and any(own != found[0][1] for _, own in found):
            return (
                f"the {self.size} processes must begin with the same settings, data and checkpoint; got different ones. Start "
                "them with one command line, and give all of them the same files."
            )
        return first

    def join(
        self, parameters: Iterable[nn.Parameter], loss: torch.Tensor, *, checksum: int = 0, step: int = 0
    ) -> torch.Tensor:
        """Average gradients and loss over all processes, in one all-reduce.

        Args:
            parameters: Those whose ``.grad`` becomes the mean.
            loss: Mean loss of this process's share, shape ().
            checksum: Of what must be the same in all processes; its lowest 24 bits are compared.
            step: Number of the step, for the message.

        Returns:
            Mean loss over the whole batch, detached, shape ().

        Raises:
            Disagreement: if the checksums differ.
        """
        loss = loss.detach()
        if self.size == 1:
            return loss
        gradients = [p.grad for p in parameters if p.grad is not None]
        slots = torch.zeros(self.size, device=loss.device)  # one checksum each: adding zeros keeps them exact
        slots[self.rank] = checksum & 0xFFFFFF
        parts = [loss.reshape(1), *(g.reshape(-1) for g in gradients)]
        flat = self.sum(torch.cat([slots, *parts]))
        slots, values = flat[: self.size], flat[self.size :] / self.size
        self._compare(slots.tolist(), "thetas, masks and gate draws", f"before step {step}")
        for gradient, part in zip(gradients, values[1:].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))
        return values[0].clone()  # a view would keep all gradients of the step alive as long as its loss

    def agree(self, model: nn.Module, checksum: int = 0, step: int = 0) -> None:
        """Make sure that all processes hold the same parameters; reads each of them once, on its device.

        Args:
            model: The model.
            checksum: Of what must be the same besides.
            step: Number of the step, for the message.

        Raises:
            Disagreement: if they do not.
        """
        if self.size == 1:
            return
        own = [_bits(parameter) for parameter in model.parameters()]
        weights = torch.stack(own).cpu() if own else torch.zeros(0)
        found = self.gather((checksum, zlib.crc32(weights.numpy())))
        for what, sums in zip(("thetas, masks and gate draws", "weights"), zip(*found, strict=True), strict=True):
            self._compare(list(sums), what, f"at step {step}")

    def settle(self, model: nn.Module, *, step: int = 0) -> None:
        """Average the running statistics of norms over all processes and make sure that the models are then the same.

        Raises:
            Disagreement: if they are not.
        """
        if self.size == 1:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.mean(buffer))
        checksum = 0
        for tensor in model.state_dict().values():
            checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), checksum)
        self._compare(self.gather(checksum), "weights", f"after step {step}")

    def _compare(self, checksums: list, what: str, when: str) -> None:
        wrong = next((rank for rank, own in enumerate(checksums) if own != checksums[0]), None)
        if wrong is not None:
            raise Disagreement(
                f"{what} must be the same in all processes; got different ones in processes 0 and {wrong} {when}. Begin "
                "with the same weights and average the gradients in every step, as Group.join does; or resume from the last "
                "checkpoint with --resume, on processors and software of one kind."
            )


def _bits(parameter: torch.Tensor) -> torch.Tensor:
    """Checksum of a tensor's bits, shape (), on its device."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    values = parameter.detach().contiguous().reshape(-1).view(whole)
    return values.sum(dtype=torch.int64) + 31 * values[::2].sum(dtype=torch.int64)


@contextmanager
def _communication() -> Iterator[None]:
    """Raise errors of communication as `Lost`."""
    try:
        yield
    except Lost:
        raise
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = re.sub(r"^\[\S+\] ", "", reason.split(". ")[0])  # without source location and hints
        raise Lost(f"another process died or stopped answering ({reason})") from error


def refuse_wrapped(model: nn.Module, group: Group) -> None:
    """Refuse a model that DistributedDataParallel holds as well: it expects parameters of fixed shapes.

    Args:
        model: The network.
        group: Processes that train it.

    Raises:
        ValueError: if there is such a wrapper.
    """
    if group.size == 1:
        return
    for thing in gc.get_objects():
        if type(thing) is nn.parallel.DistributedDataParallel and thing.module is model:
            raise ValueError(
                "`model` must not be in DistributedDataParallel, which needs parameters of fixed shapes; got one that is. Call the "
                "network itself, and after backward() call pruner.group.join(model.parameters(), loss)."
            )


def current() -> Group:
    """The processes of torch.distributed's default group, where there is one; else this one alone."""
    if not dist.is_available() or not dist.is_initialized():
        return Group()
    return Group(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined() -> Iterator[Group]:
    """Join the processes that torchrun started, if it did; while they are joined, its stop signal raises `Lost`."""
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        yield current()
        return
    if int(os.environ["WORLD_SIZE"]) == 1:
        yield Group()
        return

    def stop(number: int, frame: object) -> None:
        raise Lost("the launcher stopped it, because another process died or the launcher was told to stop")

    before = signal.signal(signal.SIGTERM, stop)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")
    try:
        yield current()
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


# batch norms over the whole batch


class SyncBatchNorm(nn.SyncBatchNorm):
    """A batch norm over the shares of all processes, of equal size; like PyTorch's, but also on the CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = current()
        if not self.training or group.size == 1 or x.device.type != "cpu":
            return super().forward(x)
        return self._synchronised(x, group)

    @torch.compiler.disable
    def _synchronised(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        y, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps, group)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            count = x.numel() // x.shape[1] * group.size
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), share)
        return y


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with mean and variance over all processes, which it also returns."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        over = [d for d in range(x.dim()) if d != 1]
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, over, correction=0)
        own = torch.stack([mean, var])
        shares = [torch.empty_like(own) for _ in range(group.size)]
        with _communication():
            dist.all_gather(shares, own)
        means, variances = torch.stack(shares).unbind(1)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.over, ctx.group = over, group
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, *_):
        x, weight, mean, inverse = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        gradient = gradient.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        own = torch.stack([gradient.sum(ctx.over), (gradient * normal).sum(ctx.over)])
        both = ctx.group.mean(own) * (x.shape[1] / x.numel())
        scale = inverse if weight is None else inverse * weight
        inward = (gradient - both[0].view(shape) - normal * both[1].view(shape)) * scale.view(shape)
        return (
            inward.to(x.dtype),
            own[1].to(weight.dtype) if ctx.needs_input_grad[1] else None,
            own[0].to(weight.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def synchronise_norms(model: nn.Module) -> None:
    """Replace every batch norm by one over the shares of all processes; same parameters, buffers and names."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm):
                new = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
                new._parameters, new._buffers, new.training = norm._parameters, norm._buffers, norm.training
                setattr(parent, name, new)


def norms_are_shared(model: nn.Module) -> bool:
    """Whether no batch norm of a model takes its statistics from the share of one process alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return all(isinstance(m, nn.SyncBatchNorm) for m in norms)
