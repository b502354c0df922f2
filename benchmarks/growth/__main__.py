"""The command ``python -m benchmarks.growth``."""

from benchmarks.common import guarded
from benchmarks.growth.frozen import main

if __name__ == "__main__":
    guarded(main)
