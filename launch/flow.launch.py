"""ros2 launch qpwc_ros flow.launch.py image:=/camera/image_raw

Starts the lifecycle node `flow`. Arguments that are not given leave the value to params_file.
"""

import os

from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.utilities import prefix_namespace

from launch import LaunchContext, LaunchDescription
from qpwc_ros.share import share_file, use_large_shared_memory

#: Launch arguments that are parameters of the node too, with how their text is read.
PARAMETERS = {
    "autostart": bool,
    "use_sim_time": bool,
    "estimator": str,
    "model": str,
    "precision": str,
    "refine": str,
    "enlarge": float,
    "threads": int,
    "delegate": str,
    "delegate_options": list,
    "dis_preset": str,
    "transport": str,
    "max_pixels": int,
    "rectify": bool,
    "max_interval": float,
    "min_interval": float,
    "frame_step": int,
    "outputs": list,
    "color_max_flow": float,
    "interpolation_factor": int,
    "interpolation_merge": bool,
    "jpeg_quality": int,
    "motion_threshold": float,
    "motion_min_area": int,
}

ARGUMENTS = {
    "image": ("image", "Camera topic; its compressed form is looked for at <image>/compressed."),
    "camera_info": ("", "Calibration topic; empty: camera_info beside the camera topic."),
    "namespace": ("", "Namespace of the node."),
    "params_file": (str(share_file("config/flow.yaml")), "YAML file with parameters."),
    "log_level": ("info", "debug, info, warn, error or fatal."),
    "autostart": ("", "true: go to active without being told."),
    "use_sim_time": ("", "true: take the time from /clock."),
    "estimator": ("", "tflite or dis."),
    "model": ("", "Bundled model by name, or path of a .tflite file."),
    "precision": ("", "int8, float32 or auto."),
    "refine": ("", "auto, always or never: whether the network's flow is refined on the images."),
    "enlarge": ("", "How much larger than a small image the network's input should be; 0: as the model says."),
    "threads": ("", "Threads of the estimator; 0: as many as suit it."),
    "delegate": ("", "Shared library of an accelerator's TFLite delegate."),
    "delegate_options": ("", "KEY=VALUE,KEY=VALUE: passed on to the delegate."),
    "dis_preset": ("", "ultrafast, fast or medium: quality of estimator dis."),
    "transport": ("", "auto, raw or compressed: which form of the image is listened to."),
    "max_pixels": ("", "Images with more pixels are refused."),
    "rectify": ("", "true: take the lens's distortion out first, by camera_info."),
    "max_interval": ("", "Seconds between two images over which they make no pair."),
    "min_interval": ("", "Seconds that the two images of a pair are at least apart."),
    "frame_step": ("", "Images from one of a pair to the other."),
    "outputs": ("", "The outputs to offer: flow,color for example."),
    "color_max_flow": ("", "Displacement in pixels shown in full colour; 0: the largest of each pair."),
    "interpolation_factor": ("", "Frame rate of ~/interpolated over the input's, 2 to 8."),
    "interpolation_merge": ("", "true: the camera's frames go out on ~/interpolated too."),
    "jpeg_quality": ("", "Quality of ~/interpolated/compressed, 1 to 100."),
    "motion_threshold": ("", "Pixels off the background's flow over which a pixel moves on its own."),
    "motion_min_area": ("", "Pixels that a moving thing has at least."),
}


def parameter_value(name, text):
    """Text of a launch argument as the parameter's type."""
    kind = PARAMETERS[name]
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"launch argument {name}:={text} is neither true nor false")
        return text.lower() in ("true", "1")
    if kind is list:
        return [item.strip() for item in text.split(",")]
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise ValueError(f"launch argument {name}:={text} is no {what}") from None


def logger_name(context, namespace):
    """What the node's logger is called, below namespaces that an including launch file has pushed too."""
    whole = prefix_namespace(context.launch_configurations.get("ros_namespace"), namespace)
    return ".".join([*filter(None, whole.split("/")), "flow"])


def start_node(context: LaunchContext):
    """The node, once the arguments are known."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    params_file = os.path.expanduser(given["params_file"])  # the shell leaves the ~ of params_file:=~/mine.yaml
    # launch_ros would only warn, and the node start with its defaults.
    if not os.path.isfile(params_file):
        raise ValueError(f"launch argument params_file:={given['params_file']} is no file")
    overrides = {name: parameter_value(name, given[name]) for name in PARAMETERS if given[name]}
    remappings = [(name, given[name]) for name in ("image", "camera_info") if given[name]]
    log_level = f"{logger_name(context, given['namespace'])}:={given['log_level']}"
    node = LifecycleNode(
        package="qpwc_ros",
        executable="flow",
        name="flow",
        namespace=given["namespace"],
        parameters=[params_file, overrides] if overrides else [params_file],
        remappings=remappings,
        arguments=["--ros-args", "--log-level", log_level],
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
