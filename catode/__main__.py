"""The command ``catode`` as a module: ``python -m catode COMMAND ...``."""

import sys

from catode.cli import main

if __name__ == "__main__":
    sys.exit(main())
