"""Runs one node as a program: signals, executor, exit code."""

from __future__ import annotations

import functools
import gc
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import rclpy
from rclpy.executors import Executor, ExternalShutdownException, SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.signals import SignalHandlerOptions

from qpwc_core.ending import end_at_once
from qpwc_ros.faults import one_line
from qpwc_ros.parameters import ParameterError
from qpwc_ros.share import use_large_shared_memory

#: What ROS raises at start when it cannot do what the command line or the environment says: arguments that it does
#: not understand, an enclave that is not there.
_ROS_REFUSALS = (rclpy_implementation.RCLError, rclpy_implementation.UnknownROSArgsError)


_HELP = """\
usage: {name} --ros-args [-r image:=TOPIC] [-p PARAMETER:=VALUE] [--params-file FILE] ...

Topics and parameters: docs/reference.md, or of a running node
    ros2 node info /{name}
    ros2 param describe /{name} PARAMETER"""


def guarded(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A node's method that reports its exceptions instead of raising: one raised in a callback ends spinning.

    The node has a method `report(problem, text)`.
    """

    @functools.wraps(callback)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return callback(self, *args, **options)
        except Exception as error:
            if self.context.ok():
                self.report("internal_errors", f"{callback.__name__}: {one_line(error)}")
                self.get_logger().debug(traceback.format_exc())
            return None

    return call


def run(make_node: Callable[[], Any], name: str, args: list[str] | None = None) -> NoReturn:
    """Run a node as this process's program until SIGINT or SIGTERM; ends the process with the exit code.

    Args:
        make_node: makes it, once rclpy is initialized. Besides rclpy's methods it has
            `report(problem, text)`, and `close()`, which ends its threads and returns False if one of them
            would not end in time.
        name: for the one line on stderr when what is given at start is impossible.
        args: the program's arguments; by default those of the process.
    """
    code = _run(make_node, name, args)
    # Threads, node and middleware have come to their end by now. The interpreter would still take itself down, hundreds
    # of modules one by one, which needs far more processor time than all of that: on a busy machine seconds.
    end_at_once(code)


def _run(make_node: Callable[[], Any], name: str, args: list[str] | None) -> int:
    if {"-h", "--help"} & set(sys.argv[1:] if args is None else args):  # ROS itself would just start the node
        print(_HELP.format(name=name))
        return 0
    use_large_shared_memory()
    node, initialized = None, False
    # Not rclpy's own handlers: they shut the context down at once, under a worker that may be publishing.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        initialized = True
        # What has been imported stays: no need to look through it in every collection, the last one least of all.
        gc.freeze()
        node = make_node()
        spin(node, SingleThreadedExecutor(), stop)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except ParameterError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except _ROS_REFUSALS as error:
        # A signal during the start takes the context away from under the constructor.
        if rclpy.ok() or not initialized:
            unknown = isinstance(error, rclpy_implementation.UnknownROSArgsError)
            what = "unknown ROS arguments: " if unknown else ""
            print(f"{name}: {what}{' '.join(str(error).split())}", file=sys.stderr)
            return 1 if initialized else 2
    except Exception:
        if rclpy.ok() or not initialized:
            raise
    finally:
        # From here on a second Ctrl-C would only interrupt the clean end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        finished = node is None or node.close()
        if not finished:
            # The node must not be destroyed under a thread that is still computing.
            end_at_once(0)
        if node is not None:
            node.destroy_node()
            node = None
        rclpy.try_shutdown()
        # The middleware gives back its shared memory when the last handle goes, and these hang together in cycles.
        gc.collect()
    return 0


def spin(node: Any, executor: Executor, stop: threading.Event) -> None:
    """Execute a node's callbacks until `stop` is set or ROS is shut down, through exceptions of rclpy's own.

    rclpy's executors raise InvalidHandle when a callback in another thread destroys a subscription or publisher
    just while they look at it. Node `flow` does so whenever its last listener leaves, and under a
    MultiThreadedExecutor `executor.spin()` would now and then end there.

    Args:
        node: has a method `report(problem, text)`; its own callbacks do not raise.
        executor: any of rclpy's; the node is added to it.
        stop: looked at ten times a second.
    """
    executor.add_node(node)
    while node.context.ok() and not stop.is_set():
        try:
            # A signal is seen between waits.
            executor.spin_once(timeout_sec=0.1)
        except (KeyboardInterrupt, ExternalShutdownException):
            return
        except rclpy_implementation.InvalidHandle:
            pass
        except Exception as error:
            if not node.context.ok():
                return
            node.report("internal_errors", one_line(error))
            time.sleep(0.01)
