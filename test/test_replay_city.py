"""The bundled bag is what its README says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from qpwc_ros.replay.bag import Bag, typestore
from qpwc_ros.replay.decode import pixels

CITY = Path(__file__).resolve().parent / "data" / "city"


def test_it_is_small_and_all_there():
    assert sum(p.stat().st_size for p in CITY.iterdir()) <= 6_000_000
    with Bag(CITY) as bag:
        assert bag.compressed and bag.topic == "/camera/image_raw/compressed"
        frames = list(bag.frames())
        assert len(frames) == bag.count == 95
    assert np.diff([f.stamp for f in frames]).tolist() == [80_000_000] * 94
    for frame in frames[::10]:
        assert pixels(frame.message).shape == (360, 640, 3)
        info = typestore().deserialize_cdr(frame.info, "sensor_msgs/msg/CameraInfo")
        assert (info.width, info.height) == (640, 360)
        # 60 degrees across 640 pixels
        assert 2 * np.degrees(np.arctan(320 / info.k[0])) == pytest.approx(60)
        assert info.header.stamp == frame.message.header.stamp


def test_there_is_motion_in_every_pair_and_one_cut():
    with Bag(CITY) as bag:
        grey = [pixels(f.message).mean(2) for f in bag.frames()]
    change = np.array([np.abs(a - b).mean() for a, b in zip(grey, grey[1:])])
    assert change.min() > 1  # no frame twice
    assert (change > 40).nonzero()[0].tolist() == [57]


def test_the_script_makes_a_bag_of_any_video(tmp_path):
    import cv2

    spec = importlib.util.spec_from_file_location("make_city_bag", CITY.parent / "make_city_bag.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    video = tmp_path / "video.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 25, (720, 405))
    for k in range(6):
        writer.write(np.full((405, 720, 3), 40 * k, np.uint8))
    writer.release()
    assert script.write_bag(video, tmp_path / "bag")[0] == 3
    with Bag(tmp_path / "bag") as bag:
        frames = list(bag.frames())
    assert [(f.stamp - frames[0].stamp) for f in frames] == [0, 80_000_000, 160_000_000]
    assert [round(pixels(f.message).mean() / 80) for f in frames] == [0, 1, 2]
