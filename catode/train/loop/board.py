"""TensorBoard: the columns of metrics.csv as scalars, keep probabilities as histograms, in the run's folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from numpy.typing import NDArray

FOLDER = "tensorboard"


def check_package() -> None:
    """Check that the package tensorboard is installed.

    Raises:
        ValueError: if it is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "`tensorboard` must be left out where the package tensorboard is missing; got tensorboard=True. "
            "Install it: pip install 'catode[tensorboard]'."
        )


class Board:
    """Event writer of one run.

    Args:
        folder: The run's folder.
        step: Steps done already; events of later steps, written before an interruption, are dropped.
    """

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=step + 1)

    def add(self, row: dict, keep_prob: dict[str, NDArray]) -> None:
        """Write one epoch.

        Args:
            row: Its row of metrics.csv.
            keep_prob: Keep probabilities by kind of structure, each of shape (n,).
        """
        for name, value in row.items():
            if name not in ("step", "time"):
                self._writer.add_scalar(name, value, row["step"])
        for kind, theta in keep_prob.items():
            self._writer.add_histogram(f"keep_prob/{kind}", theta, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
