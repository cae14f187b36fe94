"""ros2 launch qpwc_ros demo.launch.py source:=street.mp4

For people without a camera driver: node `camera` plays a video file, a folder of images or a USB camera, and
node `flow` computes from it, each in its own process; when one ends, so does the other. Takes the arguments
of flow.launch.py too.
"""

import os

from launch.actions import (
    DeclareLaunchArgument,
    IncludeLaunchDescription,
    OpaqueFunction,
    RegisterEventHandler,
    Shutdown,
)
from launch.event_handlers import OnProcessExit
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
    "width": ("", "Asked of a device, in pixels; its own if not given."),
    "height": ("", "Asked of a device, in pixels; its own if not given."),
    "frame_id": ("", "Frame of the images' headers; camera if not given."),
    "calibration": ("", "YAML file of camera_calibration, for camera_info."),
    "namespace": ("", "Namespace of both nodes."),
    "image": ("image", "Topic from the camera to the flow."),
    "camera_info": ("", "Calibration topic; empty: camera_info beside the image."),
}


def camera_parameters(given):
    """The parameters of node `camera` by the text of all arguments."""
    # launch_ros would read "0" as a number, but it names a device.
    values = {"source": ParameterValue(given["source"], value_type=str)}
    for name in ("frame_id", "calibration"):
        if given[name]:
            values[name] = ParameterValue(given[name], value_type=str)
    for name, kind in (("rate", float), ("width", int), ("height", int)):
        if given[name]:
            values[name] = number(name, given[name], kind)
    if given["loop"]:
        values["loop"] = truth(given["loop"])
    return values


def texts(context: LaunchContext):
    """The text of every argument."""
    return {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}


def refuse(context: LaunchContext):
    """Raise for an impossible value while nothing runs: a launch that fails leaves behind what it started."""
    camera_parameters(texts(context))


def start_camera(context: LaunchContext):
    """Node `camera`, once the arguments are known."""
    given = texts(context)
    node = Node(
        package="qpwc_ros",
        executable="camera",
        name="camera",
        namespace=given["namespace"],
        parameters=[camera_parameters(given)],
        remappings=[(name, given[name]) for name in ("image", "camera_info") if given[name]],
        output="screen",
    )
    return [node]


def number(name, text, kind):
    """The value of a launch argument that is a number of this kind, float or int."""
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise ValueError(f"launch argument {name}:={text} is no {what}") from None


def truth(text):
    """The value of launch argument `loop`."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"launch argument loop:={text} is neither true nor false")
    return text.lower() in ("true", "1")


def is_ours(action):
    """Whether it is one of the two nodes, and not of a launch file that includes this one."""
    return isinstance(action, Node) and action.node_package == "qpwc_ros"


def end(event, context: LaunchContext):
    """What is left when a node has ended, which may have refused a value, is of no use."""
    return None if context.is_shutdown else [Shutdown(reason=f"{event.process_name} has ended")]


def generate_launch_description():
    """The arguments, then node `flow` with the shared-memory profile for both, then node `camera`."""
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    flow = IncludeLaunchDescription(PythonLaunchDescriptionSource(FLOW))
    before = [
        OpaqueFunction(function=refuse),
        RegisterEventHandler(OnProcessExit(target_action=is_ours, on_exit=end)),
    ]
    return LaunchDescription([*arguments, *before, flow, OpaqueFunction(function=start_camera)])
