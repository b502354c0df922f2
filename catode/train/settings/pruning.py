"""Settings of the prices, tolerances and decisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from catode.train.settings.setting import ConfigError, SettingsGroup, helpers

number, text, switch = helpers("pruning")


@dataclass(frozen=True, kw_only=True)
class PruningSettings(SettingsGroup):
    """Prices, tolerances, and when structures are decided."""

    nu: float = number(
        0.1,
        float,
        "price of the network's whole expected complexity, nats; larger prunes more, 0 trains without gates",
        low=0,
        hint="Use 0 to train without gates.",
    )
    alpha: float = number(
        0.5,
        float,
        "share of the price on layers, the rest is on units; with 0 layers have no gates, with 1 units have none",
        low=0,
        high=1,
        hint="Use 0.5 to price units and layers alike.",
    )
    beta: float = number(
        0.0,
        float,
        "weight of parameters in the complexity; MACs have weight 1 - beta",
        low=0,
        high=1,
        hint="Use 0 to price MACs alone.",
    )
    cost: str = text(
        "macs",
        "what the complexity counts besides parameters: macs, or latency, the training-step time of each layer, measured on "
        "this device before the run and saved in latency_table.csv",
        choices=("macs", "latency"),
    )
    risk: float = number(
        0.05,
        float,
        "target share of removals that would have recovered; several limits each use the whole of it",
        low=0,
        high=0.5,
        low_open=True,
        high_open=True,
        hint="Use 0.05 if in doubt.",
    )
    derive_tol: bool = switch(
        False,
        "derive the tolerance of each structure from measured quantities: the default, unless --tol is given",
    )
    tol: float | None = number(
        None,
        float,
        "one fixed tolerance on the keep probability instead of the derived ones",
        low=0,
        high=1,
        optional=True,
        hint="Leave it out to derive tolerances.",
    )
    target_macs: float | None = number(
        None,
        float,
        "share of the MACs to keep at the end; adjusts nu while training",
        low=0,
        high=1,
        low_open=True,
        high_open=True,
        optional=True,
        hint="Use 0.5 for half of them, or leave it out to set --nu.",
    )
    target_params: float | None = number(
        None,
        float,
        "share of the parameters to keep at the end; adjusts nu while training",
        low=0,
        high=1,
        low_open=True,
        high_open=True,
        optional=True,
        hint="Use 0.5 for half of them, or leave it out to set --nu.",
    )
    initial_keep_prob: float = number(
        1.0,
        float,
        "keep probability of every structure at the start",
        low=0,
        high=1,
        low_open=True,
        hint="Use 1 to start from the full network.",
    )
    warmup_epochs: float = number(
        0.0,
        float,
        "epochs before any keep probability changes; a preset's value is scaled down with --epochs",
        low=0,
        hint="Use 0 for no warm-up.",
    )
    decide_until: float = number(
        0.8,
        float,
        "share of the run in which structures are decided by rule; of those undecided then, a theta of at least 1/2 is "
        "kept and the others are removed, counted separately",
        low=0,
        high=1,
        low_open=True,
        hint="Use 0.8 if in doubt.",
    )
    rate_ratio: float | None = number(
        None,
        float,
        "speed of every theta, 1/time: theta of a useless structure falls from 1 to 0 within 1/rate_ratio of ODE time; the rate "
        "ratio of a structure is rate_ratio/price at the start; default: 1/(sink_share x ODE time of the run)",
        low=0,
        low_open=True,
        optional=True,
        hint="Leave it out to derive it from sink_share.",
    )
    sink_share: float = number(
        0.1,
        float,
        "share of the run's ODE time in which theta of a useless structure falls from 1 to 0; not used with --rate-ratio",
        low=0,
        high=1,
        low_open=True,
        hint="Use 0.1 if in doubt.",
    )

    prior: str = text(
        "flattening",
        "prior of the gates: the flattening hyper-prior, or a baseline, which needs --tol: a fixed Bernoulli prior, or "
        "thetas that are sigmoids as in hard-concrete L0 gates",
        choices=("flattening", "bernoulli", "concrete"),
    )
    shadow: bool = switch(
        False,
        "decide, but remove nothing before its theta is 0: shadow.csv then lists what the tolerances and other rules would "
        "have removed and the outcome (python -m catode.report.compare)",
    )
    max_norm: float | None = number(
        None,
        float,
        "bound on the norm of the weights of every block's branch, which is scaled down to it after each step while pruning, as "
        "the theorems assume; default: no bound",
        low=0,
        low_open=True,
        optional=True,
        hint="Leave it out for no bound.",
    )
    keep: tuple[str, ...] | None = number(
        None,
        tuple,
        "paths of modules of the network, or glob patterns of them, that stay whole with everything inside them, such as "
        "classifier 'layer4.*'",
        optional=True,
        hint="Write --keep PATTERN ..., or leave it out.",
    )
    least: tuple[str, ...] | None = number(
        None,
        tuple,
        "fewest units that stay of the widths made by modules whose path fits a pattern, as PATTERN=NUMBER, such as 'layer1.*=8'",
        optional=True,
        hint="Write --least PATTERN=NUMBER ..., or leave it out.",
    )
    round_to: int = number(
        1,
        int,
        "make the final width of every pruned site a multiple of this: units are removed in whole groups, and an incomplete "
        "group is kept at the end",
        low=1,
        hint="Use 1 for any width.",
    )

    def check(self) -> None:
        least_units(self.least)
        targets = self.target_macs, self.target_params
        if self.derive_tol and self.tol is not None:
            raise ConfigError(
                f"`tol` must be left out with derive_tol; got tol={self.tol:g} and derive_tol=True. Give one of the two."
            )
        if self.prior != "flattening" and (self.tol is None or self.shadow or targets != (None, None)):
            raise ConfigError(
                f"`prior` must be flattening without --tol, with a target or with shadow; got prior={self.prior!r}. "
                "Derived tolerances hold for the flattening prior only: add --tol 0.01."
            )
        if self.prior == "concrete" and self.initial_keep_prob == 1.0:
            raise ConfigError(
                "`initial_keep_prob` must be below 1 with prior=concrete, whose theta stays at 1; got initial_keep_prob=1. Use 0.9."
            )
        if self.shadow and (self.nu == 0 or self.round_to > 1 or targets != (None, None)):
            raise ConfigError(
                f"`shadow` must be left out with nu=0, a target or round_to; got nu={self.nu:g}, round_to={self.round_to}, "
                f"target_macs={self.target_macs}, target_params={self.target_params}. Leave one of them out."
            )
        if None not in targets:
            raise ConfigError(
                f"`target_macs` must be left out with target_params; got target_macs={self.target_macs:g} and "
                f"target_params={self.target_params:g}. Give one of the two."
            )
        for name in ("target_macs", "target_params"):
            if getattr(self, name) is not None and self.nu == 0:
                raise ConfigError(
                    f"`{name}` must be left out with nu=0, which trains without gates; got {name}={getattr(self, name):g}. "
                    "Leave out --nu."
                )


def least_units(least: Iterable[str] | None) -> dict[str, int]:
    """Fewest units by pattern, of texts PATTERN=NUMBER.

    Raises:
        ConfigError: if a text has another form.
    """
    found = {}
    for part in least or ():
        pattern, _, count = part.rpartition("=")
        if not pattern or not count.isdecimal() or int(count) < 1:
            raise ConfigError(
                f"`least` must be PATTERN=NUMBER with a number of at least 1; got least={part!r}. Write --least 'layer1.*=8'."
            )
        found[pattern] = int(count)
    return found
