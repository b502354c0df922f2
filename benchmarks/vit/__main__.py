"""The command ``python -m benchmarks.vit``."""

from benchmarks.common import guarded
from benchmarks.vit.comparison import main

if __name__ == "__main__":
    guarded(main)
