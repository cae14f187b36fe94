"""Tables of results, for machines and for readers."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Mapping, Sequence

from qpwc_core import atomic


def write_table(base: Path, fields: Sequence[str], rows: Sequence[Mapping], lines: Sequence[str]) -> list[Path]:
    """Writes ``base``.csv from the rows and ``base``.md from the lines; what was there is replaced whole or not at all.

    Returns:
        Both paths.

    Raises:
        OSError: one cannot be written.
    """
    table, page = (base.with_name(f"{base.name}.{kind}") for kind in ("csv", "md"))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    atomic.write_bytes(table, text.getvalue().encode())
    atomic.write_bytes(page, ("\n".join(lines) + "\n").encode())
    return [table, page]
