"""The command ``python -m benchmarks.gpt``."""

from benchmarks.common import guarded
from benchmarks.gpt.comparison import main

if __name__ == "__main__":
    guarded(main)
