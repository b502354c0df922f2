"""How fast starts are labelled, how accurate the labels are, and what each further digit costs.

    python -m benchmarks.theory [--quick] [--write] [--peers FOLDER]

Starts a second on one core: the grid's size over the CPU time of the process, best of several rounds (with median and
spread), without the compilation in the first call. A busy machine also slows CPU time, so the load is printed.
Labels count as wrong where they are missing or differ from the closed form of docs/mathematics.md section 4.2, and no
wrong one may lie further than a band from the separatrix.
Peers solve the same problem with the same tolerances: theta leaving [0, 1] ends a start, by an event where the library
has them and by a field that stops where it has not. They are measured only where they can be imported; --peers names a
site-packages folder to look in after this environment's own. All run on one thread.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.common import add_quick, guarded, hardware, load, markdown, publish, publish_picture, quartiles
from catode.theory import UnitSystem
from catode.theory.basins import UNDECIDED, basins_of_attraction
from catode.theory.flow.batch import Batch, integrate_batch
from catode.theory.systems.box import BoxSystem
from catode.train.settings.commandline import CommandLine

UNIT = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
BAND, HORIZON = 1e-3, 200.0
LABELLING = 1e-4  # tolerance of the labelling that is compared with the goals
GRID_GOAL, SEPARATRIX_GOAL, CUBE_GOAL, PEER_GOAL = 1e6, 5e7, 3e5, 10.0


@dataclass(frozen=True)
class Timing:
    """Seconds of CPU time of one job, round by round, the first call's overhead separately."""

    seconds: np.ndarray
    first: float
    result: object

    def rate(self, n: int) -> float:
        """Starts a second in the best round."""
        return n / self.seconds.min()


def timed(job: Callable[[], object], rounds: int) -> Timing:
    """Run a job once to compile, then `rounds` times."""
    mark = time.process_time()
    job()
    first = time.process_time() - mark
    seconds = []
    for _ in range(rounds):
        mark = time.process_time()
        result = job()
        seconds.append(time.process_time() - mark)
    return Timing(np.array(seconds), max(first - min(seconds), 0.0), result)


def first_calls() -> tuple[float, float]:
    """CPU seconds of the first call in a fresh process: with an empty cache of compiled code, then with a filled one."""
    code = (
        "import time; from benchmarks.theory import starts, ours; few = starts(10); mark = time.process_time(); "
        "ours(few, 1e-4, 1); print(time.process_time() - mark)"
    )
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"NUMBA_CACHE_DIR": folder}
        runs = [subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True) for _ in range(2)]
    for run in runs:
        if run.returncode:
            raise OSError(f"The first call failed in a fresh process: {run.stderr.strip().splitlines()[-1]}")
    cold, warm = (float(run.stdout) for run in runs)
    return cold, warm


