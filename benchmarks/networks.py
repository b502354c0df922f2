"""How cautious the closed forms are: what they certify, against what the real projected flow prunes.

    python -m benchmarks.networks [--quick] [--write] [--networks N] [--points N]

Networks are drawn by `catode.theory.networks.draw`, seeds 0, 1, ..: the block of one half, one unit of the other. The box
is 0 <= theta <= 1 and norms of the structure's weights up to twice those of Glorot's initialisation; it knows nothing of
the data, the price or the bounds. From a grid of starts in it, with directions at random, the real flow of all weights of
the structure is followed to its end, and the domains of THEORY 4.1 (layer), 4.2 (unit) and 4.3 (benefit), with constants
that are proven bounds of that network, are held against it: *certified* is the share of starts inside a domain,
*converging* the share that really goes to the removed state, *ratio* the first over the second. A certified start that
does not converge is a violation; one undecided at the horizon counts as not converging.

A second table is about the comparison systems themselves: the share of the exact area of D for which
`catode.theory.certify` finds a proof in rational numbers, and the CPU seconds that it takes, for systems drawn with the
saddle uniform in [.1, .9]^2 and D between 10 % and 90 % of the box.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from benchmarks._common import RESULTS, guarded, hardware, load, markdown, publish, quartiles
from catode._validate import check_int
from catode.theory import BenefitSystem, LayerSystem, PlanarSystem, UnitSystem, certify
from catode.theory.networks import COORDINATES, Coverage, Structure, bounds, coverage, draw

KINDS = ("layer", "unit")
SHARE_GOAL, AREA_GOAL = 0.01, 0.99


def measure(structure: Structure, kind: str, points: int) -> dict[str, Coverage]:
    """Follow the real flow once and put the domains of all coordinates on trial.

    Args:
        structure: A structure of a drawn network.
        kind: Its kind, whose coordinates come first.
        points: Starts along each side of the box.
    """
    first = coverage(bounds(structure, kind), n=points)
    return {name: first if name == kind else first.under(bounds(structure, name)) for name in COORDINATES}


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


def _row(name: str, found: Sequence[Coverage]) -> list[str]:
    certified = [100.0 * c.certified_share for c in found]
    return [
        name,
        str(len(found)),
        _spread(certified, "{:.1f}"),
        _spread([100.0 * c.pruned_share for c in found], "{:.0f}"),
        _spread([c.ratio for c in found], "{:.3f}"),
        f"{np.mean(np.array(certified) >= 100.0 * SHARE_GOAL):.0%}",
        str(sum(c.violations for c in found)),
        f"{sum(int((c.runs.labels < 0).sum()) for c in found):,} of {sum(len(c.starts) for c in found):,}",
    ]


HEADER = ["structure", "networks", "certified, % of the box", "converging, %", "ratio"]
HEADER += [f"domain >= {SHARE_GOAL:.0%}", "violations", "undecided starts"]


def picture(results: dict[str, list[dict[str, Coverage]]], floor: float) -> None:
    """Certified share against converging share, a point for each network, into benchmarks/results/networks.png.

    Args:
        results: Kind -> one dictionary of coverages for each network.
        floor: Certified share at which nothing certified is drawn, half a start.
    """
    from catode.theory import plotting

    figure = plotting.new_figure(9.6, 4.6)
    with plotting.house_style():
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    looks = {"layer": ("o", "blue"), "unit": ("^", "vermillion"), "benefit": ("s", "green")}
    for ax, (kind, found) in zip(panels, results.items(), strict=True):
        for name, (marker, color) in looks.items():
            x = [100.0 * network[name].pruned_share for network in found]
            y = [100.0 * max(network[name].certified_share, floor) for network in found]
            ax.scatter(x, y, s=22, marker=marker, color=plotting.PALETTE[color], alpha=0.6, linewidths=0, label=name)
        line = np.array([100.0 * floor, 100.0])
        ax.plot(line, line, color=plotting.PALETTE["black"], linewidth=1.2, label="everything that converges")
        look = {"color": plotting.PALETTE["grey"], "linestyle": "--", "linewidth": 1.2}
        ax.axhline(100.0 * SHARE_GOAL, **look, label=f"{SHARE_GOAL:.0%} of the box")
        ax.set(xlim=(0.0, 103.0), yscale="log", xlabel="share of the box that converges, %")
        ax.set_title({"layer": "the whole block", "unit": "one unit"}[kind])
    panels[0].set_ylabel(f"certified share, % (none: {100.0 * floor:.2g})")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "networks.png", dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few networks and starts: a look, not a measurement")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/networks.md and .png")
    parser.add_argument("--networks", type=int, metavar="N", help="networks of each kind (40; quick 2)")
    parser.add_argument("--points", type=int, metavar="N", help="starts along each side of the box (16; quick 6)")
    args = parser.parse_args(argv)
    default = {"networks": 2, "points": 6} if args.quick else {"networks": 40, "points": 16}
    given = {name: value for name, value in vars(args).items() if name in default and value is not None}
    networks, points = (check_int(name, value, low=1) for name, value in (default | given).items())
    mark, before = time.process_time(), load()

    results = {kind: [measure(draw(seed, kind), kind, points) for seed in range(networks)] for kind in KINDS}
    rows, verdicts = [], []
    for kind, found in results.items():
        what = {"layer": "block", "unit": "unit"}[kind]
        for name in COORDINATES:
            rows.append(_row(f"{what}, in {name} coordinates", [network[name] for network in found]))
        large = np.mean([network[kind].certified_share >= SHARE_GOAL for network in found])
        verdict = "yes" if large >= 0.5 else "NO"
        verdicts.append(
            f"- {verdict}: domain of a {what} at least {SHARE_GOAL:.0%} of the box: {large:.0%} of networks"
        )
    for name in ("activation", "loss"):
        own = [(getattr(n[kind].bounds.structure.network, name), n[kind]) for kind in KINDS for n in results[kind]]
        for value in sorted({value for value, _ in own}):
            rows.append(_row(f"{name} {value}, own coordinates", [c for v, c in own if v == value]))
    violations = sum(c.violations for found in results.values() for network in found for c in network.values())
    verdicts.append(f"- {'NO' if violations else 'yes'}: certified starts that did not converge: {violations}")
    spent = time.process_time() - mark

    proofs = []
    for kind in KINDS:
        shares, seconds = certificates(kind, 3 if args.quick else 50)
        proofs.append(
            [kind, str(len(shares)), f"{shares.min():.2%}", f"{np.median(shares):.2%}"]
            + [f"{seconds.sum():.1f}", f"{np.median(seconds):.2f}", f"{seconds.max():.2f}"]
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
        picture(results, 0.5 / points**2)
    parts = [title, "", markdown(HEADER, rows), "", "Certificates in exact arithmetic:", ""]
    publish("networks", "\n".join([*parts, markdown(header, proofs), "", *verdicts]), args.write)


if __name__ == "__main__":
    guarded(main)
