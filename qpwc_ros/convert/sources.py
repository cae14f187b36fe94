"""What can be made into a recording. Each source yields its messages in the order of their stamps."""

from __future__ import annotations

import csv
import heapq
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path

import cv2
import numpy as np

from qpwc_core.errors import FormatError
from qpwc_core.images import natural_order
from qpwc_core.video import VideoReader
from qpwc_ros.codec import compressed_format
from qpwc_ros.convert.messages import (
    Calibration,
    Item,
    camera_info,
    compressed_image,
    image,
    imu,
    pose,
)
from qpwc_ros.replay.bag import END_NS, NS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
TRUE_POSE = "/ground_truth/pose"
WORLD = "world"
# Any time will do where the source has none; stamps that start at zero would read as "not set" in ROS.
START_NS = 1_700_000_000 * NS
DEFAULT_RATE = 30.0


@dataclass(frozen=True)
class Settings:
    """What the source does not say itself.

    Attributes:
        rate: frames per second of images; of a video, in place of its own. None: the video's, else 30.
        field_of_view: horizontal, degrees, of a camera that comes without calibration; None leaves it open.
        quality: of the JPEGs that a video's frames become, 1..100.
    """

    rate: float | None = None
    field_of_view: float | None = None
    quality: int = 95


def items(source: Path, settings: Settings) -> Iterator[Item]:
    """The messages of whatever `source` is.

    A video file; or a directory: a TUM RGB-D sequence (rgb.txt), a EuRoC one (mav0/), a KITTI raw drive
    (image_02/timestamps.txt), or else images in the order of their names.

    Raises:
        OSError: it cannot be read.
        FormatError: it is none of these, or damaged.
    """
    if not source.exists():
        raise FormatError(f"{source}: no such file or directory")
    if source.is_file():
        return _video(source, settings)
    if (source / "rgb.txt").is_file():
        return _tum(source)
    if (source / "mav0").is_dir():
        return _euroc(source / "mav0")
    if any(source.glob("image_0[0-3]/timestamps.txt")):
        return _kitti(source)
    return _images(source, settings)


def _video(path: Path, settings: Settings) -> Iterator[Item]:
    with VideoReader(path) as video:
        rate = settings.rate or video.fps
        varies = not settings.rate and video.measured_fps() != video.fps
        for number, frame in enumerate(video):
            ok, jpeg = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, settings.quality])
            if not ok:
                raise FormatError(f"{path}: frame {number} cannot be encoded as JPEG")
            # The times in files are rounded, so they are only taken where numbers do not tell.
            stamp = _at_time(number, video.time, path) if varies else _at_rate(number, rate, path)
            size = (frame.shape[1], frame.shape[0])
            yield camera_info(stamp, "/camera/camera_info", "camera", size, _assumed(settings, size))
            topic = "/camera/image_raw/compressed"
            yield compressed_image(stamp, topic, "camera", jpeg.tobytes(), "jpeg")
        video.check_whole()


