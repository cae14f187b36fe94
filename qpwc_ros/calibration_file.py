"""Calibration files as camera_calibration writes them and camera drivers read them (camera_info_url)."""

from __future__ import annotations

import os
from typing import Any


class CalibrationError(Exception):
    """A calibration file cannot be used; the text says why, in one line."""


def read_calibration(path: str | os.PathLike[str], info: Any) -> Any:
    """Fill a sensor_msgs/CameraInfo from a YAML file and return it.

    Raises:
        CalibrationError: the file is missing, or is no calibration.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise CalibrationError(f"calibration {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no text, a 13th month, deep brackets
        raise CalibrationError(f"calibration {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise CalibrationError(f"calibration {path}: no mapping of names to values")
    try:
        info.width, info.height = _size(content, "image_width"), _size(content, "image_height")
        info.distortion_model = str(content["distortion_model"])
        info.d = _numbers(content, "distortion_coefficients", None)
        info.k = _numbers(content, "camera_matrix", 9)
        info.r = _numbers(content, "rectification_matrix", 9)
        info.p = _numbers(content, "projection_matrix", 12)
    except KeyError as error:
        raise CalibrationError(f"calibration {path}: {error} is missing") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise CalibrationError(f"calibration {path}: {' '.join(str(error).split())}") from None
    return info


def _size(content: Any, name: str) -> int:
    size = int(content[name])
    if not 0 <= size < 1 << 32:  # all that the message has room for
        raise ValueError(f"{name} {size} is no size")
    return size


def _numbers(content: Any, name: str, count: int | None) -> list[float]:
    numbers = [float(value) for value in content[name]["data"]]
    if count is not None and len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} numbers, not {count}")
    return numbers
