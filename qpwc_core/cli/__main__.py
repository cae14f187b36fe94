"""`python -m qpwc_core.cli`: the program `qpwc`, also where the package is not installed."""

import sys

from qpwc_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
