"""Runs one node as a program: signals, executor, exit code."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions

from qpwc_ros.frames import one_line
from qpwc_ros.parameters import ParameterError
from qpwc_ros.share import use_large_shared_memory


def guarded(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A node's method that reports its exceptions instead of raising: one raised in a callback ends spinning.

    The node has a method `report(problem, text)`.
    """

    @functools.wraps(callback)
    def call(self: Any, *args: Any) -> Any:
        try:
            return callback(self, *args)
        except Exception as error:
            if self.context.ok():
                self.report("internal_errors", f"{callback.__name__}: {one_line(error)}")
                self.get_logger().debug(traceback.format_exc())
            return None

    return call


def run(make_node: Callable[[], Any], name: str, args: list[str] | None = None) -> int:
    """Run a node until SIGINT or SIGTERM; returns the exit code.

    Args:
        make_node: makes it, once rclpy is initialized. Besides rclpy's methods it has
            `report(problem, text)`, and `close()`, which ends its threads and returns False if one of them
            would not end in time.
        name: for the one line on stderr when a parameter given at start is impossible.
        args: the program's arguments; by default those of the process.
    """
    use_large_shared_memory()
    node, initialized = None, False
    # Not rclpy's own handlers: they shut the context down at once, under a worker that may be publishing.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        initialized = True
        node = make_node()
        _spin(node, stop)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except ParameterError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except Exception:
        # A signal during the start takes the context away from under the constructor.
        if rclpy.ok() or not initialized:
            raise
    finally:
        # From here on a second Ctrl-C would only interrupt the clean end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        finished = node is None or node.close()
        if not finished:
            # Python would tear down the interpreter under a thread that is still computing.
            sys.stderr.flush()
            os._exit(0)
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


def _spin(node: Any, stop: threading.Event) -> None:
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    while rclpy.ok() and not stop.is_set():
        try:
            # A signal is seen between waits.
            executor.spin_once(timeout_sec=0.1)
        except (KeyboardInterrupt, ExternalShutdownException):
            return
        except Exception as error:  # of rclpy itself: our callbacks are guarded
            if not rclpy.ok():
                return
            node.report("internal_errors", one_line(error))
            time.sleep(0.01)
