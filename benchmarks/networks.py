"""How conservative the closed forms are: what they certify, against what the real projected flow prunes.

    python -m benchmarks.networks [--quick] [--write] [--networks N] [--points N]

Networks are drawn by `catode.theory.networks.draw`, seeds 0, 1, ..: the block of one half, one unit of the other. The box
is 0 <= theta <= 1 and norms of the structure's weights up to twice those of Glorot's initialisation; it does not depend on
the data, the price or the bounds. From a grid of starts in it, with directions at random, the real flow of all weights of
the structure is followed to its end, and the domains of docs/mathematics.md sections 4.1 (layer), 4.2 (unit) and
4.3 (benefit), with constants that are proven bounds of that network, are compared with it: *certified* is the share of the
box inside a domain (on a finer grid, since it needs no integration), *converging* the share that really converges to
the removed state, *ratio* the first over the second. A start that is certified and does not converge is a violation; one
that is undecided at the horizon counts as not converging.

A second table is about the comparison systems themselves: the share of the exact area of D for which
`catode.theory.certify` finds a proof in rational numbers, and the CPU seconds that it takes, for systems drawn with the
saddle uniform in [.1, .9]^2 and D between 10 % and 90 % of the box.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.common import add_quick, guarded, hardware, load, markdown, publish, publish_picture, quartiles
from catode._validate import check_int
from catode.theory import BenefitSystem, LayerSystem, PlanarSystem, UnitSystem, certify
from catode.theory.networks import Structure, draw
from catode.theory.networks.bounds import COORDINATES, bounds
from catode.theory.networks.runs import Coverage, coverage
from catode.train.settings.commandline import CommandLine

KINDS = {"layer": "block", "unit": "unit"}
SHARE_GOAL, AREA_GOAL = 0.01, 0.99


@dataclass(frozen=True)
class Trial:
    """One domain of one network, compared with its real flow."""

    coverage: Coverage
    share: float

    @property
    def ratio(self) -> float:
        """Certified share over converging share; 0 where nothing converges."""
        return self.share / self.coverage.pruned_share if self.coverage.pruned_share else 0.0


def measure(structure: Structure, kind: str, points: int) -> dict[str, Trial]:
    """Integrate the real flow once and compare the domains of all coordinates with it.

    Args:
        structure: A structure of a drawn network.
        kind: Its kind, "layer" or "unit".
        points: Starts along each side of the box.
    """
    first = coverage(bounds(structure, kind), n=points)
    found = {name: first.under(bounds(structure, name)) for name in COORDINATES}
    return {name: Trial(one, one.bounds.share(100)) for name, one in found.items()}


def draw_system(rng: np.random.Generator, kind: str, low: float = 0.1, high: float = 0.9) -> PlanarSystem:
    """A comparison system whose saddle is uniform in [low, high]^2."""
    size, theta = rng.uniform(low, high, 2)
    slope, rho, eta = np.exp(rng.uniform(np.log(0.2), np.log(5.0), 3))
    if kind == "layer":
        return LayerSystem(
            price=slope * size, weight_decay=theta * eta / size, rate_ratio=rho, grad_bound=eta, benefit_slope=slope
        )
    if kind == "unit":
        return UnitSystem(price=slope * size / 2, weight_decay=theta * slope, rate_ratio=rho, benefit_slope=slope)
    decay, drift = rng.uniform(0.0, 1.0), rng.choice([0.0, 0.3])
    return BenefitSystem(
        price=size, gain=eta, rate_ratio=rho, decay=decay, drift=0.0 if decay == 0 else drift * decay * size
    )


def area(system: PlanarSystem) -> float:
    """Share of D in the unit square, from the separatrix in closed form."""
    sizes = (np.arange(4_000) + 0.5) / 4_000
    return float(np.clip(system.separatrix(sizes), 0.0, 1.0).mean())


def certificates(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Certify drawn systems.

    Args:
        kind: "layer" or "unit".
        count: How many.

    Returns:
        Certified share of the exact area of D, and CPU seconds, each of shape (count,).
    """
    rng, shares, seconds = np.random.default_rng(1), [], []
    while len(shares) < count:
        system = draw_system(rng, kind)
        exact = area(system)
        if not 0.1 <= exact <= 0.9:
            continue
        mark = time.process_time()
        proof = certify(system)
        seconds.append(time.process_time() - mark)
        shares.append(proof.share / exact)
    return np.array(shares), np.array(seconds)


def _spread(values: Sequence[float], form: str) -> str:
    """Median (quartiles), least to largest."""
    low, high = (form.format(v) for v in (min(values), max(values)))
    return f"{quartiles(values, form)}, {low} to {high}"


def _row(name: str, found: Sequence[Trial]) -> list[str]:
    runs = [trial.coverage for trial in found]
    undecided = sum(int((run.runs.labels < 0).sum()) for run in runs)
    return [
        name,
        str(len(found)),
        _spread([100.0 * trial.share for trial in found], "{:.1f}"),
        _spread([100.0 * run.pruned_share for run in runs], "{:.0f}"),
        _spread([trial.ratio for trial in found], "{:.3f}"),
        f"{_large(found):.0%}",
        f"{sum(run.violations for run in runs)} of {sum(int(run.certified.sum()) for run in runs):,}",
        f"{undecided} of {sum(len(run.starts) for run in runs):,}",
    ]


