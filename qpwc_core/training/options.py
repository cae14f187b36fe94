"""Command-line options generated from a config dataclass, so that each option stands in one place."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Adds ``--field-name`` for every field of a dataclass; defaults are the dataclass' own.

    A field whose metadata has ``choices`` takes one of these.
    """
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        parts = [t for t in typing.get_args(kind) if t is not type(None)]
        options: dict = {"default": field.default, "help": f"default: {field.default}"}
        if typing.get_origin(kind) is tuple:
            options.update(type=parts[0], nargs="+" if Ellipsis in parts else len(parts))
        else:
            options["type"] = parts[0] if parts else kind
        if "choices" in field.metadata:
            options["choices"] = field.metadata["choices"]
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def parse_config(args: argparse.Namespace, config: type):
    """The dataclass from parsed options."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(config)}
    return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def changed_options(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What to tell people of each option whose value is not what it was; one that is missing counts as None."""
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r} now"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
