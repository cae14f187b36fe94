"""A camera in a process of its own, to be killed: killable_camera.py DOMAIN STAMP PERIOD (ns).

Publishes the frames of a MovingTexture on /image every 50 ms, with stamps from STAMP on, PERIOD apart.
"""

import itertools
import sys
import time

import rclpy
from ros_harness import BEST_EFFORT, MovingTexture, image
from sensor_msgs.msg import Image


def main() -> None:
    domain, stamp, period = map(int, sys.argv[1:])
    rclpy.init(domain_id=domain)
    node = rclpy.create_node("killable_camera")
    publisher = node.create_publisher(Image, "/image", BEST_EFFORT)
    scene = MovingTexture()
    for k in itertools.count():
        publisher.publish(image(scene.rgb(k), stamp + k * period))
        time.sleep(0.05)


if __name__ == "__main__":
    main()
