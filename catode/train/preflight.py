"""What a run will cost, before it runs."""

from __future__ import annotations

import numpy as np

from catode.train.loop import Setup
from catode.train.steptime import MeasuredComplexity
from catode.train.structure import describe


def table(setup: Setup) -> str:
    """The resolved settings that matter and the price of every block, as text.

    Args:
        setup: A prepared run.
    """
    config = setup.config
    blocks = setup.model.structures()
    cost = describe(setup.model, blocks, setup.example)
    if setup.step_times is not None:
        cost = MeasuredComplexity(cost, setup.step_times)
    ones, layers = np.ones(cost.size), len(blocks)
    prices = cost.prices(ones, nu=config.nu, alpha=config.alpha, beta=config.beta)
    macs, params = cost.macs(ones), cost.params(ones)
    lines = [
        f"{config.dataset}: {len(setup.images.train_labels)} training and {len(setup.images.test_labels)} test images, "
        f"{len(setup.images.classes)} classes",
        f"{config.arch}: {macs:,.0f} MACs, {params:,.0f} parameters; removable {cost.removable_macs / macs:.1%} of the MACs, "
        f"{cost.removable_params / params:.1%} of the parameters",
        f"nu {config.nu:g}, alpha {config.alpha:g}, beta {config.beta:g}; {len(setup.schedule)} steps, ODE time "
        f"{setup.ode_time:.4g}, rate_ratio {setup.rate_ratio:.4g}, deciding from step {setup.warmup_steps} to {setup.decide_steps}",
        "",
        f"{'block':<12} {'width':>6} {'MACs':>12} {'params':>10} {'layer price':>12} {'unit price':>12}",
    ]
    if setup.step_times is not None:
        time = f"{cost.removable_ms:.4g} ms a step of {config.batch_size} images in the blocks, measured now"
        lines.insert(-2, f"prices by time: {time}")
    for number, block in enumerate(blocks):
        without = ones.copy()
        without[number] = 0.0
        units = np.flatnonzero(cost.unit_block == number)
        lines.append(
            f"{block.name:<12} {len(units):>6} {macs - cost.macs(without):>12,.0f} {params - cost.params(without):>10,.0f} "
            f"{prices[number]:>12.3g} {prices[layers + units[0]]:>12.3g}"
        )
    floor = np.zeros(cost.size)
    lines += [
        "",
        f"least possible: {cost.macs(floor):,.0f} MACs ({cost.macs(floor) / macs:.1%}), {cost.params(floor):,.0f} parameters",
    ]
    return "\n".join(lines)
