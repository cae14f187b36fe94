"""Where the files shipped beside the code are, and the Fast DDS profile among them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = "qpwc_ros"
FASTDDS_PROFILE = "config/fastdds.xml"


def share_file(name: str) -> Path:
    """Path of a shipped file such as "config/flow.yaml".

    Looked for in the source tree, then below the Python installation's share/, then in every ROS workspace on
    AMENT_PREFIX_PATH.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    prefixes = [
        Path(sys.prefix),
        *map(Path, filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep))),
    ]
    folders = [Path(__file__).resolve().parents[1], *(prefix / "share" / PACKAGE for prefix in prefixes)]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{name} is not in {', '.join(map(str, folders))}")


def use_large_shared_memory() -> None:
    """Have Fast DDS use the shipped profile here and in child processes, unless the user chose another.

    Fast DDS's default shared-memory segment holds 0.5 MB, less than one VGA colour image, and nearly all
    best-effort images above that are lost. Must be called before rclpy.init(). Other middlewares ignore it.
    """
    old, new = "FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"
    # A file of this name in the working folder is a choice too.
    if os.environ.get(old) or os.environ.get(new) or Path("DEFAULT_FASTDDS_PROFILES.xml").exists():
        return
    try:
        profile = str(share_file(FASTDDS_PROFILE))
    except FileNotFoundError:
        return
    # Fast DDS 2.6 knows only the old name; later ones warn about it.
    os.environ[old if os.environ.get("ROS_DISTRO") == "humble" else new] = profile