def _large(found: Sequence[Trial]) -> float:
    """Share of the networks in which the domain is large enough for the claim not to be empty."""
    return float(np.mean([trial.share >= SHARE_GOAL for trial in found]))


HEADER = ["structure", "networks", "certified, % of the box", "converging, %", "ratio"]
HEADER += [f"domain >= {SHARE_GOAL:.0%}", "violations", "undecided starts"]


def picture(results: dict[str, list[dict[str, Trial]]]) -> None:
    """Certified share against converging share, a point for each network, into benchmarks/results/networks.png.

    Args:
        results: Kind -> the trials of each network by coordinates.
    """
    from catode.theory import plotting

    figure = plotting.new_figure(9.6, 4.6)
    with plotting.house_style():
        panels = figure.subplots(1, len(results), sharey=True)
    looks = {"layer": ("o", "blue"), "unit": ("^", "vermillion"), "benefit": ("s", "green")}
    floor = 0.1  # percent; smaller certified shares are drawn there
    for ax, (kind, found) in zip(panels, results.items(), strict=True):
        for name, (marker, color) in looks.items():
            x = [100.0 * network[name].coverage.pruned_share for network in found]
            y = [max(100.0 * network[name].share, floor) for network in found]
            look = {"color": plotting.PALETTE[color], "alpha": 0.6, "linewidths": 0, "clip_on": False, "zorder": 3}
            ax.scatter(x, y, s=22, marker=marker, label=f"{name} coordinates", **look)
        line = np.geomspace(floor, 100.0, 200)
        ax.plot(line, line, color=plotting.PALETTE["black"], linewidth=1.2, label="all that converges")
        goal = {"color": plotting.PALETTE["grey"], "linestyle": "--", "linewidth": 1.2}
        ax.axhline(100.0 * SHARE_GOAL, **goal, label=f"{SHARE_GOAL:.0%} of the box")
        ax.set(xlim=(0.0, 100.0), ylim=(floor, 100.0), yscale="log", xlabel="share of the box that converges, %")
        ax.set_title(f"drawn networks: one {KINDS[kind]}")
    panels[0].set_ylabel("certified share of the box, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    publish_picture("networks", figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(prog="python -m benchmarks.networks", description=__doc__.splitlines()[0])
    add_quick(parser)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/networks.md and .png")
    parser.add_argument("--networks", type=int, metavar="N", help="networks of each kind (40)")
    parser.add_argument("--points", type=int, metavar="N", help="starts along each side of the box (16)")
    args = parser.parse_args(argv)
    default = {"networks": 1, "points": 4} if args.quick else {"networks": 40, "points": 16}
    given = {name: value for name, value in vars(args).items() if name in default and value is not None}
    networks, points = (check_int(name, value, low=1) for name, value in (default | given).items())
    mark, before = time.process_time(), load()

    results = {kind: [measure(draw(seed, kind), kind, points) for seed in range(networks)] for kind in KINDS}
    rows, verdicts = [], []
    for kind, what in KINDS.items():
        for name in COORDINATES:
            rows.append(_row(f"{what}, {name} coordinates", [network[name] for network in results[kind]]))
        large = _large([network[kind] for network in results[kind]])
        verdict = "yes" if large >= 0.5 else "NO"
        verdicts.append(
            f"- {verdict}: domain of a {what} at least {SHARE_GOAL:.0%} of the box: {large:.0%} of networks"
        )
    own = [network[kind] for kind in KINDS for network in results[kind]]
    for name in ("activation", "loss"):
        groups = [getattr(trial.coverage.bounds.structure.network, name) for trial in own]
        for group in sorted(set(groups)):
            chosen = [trial for trial, value in zip(own, groups, strict=True) if value == group]
            rows.append(_row(f"{name} {group}, own coordinates", chosen))
    violations = sum(t.coverage.violations for found in results.values() for network in found for t in network.values())
    verdicts.append(f"- {'NO' if violations else 'yes'}: certified starts that did not converge: {violations}")
    spent = time.process_time() - mark

    proofs = []
    for kind in KINDS:
        shares, seconds = certificates(kind, 1 if args.quick else 50)
        proofs.append(
            [kind, str(len(shares))]
            + [f"{value:.2%}" for value in (shares.min(), np.median(shares))]
            + [f"{value:.2f}" for value in (seconds.sum(), np.median(seconds), seconds.max())]
        )
        worst = shares.min()
        verdict = "yes" if worst >= AREA_GOAL else "NO"
        verdicts.append(f"- {verdict}: least certified share of D, {kind}: {worst:.2%} (at least {AREA_GOAL:.0%})")
    header = ["system", "drawn", "least share of D", "median", "s in all", "median s", "longest s"]
    title = (
        f"Networks drawn at random, {points} x {points} starts each, median (quartiles), range; {hardware()}; {before} at "
        f"the start, {load()} at the end; {spent:.0f} s of CPU for the networks."
    )
    if args.write:
        picture(results)
    parts = [title, "", markdown(HEADER, rows), "", "Certificates in exact arithmetic:", ""]
    publish("networks", "\n".join([*parts, markdown(header, proofs), "", *verdicts]), args.write)


if __name__ == "__main__":
    guarded(main)
