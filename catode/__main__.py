"""The command ``catode`` as a module: ``python -m catode COMMAND ...``."""

import sys

from catode.cli import main

sys.exit(main())