def square(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Axes of an n x n grid of 4.2 with the saddle well inside."""
    return np.linspace(0.0, 5.0 * UNIT.saddle[0], n), np.linspace(0.0, 1.0, n)


def starts(n: int) -> np.ndarray:
    """The states of `square`, shape (n^2, 2)."""
    return np.stack(np.meshgrid(*square(n), indexing="ij"), axis=-1).reshape(-1, 2)


def labels(batch: Batch) -> np.ndarray:
    """0 for pruned, 1 for kept, -1 for undecided, as in `basins_of_attraction`."""
    return np.select([batch.statuses == "pruned", batch.statuses == "kept"], [0, 1], UNDECIDED)


def judge(found: np.ndarray, states: np.ndarray) -> tuple[int, int, float]:
    """Wrong or missing labels, those outside the band, and the largest distance of one from the separatrix."""
    wrong = found != np.where(UNIT.in_basin(states), 0, 1)
    distance = np.abs(states[:, 1] - UNIT.separatrix(states[:, 0]))
    return int(wrong.sum()), int((wrong & (distance > BAND)).sum()), float(distance[wrong].max(initial=0.0))


def _not_between(system: BoxSystem, axes: Sequence[np.ndarray], found: np.ndarray) -> int:
    """How many undecided starts are not between labels: those around them, a tolerance away, all have one more exactly."""
    here = np.stack([axis[where] for axis, where in zip(axes, np.nonzero(found < 0), strict=True)], axis=-1)
    reach = LABELLING * (np.abs(here) + 1e-2)
    around = here[:, None] + reach[:, None] * np.concatenate([np.eye(len(axes)), -np.eye(len(axes))])
    states = system.project(around.reshape(-1, len(axes)))
    exact = integrate_batch(system, states, HORIZON, absorbing=True, rtol=1e-9, atol=1e-11) if len(here) else None
    sides = labels(exact).reshape(len(here), -1) if len(here) else np.empty((0, 1))
    return int((sides.min(axis=1) == sides.max(axis=1)).sum())


def cube() -> BoxSystem:
    """A unit by its two norms and theta."""
    return BoxSystem.from_expressions(
        "x, y, theta",
        "-0.1*x + 0.5*theta*y, -0.1*y + 0.5*theta*x, 1.0*(0.5*x*y - 0.1)",
        lower=(0, 0, 0),
        upper=(np.inf, np.inf, 1),
    )


def ours(states: np.ndarray, tolerance: float, rounds: int) -> Timing:
    """`integrate_batch` on 4.2."""
    settings = {"rtol": tolerance, "atol": 1e-2 * tolerance, "absorbing": True}
    return timed(lambda: integrate_batch(UNIT, states, HORIZON, **settings), rounds)


def diffrax_labels(states: np.ndarray, tolerance: float, rounds: int) -> tuple[Timing, np.ndarray]:
    """diffrax: Tsit5 under vmap and jit, with an event."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import diffrax
    import jax.numpy as jnp

    g, decay, rho, kappa = UNIT.price, UNIT.weight_decay, UNIT.rate_ratio, UNIT.benefit_slope

    def field(t, y, args):
        u, theta = y
        return jnp.stack([2.0 * u * (kappa * theta - decay), rho * (0.5 * kappa * u - g)])

    term = diffrax.ODETerm(field)
    out = diffrax.Event(lambda t, y, args, **_: (y[1] < 0.0) | (y[1] > 1.0))
    control = diffrax.PIDController(rtol=tolerance, atol=1e-2 * tolerance)

    def label(y):
        solution = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, HORIZON, None, y, stepsize_controller=control, event=out, throw=False
        )
        return jnp.where(solution.ys[-1, 1] < 0.0, 0, jnp.where(solution.ys[-1, 1] > 1.0, 1, UNDECIDED))

    many, states = jax.jit(jax.vmap(label)), jnp.asarray(states)
    timing = timed(lambda: many(states).block_until_ready(), rounds)
    return timing, np.asarray(timing.result)


def torchode_labels(states: np.ndarray, tolerance: float, rounds: int) -> tuple[Timing, np.ndarray]:
    """torchode: Tsit5 with a step size of its own for each start; it has no events, so the field stops outside."""
    import torch
    import torchode

    g, decay, rho, kappa = UNIT.price, UNIT.weight_decay, UNIT.rate_ratio, UNIT.benefit_slope

    def field(t, y):
        u, theta = y[:, 0], y[:, 1]
        inside = ((theta >= 0.0) & (theta <= 1.0)).to(y.dtype)
        return inside[:, None] * torch.stack([2.0 * u * (kappa * theta - decay), rho * (0.5 * kappa * u - g)], dim=1)

    term = torchode.ODETerm(field)
    control = torchode.IntegralController(atol=1e-2 * tolerance, rtol=tolerance, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), control)
    y = torch.from_numpy(states)
    ends = torch.tensor([0.0, HORIZON], dtype=y.dtype).expand(len(y), 2)

    def job():
        with torch.no_grad():
            return solver.solve(torchode.InitialValueProblem(y0=y, t_start=ends[:, 0], t_end=ends[:, 1]))

    timing = timed(job, rounds)
    theta = timing.result.ys[:, -1, 1].numpy()
    return timing, np.select([theta < 0.0, theta > 1.0], [0, 1], UNDECIDED)


