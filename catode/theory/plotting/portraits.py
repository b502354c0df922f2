"""Planar flows: streamlines, domains, separatrices, equilibria and trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_rgba

from catode.theory.plotting.basins import basin_map
from catode.theory.plotting.style import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from catode.theory.basins.curves import Manifolds
    from catode.theory.basins.equilibria import Equilibrium
    from catode.theory.basins.grids import Basins
    from catode.theory.flow.trajectory import Trajectory
    from catode.theory.systems.benefit import BenefitSystem
    from catode.theory.systems.box import BoxSystem
    from catode.theory.systems.planar import PlanarSystem


def phase_portrait(
    ax: Axes,
    system: BenefitSystem,
    *,
    paths: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    path_colors: Sequence[str] | None = None,
    trajectories: Sequence[Trajectory] = (),
    benefit_min: float = 0.0,
    benefit_max: float | None = None,
    nullclines: bool = False,
    legend: bool = True,
    density: float = 0.7,
    resolution: int = 400,
) -> Axes:
    """Draw the projected flow of one structure in the plane of its benefit and its keep probability.

    Shown are streamlines, the certified domain of attraction D of the removed state (shaded, with the separatrix as its
    upper edge), the mirror domain in which keeping is certain, the price, and the saddle where it lies in the window.
    Where D is empty nothing is shaded; the mirror domain needs the system's `gain_lower` and `decay_upper`.

    Source: docs/mathematics.md sections 4.3 and 4.4, derived there.

    Args:
        ax: Where to draw.
        system: The comparison system of the structure.
        paths: Measured trajectories to draw on top, each the pair (benefit, keep probability) of arrays of shape (n,)
            in the system's units. A dot marks the end of each.
        path_colors: One colour a path.
        trajectories: Solutions of the projected flow, in vermillion; the parts that slide on a face are thick.
        benefit_min: Left edge of the window, nats. The system counts a negative benefit as 0.
        benefit_max: Right edge of the window, nats; three times the price when not given.
        nullclines: Whether to draw the line where the benefit stands still; that of the keep probability is the price.
        legend: Whether to put a legend below the Axes.
        density: Density of the streamlines, as in `Axes.streamplot`.
        resolution: Points along each side of the grid on which the domains are evaluated.

    Returns:
        `ax`.

    Raises:
        ValueError: if the window is empty or `path_colors` does not match `paths`.
    """
    price = float(system.price)
    if benefit_max is None:
        benefit_max = 3.0 * price
    if not benefit_min < benefit_max:
        raise ValueError(
            f"`benefit_max` must exceed `benefit_min`; got benefit_max={benefit_max}, benefit_min={benefit_min}"
        )
    if path_colors is None:
        path_colors = [PALETTE["black"]] * len(paths)
    if len(path_colors) != len(paths):
        raise ValueError(f"`path_colors` must have one colour a path; got {len(path_colors)} for {len(paths)} paths")

    _domains(ax, system, benefit_min, benefit_max, resolution)
    _streamlines(ax, system, benefit_min, benefit_max, density)

    label = "price: θ at rest" if nullclines else "price"
    ax.axvline(price, color=PALETTE["grey"], linestyle="--", linewidth=1.3, zorder=2.5, label=label)
    if nullclines:
        benefit = np.array([max(benefit_min, 0.0), benefit_max])
        still = (float(system.decay) * benefit - float(system.drift)) / float(system.gain)
        look = {"color": PALETTE["blue"], "linestyle": ":", "linewidth": 1.4, "zorder": 2.5}
        ax.plot(benefit, still, label="benefit at rest", **look)
    saddle = np.asarray(system.saddle, dtype=float)
    if benefit_min <= saddle[0] <= benefit_max and 0.0 <= saddle[1] <= 1.0:
        ax.plot(
            *saddle,
            marker="o",
            markersize=7,
            markerfacecolor="white",
            markeredgecolor=PALETTE["black"],
            linestyle="none",
            zorder=5,
            clip_on=False,
            label="saddle",
        )
    for (benefit, theta), color in zip(paths, path_colors, strict=True):
        benefit, theta = np.asarray(benefit, dtype=float), np.asarray(theta, dtype=float)
        ax.plot(benefit, theta, color=color, linewidth=1.1, alpha=0.8, zorder=4)
        ax.plot(benefit[-1:], theta[-1:], color=color, marker="o", markersize=3.5, linestyle="none", zorder=4.5)

    for i, found in enumerate(trajectories):
        window = (benefit_min, 0.0), (benefit_max, 1.0)
        _trajectory(ax, found, ((np.nan, 0.0), (np.nan, 1.0)), window, label=i == 0)

    margin = 0.02
    ax.set_xlim(benefit_min, benefit_max)
    ax.set_ylim(-margin, 1.0 + margin)
    ax.grid(visible=False)
    ax.set_xlabel("benefit (nats)")
    ax.set_ylabel("keep probability θ")
    if legend:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    return ax


def flow_portrait(
    ax: Axes,
    system: BoxSystem | PlanarSystem,
    window: Sequence[Sequence[float]],
    *,
    basins: Basins | None = None,
    equilibria: Sequence[Equilibrium] = (),
    manifolds: Sequence[Manifolds] = (),
    trajectories: Sequence[Trajectory] = (),
    nullclines: bool = True,
    density: float = 0.7,
    legend: bool = True,
) -> Axes:
    """Draw any planar projected flow: streamlines and what the analysis found about it.

    Args:
        ax: Where to draw.
        system: A flow on a box with two coordinates, or a comparison system.
        window: Lower left and upper right corner, as in `catode.theory.basins.curves`.
        basins: Domains of attraction on a grid, shaded.
        equilibria: Marked by their class: filled where stable, white where not, a diamond for a saddle.
        manifolds: Stable manifolds as black lines, unstable ones dashed.
        trajectories: Drawn with a dot at the end; the parts that slide on a face are thick.
        nullclines: Whether to draw where one component of the raw field vanishes.
        density: Density of the streamlines, as in `Axes.streamplot`.
        legend: Whether to put a legend below the Axes.

    Returns:
        `ax`.

    Raises:
        ValueError: if the window is empty.
    """
    from catode.theory.basins import curves

    (left, bottom), (right, top) = window
    if not (left < right and bottom < top):
        raise ValueError(f"`window` must be a lower left and an upper right corner; got window={tuple(window)}")
    if basins is not None:
        basin_map(ax, basins, legend=False)
    x, y = np.linspace(left, right, 60), np.linspace(bottom, top, 60)
    flow = np.asarray(system.projected_field(np.stack(np.meshgrid(x, y), axis=-1)), dtype=float)
    look = {"color": "#B5B5B5", "linewidth": 0.7, "arrowsize": 0.8, "zorder": 1}
    ax.streamplot(x, y, flow[..., 0], flow[..., 1], density=density, **look)
    names = getattr(system, "names", ("size", "keep probability θ"))
    if nullclines:
        lines = curves.nullclines(system, window=window)
        for (name, parts), color in zip(lines.items(), ("blue", "green"), strict=False):
            for i, part in enumerate(parts):
                label = f"{name} at rest" if i == 0 else None
                ax.plot(*part.T, color=PALETTE[color], linestyle=":", linewidth=1.4, zorder=2.5, label=label)
    for found in manifolds:
        for branches, style, label in ((found.stable, "-", "separatrix"), (found.unstable, "--", "unstable manifold")):
            for i, branch in enumerate(branches):
                label = label if i == 0 and found is manifolds[0] else None
                ax.plot(*branch.points.T, style, color=PALETTE["black"], linewidth=1.6, zorder=3, label=label)
    for i, found in enumerate(trajectories):
        faces = getattr(system, "lower", (np.nan, 0.0)), getattr(system, "upper", (np.nan, 1.0))
        _trajectory(ax, found, faces, window, label=i == 0)
    for found in equilibria:
        if left <= found.state[0] <= right and bottom <= found.state[1] <= top:
            marker = "D" if found.stability == "saddle" else "o"
            face = PALETTE["black"] if found.stable else "white"
            look = {"markerfacecolor": face, "markeredgecolor": PALETTE["black"], "markersize": 7, "zorder": 5}
            ax.plot(*found.state, marker, clip_on=False, **look)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.grid(visible=False)
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    return ax


def _trajectory(ax: Axes, found: Trajectory, faces: Sequence[Any], window: Sequence[Any], *, label: bool) -> None:
    """Draw a trajectory, thick where it slides on a face, with a dot where it ends inside the window."""
    color, states = PALETTE["vermillion"], found.states
    inside = ((states >= window[0]) & (states <= window[1])).all(axis=1)
    ax.plot(*states.T, color=color, linewidth=1.1, zorder=4, label="trajectory" if label else None)
    for face in faces:
        for on in (states == face).T & (np.clip(states, *window) == face).T:
            if (on[1:] & on[:-1]).any():
                slides = np.where(on[:, None], np.clip(states, *window), np.nan)
                ax.plot(*slides.T, color=color, linewidth=3.0, solid_capstyle="butt", zorder=4, clip_on=False)
    if inside[-1]:
        ax.plot(*found.end, "o", color=color, markersize=4, zorder=4.5, clip_on=False)


def _domains(ax: Axes, system: BenefitSystem, benefit_min: float, benefit_max: float, resolution: int) -> None:
    """Shade D below the separatrix and the mirror domain above its own boundary."""
    benefit = np.linspace(benefit_min, benefit_max, resolution)
    separatrix = np.asarray(system.separatrix(benefit), dtype=float)
    if not system.empty:
        shade = to_rgba(PALETTE["yellow"], 0.4)
        inside = np.clip(separatrix, 0.0, 1.0)
        ax.fill_between(benefit, 0.0, inside, color=shade, linewidth=0, zorder=0.5, label="certain to go (D)")
    ax.fill_between([], [], facecolor="white", edgecolor="#444444", linewidth=0.5, label="undecided")
    visible = np.where((separatrix >= 0.0) & (separatrix <= 1.0), separatrix, np.nan)
    if np.isfinite(visible).any():
        ax.plot(benefit, visible, color=PALETTE["black"], linewidth=1.8, zorder=3, label="separatrix")

    theta = np.linspace(0.0, 1.0, resolution)
    grid = np.stack(np.meshgrid(benefit, theta), axis=-1)
    mirror = np.asarray(system.contains_mirror(grid), dtype=float)
    if mirror.any():
        shade = to_rgba(PALETTE["sky"], 0.25)
        ax.contourf(benefit, theta, mirror, levels=[0.5, 1.5], colors=[shade], zorder=0.5)
        ax.fill_between([], [], color=shade, linewidth=0, label="certain to stay (mirror)")


def _streamlines(ax: Axes, system: BenefitSystem, benefit_min: float, benefit_max: float, density: float) -> None:
    """Draw streamlines of the projected field."""
    benefit = np.linspace(benefit_min, benefit_max, 60)
    theta = np.linspace(0.0, 1.0, 60)
    field = np.asarray(system.projected_field(np.stack(np.meshgrid(benefit, theta), axis=-1)), dtype=float)
    ax.streamplot(
        benefit,
        theta,
        field[..., 0],
        field[..., 1],
        density=density,
        color="#B5B5B5",
        linewidth=0.7,
        arrowsize=0.8,
        zorder=1,
    )
