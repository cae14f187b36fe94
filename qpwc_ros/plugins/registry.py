"""Finds plugins among the entry points of every installed package."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from qpwc_ros.faults import let_ctrl_c_pass, one_line
from qpwc_ros.plugins.builtin import ENTRY_POINTS


class PluginError(Exception):
    """A plugin is unknown or cannot be imported; the text is one line."""


def available(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name, built-in ones first, then by name.

    A package cannot replace a built-in plugin: its own must have a name of its own.
    """
    built_in = {name: EntryPoint(name, value, group) for name, value in ENTRY_POINTS[group].items()}
    others = {point.name: point for point in entry_points(group=group) if point.name not in built_in}
    return {**built_in, **dict(sorted(others.items()))}


def load(group: str, name: str, base: type) -> type:
    """The class behind an entry point.

    Raises:
        PluginError: there is no such plugin, it cannot be imported, or it is no subclass of `base`.
    """
    points = available(group)
    if name not in points:
        raise PluginError(f"no plugin {name!r} in {group}; there are {', '.join(points)}")
    try:
        found = points[name].load()
    except BaseException as error:  # whatever a foreign module raises on import, or calls sys.exit()
        let_ctrl_c_pass(error)
        raise PluginError(f"plugin {name!r} cannot be imported: {one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(
            f"plugin {name!r} ({points[name].value}) is no {base.__module__}.{base.__qualname__}"
        )
    return found
