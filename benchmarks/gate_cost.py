"""What gates, measuring and checking cost, and what compaction saves: CIFAR ResNets, random images of 32 x 32.

    python -m benchmarks.gate_cost [--arch resnet20] [--quick] [--threads N] [--clock wall|cpu] [--write]

One process; what is compared takes turns step by step, and ratios are taken within a round, so that a drift of the
machine affects all alike. Medians with quartiles. Probes run in the precision of the training step.
CPU time counts the work of all threads: the steadier clock on a machine that others use too.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import add_quick, guarded, hardware, load, markdown, publish, quartiles
from catode.prune.describe.costs import count
from catode.prune.devices.timing import keep_freed_memory
from catode.prune.gated import cut as compaction
from catode.prune.pruner import Pruner
from catode.train import models
from catode.train.settings.commandline import CommandLine
from catode.train.settings.config import Config

BATCH, SIZE, CLASSES = 128, 32, 10
QUICK_BATCH = 2
COMPILED = "compiled, channels_last"
FORMATS = {
    "channels_last": torch.channels_last,
    "NCHW": torch.contiguous_format,
    COMPILED: torch.channels_last,
}
SHARES = (0.5, 0.35)
GATED_LIMIT, PROBE_LIMIT, CHECK_LIMIT, COMPACT_LIMIT = 1.05, 1.15, 0.01, 0.8
TRAINING_IMAGES = 50_000  # of CIFAR-10
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PLAIN, GATED, PADDED = "plain", "gated", "padded to"


@dataclass
class Lane:
    """A network in training, with everything that one of its steps needs.

    Args:
        name: Name in the table.
        model: The network.
        amp: bf16 autocast.
        memory_format: Of weights and images.
        device: Where it trains.
        batch: Images in a step.
        clock: Returns the time in seconds.
    """

    name: str
    model: nn.Module
    amp: bool
    memory_format: torch.memory_format = torch.channels_last
    device: str = "cpu"
    batch: int = BATCH
    clock: Callable[[], float] = time.perf_counter
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.model.to(self.device, memory_format=self.memory_format).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, 3, SIZE, SIZE, generator=generator)
        self.x = x.to(self.device).contiguous(memory_format=self.memory_format)
        self.y = torch.randint(CLASSES, (self.batch,), generator=generator).to(self.device)

    def step(self) -> None:
        """One training step."""
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.model(self.x), self.y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def timed(self, after: Callable[[], object] | None = None) -> float:
        """Seconds of one step, with what follows it."""
        _wait(self.device)
        mark = self.clock()
        self.step()
        if after is not None:
            after()
        _wait(self.device)
        return self.clock() - mark


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def network(arch: str) -> nn.Module:
    """The dense network."""
    torch.manual_seed(0)
    return models.build(arch, in_channels=3, classes=CLASSES)


def preset() -> Config:
    """The preset of CIFAR-10, resolved for its whole training set."""
    config = Config.from_presets(dataset="cifar10", data_dir="unused")
    return config.resolved(TRAINING_IMAGES // config.batch_size * config.epochs)


def pruner_for(lane: Lane, *, settled: bool, **settings: object) -> Pruner:
    """A pruner with the trainer's settings; `settled` means that no theta moves and nothing is checked."""
    config = preset()
    given = dict(estimator=config.estimator, layer_estimator=config.layer_estimator, probe_size=config.probe_size)
    given |= dict(
        layers_per_probe=config.layers_per_probe, measure_every=config.measure_every, nu=config.nu, alpha=config.alpha
    )
    given |= dict(epoch_steps=TRAINING_IMAGES / config.batch_size)
    far = 10**9
    given |= dict(rate_ratio=1.0, steps=far, warmup=far - 1 if settled else 0, check_every=far)
    pruner = Pruner(lane.model, lane.x[:1], optimizer=lane.optimizer, **{**given, **settings})
    if not pruner.started:
        pruner._start()  # a long warm-up would begin without gates
    return pruner


# --- gated steps ----------------------------------------------------------------------------------------------------


def kind_of_next(pruner: Pruner) -> str:
    """What the pruner will do at its next step."""
    schedule, done = pruner.schedule, pruner.state.done
    parts = ["probe"] if done % schedule.measure_every == 0 else []
    if done % schedule.burst_every in schedule.burst:
        parts.append("products")
    return " + ".join([GATED, *parts])


