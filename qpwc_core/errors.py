"""What can go wrong with things outside the program: files, models, the machine.

Each message is one line that names the offending thing. A caller's own mistake (a wrong shape, a
wrong dtype, a number out of range) is a plain `ValueError` instead.
"""

from __future__ import annotations


class QpwcError(Exception):
    """Base of this package's errors; its message is one line fit to show to a user."""


class ModelError(QpwcError):
    """A model is missing, damaged, or not one of ours."""


class FormatError(QpwcError):
    """A file does not hold what its format promises, or cannot hold what it is given."""


class CutOffError(FormatError):
    """A file ends early, or is damaged from somewhere on; what came before has been read and can be used."""


class UsageError(QpwcError):
    """Command-line arguments that do not go together; the program ends with exit code 2."""