def _images(directory: Path, settings: Settings) -> Iterator[Item]:
    files = sorted(
        (p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")),
        key=lambda path: natural_order(path.name),
    )
    if not files:
        raise FormatError(f"{directory}: has no images, and is no TUM, EuRoC or KITTI sequence")
    rate = settings.rate or DEFAULT_RATE
    stamped = ((_at_rate(n, rate, directory), path) for n, path in enumerate(files))
    yield from _camera("/camera", stamped, None, settings)


def _assumed(settings: Settings, size: tuple[int, int]) -> Calibration:
    if settings.field_of_view is None:
        return Calibration()
    return Calibration.from_field_of_view(*size, settings.field_of_view)


def _camera(
    base: str,
    stamped: Iterable[tuple[int, Path]],
    calibration: Calibration | None,
    settings: Settings | None = None,
) -> Iterator[Item]:
    """Image files of a camera and their CameraInfo; JPEG and PNG go in as they are, all else as PNG."""
    frame_id = base.strip("/")
    for stamp, path in stamped:
        content = _content(path)
        # As they lie in the file: readers of bags take no notice of EXIF's orientation.
        pixels = _decoded(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            raise FormatError(f"{path}: not an image that can be read")
        size = (pixels.shape[1], pixels.shape[0])
        known = calibration if calibration is not None else _assumed(settings or Settings(), size)
        yield camera_info(stamp, f"{base}/camera_info", frame_id, size, known)
        form = compressed_format(content)  # by the content: suffixes are often wrong
        if form is None:
            form, content = "png", _png(pixels, path)
        yield compressed_image(stamp, f"{base}/image_raw/compressed", frame_id, content, form)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except ValueError as error:  # as of a name with a NUL in it
        raise FormatError(f"{str(path)!r}: is no name of a file ({error})") from error


def _decoded(content: bytes, flags: int) -> np.ndarray | None:
    """The pixels of an image file, None where it is none."""
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error:
        return None


def _png(pixels: np.ndarray, path: Path) -> bytes:
    ok, content = cv2.imencode(".png", pixels)
    if not ok:
        raise FormatError(f"{path}: cannot be encoded as PNG")
    return content.tobytes()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not text") from error


def _merge(*streams: Iterable[Item]) -> Iterator[Item]:
    return heapq.merge(*streams, key=lambda item: item.stamp)


def _stamp(ns: int | Decimal, what: str) -> int:
    """Whole nanoseconds, if ROS can say them."""
    if not 0 <= ns <= END_NS - 1:  # in whole numbers, since rounding must not lead beyond
        raise FormatError(f"{what} is outside of the time that ROS can say, 1970 to 2038")
    return round(ns)


def _at_rate(number: int, rate: float, path: Path) -> int:
    """The stamp of a frame of which only the number is known."""
    since = round(min(number * NS / rate, END_NS))  # what is infinite cannot be rounded
    return _stamp(START_NS + since, f"{path}: frame {number}, at {rate:g} frames/s,")


def _at_time(number: int, seconds: float, path: Path) -> int:
    """The stamp of a frame so many seconds after the beginning."""
    return _stamp(START_NS + round(seconds * NS), f"{path}: frame {number}, {seconds:g} s from the beginning,")


def _seconds(text: str, where: str) -> int:
    """Nanoseconds of decimal seconds, without the rounding of floats."""
    try:
        return _stamp(Decimal(text) * NS, f"{where}: {text!r}")
    except ArithmeticError as error:  # of what is no number, or has no end of digits
        raise FormatError(f"{where}: {text!r} is no time") from error


def _numbers(texts: Iterable[str], count: int, where: str) -> list[float]:
    try:
        values = [float(text) for text in texts]
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error
    if len(values) < count or not all(map(math.isfinite, values)):
        raise FormatError(f"{where}: {count} finite numbers were expected, got {len(values)}")
    return values


# --- TUM RGB-D: https://cvg.cit.tum.de/data/datasets/rgbd-dataset/file_formats ----------------------------

# Published calibrations of the three cameras; else the default of the ROS driver.
_TUM_CAMERAS = {
    "freiburg1": Calibration(517.3, 516.5, 318.6, 255.3, (0.2624, -0.9531, -0.0054, 0.0026, 1.1633)),
    "freiburg2": Calibration(520.9, 521.0, 325.1, 249.7, (0.2312, -0.7849, -0.0033, -0.0001, 0.9172)),
    "freiburg3": Calibration(535.4, 539.2, 320.1, 247.6),
}
_TUM_DEFAULT = Calibration(525.0, 525.0, 319.5, 239.5)
_TUM_DEPTH_PER_METRE = 5000


def _tum(directory: Path) -> Iterator[Item]:
    name = directory.resolve().name
    calibration = next((c for key, c in _TUM_CAMERAS.items() if key in name), _TUM_DEFAULT)
    streams = [_camera("/camera", _tum_files(directory, "rgb.txt"), calibration)]
    if (directory / "depth.txt").is_file():
        streams.append(_tum_depth(directory))
    if (directory / "groundtruth.txt").is_file():
        streams.append(_tum_poses(directory / "groundtruth.txt"))
    return _merge(*streams)


def _tum_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(where it is, the words) of each line that is no comment."""
    for number, line in enumerate(_text(path).splitlines(), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield f"{path}:{number}", words


def _tum_files(directory: Path, listing: str) -> Iterator[tuple[int, Path]]:
    for where, words in _tum_rows(directory / listing):
        if len(words) < 2:
            raise FormatError(f"{where}: a time and a file were expected")
        yield _seconds(words[0], where), directory / words[1]


def _tum_depth(directory: Path) -> Iterator[Item]:
    for stamp, path in _tum_files(directory, "depth.txt"):
        depth = _decoded(_content(path), cv2.IMREAD_UNCHANGED)
        if depth is None or depth.dtype != np.uint16 or depth.ndim != 2:
            raise FormatError(f"{path}: not a 16-bit grey image, as depth is")
        # 16UC1 is in millimetres (REP 118); 0 is unknown in both.
        millimetres = np.rint(depth * (1000 / _TUM_DEPTH_PER_METRE)).astype(np.uint16)
        yield image(stamp, "/camera/depth/image_raw", "camera", millimetres, "16UC1")


def _tum_poses(path: Path) -> Iterator[Item]:
    for where, words in _tum_rows(path):
        values = _numbers(words[1:], 7, where)
        yield pose(_seconds(words[0], where), TRUE_POSE, WORLD, values[:3], values[3:7])


# --- EuRoC MAV: https://projects.asl.ethz.ch/datasets/euroc-mav ------------------------------------------


def _euroc(mav: Path) -> Iterator[Item]:
    cameras = sorted(path for path in mav.glob("cam[0-9]") if (path / "data.csv").is_file())
    if not cameras:
        raise FormatError(f"{mav}: has no cam0/data.csv")
    streams = [_camera(f"/{c.name}", _euroc_files(c), _euroc_calibration(c)) for c in cameras]
    for path in sorted(mav.glob("imu[0-9]/data.csv")):
        streams.append(_euroc_imu(path))
    for path in sorted(mav.glob("state_groundtruth_estimate[0-9]/data.csv"))[:1]:
        streams.append(_euroc_poses(path))
    return _merge(*streams)


def _euroc_rows(path: Path) -> Iterator[tuple[str, int, list[str]]]:
    """(where it is, stamp in ns, the other cells) of each line that is no comment."""
    try:
        for number, cells in enumerate(csv.reader(_text(path).splitlines()), 1):
            if cells and not cells[0].lstrip().startswith("#"):
                yield f"{path}:{number}", _nanoseconds(cells[0], f"{path}:{number}"), [c.strip() for c in cells[1:]]
    except csv.Error as error:
        raise FormatError(f"{path}: {error}") from error


def _nanoseconds(text: str, where: str) -> int:
    # Digits alone, and not too many: int() takes more than that, and refuses what is very long.
    if not re.fullmatch("[0-9]{1,30}", text.strip()):
        raise FormatError(f"{where}: {text!r} is no time in nanoseconds")
    return _stamp(int(text), f"{where}: {text!r}")


def _euroc_files(camera: Path) -> Iterator[tuple[int, Path]]:
    for where, stamp, cells in _euroc_rows(camera / "data.csv"):
        if not cells:
            raise FormatError(f"{where}: names no file")
        yield stamp, camera / "data" / cells[0]


def _euroc_calibration(camera: Path) -> Calibration:
    path = camera / "sensor.yaml"
    if not path.is_file():
        return Calibration()
    from ruamel.yaml import YAML  # rosbags needs it too
    from ruamel.yaml.error import YAMLError

    # The files begin with %YAML:1.0, which is OpenCV's way and no YAML.
    text = re.sub(r"\A%YAML.*\n", "", _text(path))
    try:
        content = YAML(typ="safe").load(text)
        intrinsics = [float(value) for value in content["intrinsics"]]
        distortion = [float(value) for value in content.get("distortion_coefficients", ())]
        return Calibration(*intrinsics[:4], distortion[:5])
    except (YAMLError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{path}: has no intrinsics ({' '.join(str(error).split())})") from error


def _euroc_imu(path: Path) -> Iterator[Item]:
    name = path.parent.name
    for where, stamp, cells in _euroc_rows(path):
        values = _numbers(cells, 6, where)
        yield imu(stamp, f"/{name}", name, values[:3], values[3:6])


def _euroc_poses(path: Path) -> Iterator[Item]:
    for where, stamp, cells in _euroc_rows(path):
        x, y, z, qw, qx, qy, qz = _numbers(cells, 7, where)[:7]
        yield pose(stamp, TRUE_POSE, WORLD, (x, y, z), (qx, qy, qz, qw))


# --- KITTI raw: https://www.cvlibs.net/datasets/kitti/raw_data.php ---------------------------------------

_EARTH_RADIUS_M = 6_378_137.0


def _kitti(drive: Path) -> Iterator[Item]:
    calibration = _kitti_calibration(drive.resolve().parent / "calib_cam_to_cam.txt")
    streams = []
    for folder in sorted(drive.glob("image_0[0-3]")):
        known = calibration.get(folder.name[-2:], Calibration())
        streams.append(_camera(f"/{folder.name}", _kitti_files(folder, ".png"), known))
    if (drive / "oxts" / "timestamps.txt").is_file():
        streams.append(_kitti_poses(drive / "oxts"))
    return _merge(*streams)


def _kitti_files(folder: Path, suffix: str) -> Iterator[tuple[int, Path]]:
    """(stamp, file); files that are missing, as some drives have it, are left out."""
    listing = folder / "timestamps.txt"
    lines = [line.strip() for line in _text(listing).splitlines()]
    for number, line in enumerate(line for line in lines if line):
        path = folder / "data" / f"{number:010d}{suffix}"
        if path.is_file():
            yield _kitti_time(line, f"{listing}:{number + 1}"), path


def _kitti_time(text: str, where: str) -> int:
    whole, _, fraction = text.partition(".")
    try:
        seconds = datetime.strptime(whole, "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
    except ValueError as error:
        raise FormatError(f"{where}: {text!r} is no time") from error
    return _stamp(int(seconds) * NS + _seconds(f"0.{fraction or 0}", where), f"{where}: {text!r}")


def _kitti_calibration(path: Path) -> dict[str, Calibration]:
    """The rectified cameras by their number, "00" to "03"; empty where there is no such file."""
    if not path.is_file():
        return {}
    cameras = {}
    for line in _text(path).splitlines():
        key, _, values = line.partition(":")
        if key.startswith("P_rect_"):
            p = _numbers(values.split(), 12, str(path))
            cameras[key[-2:]] = Calibration(p[0], p[5], p[2], p[6])
    return cameras


def _kitti_poses(oxts: Path) -> Iterator[Item]:
    """The vehicle's pose in metres from where it began, as the development kit's convertOxtsToPose does."""
    scale = origin = None
    for stamp, path in _kitti_files(oxts, ".txt"):
        latitude, longitude, altitude, roll, pitch, yaw = _numbers(_text(path).split(), 6, str(path))[:6]
        if not -90 < latitude < 90:
            raise FormatError(f"{path}: {latitude:g} is no latitude of a place to drive at")
        if scale is None:
            scale = math.cos(math.radians(latitude))
        place = np.array(
            [
                scale * _EARTH_RADIUS_M * math.radians(longitude),
                scale * _EARTH_RADIUS_M * math.log(math.tan(math.radians(90 + latitude) / 2)),
                altitude,
            ]
        )
        origin = place if origin is None else origin
        yield pose(stamp, TRUE_POSE, WORLD, place - origin, _quaternion(roll, pitch, yaw))


def _quaternion(roll: float, pitch: float, yaw: float) -> tuple[float, float, float, float]:
    """x, y, z, w of Rz(yaw) Ry(pitch) Rx(roll), radians."""
    (sr, cr), (sp, cp), (sy, cy) = ((math.sin(a / 2), math.cos(a / 2)) for a in (roll, pitch, yaw))
    return (
        sr * cp * cy - cr * sp * sy,
        cr * sp * cy + sr * cp * sy,
        cr * cp * sy - sr * sp * cy,
        cr * cp * cy + sr * sp * sy,
    )