def gated(
    arch: str, amp: bool, cycles: int, batch: int, device: str, clock: Callable[[], float]
) -> tuple[list[list[str]], dict[str, float], float]:
    """Plain and gated steps in turn: rows of the table, the ratio of each kind, and the plain step's seconds."""
    plain, lane = (Lane(name, network(arch), amp, device=device, batch=batch, clock=clock) for name in (PLAIN, GATED))
    pruner = pruner_for(lane, settled=True)
    cycle = math.lcm(pruner.schedule.burst_every, 2 * pruner.schedule.measure_every)  # two kinds of probes take turns
    for _ in range(2):
        plain.step()
        lane.step()
        pruner.step()
    seconds, ratios = defaultdict(list), defaultdict(list)
    own = defaultdict(list)

    def follow() -> None:
        mark = clock()
        pruner.step()
        own[kind].append(clock() - mark)

    for _ in range(cycles * cycle):
        kind = kind_of_next(pruner)
        base = plain.timed()
        one = lane.timed(follow)
        seconds[PLAIN].append(base)
        seconds[kind].append(one)
        ratios[kind].append(one / base)
    medians = {kind: float(np.median(r)) for kind, r in ratios.items()}
    total = sum(map(len, ratios.values()))
    medians["mean over a cycle"] = sum(medians[k] * len(r) / total for k, r in ratios.items())
    precision = "bf16" if amp else "fp32"
    base = quartiles(np.multiply(seconds[PLAIN], 1e3), "{:.0f}")
    rows = [[f"{precision} {PLAIN}", len(seconds[PLAIN]), "", base, "", ""]]
    for kind in sorted(ratios):
        rows.append(
            [
                f"{precision} {kind}",
                len(ratios[kind]),
                f"{len(ratios[kind]) * cycle // total} of {cycle}",
                quartiles(np.multiply(seconds[kind], 1e3), "{:.0f}"),
                quartiles(np.multiply(own[kind], 1e3), "{:.1f}"),
                quartiles(ratios[kind], "{:.3f}"),
            ]
        )
    rows.append([f"{precision} gated, mean over a cycle", total, "", "", "", f"{medians['mean over a cycle']:.3f}"])
    return rows, medians, float(np.median(seconds[PLAIN]))


# --- checks ---------------------------------------------------------------------------------------------------------


def checks(arch: str, number: int, device: str, clock: Callable[[], float]) -> tuple[list[float], int, str]:
    """Seconds of real checks while a network is pruned (small batch: a check does not see the images).

    Returns:
        Seconds of each check, the default steps between checks, and what the checks did.
    """
    every, measured = 20, []
    lane = Lane("checked", network(arch), False, device=device, batch=8)
    steps = every * (number + 2)
    pruner = pruner_for(lane, settled=False, nu=20.0, check_every=every, steps=steps, warmup=every, probe_size=4)
    inner = pruner._check

    def timed(*args: object, **more: object):
        _wait(device)
        mark = clock()
        check = inner(*args, **more)
        _wait(device)
        if not more.get("final"):
            measured.append(clock() - mark)
        return check

    pruner._check = timed
    removed = decided = 0
    while not pruner.finished and len(measured) < number:
        before = pruner.undecided
        lane.step()
        check = pruner.step()
        if check is not None:
            removed, decided = removed + check.removed, decided + before - pruner.undecided
    what = f"{decided} structures decided and {removed} removed meanwhile, compaction included"
    return measured, preset().check_every, what


# --- compacted steps ------------------------------------------------------------------------------------------------


