"""ros2 launch qpwc_ros flow.launch.py image:=/camera/image_raw

Starts the lifecycle node `flow`. Arguments that are not given leave the value to params_file.
"""

import os

from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode

from launch import LaunchContext, LaunchDescription
from qpwc_ros.share import share_file, use_large_shared_memory

#: Launch arguments that are parameters of the node too, with how their text is read.
PARAMETERS = {
    "model": str,
    "precision": str,
    "estimator": str,
    "threads": int,
    "autostart": "bool",
    "interpolation_factor": int,
    "transport": str,
    "rectify": "bool",
    "use_sim_time": "bool",
}

ARGUMENTS = {
    "image": ("image", "Camera topic; its compressed form is looked for at <image>/compressed."),
    "camera_info": ("", "Calibration topic; empty: camera_info beside the camera topic."),
    "namespace": ("", "Namespace of the node."),
    "params_file": (str(share_file("config/flow.yaml")), "YAML file with parameters."),
    "log_level": ("info", "debug, info, warn, error or fatal."),
    "model": ("", "Bundled model by name, or path of a .tflite file."),
    "precision": ("", "int8, float32 or auto."),
    "estimator": ("", "tflite or dis."),
    "threads": ("", "Threads of the estimator; 0: as many as suit it."),
    "autostart": ("", "true: go to active without being told."),
    "interpolation_factor": ("", "Frame rate of ~/interpolated over the input's, 2 to 8."),
    "transport": ("", "auto, raw or compressed: which form of the image is listened to."),
    "rectify": ("", "true: take the lens's distortion out first, by camera_info."),
    "use_sim_time": ("", "true: take the time from /clock."),
}


def parameter_value(name, text):
    """Text of a launch argument as the parameter's type."""
    kind = PARAMETERS[name]
    if kind == "bool":
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"launch argument {name}:={text} is neither true nor false")
        return text.lower() in ("true", "1")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"launch argument {name}:={text} is no whole number") from None


def start_node(context: LaunchContext):
    """The node, once the arguments are known."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    overrides = {name: parameter_value(name, given[name]) for name in PARAMETERS if given[name]}
    remappings = [(name, given[name]) for name in ("image", "camera_info") if given[name]]
    node = LifecycleNode(
        package="qpwc_ros",
        executable="flow",
        name="flow",
        namespace=given["namespace"],
        parameters=[given["params_file"], overrides] if overrides else [given["params_file"]],
        remappings=remappings,
        arguments=["--ros-args", "--log-level", f"flow:={given['log_level']}"],
        output="screen",
    )
    return [node]


def shared_memory_profile():
    """Environment for every node of this launch, so that large images are not lost (see
    config/fastdds.xml).
    """
    before = dict(os.environ)
    use_large_shared_memory()
    added = {name: value for name, value in os.environ.items() if before.get(name) != value}
    return [SetEnvironmentVariable(name, value) for name, value in added.items()]


def generate_launch_description():
    """All arguments, the shared-memory profile, and the node."""
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, *shared_memory_profile(), OpaqueFunction(function=start_node)])
