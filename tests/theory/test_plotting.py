"""Pictures of flows and basins: what is drawn is what was found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from catode.structures.fates import COLORS, FATES
from catode.theory import BoxSystem, UnitSystem, basins_of_attraction, integrate, plotting
from catode.theory.basins.curves import manifolds
from catode.theory.basins.equilibria import find

UNIT = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
WINDOW = ((0.0, 0.0), (1.5, 1.0))
GRID = np.linspace(0.0, 1.5, 40), np.linspace(0.0, 1.0, 30)


def axes():
    figure = plotting.new_figure(6.0, 5.5)
    with plotting.house_style():
        return figure, figure.subplots()


def test_a_portrait_shows_basins_saddle_manifolds_and_sliding_parts():
    figure, ax = axes()
    found = find(UNIT)
    saddle = next(e for e in found if e.stability == "saddle")
    path = integrate(UNIT, [0.3, 0.9], 12.0, events=False)
    assert [e.kind for e in path.events] == ["arrive"]
    plotting.flow_portrait(
        ax,
        UNIT,
        WINDOW,
        basins=basins_of_attraction(UNIT, GRID, method="separatrix"),
        equilibria=found,
        manifolds=[manifolds(UNIT, saddle, window=WINDOW)],
        trajectories=[path],
    )
    figure.draw_without_rendering()
    assert ax.get_xlim() == (0.0, 1.5) and ax.get_ylim() == (0.0, 1.0)
    labels = ax.get_legend_handles_labels()[1]
    assert "separatrix" in labels and "unstable manifold" in labels and sum("at rest" in name for name in labels) == 2
    diamonds = [line for line in ax.lines if line.get_marker() == "D"]
    assert len(diamonds) == 1 and [v[0] for v in diamonds[0].get_data()] == pytest.approx(saddle.state.tolist())
    sliding = [line for line in ax.lines if line.get_linewidth() == 3.0]
    (y,) = (line.get_ydata()[np.isfinite(line.get_ydata())] for line in sliding)
    assert (y == 1.0).all() and len(y) > 2


def test_what_slides_from_the_start_is_thick_as_far_as_the_window():
    _, ax = axes()
    path = integrate(UNIT, [1.0, 1.0], 3.0, events=False)
    assert path.events == () and path.end[0] > 1.5  # it stays on the face and leaves the window
    plotting.flow_portrait(ax, UNIT, WINDOW, trajectories=[path])
    (x, y) = next(line.get_data() for line in ax.lines if line.get_linewidth() == 3.0)
    assert (y == 1.0).all() and x[0] == 1.0 and x[-1] == 1.5


def test_the_shade_of_every_start_is_its_label():
    figure, ax = axes()
    basins = basins_of_attraction(UNIT, GRID, method="separatrix")
    plotting.basin_map(ax, basins)
    figure.draw_without_rendering()
    colors = ax.collections[0].get_facecolors().reshape(30, 40, 4)
    pruned, kept = (colors[np.swapaxes(basins.labels == label, 0, 1)] for label in (0, 1))
    assert len(pruned) and len(kept) and len(np.unique(pruned, axis=0)) == len(np.unique(kept, axis=0)) == 1
    assert not np.allclose(pruned[0], kept[0])
    shares = [f"{(basins.labels == label).mean():.0%}" for label in (0, 1)]
    assert all(share in text.get_text() for share, text in zip(shares, ax.get_legend().get_texts(), strict=False))


def test_slices_of_a_box():
    system = BoxSystem.from_expressions("x, y, z", "x - 1/2, -y, -z", lower=(0, 0, 0), upper=(1, 1, 1))
    grid = (np.linspace(0.01, 0.98, 8),) * 3
    basins = basins_of_attraction(system, grid, 40.0, attractors=[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    figure = plotting.basin_slices(plotting.new_figure(8.0, 2.5), basins, count=3)
    figure.draw_without_rendering()
    assert [ax.get_title() for ax in figure.axes] == ["z = 0.01", "z = 0.564", "z = 0.98"]
    _, ax = axes()
    with pytest.raises(ValueError, match="basin_slices"):
        plotting.basin_map(ax, basins)
    flat = basins_of_attraction(UNIT, GRID, method="separatrix")
    with pytest.raises(ValueError, match="basin_map"):
        plotting.basin_slices(plotting.new_figure(8.0, 2.5), flat)


@pytest.mark.parametrize("window", [((0, 0), (0, 1)), ((0, 1), (1, 0))])
def test_an_empty_window_is_refused(window):
    with pytest.raises(ValueError, match="window"):
        plotting.flow_portrait(axes()[1], UNIT, window)


def test_a_picture_of_a_run_has_the_colour_of_each_fate_in_both_panels():
    rows = [{"fate": f, "benefit": 0.1 + i, "price": 1.0, "keep_prob": i / 10} for i, f in enumerate(FATES)]
    _, ax = axes()
    plotting.decisions(ax, rows)
    points = {part.get_label(): part for part in ax.collections}
    assert [label.removesuffix(" (1)").replace(" ", "_") for label in points] == list(FATES)
    _, other = axes()
    plotting.tolerances(other, rows, [0.5] * len(rows))
    for fate, one, two in zip(FATES, points.values(), other.collections, strict=True):
        color = to_rgb(plotting.PALETTE[COLORS[fate]])
        assert all(tuple(part.get_facecolor()[0][:3]) == pytest.approx(color) for part in (one, two))


VISION = {  # Machado, Oliveira and Fernandes (2009), severity 1, linear RGB
    "full": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(color, vision):
    rgb = np.array(to_rgb(color))
    rgb = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ rgb, 0.0, 1.0)
    to_xyz = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
    ratio = to_xyz @ seen / np.array([0.9505, 1.0, 1.0888])
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16.0 / 116.0)
    return np.array([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_the_fates_are_as_far_apart_as_the_colours_of_okabe_and_ito(vision):
    def nearest(names):
        seen = [lab(plotting.PALETTE[name], vision) for name in names]
        return min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2))

    assert set(COLORS) == set(FATES) and len(set(COLORS.values())) == len(FATES)
    assert (
        nearest(COLORS.values()) >= nearest([name for name in plotting.PALETTE if name not in ("wine", "indigo")]) > 9.0
    )