def scipy_labels(states: np.ndarray, tolerance: float, rounds: int) -> tuple[Timing, np.ndarray]:
    """scipy: `solve_ivp` with RK45 and a terminal event at each face, one start after another."""
    from scipy.integrate import solve_ivp

    g, decay, rho, kappa = UNIT.price, UNIT.weight_decay, UNIT.rate_ratio, UNIT.benefit_slope

    def field(t, y):
        return 2.0 * y[0] * (kappa * y[1] - decay), rho * (0.5 * kappa * y[0] - g)

    def below(t, y):
        return y[1] + 1e-300  # a start on the face is not yet outside

    def above(t, y):
        return 1.0 - y[1] + 1e-15

    below.terminal, above.terminal, below.direction, above.direction = True, True, -1, -1

    def job():
        found = np.full(len(states), UNDECIDED)
        for i, y in enumerate(states):
            out = solve_ivp(field, (0.0, HORIZON), y, rtol=tolerance, atol=1e-2 * tolerance, events=(below, above))
            found[i] = 0 if len(out.t_events[0]) else 1 if len(out.t_events[1]) else UNDECIDED
        return found

    timing = timed(job, rounds)
    return timing, timing.result


PEERS = {"diffrax": (diffrax_labels, 40_000), "torchode": (torchode_labels, 40_000), "scipy": (scipy_labels, 400)}


def draw(costs: dict[float, tuple[float, float]], n: int, numbers: dict[int, float]) -> None:
    """The picture: seconds against the number of starts and against the tolerance, into benchmarks/results/theory.png.

    Args:
        costs: Tolerance -> (microseconds a start, share of labels wrong) for `n` starts.
        n: Their number.
        numbers: Number of starts -> seconds.
    """
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 3.2), layout="constrained")
    left.loglog(list(numbers), list(numbers.values()), "o-", color="#0072B2")
    left.set(xlabel="starts", ylabel="CPU seconds", title=f"rtol {LABELLING:g}")
    tolerances, (micro, wrong) = list(costs), zip(*costs.values(), strict=True)
    right.loglog(tolerances, micro, "o-", color="#0072B2")
    right.invert_xaxis()
    right.set(xlabel="relative tolerance", ylabel="µs a start", title=f"{n:,} starts")
    right.yaxis.label.set_color("#0072B2")
    other = right.twinx()
    other.loglog(tolerances, np.maximum(wrong, 1e-7), "s--", color="#D55E00")
    other.set_ylabel("share of labels wrong (floor 1e-7)", color="#D55E00")
    publish_picture("theory", figure)
    plt.close(figure)


def _row(name: str, n: int, timing: Timing, verdict: tuple[int, int, float] | None, steps: str = "") -> list[str]:
    rates = quartiles(n / timing.seconds / 1e6, "{:.2f}")
    errors = ["", "", ""] if verdict is None else [str(verdict[0]), str(verdict[1]), f"{verdict[2]:.1e}"]
    return [name, f"{n:,}", f"{timing.rate(n) / 1e6:.3g}", rates, steps, *errors, f"{timing.first:.1f}"]


HEADER = [
    "4.2",
    "starts",
    "10^6 a second, best",
    "median (quartiles)",
    "mean steps",
    "labels wrong",
    f"wrong beyond {BAND:g}",
    "furthest wrong",
    "s for the first call",
]


