"""`python -m qpwc_core.cli`: the program `qpwc`, also where the package is not installed."""

from qpwc_core.cli.main import program

if __name__ == "__main__":
    program()
