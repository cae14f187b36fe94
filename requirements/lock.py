"""Write requirements/*.txt: every direct requirement of *.in and all it needs, at one exact version each.

    python requirements/lock.py python3.10 python3.11 python3.12 python3.13

Each interpreter given resolves each of SETS for itself (`pip install --dry-run`, nothing is installed). A
package goes into the first group of a set that needs it. A set that is installed by itself as well as beside
an earlier one keeps to that one's versions (CONSTRAINED). Where interpreters disagree, the line carries an
environment marker. Edit *.in, run this, commit both.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Groups that are installed together, and the newest Python for which they can be.
SETS = (
    (("build", "runtime", "ros", "replay", "train", "test"), "3.13"),
    (("build", "system-ros", "system-ros-test"), "3.12"),
    (("docs",), "3.13"),
)
# Sets, by their last group, that keep to the versions locked for these groups.
CONSTRAINED = {"docs": ("build", "runtime", "ros", "replay", "train", "test")}
HERE = Path(__file__).parent


def normal(name: str) -> str:
    """A package's name in the form that is compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirement: str) -> str:
    """The package that a requirement line names."""
    return normal(re.match(r"[A-Za-z0-9._-]+", requirement).group())


def direct(group: str) -> list[str]:
    """The requirement lines of a group's .in file."""
    lines = (line.split(" #")[0].strip() for line in (HERE / f"{group}.in").read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def python_version(interpreter: str) -> str:
    """An interpreter's "3.x"."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run(
        [interpreter, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def ordered(python: str) -> tuple[int, ...]:
    """A "3.x" as something that sorts."""
    return tuple(map(int, python.split(".")))


def resolve(interpreter: str, groups: tuple[str, ...]) -> dict[str, tuple[str, set[str]]]:
    """What one interpreter would install: {package: (version, packages it may require)}."""
    with tempfile.TemporaryDirectory() as directory:
        environment, report = Path(directory) / "venv", Path(directory) / "report.json"
        subprocess.run([interpreter, "-m", "venv", str(environment)], check=True)
        files = [argument for group in groups for argument in ("-r", str(HERE / f"{group}.in"))]
        for group in CONSTRAINED.get(groups[-1], ()):
            files += ["-c", str(HERE / f"{group}.txt")]
        command = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report), *files]
        subprocess.run([str(environment / "bin" / "python"), "-m", "pip", *command], check=True)
        found = {}
        for item in json.loads(report.read_text())["install"]:
            meta = item["metadata"]
            needs = {named(r) for r in meta.get("requires_dist", ()) if not re.search(r";.*\bextra\s*==", r)}
            found[normal(meta["name"])] = (meta["version"], needs)
    return found


def closure(names: list[str], found: dict[str, tuple[str, set[str]]]) -> set[str]:
    """`names` and everything they need, of what was found for one interpreter."""
    todo, seen = [name for name in names if name in found], set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [need for need in found[name][1] if need in found]
    return seen


def lines(name: str, versions: dict[str, str], pythons: list[str]) -> list[str]:
    """The pinned lines of one package from its version for each Python (absent where not needed)."""
    if len(set(versions.values())) == 1 and len(versions) == len(pythons):
        return [f"{name}=={versions[pythons[0]]}"]
    result = []
    for version in sorted(set(versions.values())):
        where = [python for python in pythons if versions.get(python) == version]
        # Pythons are ordered, and agreement comes in runs, so two bounds describe a run.
        bounds = []
        if where[0] != pythons[0]:
            bounds.append(f'python_version >= "{where[0]}"')
        if where[-1] != pythons[-1]:
            after = pythons[pythons.index(where[-1]) + 1]
            bounds.append(f'python_version < "{after}"')
        if pythons[pythons.index(where[0]) : pythons.index(where[-1]) + 1] != where:
            raise SystemExit(f"lock: {name} {version} is wanted by {where}, which is no range")
        result.append(f"{name}=={version}; {' and '.join(bounds)}" if bounds else f"{name}=={version}")
    return result


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    interpreters = {python_version(interpreter): interpreter for interpreter in sys.argv[1:]}
    for groups, newest in SETS:
        pythons = sorted((p for p in interpreters if ordered(p) <= ordered(newest)), key=ordered)
        write(groups, {python: resolve(interpreters[python], groups) for python in pythons})
    return 0


def write(groups: tuple[str, ...], resolved: dict[str, dict[str, tuple[str, set[str]]]]) -> None:
    """Write the .txt files of one set from what every Python resolved."""
    pythons = list(resolved)
    placed: set[str] = set()
    for group in groups:
        names = [named(requirement) for requirement in direct(group)]
        wanted = set().union(*(closure(names, found) for found in resolved.values())) - placed
        # What a group names itself stays in it, although an earlier one has it too: it may be installed without that.
        wanted |= {name for name in names if any(name in found for found in resolved.values())}
        placed |= wanted
        body = [f"# Made by lock.py from {group}.in for Python {', '.join(pythons)}. Edit that, not this."]
        for name in sorted(wanted):
            versions = {python: found[name][0] for python, found in resolved.items() if name in found}
            body += lines(name, versions, pythons)
        (HERE / f"{group}.txt").write_text("\n".join(body) + "\n")
        print(f"{group}.txt: {len(wanted)} packages")


if __name__ == "__main__":
    raise SystemExit(main())
