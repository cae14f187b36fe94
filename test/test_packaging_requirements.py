"""The pinned requirements are complete, exact, and what the demo installs has no TensorFlow in it."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DIRECTORY = Path(__file__).resolve().parents[1] / "requirements"
LOCKED = sorted(path.stem for path in DIRECTORY.glob("*.txt"))
DEMO = ("build", "runtime", "ros", "replay")


def requirements(path: Path) -> list[Requirement]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def here(items: list[Requirement]) -> dict[str, str]:
    """{package: version} that apply to this Python."""
    apply = [r for r in items if r.marker is None or r.marker.evaluate()]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in apply}


@pytest.mark.parametrize("name", LOCKED)
def test_every_line_is_one_exact_version(name):
    text = (DIRECTORY / f"{name}.txt").read_text()
    assert "://" not in text and "--" not in text
    for requirement in requirements(DIRECTORY / f"{name}.txt"):
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), requirement
        assert requirement.url is None and not requirement.extras


@pytest.mark.parametrize("name", LOCKED)
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_what_is_asked_for_is_what_is_locked(name, python):
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}

    def versions(items):
        return {
            canonicalize_name(r.name): r.specifier
            for r in items
            if r.marker is None or r.marker.evaluate(environment)
        }

    locked = versions(requirements(DIRECTORY / f"{name}.txt"))
    asked = versions(requirements(DIRECTORY / f"{name}.in"))
    for package, specifier in asked.items():
        assert package in locked
        assert all(specifier.contains(pin.version) for pin in locked[package]), package


def test_the_demo_needs_no_tensorflow():
    packages = set().union(*(here(requirements(DIRECTORY / f"{name}.txt")) for name in DEMO))
    assert not [p for p in packages if p.startswith(("tensorflow", "tf-", "keras"))]


def test_the_demo_set_is_complete():
    """Nothing that an installed package of the set requires is missing from it, so --no-deps is safe."""
    pinned: dict[str, str] = {}
    for name in DEMO:
        pinned |= here(requirements(DIRECTORY / f"{name}.txt"))
    checked = 0
    for package, version in pinned.items():
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if distribution.version != version:
            continue
        checked += 1
        for line in distribution.requires or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                have = pinned.get(canonicalize_name(need.name))
                assert have is not None, f"{package} needs {need}"
                assert need.specifier.contains(have, prereleases=True), (
                    f"{package} needs {need}, locked is {have}"
                )
    if checked < len(pinned) / 2:
        pytest.skip("this environment was not made from requirements/*.txt")
