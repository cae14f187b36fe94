"""What foreign code does wrong, caught whatever it raises: a plugin may well call sys.exit()."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np


def let_ctrl_c_pass(error: BaseException) -> None:
    """To be called first where BaseException is caught around a plugin's code: Ctrl-C still ends the program.

    Raises:
        KeyboardInterrupt: `error` is one, and this is the main thread, the only one that Ctrl-C reaches.
    """
    if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
        raise error


def one_line(error: BaseException) -> str:
    """An exception as one line of text."""
    try:
        text = " ".join(str(error).split())
    except BaseException as failure:  # its __str__ is foreign code, too
        let_ctrl_c_pass(failure)
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def description(plugin: Any) -> tuple[dict[str, str], str]:
    """What a plugin's describe() says, all of it made text, and why it says nothing, or ""."""
    try:
        found = plugin.describe()
        if not isinstance(found, Mapping):
            return {}, f"describe() returned {type(found).__name__} instead of dict"
        return {printable(key): printable(value) for key, value in found.items()}, ""
    except BaseException as error:
        let_ctrl_c_pass(error)
        return {}, one_line(error)


def flow_fault(flow: object, image_shape: tuple[int, ...]) -> str | None:
    """What is wrong with what an estimator's match() returned for images of a shape (H, W, ...), or None if it is a flow."""
    expected = (*image_shape[:2], 2)
    if isinstance(flow, np.ndarray) and flow.shape == expected and flow.dtype == np.float32:
        return None
    what = f"{flow.dtype} {flow.shape}" if isinstance(flow, np.ndarray) else type(flow).__name__
    return f"the estimator returned {what} instead of float32 {expected}"


def printable(value: object) -> str:
    """A value as text that a ROS message can carry: half a surrogate pair, as in odd file names, is none."""
    return str(value).encode("utf-8", "replace").decode()
