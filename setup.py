"""Installs both packages, with pip or with colcon (ament_python)."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "qpwc_ros"
SHARE = f"share/{PACKAGE}"


def files(folder: str, *patterns: str) -> tuple[str, list[str]]:
    """Entry of data_files: the files of one folder below share/; the folder may be empty or absent."""
    found = sorted(str(path) for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file())
    return f"{SHARE}/{folder}", found


# The table of plugins lives in the package, which also works without being installed; it imports nothing.
plugins = runpy.run_path("qpwc_ros/plugins/builtin.py")["ENTRY_POINTS"]


def entries(table: dict[str, str]) -> list[str]:
    return [f"{name} = {target}" for name, target in table.items()]


setup(
    name=PACKAGE,
    version="0.1.0",
    description="Optical flow and in-between frames for ROS 2 from an int8 network",
    license="Apache-2.0",
    maintainer="The qpwc_ros developers",
    maintainer_email="qpwc@users.noreply.github.com",
    packages=find_packages(include=["qpwc_core", "qpwc_core.*", "qpwc_ros", "qpwc_ros.*"]),
    package_data={"": ["*.html", "*.css", "*.js"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (SHARE, ["package.xml"]),
        files("launch", "*.launch.py"),
        files("config", "*"),
        files("models", "*.tflite", "*.md"),
    ],
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=["numpy>=1.24", "opencv-python-headless>=4.6", "ai-edge-litert>=1.2", "tqdm>=4.60"],
    extras_require={
        "replay": ["rosbags>=0.10", "jinja2>=3.0", "matplotlib>=3.6"],
        "cluster": ["distributed>=2024.1"],
        "train": [
            "tensorflow>=2.16",
            "tf-keras>=2.16",
            "tensorflow-model-optimization>=0.8",
            "tensorboard>=2.16",
            "pyyaml>=6",
            "matplotlib>=3.6",
        ],
        "test": ["pytest>=7,<9", "hypothesis>=6", "pyyaml>=6", "setuptools>=61"],
    },
    entry_points={
        "console_scripts": [
            "qpwc = qpwc_core.cli.main:program",
            "camera = qpwc_ros.nodes.camera:main",
            "flow = qpwc_ros.nodes.flow:main",
            "replay = qpwc_ros.replay.command:program",
        ],
        # qpwc_core knows its own
        "qpwc.commands": ["replay = qpwc_ros.replay.command", "bag = qpwc_ros.convert.command"],
        **{group: entries(table) for group, table in plugins.items()},
    },
)
