"""The cost table of a run, printed by --dry-run."""

from __future__ import annotations

import numpy as np

from catode.decisions.target import Target
from catode.prune.checking import cannot_decide
from catode.prune.describe.costs import describe
from catode.prune.describe.steptime import MeasuredComplexity
from catode.train.loop.setup import Setup


def table(setup: Setup) -> str:
    """The main resolved settings and the price of every block, as text.

    Args:
        setup: A prepared run.
    """
    config, images = setup.config, setup.images
    validation = len(images.validation_labels) if images.validated else 0
    blocks = setup.blocks
    cost = describe(setup.model, blocks, setup.example)
    if setup.step_times is not None:
        cost = MeasuredComplexity(cost, setup.step_times)
    ones = np.ones(cost.size)
    prices = cost.prices(ones, nu=config.nu, alpha=config.alpha, beta=config.beta)
    macs, params = cost.macs(ones), cost.params(ones)
    lines = [
        *(f"note: {note}" for note in setup.notes),
        f"{config.dataset}: {len(images.train_labels)} training, {validation} validation and {len(images.test_labels)} test "
        f"images, {len(images.classes)} classes",
        f"{config.arch}: {macs:,.0f} MACs, {params:,.0f} parameters; removable {cost.removable_macs / macs:.1%} of the MACs, "
        f"{cost.removable_params / params:.1%} of the parameters",
        f"nu {config.nu:g}, alpha {config.alpha:g}, beta {config.beta:g}; {len(setup.schedule)} steps, ODE time "
        f"{setup.ode_time:.4g}, rate_ratio {config.rate_ratio:.4g}, deciding from step {setup.warmup_steps} to "
        f"{setup.decide_steps}",
        f"memory {config.memory} steps, a check every {config.check_every}",
        "",
        f"{'block':<12} {'width':>9} {'MACs':>13} {'params':>11} {'layer price':>12} {'unit price':>18}",
    ]
    if setup.step_times is not None:
        time = f"{cost.removable_ms:.4g} ms for {config.batch_size // config.accumulate} images in the blocks, just measured"
        lines.insert(-2, f"prices by time: {time}")
    for number, block in enumerate(blocks):
        without = ones.copy()
        without[number] = 0.0
        sites = np.flatnonzero(cost.inventory.site_layer == number)
        widths = "+".join(str(cost.inventory.widths[site]) for site in sites)
        units = " ".join(f"{prices[cost.inventory.units[site][0]]:.3g}" for site in sites)
        lines.append(
            f"{block.name:<12} {widths:>9} {macs - cost.macs(without):>13,.0f} {params - cost.params(without):>11,.0f} "
            f"{prices[number]:>12.3g} {units:>18}"
        )
    floor = np.zeros(cost.size)
    lines += [
        "",
        f"minimum: {cost.macs(floor):,.0f} MACs ({cost.macs(floor) / macs:.1%}), {cost.params(floor):,.0f} parameters",
    ]
    target = Target.choose(cost, config.target_macs, config.target_params)
    if target is not None:
        lines.append(
            f"target: {target.share:.1%} of the {target.quantity}, above the minimum; nu starts as above and is adjusted "
            "while training, and the prices with it"
        )
    units = config.alpha < 1 and cost.size > cost.inventory.layers
    gated = prices[cost.inventory.layers :] if units else prices[: cost.inventory.layers]
    pool = dict(memory=config.memory, check_every=config.check_every, risk=config.risk, epochs=config.epochs)
    short = cannot_decide(setup.decide_steps, setup.warmup_steps, prices=gated, **pool) if config.nu > 0 else ""
    if short:
        lines.append(f"warning: {short}")
    return "\n".join(lines)