def narrowed(arch: str, share: float, multiple: int = 1, halvings: int = 20) -> nn.Module:
    """A network cut by the pruner's own compaction to a share of its MACs.

    Args:
        arch: Its architecture.
        share: MACs left, dead channels not counted.
        multiple: Widths are odd, as pruning leaves them; dead channels fill them up to this multiple.
        halvings: Bisection steps for the factor on the widths.
    """
    widths_of = np.random.default_rng(0)
    noise = widths_of.uniform(0.6, 1.4, len(network(arch).structures()))
    example = torch.zeros(1, 3, SIZE, SIZE)
    whole = count(network(arch), example).macs

    def cut(level: float, multiple: int) -> nn.Module:
        model = network(arch)
        for block, factor in zip(model.structures(), noise, strict=True):
            full = block.sites[0].width
            width = min(full - 1, int(level * factor * full)) | 1
            padded = min(full, -(-width // multiple) * multiple)
            change = compaction.keep_units(model, block.sites[0], range(padded))
            compaction.silence_units(model, block.sites[0], range(width, padded), change)
        return model

    low, high = 0.0, 2.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if count(cut(middle, 1), example).macs > share * whole else (middle, high)
    return cut(low, multiple)


def shallower(arch: str) -> nn.Module:
    """The network without every second residual branch."""
    model = network(arch)
    for block in model.structures()[::2]:
        compaction.drop_block(model, block)
    return model


def compacted(
    arch: str, amp: bool, layout: str, rounds: int, batch: int, device: str, clock: Callable[[], float]
) -> tuple[list[list[str]], list[tuple[str, float]], str]:
    """Dense and compacted steps in turn: rows of the table, ratios, and a profile where compaction does not pay."""
    precision, example = "bf16" if amp else "fp32", torch.zeros(1, 3, SIZE, SIZE)
    whole = count(network(arch), example).macs
    makes = {"dense": network(arch)}
    multiple = preset().width_multiple
    halvings = {"halvings": 3} if rounds == 1 else {}
    makes["every second layer gone"] = shallower(arch)
    for share in SHARES[: 1 if rounds == 1 or layout == COMPILED else None]:
        makes[f"{share:.0%}, odd widths"] = narrowed(arch, share, **halvings)
        makes[f"{share:.0%}, {PADDED} {multiple}"] = narrowed(arch, share, multiple, **halvings)
    macs = {name: count(model, example).macs / whole for name, model in makes.items()}
    lanes = [Lane(name, model, amp, FORMATS[layout], device, batch, clock=clock) for name, model in makes.items()]
    if layout == COMPILED:
        for lane in lanes:
            lane.model = torch.compile(lane.model)
    for lane in lanes:
        for _ in range(2):
            lane.step()
    seconds = {lane.name: [] for lane in lanes}
    for _ in range(rounds):
        for lane in lanes:
            seconds[lane.name].append(lane.timed())
    rows, ratios = [], []
    for lane in lanes:
        ratio = np.divide(seconds[lane.name], seconds["dense"])
        rows.append(
            [
                f"{precision} {layout} {lane.name}",
                f"{macs[lane.name]:.2f}",
                quartiles(np.multiply(seconds[lane.name], 1e3), "{:.0f}"),
                quartiles(ratio) if lane.name != "dense" else "",
            ]
        )
        if PADDED in lane.name:  # what the trainer does; the odd widths show why
            ratios.append((f"{precision} {layout} {lane.name}", float(np.median(ratio))))
    if rounds == 1 or layout == COMPILED:  # whose operators have names of their own
        return rows, ratios, ""
    slow = [lane for lane in lanes[1:] if np.median(np.divide(seconds[lane.name], seconds["dense"])) > COMPACT_LIMIT]
    profile = "" if not slow else _profiles(f"{precision} {layout}", [lanes[0], *slow], device)
    return rows, ratios, profile


def _profiles(title: str, lanes: Sequence[Lane], device: str, steps: int = 3, top: int = 6) -> str:
    """Self time of the most expensive operators, ms a step, side by side."""
    cuda = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    found: dict[str, dict[str, float]] = {}
    for lane in lanes:
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(steps):
                lane.step()
            _wait(device)
        times = defaultdict(float)
        for event in profiler.key_averages():
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[event.key] += own / steps / 1e3
        found[lane.name] = times
    names = {name for times in found.values() for name in sorted(times, key=times.get, reverse=True)[:top]}
    order = sorted(names, key=lambda name: max(times[name] for times in found.values()), reverse=True)
    rows = [[f"`{name}`", *(f"{found[lane.name][name]:.0f}" for lane in lanes)] for name in order]
    rows.append(["all operators", *(f"{sum(found[lane.name].values()):.0f}" for lane in lanes)])
    return f"Profile, {title}: self time by operator, ms a step\n\n" + markdown(
        ["operator", *(lane.name for lane in lanes)], rows
    )


# --- command line ---------------------------------------------------------------------------------------------------


def _verdict(what: str, value: float, limit: float) -> str:
    return f"- {'yes' if value <= limit else 'NO'}: {what}: {value:.3g} (at most {limit:g})"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.gate_cost", description=__doc__.splitlines()[0])
    nets = [name for name, own in models.ARCHITECTURES.items() if own.stem == "cifar"]
    parser.add_argument("--arch", default="resnet20", choices=nets, help="the network (resnet20)")
    add_quick(parser)
    parser.add_argument("--rounds", type=int, help="rounds of the compacted steps (15)")
    parser.add_argument("--cycles", type=int, help="cycles of the pruner's measuring (8)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall time, or CPU time on a shared machine")
    parser.add_argument("--only", choices=("gated", "check", "compact"), help="one part alone, in a file of its own")
    parser.add_argument("--write", action="store_true", help="write a file under benchmarks/results/")
    args = parser.parse_args(argv)
    clock, device = CLOCKS[args.clock], args.device
    if args.clock == "cpu" and device != "cpu":
        raise ValueError(f"`clock` must be wall on device={device!r}, where the CPU only waits; got clock='cpu'.")
    rounds, cycles, batch = args.rounds or 15, args.cycles or 8, BATCH
    if args.quick:
        rounds, cycles, batch = 1, 1, QUICK_BATCH
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    began, before = time.perf_counter(), load()
    parts, verdicts = [], []
    plain_seconds = None
    if args.only in (None, "gated"):
        rows = []
        for amp in (False, True):
            more, ratios, seconds = gated(args.arch, amp, cycles, batch, device, clock)
            rows += more
            plain_seconds = seconds if plain_seconds is None else min(plain_seconds, seconds)
            precision = "bf16" if amp else "fp32"
            probes = [v for k, v in ratios.items() if "probe" in k]
            verdicts.append(_verdict(f"{precision} gated step / plain step", ratios.get(GATED, np.nan), GATED_LIMIT))
            verdicts.append(_verdict(f"{precision} step that measures benefits / plain step", max(probes), PROBE_LIMIT))
        header = ["channels_last", "n", "share of steps", "ms a step", "ms in Pruner.step", "ratio to plain"]
        parts += ["### Gated steps, every gate undecided", "", markdown(header, rows), ""]
    if args.only in (None, "check"):
        seconds, every, what = checks(args.arch, 2 if args.quick else 20, device, clock)
        if plain_seconds is None:
            lane = Lane(PLAIN, network(args.arch), False, device=device, batch=batch, clock=clock)
            plain_seconds = float(np.median([lane.timed() for _ in range(5)][2:]))
        share = float(np.mean(seconds)) / (every * plain_seconds)
        times = np.multiply(seconds, 1e3)
        rows = [[quartiles(times, "{:.1f}"), f"{times.max():.1f}", len(times), f"{share:.2%}"]]
        header = ["ms a check", "slowest", "n", f"mean, share of {every} plain steps (the faster precision)"]
        parts += ["### Checks", "", markdown(header, rows), "", f"{what[0].upper()}{what[1:]}.", ""]
        verdicts.append(_verdict("check / training time", share, CHECK_LIMIT))
    if args.only in (None, "compact"):
        rows, profiles = [], []
        for amp in (False, True):
            for layout in list(FORMATS)[: 1 if args.quick else None]:
                more, ratios, profile = compacted(args.arch, amp, layout, rounds, batch, device, clock)
                rows += more
                profiles += [profile, ""] if profile else []
                worst = max(ratios, key=lambda r: r[1])
                verdicts.append(_verdict(f"compacted / dense step, worst of {worst[0]}", worst[1], COMPACT_LIMIT))
        header = ["network", "MACs executed", "ms a step", "ratio to dense"]
        parts += ["### Compacted steps", "", markdown(header, rows), "", *profiles]
    title = (
        f"{args.arch}, batch {batch}, random images of {SIZE} x {SIZE}, {device}; {hardware(device)}; {before} at the start, "
        f"{load()} at the end; {time.perf_counter() - began:.0f} s, {args.clock} time. Medians (quartiles), steps taken in turn"
    )
    publish(
        "_".join(["gate_cost", *([args.arch] if args.arch != "resnet20" else []), *([args.only] if args.only else [])]),
        "\n".join([title + ".", "", *parts, *verdicts]),
        args.write,
    )


if __name__ == "__main__":
    guarded(main)