def _verdict(what: str, value: float, goal: float) -> str:
    return f"- {'yes' if value >= goal else 'NO'}: {what}: {value:.3g} (at least {goal:g})"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.theory", description=__doc__.splitlines()[0])
    add_quick(parser)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/theory.md and .png")
    parser.add_argument("--peers", metavar="FOLDER", help="a site-packages folder with more peers")
    args = parser.parse_args(argv)
    if args.peers:
        if not os.path.isdir(args.peers):
            raise ValueError(f"`--peers` must be a folder; got {args.peers}. Name a site-packages folder.")
        sys.path.append(args.peers)
    rounds, n, side = (1, 20, 8) if args.quick else (15, 400, 64)
    began, before = time.perf_counter(), load()
    states, rows, verdicts = starts(n), [], []
    costs: dict[float, tuple[float, float]] = {}
    numbers: dict[int, float] = {}

    first = "First call in a fresh process: not timed."
    if not args.quick:
        cold, warm = first_calls()
        first = (
            f"First call in a fresh process: {cold:.1f} s to compile, {warm:.1f} s with the compiled code in the cache."
        )
    closed = timed(lambda: basins_of_attraction(UNIT, square(n), method="separatrix"), 3 * rounds)
    rows.append(_row("separatrix", n * n, closed, judge(closed.result.labels.ravel(), states)))
    main_rate, outside = 0.0, 0
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10):
        timing = ours(states, tolerance, rounds if tolerance >= 1e-6 else max(3, rounds // 3))
        batch = timing.result
        verdict = judge(labels(batch), states)
        rows.append(_row(f"integration, rtol {tolerance:g}", n * n, timing, verdict, f"{batch.steps.mean():.1f}"))
        costs[tolerance] = (1e6 / timing.rate(n * n), verdict[0] / len(states))
        if tolerance == LABELLING:
            main_rate, outside = timing.rate(n * n), verdict[1]
            numbers[n * n] = n * n / main_rate
    for number in (10, 30, 100, 1000) if not args.quick else (10,):
        few = starts(number)
        timing = ours(few, LABELLING, rounds if number < 1000 else 3)
        verdict = judge(labels(timing.result), few)
        numbers[len(few)] = len(few) / timing.rate(len(few))
        name = f"integration, rtol {LABELLING:g}"
        rows.append(_row(name, len(few), timing, verdict, f"{timing.result.steps.mean():.1f}"))
    plain = BoxSystem(velocity=UNIT.field, lower=(0, 0), upper=(np.inf, 1))
    some = states[:: max(1, len(states) // 4000)]
    settings = {"rtol": LABELLING, "atol": 1e-2 * LABELLING, "absorbing": True}
    timing = timed(lambda: integrate_batch(plain, some, HORIZON, **settings), 3)
    verdict = judge(labels(timing.result), some)
    rows.append(_row(f"numpy form, rtol {LABELLING:g}", len(some), timing, verdict))
    verdicts.append(_verdict(f"starts a second by integration, rtol {LABELLING:g}", main_rate, GRID_GOAL))
    verdicts.append(f"- {'yes' if not outside else 'NO'}: labels wrong or undecided outside the band: {outside}")
    verdicts.append(_verdict("starts a second by the separatrix", closed.rate(n * n), SEPARATRIX_GOAL))

    axes = (np.linspace(0.0, 1.2, side), np.linspace(0.0, 1.2, side), np.linspace(0.0, 1.0, side))
    system = cube()
    job = {"absorbing": True, "rtol": LABELLING, "atol": 1e-2 * LABELLING}
    solid = timed(lambda: basins_of_attraction(system, axes, HORIZON, **job), rounds)
    rows.append(_row(f"three coordinates, rtol {LABELLING:g}", side**3, solid, None))
    undecided = _not_between(system, axes, solid.result.labels)
    verdicts.append(_verdict("starts a second in three coordinates", solid.rate(side**3), CUBE_GOAL))
    verdicts.append(
        f"- {'yes' if not undecided else 'NO'}: undecided in three coordinates, with one label all around: {undecided}"
    )

    peers = []
    for name, (label, number) in PEERS.items():
        if not importlib.util.find_spec(name):
            continue
        few = states[:: max(1, len(states) // (10 if args.quick else number))]
        timing, found = label(few, LABELLING, 3)
        rows.append(_row(f"{name}, rtol {LABELLING:g}", len(few), timing, judge(found, few)))
        ratio, goal = main_rate / timing.rate(len(few)), PEER_GOAL if name == "diffrax" else 1.0
        verdicts.append(_verdict(f"starts a second, ours over {name}", ratio, goal))
        peers.append(f"{name} {importlib.metadata.version(name)}")
    versions = ", ".join([f"numba {importlib.metadata.version('numba')}", *peers])
    title = (
        f"Labelling starts on one core (CPU time), horizon {HORIZON:g}; {hardware()}, {versions}; {before} at the start, "
        f"{load()} at the end; {time.perf_counter() - began:.0f} s"
    )
    if args.write:
        draw(costs, n * n, dict(sorted(numbers.items())))
    publish("theory", "\n".join([title + ".", "", markdown(HEADER, rows), "", first, "", *verdicts]), args.write)


if __name__ == "__main__":
    guarded(main)
