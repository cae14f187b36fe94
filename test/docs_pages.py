"""The documentation as the tests see it: its pages, and the command lines in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "models").glob("*.md"))]

# Fences that hold commands; an indented block always does. Anything else is fenced with its own language.
SHELL = ("", "sh", "bash", "console")
# What a shell would fill in, or a reader.
FILLED_IN = {"$(ros2 pkg prefix --share qpwc_ros)": "SHARE", "<this repository>": "REPOSITORY", "$PWD/": ""}
ASSIGNMENT = re.compile(r"([A-Z][A-Z_0-9]*)=")


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        where: page and line, as "docs/cli.md:36".
        words: as a shell would split them, with FILLED_IN replaced.
    """

    where: str
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        """The program's name without its directory."""
        name = self.words[0].rsplit("/", 1)[-1]
        return "python" if re.fullmatch(r"python3?", name) else name


def shell_lines(text: str) -> list[tuple[int, str]]:
    """(line number, line) of all code blocks with commands, continued lines joined."""
    lines: list[tuple[int, str]] = []
    fence: str | None = None
    in_list = False
    previous_blank, in_block = True, False
    for number, line in enumerate(text.splitlines(), 1):
        opening = re.match(r"\s*```(\w*)", line)
        if opening:
            fence, in_block = (opening[1] if fence is None else None), False
            continue
        if fence is not None:
            if fence in SHELL and line.strip():
                lines.append((number, line))
            continue
        indented = line.startswith("    ")
        if line.strip() and not indented:
            in_list = bool(re.match(r"([-*]|\d+\.) ", line)) or (in_list and line.startswith(" "))
        in_block = indented and not in_list and (previous_blank or in_block)
        if in_block and line.strip():
            lines.append((number, line))
        previous_blank = not line.strip()
    joined: list[tuple[int, str]] = []
    for number, line in lines:
        if joined and joined[-1][1].endswith("\\"):
            joined[-1] = (joined[-1][0], joined[-1][1][:-1] + line.strip())
        else:
            joined.append((number, line.strip()))
    return joined


def split(line: str) -> list[tuple[str, ...]]:
    """The commands of a line, parted at &&, ; and |; comments are left out."""
    for text, stand_in in FILLED_IN.items():
        line = line.replace(text, stand_in)
    reader = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    reader.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in reader:
        if re.fullmatch(r"[&|;]+", word):
            commands.append([])
        elif word != "...":
            commands[-1].append(word)
    return [tuple(words) for words in commands if words]


def commands() -> list[Command]:
    """Every command in a code block of any page."""
    found = []
    for page in PAGES:
        where = page.relative_to(ROOT)
        for number, line in shell_lines(page.read_text(encoding="utf-8")):
            found += [Command(f"{where}:{number}", words) for words in split(line)]
    return found


def mentions() -> list[Command]:
    """Commands of this project named within sentences and tables: code spans that begin with a program."""
    found = []
    for page in PAGES:
        where = page.relative_to(ROOT)
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            for span in (
                re.findall(r"`((?:qpwc|make|ros2|python) [^`]+)`", line) if line[:4] != "    " else ()
            ):
                found += [Command(f"{where}:{number}", words) for words in split(span.replace("…", ""))]
    return found
