"""The domains of attraction of the removed state: a layer, a unit, and the benefit coordinates used in training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from matplotlib.ticker import MaxNLocator

from catode.theory import BenefitSystem, LayerSystem, UnitSystem, basins_of_attraction, tolerance
from catode.theory.basins.curves import manifolds
from catode.theory.basins.equilibria import find
from catode.theory.plotting import PALETTE, flow_portrait, house_style, legend_below, new_figure, phase_portrait
from paper_figures._common import Made, letter
from paper_figures.runs import Data

NEEDS = ()
LAYER = LayerSystem(price=0.1, weight_decay=0.3, rate_ratio=1.0, grad_bound=0.6, benefit_slope=0.5)
UNIT = UnitSystem(price=0.1, weight_decay=0.2, rate_ratio=1.0, benefit_slope=0.5)
BENEFIT = BenefitSystem(price=0.1, gain=0.3, decay=0.3, rate_ratio=1.0, drift=0.002, gain_lower=0.12, decay_upper=0.5)
NOISE = {"noise": 0.02, "benefit_noise": 0.01, "step_time": 0.1}
RISKS = ((0.2, "sky", "--"), (0.05, "blue", "-."), (0.005, "purple", ":"))


def make(data: Data) -> Made:
    """Draw the four planes; no run is needed."""
    figure = new_figure(8.0, 8.8)
    with house_style():
        axes = figure.subplots(2, 2)
        for ax, system, size, title, name in (
            (axes[0, 0], LAYER, 0.6, "A layer: domain $D_B$", "weight norm  r = |w|"),
            (axes[0, 1], UNIT, 1.6, "A unit: domain $D_U$", "squared norms  u = |w in|² + |w out|²"),
        ):
            window = (0.0, 0.0), (size, 1.0)
            grid = np.linspace(0.0, size, 300), np.linspace(0.0, 1.0, 300)
            found = find(system)
            saddle = next(e for e in found if e.stability == "saddle")
            flow_portrait(
                ax,
                system,
                window,
                basins=basins_of_attraction(system, grid, method="separatrix"),
                equilibria=[saddle],
                manifolds=[manifolds(system, saddle, window=window)],
                legend=False,
            )
            ax.set_title(title)
            ax.set_xlabel(name)
        ax = axes[1, 0]
        phase_portrait(ax, BENEFIT, benefit_max=0.2, nullclines=True, legend=False)
        ax.set_title("Benefit coordinates: D and its mirror")
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax = axes[1, 1]
        _tolerances(ax)
        ax.set_title("The tolerance under noise")
        letter(axes)
        for ax in axes.flat:
            legend_below(ax)
    caption = (
        "Where a structure is driven out by itself: the planes of its size and its keep probability θ, from the "
        "closed forms. (a) A layer in norm coordinates, the domain D_B of Theorem 3.2, and (b) a unit, D_U of Theorem "
        "3.3: what starts in the yellow region ends at θ = 0. Its edge, the separatrix, is the stable manifold of the "
        "saddle; the dashed unstable manifold shows where everything else goes. (c) The same with the benefit, which "
        "training can measure, as the state. Above the price θ rises, below it falls; between the yellow and the blue "
        "region the bounds alone do not decide. (d) Noise lowers the edge: the tolerance for three accepted risks, "
        "from the same constants, and for a rate ratio four times as large, at which θ outruns the weights more "
        "easily and the domain is larger. Percentages are shares of the window that is drawn. Constants, price "
        f"{BENEFIT.price:g} nats and rate ratio {BENEFIT.rate_ratio:g} in all: (a) weight decay {LAYER.weight_decay:g}, "
        f"gradient bound {LAYER.grad_bound:g}, benefit slope {LAYER.benefit_slope:g}; (b) weight decay {UNIT.weight_decay:g}, "
        f"benefit slope {UNIT.benefit_slope:g}; (c, d) gain {BENEFIT.gain:g} (at least {BENEFIT.gain_lower:g}), decay "
        f"{BENEFIT.decay:g} (at most {BENEFIT.decay_upper:g}), drift {BENEFIT.drift:g}; (d) noise of θ {NOISE['noise']:g}, "
        f"of the benefit {NOISE['benefit_noise']:g}, a step of {NOISE['step_time']:g} of ODE time."
    )
    return Made("Domains of attraction of the removed state", caption, figure)


def _tolerances(ax) -> None:
    """Separatrix and tolerances over the benefit, for two rate ratios."""
    benefit = np.linspace(0.0, 0.16, 300)
    for factor, width, suffix in ((1.0, 1.0, ""), (4.0, 2.2, ", θ 4 x as fast")):
        system = replace(BENEFIT, rate_ratio=factor * BENEFIT.rate_ratio)
        ax.plot(
            benefit, system.separatrix(benefit), color=PALETTE["black"], linewidth=width, label=f"separatrix{suffix}"
        )
    inputs = {name: getattr(BENEFIT, name) for name in ("price", "gain", "decay", "rate_ratio", "drift")}
    for risk, color, line in RISKS:
        found = tolerance.derive(benefit=benefit, risk=risk, **inputs, **NOISE).values
        ax.plot(benefit, found, line, color=PALETTE[color], label=f"tolerance, risk {risk:g}")
    ax.axvline(BENEFIT.price, color=PALETTE["grey"], linestyle="--", linewidth=1.3, label="price")
    ax.set_xlim(0.0, benefit[-1])
    ax.set_ylim(0.0, 0.5)
    ax.set_xlabel("benefit (nats)")
    ax.set_ylabel("keep probability θ")
