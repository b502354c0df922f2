"""What a pruner tells at any moment: thetas, fates, masks and counts."""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from catode.decisions.shadow import Shadow
from catode.prune.describe.costs import Counts
from catode.prune.settings import PrunerSettings
from catode.prune.state import PrunerState
from catode.structures import fates
from catode.structures.complexity import Complexity
from catode.structures.inventory import Inventory


class Queries:
    """The queries of a `catode.prune.pruner.Pruner`; nothing here changes it.

    Attributes:
        settings: The settings.
        complexity: The network's complexity polynomial.
        inventory: Numbering of its structures.
        state: The pruner's state.
        is_layer: Which structures are layers, shape (n,); the others are units.
        gated: Which structures have gates at all, shape (n,).
    """

    settings: PrunerSettings
    complexity: Complexity
    inventory: Inventory
    state: PrunerState
    is_layer: NDArray[np.bool_]
    gated: NDArray[np.bool_]

    @property
    def keep_prob(self) -> NDArray:
        """theta, shape (n,); layers first, then units site by site."""
        return self.state.keep_prob

    @property
    def fate(self) -> NDArray[np.str_]:
        """One of `catode.structures.fates.FATES` of every structure, shape (n,)."""
        return self.state.fate

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Structures in the network, shape (n,)."""
        return self.state.kept

    @property
    def nu(self) -> float:
        """Nats that the whole network may cost at this moment."""
        return self.state.nu

    @property
    def shadow(self) -> Shadow | None:
        """Record of a shadow run."""
        return self.state.shadow

    @property
    def started(self) -> bool:
        """Whether gates are in the model (until it is `finished`)."""
        return self.state.started

    @property
    def finished(self) -> bool:
        """Whether everything is decided and the model has no gates."""
        return self.state.finished

    @property
    def expected_complexity(self) -> float:
        """J at the current thetas, in [0, 1]."""
        return self.complexity.index(self.keep_prob, self.settings.beta)

    @property
    def expected_macs(self) -> float:
        """Expected MACs of the whole network at the current thetas."""
        return self.complexity.macs(self.keep_prob)

    @property
    def undecided(self) -> int:
        """Structures without a decision."""
        return int(self._open.sum())

    @property
    def layers_kept(self) -> int:
        """Residual branches in the network."""
        return int(self.kept[self.is_layer & self.inventory.removable].sum())

    @property
    def units_kept(self) -> int:
        """Units in the network, without dead channels."""
        return int(self.kept[~self.is_layer].sum())

    @property
    def kept_for_width(self) -> int:
        """Units in the network only because of `round_to`."""
        return int((self.kept & self.state.for_width).sum())

    @property
    def out_of_time(self) -> int:
        """Structures that were decided only because the deciding phase ended."""
        return int(np.isin(self.fate, (fates.KEPT_OUT_OF_TIME, fates.REMOVED_OUT_OF_TIME)).sum())

    @property
    def removed_near_one(self) -> int:
        """Those of them that were removed with a theta near 1, which a longer run might have kept."""
        return self.state.removed_near_one

    @property
    def largest_norms(self) -> NDArray:
        """Largest norm of the weights of each block's branch at any check, shape (layers,)."""
        return self.state.bounds.norm

    @property
    def largest_violations(self) -> NDArray:
        """Largest share of what the Lipschitz assumption permits a layer's benefit, at any check, shape (layers,)."""
        return self.state.bounds.violation

    @property
    def warnings(self) -> list[str]:
        """What was said aloud so far, one line each."""
        return list(self.state.warnings)

    @property
    def decided_by_rule(self) -> float:
        """Share of the gated structures whose fate a measurement decided, in [0, 1].

        What was removed with its site or block counts if those would have gone without anything that was out of time.
        """
        pruned = np.isin(self.fate, (fates.PRUNED_TOLERANCE, fates.PRUNED_ZERO))
        timeless = (self.fate == fates.REMOVED_WITH_BLOCK) & self.inventory.close(~pruned)
        decided = self.gated & ~timeless & ~np.isin(self.fate, (fates.UNDECIDED, *fates.NOT_BY_RULE))
        return float(decided.sum() / self.gated.sum())

    def keep_prob_by_kind(self) -> dict[str, NDArray]:
        """theta of the gated layers and of the gated units."""
        kinds = (("layers", self.is_layer), ("units", ~self.is_layer))
        return {name: self.keep_prob[kind & self.gated] for name, kind in kinds if (kind & self.gated).any()}

    def decisions(self) -> dict[str, int]:
        """Number of gated structures of each fate."""
        return dict(sorted(Counter(self.fate[self.gated].tolist()).items()))

    def counts(self) -> Counts:
        """MACs and parameters of the network as cut so far."""
        kept = self.kept.astype(float)
        return Counts(round(self.complexity.macs(kept)), round(self.complexity.params(kept)))

    def macs_removed(self, fate: str) -> int:
        """MACs that the whole network would lose by removing the structures of one fate alone."""
        kept = self.inventory.close(self.fate != fate)
        return round(self.complexity.macs(np.ones(self.complexity.size)) - self.complexity.macs(kept.astype(float)))

    def prices(self) -> NDArray:
        """Price of every structure at the current thetas, nats, shape (n,)."""
        return self.complexity.prices(self.keep_prob, nu=self.nu, alpha=self.settings.alpha, beta=self.settings.beta)

    def structure(self) -> dict:
        """Kept blocks and units in the original numbering, as in structure.json."""
        return self.inventory.record(self.kept)

    def checksum(self) -> int:
        """Checksum of what must be the same in all processes: thetas, masks, and the state of the gate draws.

        `read`, `snapshot` and `state_dict` between two readings move the thetas of this process alone: call ``read()`` in
        all processes first.
        """
        generator = self.state.draws.generator.get_state().numpy()
        return zlib.crc32(generator, zlib.crc32(self.kept, zlib.crc32(self.keep_prob)))

    @property
    def _open(self) -> NDArray[np.bool_]:
        """Undecided structures, shape (n,)."""
        return self.state.fate == fates.UNDECIDED
