"""Packages that are not there, for programs that only look at declarations: `install("rclpy", …)`.

Everything in such a package is a class that can be called, subclassed and asked for any attribute, and does
nothing. So a module that uses ROS or TensorFlow can be imported for its tables of parameters or options, on
any machine and in a fraction of a second.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


class _Meta(type):
    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(name, cls.__module__)


class StandIn(metaclass=_Meta):
    """What every name in a package that is not there stands for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> StandIn:
        return StandIn()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(name, type(self).__module__)


def _make(name: str, module: str) -> type:
    return _Meta(name, (StandIn,), {"__module__": module})


class _Module(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(name, self.__name__)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in self._names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module) -> None:
        pass


def install(*names: str) -> None:
    """From now on importing one of these packages, or a part of it, gives stand-ins, installed or not.

    For a process of its own: what is imported with them stays so.
    """
    sys.meta_path.insert(0, _Finder(frozenset(names)))
