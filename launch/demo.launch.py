"""ros2 launch qpwc_ros demo.launch.py source:=street.mp4

For people without a camera driver: node `camera` plays a video file, a folder of images or a USB camera, and
node `flow` computes from it, each in its own process. Takes the arguments of flow.launch.py too.
"""

import os

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchContext, LaunchDescription

FLOW = os.path.join(os.path.dirname(os.path.abspath(__file__)), "flow.launch.py")

ARGUMENTS = {
    "source": ("0", "Video file, folder of images, or video device by number or path."),
    "rate": ("", "Images per second; the video's or the device's own if not given."),
    "loop": ("", "false: stop at the end of a video or folder."),
    "calibration": ("", "YAML file of camera_calibration, for camera_info."),
    "namespace": ("", "Namespace of both nodes."),
    "image": ("image", "Topic from the camera to the flow."),
}


def start_camera(context: LaunchContext):
    """Node `camera`, once the arguments are known."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    # launch_ros would read "0" as a number, but it names a device.
    values = {name: ParameterValue(given[name], value_type=str) for name in ("source", "calibration")}
    if given["rate"]:
        values["rate"] = number(given["rate"])
    if given["loop"]:
        values["loop"] = truth(given["loop"])
    image = given["image"]
    folder = image.rpartition("/")[0]
    remappings = [("image", image), ("image/compressed", f"{image}/compressed")]
    if folder:
        remappings.append(("camera_info", f"{folder}/camera_info"))
    node = Node(
        package="qpwc_ros",
        executable="camera",
        name="camera",
        namespace=given["namespace"],
        parameters=[values],
        remappings=remappings,
        output="screen",
    )
    return [node]


def number(text):
    """The value of launch argument `rate`."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"launch argument rate:={text} is no number") from None


def truth(text):
    """The value of launch argument `loop`."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"launch argument loop:={text} is neither true nor false")
    return text.lower() in ("true", "1")


def generate_launch_description():
    """The arguments, then node `flow` with the shared-memory profile for both, then node `camera`."""
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    flow = IncludeLaunchDescription(PythonLaunchDescriptionSource(FLOW))
    return LaunchDescription([*arguments, flow, OpaqueFunction(function=start_camera)])
