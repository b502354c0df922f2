"""``python -m catode.report.compare FOLDER [FOLDER ...] [--out FOLDER]``."""

from __future__ import annotations

import sys

from catode._output import run
from catode.report.compare.command import main

if __name__ == "__main__":
    sys.exit(run(main))
