"""Node flow in a program of somebody else's, under rclpy's MultiThreadedExecutor."""

import signal
import sys
import threading

import rclpy
from rclpy.executors import MultiThreadedExecutor
from rclpy.signals import SignalHandlerOptions

from qpwc_ros.nodes.flow import FlowNode
from qpwc_ros.nodes.running import spin


def main() -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
    node = FlowNode()
    spin(node, MultiThreadedExecutor(num_threads=4), stop)
    node.close()
    node.destroy_node()
    rclpy.try_shutdown()


if __name__ == "__main__":
    main()
