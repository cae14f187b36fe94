"""The image sources of node `camera`, and its calibration files, without ROS."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from qpwc_core.images import write_image
from qpwc_core.video import VideoWriter
from qpwc_ros.calibration_file import CalibrationError, read_calibration
from qpwc_ros.sources import FOLDER_RATE, SourceError, open_source


def grey(value, height=48, width=64):
    return np.full((height, width, 3), value, np.uint8)


def unexpected(text):
    raise AssertionError(text)


def test_a_video_is_read_to_its_end_and_again(tmp_path):
    path = tmp_path / "clip.avi"
    with VideoWriter(path, 12.5, (64, 48)) as writer:
        for k in range(5):
            writer.write(grey(40 * k))
    source = open_source(str(path), unexpected)
    assert source.rate == 12.5 and not source.live
    for _ in range(2):
        means = [round(source.read().mean()) for _ in range(5)]
        assert np.abs(np.subtract(means, [0, 40, 80, 120, 160])).max() <= 2
        assert source.read() is None and source.read() is None
        source.rewind()
    source.close()


def test_a_folder_is_read_in_the_order_people_expect_and_what_is_broken_is_left_out(tmp_path):
    for name, value in (("f10.png", 30), ("f9.png", 20), ("f1.PNG", 10), ("f2.jpg", 0)):
        write_image(tmp_path / name.lower(), grey(value))
    (tmp_path / "f9a.png").write_bytes(b"\x89PNG cut off")
    (tmp_path / "notes.txt").write_text("no image")
    reports = []
    source = open_source(str(tmp_path), reports.append)
    assert source.rate == FOLDER_RATE and not source.live
    assert [round(source.read().mean()) for _ in range(4)] == [10, 0, 20, 30]
    assert source.read() is None
    assert len(reports) == 1 and "f9a.png" in reports[0]
    source.rewind()
    assert source.read().shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "parameter source is empty"),
        ("missing.mp4", "missing.mp4: no such file, folder or device"),
        ("empty", "empty: no images"),
        ("text.mp4", "text.mp4: not a video"),
        ("/dev/no_such_camera", "/dev/no_such_camera: no such device; is the camera plugged in"),
        ("987", "/dev/video987: no such device"),
        ("/dev/null", "/dev/null: not a camera"),
    ],
)
def test_what_is_no_source_is_refused_with_the_reason(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(SourceError, match=reason) as caught:
        open_source(name, unexpected)
    assert "\n" not in str(caught.value)


CALIBRATION = """\
image_width: 640
image_height: 480
camera_name: mine
distortion_model: plumb_bob
distortion_coefficients: {rows: 1, cols: 5, data: [0.1, -0.2, 0, 0, 0]}
camera_matrix: {rows: 3, cols: 3, data: [500, 0, 320, 0, 510, 240, 0, 0, 1]}
rectification_matrix: {rows: 3, cols: 3, data: [1, 0, 0, 0, 1, 0, 0, 0, 1]}
projection_matrix: {rows: 3, cols: 4, data: [490, 0, 321, 0, 0, 500, 241, 0, 0, 0, 1, 0]}
"""


def test_a_calibration_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CALIBRATION)
    info = read_calibration(path, SimpleNamespace())
    assert (info.width, info.height, info.distortion_model) == (640, 480, "plumb_bob")
    assert info.d == [0.1, -0.2, 0.0, 0.0, 0.0] and info.k == [500.0, 0, 320, 0, 510, 240, 0, 0, 1]
    assert info.r[4] == 1.0 and info.p == [490.0, 0, 321, 0, 0, 500, 241, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CALIBRATION.replace("camera_matrix", "matrix"), "'camera_matrix' is missing"),
        (CALIBRATION.replace("[1, 0, 0, 0, 1, 0, 0, 0, 1]", "[1, 0]"), "rectification_matrix has 2 numbers"),
        (CALIBRATION.replace("640", "wide"), "wide"),
        ("", "no mapping"),
        ("a: [", "expected"),
        ("!!python/object/apply:os.system ['true']", "python/object"),
        (CALIBRATION.replace("mine", "2024-13-45"), "month must be in 1..12"),  # read as a date
        (CALIBRATION.replace("640", ".inf"), "infinity"),
        (CALIBRATION.replace("640", "-640"), "image_width -640 is no size"),
        (CALIBRATION.replace("480", "99999999999"), "image_height 99999999999 is no size"),
        (CALIBRATION.replace("510", "1" + "0" * 400), "too large"),
        pytest.param("[" * 10_000, "recursion", id="brackets"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused_in_one_line(tmp_path, text, reason):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=reason) as caught:
        read_calibration(path, SimpleNamespace())
    assert "\n" not in str(caught.value) and "mine.yaml" in str(caught.value)


def test_a_missing_calibration_file_is_named(tmp_path):
    with pytest.raises(CalibrationError, match=r"none\.yaml"):
        read_calibration(tmp_path / "none.yaml", SimpleNamespace())
