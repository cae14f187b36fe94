"""Videos, images and the sequences of data sets become bags that hold what they held."""

from __future__ import annotations

import argparse
import struct

import cv2
import numpy as np
import pytest
from replay_bags import moving_frames
from uneven_videos import write_uneven

from qpwc_core.errors import CutOffError, QpwcError
from qpwc_ros.convert import command
from qpwc_ros.replay.bag import Bag, typestore
from qpwc_ros.replay.decode import pixels

INFO = "sensor_msgs/msg/CameraInfo"
POSE = "geometry_msgs/msg/PoseStamped"
FRAMES = moving_frames(4, 2, 1)


def convert(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in arguments]))


def save(path, rgb) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), rgb[..., ::-1] if rgb.ndim == 3 else rgb)


def read(path, topic=None):
    with Bag(path, topic) as bag:
        return list(bag.frames())


def poses(path) -> list:
    with Bag(path, need_images=False) as bag:
        return list(bag.messages({"/ground_truth/pose": POSE}))


def camera(frame) -> object:
    return typestore().deserialize_cdr(frame.info, INFO)


def test_video(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (160, 120))
    for frame in FRAMES:
        writer.write(frame[..., ::-1])
    writer.release()
    assert convert(tmp_path / "v.avi", "-o", tmp_path / "bag", "--hfov", 90) == 0
    frames = read(tmp_path / "bag")
    assert [f.stamp - frames[0].stamp for f in frames] == [0, 40_000_000, 80_000_000, 120_000_000]
    for frame, original in zip(frames, FRAMES):
        assert np.abs(pixels(frame.message).astype(int) - original).mean() < 6  # two generations of JPEG
    assert camera(frames[0]).k[0] == pytest.approx(80)  # 45 degrees to either side of 160 pixels


def test_frames_of_a_video_of_varying_rate_keep_their_times(tmp_path):
    frames = [np.full((80, 96, 3), 100 + number, np.uint8) for number in range(20)]
    write_uneven(tmp_path / "v.webm", frames, lambda time: time if time < 400 else 4 * time - 1200)
    assert convert(tmp_path / "v.webm", "-o", tmp_path / "bag") == 0
    steps = np.diff([f.stamp for f in read(tmp_path / "bag")]) / 1e6
    assert steps == pytest.approx([40] * 10 + [160] * 9)
    assert convert(tmp_path / "v.webm", "-o", tmp_path / "even", "--rate", 10) == 0
    assert {*np.diff([f.stamp for f in read(tmp_path / "even")])} == {100_000_000}


def test_of_a_video_that_is_cut_off_the_frames_before_are_kept(tmp_path):
    path = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (160, 120))
    for _ in range(5):
        for frame in FRAMES:
            writer.write(frame[..., ::-1])
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CutOffError, match="v.avi: cut off or damaged: [0-9]+ of 20 frames") as caught:
        convert(path, "-o", tmp_path / "bag")
    assert f" {len(read(tmp_path / 'bag'))} of 20 frames" in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_images_in_the_order_of_their_numbers(tmp_path):
    for number, frame in zip((2, 9, 10, 100), FRAMES):
        save(tmp_path / "images" / f"frame{number}.png", frame)
    assert convert(tmp_path / "images", "-o", tmp_path / "bag", "--rate", 10) == 0
    frames = read(tmp_path / "bag")
    assert np.diff([f.stamp for f in frames]).tolist() == [10**8] * 3
    for frame, original in zip(frames, FRAMES):
        np.testing.assert_array_equal(pixels(frame.message), original)
    info = camera(frames[0])
    assert (info.width, info.height, info.k[0]) == (160, 120, 0)  # not calibrated


def test_formats_go_by_the_content_and_all_into_one_topic(tmp_path):
    encoded = (("0.jpg", ".webp"), ("1.png", ".jpg"), ("2.bmp", ".bmp"), ("3.jpeg", ".png"))
    files = []
    (tmp_path / "images").mkdir()
    for (name, kind), frame in zip(encoded, FRAMES):
        content = cv2.imencode(kind, frame[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
        (tmp_path / "images" / name).write_bytes(content)
        files.append(content)
    assert convert(tmp_path / "images", "-o", tmp_path / "bag") == 0
    frames = read(tmp_path / "bag", "/camera/image_raw/compressed")
    assert [f.message.format for f in frames] == ["png", "jpeg", "png", "png"]
    assert [f.message.data.tobytes() == c for f, c in zip(frames, files)] == [False, True, False, True]
    for k in (0, 2, 3):
        np.testing.assert_array_equal(pixels(frames[k].message), FRAMES[k])


def test_camera_info_is_for_the_image_as_readers_see_it(tmp_path):
    jpeg = cv2.imencode(".jpg", FRAMES[0][..., ::-1])[1].tobytes()
    # One entry, orientation: 6, to be turned by a quarter.
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    turned = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (160, 120, 3)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(turned)
    assert convert(tmp_path / "images", "-o", tmp_path / "bag", "--hfov", 90) == 0
    frame, info = read(tmp_path / "bag")[0], camera(read(tmp_path / "bag")[0])
    assert frame.message.data.tobytes() == turned and pixels(frame.message).shape == (120, 160, 3)
    assert (info.width, info.height) == (160, 120) and info.k[0] == pytest.approx(80)


def test_tum(tmp_path):
    root = tmp_path / "rgbd_dataset_freiburg3_test"
    depth = np.full((120, 160), 7500, np.uint16)
    depth[0] = 0
    listing, depths = ["# color images"], []
    for number, frame in enumerate(FRAMES):
        save(root / "rgb" / f"{number}.png", frame)
        listing.append(f"1305031102.{175304 + number * 30000:06d} rgb/{number}.png")
    save(root / "depth" / "0.png", depth)
    depths.append("1305031102.160407 depth/0.png")
    (root / "rgb.txt").write_text("\n".join(listing))
    (root / "depth.txt").write_text("\n".join(depths))
    (root / "groundtruth.txt").write_text("# t x y z qx qy qz qw\n1305031102.1758 1 2 3 0.1 0.2 0.3 0.9\n")
    assert convert(root, "-o", tmp_path / "bag") == 0
    frames = read(tmp_path / "bag", "/camera/image_raw/compressed")
    assert frames[0].stamp == 1305031102_175304000  # not rounded
    np.testing.assert_array_equal(pixels(frames[2].message), FRAMES[2])
    assert camera(frames[0]).k[0] == 535.4
    metric = read(tmp_path / "bag", "/camera/depth/image_raw")[0].message
    assert metric.encoding == "16UC1"
    millimetres = metric.data.view("<u2").reshape(120, 160)
    assert millimetres[1, 1] == 1500 and millimetres[0, 0] == 0
    pose = poses(tmp_path / "bag")[0].pose
    assert (pose.position.x, pose.position.z, pose.orientation.x, pose.orientation.w) == (1, 3, 0.1, 0.9)


def test_euroc(tmp_path):
    mav = tmp_path / "V1_01" / "mav0"
    stamps = [1403715273262142976 + k * 50_000_000 for k in range(4)]
    rows = ["#timestamp [ns],filename"]
    for stamp, frame in zip(stamps, FRAMES):
        save(mav / "cam0" / "data" / f"{stamp}.png", frame[..., 0])
        rows.append(f"{stamp},{stamp}.png")
    (mav / "cam0" / "data.csv").write_text("\r\n".join(rows) + "\r\n")
    (mav / "cam0" / "sensor.yaml").write_text(
        "%YAML:1.0\nsensor_type: camera\nintrinsics: [458.654, 457.296, 367.215, 248.375] #fu, fv, cu, cv\n"
        "distortion_coefficients: [-0.28340811, 0.07395907, 0.00019359, 1.76187114e-05]\n"
    )
    (mav / "imu0").mkdir()
    (mav / "imu0" / "data.csv").write_text(f"#t\n{stamps[0]},-0.09,0.14,0.07,9.08,0.13,-3.69\n")
    estimate = mav / "state_groundtruth_estimate0"
    estimate.mkdir()
    (estimate / "data.csv").write_text(f"#t\n{stamps[1]},4.6,-1.7,0.8,0.5,0.1,0.2,0.3,0,0,0\n")
    assert convert(tmp_path / "V1_01", "-o", tmp_path / "bag") == 0
    frames = read(tmp_path / "bag")
    assert [f.stamp for f in frames] == stamps
    np.testing.assert_array_equal(pixels(frames[1].message)[..., 1], FRAMES[1][..., 0])
    info = camera(frames[0])
    assert info.k[[0, 4, 2, 5]].tolist() == [458.654, 457.296, 367.215, 248.375]
    assert info.d[0] == -0.28340811
    with Bag(tmp_path / "bag", need_images=False) as bag:
        imu = next(bag.messages({"/imu0": "sensor_msgs/msg/Imu"}))
    assert (imu.angular_velocity.y, imu.linear_acceleration.z) == (0.14, -3.69)
    pose = poses(tmp_path / "bag")[0].pose
    assert (pose.orientation.w, pose.orientation.x, pose.position.y) == (
        0.5,
        0.1,
        -1.7,
    )  # w comes first there


def test_kitti_raw(tmp_path):
    drive = tmp_path / "2011_09_26" / "2011_09_26_drive_0001_sync"
    for number, frame in enumerate(FRAMES):
        if number != 2:  # some drives lack frames
            save(drive / "image_02" / "data" / f"{number:010d}.png", frame)
    times = [f"2011-09-26 13:02:25.{100 + number:03d}000001" for number in range(4)]
    (drive / "image_02" / "timestamps.txt").write_text("\n".join(times) + "\n")
    projection = "7.2e+02 0 6.1e+02 4.4e+01 0 7.3e+02 1.7e+02 2.1e-01 0 0 1 2.7e-03"
    (drive.parent / "calib_cam_to_cam.txt").write_text(f"calib_time: 09-Jan\nP_rect_02: {projection}\n")
    (drive / "oxts" / "data").mkdir(parents=True)
    (drive / "oxts" / "timestamps.txt").write_text("\n".join(times[:2]))
    for number, latitude in enumerate((49.0, 49.001)):
        (drive / "oxts" / "data" / f"{number:010d}.txt").write_text(f"{latitude} 8.4 110 0 0 1.5707963 0 0")
    assert convert(drive, "-o", tmp_path / "bag") == 0
    frames = read(tmp_path / "bag")
    start = 1317042145 * 10**9  # 2011-09-26 13:02:25 UTC
    assert [f.stamp - start for f in frames] == [100_000_001, 101_000_001, 103_000_001]
    np.testing.assert_array_equal(pixels(frames[2].message), FRAMES[3])
    assert camera(frames[0]).k[[0, 4, 2, 5]].tolist() == [720, 730, 610, 170]
    first, second = (message.pose for message in poses(tmp_path / "bag"))
    assert (first.position.x, first.position.y) == (0, 0)
    # A thousandth of a degree to the north is 111.3 m on the Mercator projection's sphere; nothing to the east.
    assert second.position.y == pytest.approx(111.32, abs=0.05) and second.position.x == pytest.approx(0)
    assert second.orientation.z == pytest.approx(np.sqrt(0.5)) == second.orientation.w


def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "images" / "a.png", FRAMES[0])
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    (tmp_path / "tum").mkdir()
    (tmp_path / "tum" / "rgb.txt").write_text("yesterday rgb/1.png\n")
    (tmp_path / "there").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    for source, words in (
        ("nothing", "no such"),
        ("empty", "no images"),
        ("images", "b.png"),
        ("tum", "rgb.txt:1: 'yesterday'"),
    ):
        with pytest.raises(QpwcError, match=words) as caught:
            convert(tmp_path / source, "-o", tmp_path / "bag")
        assert "\n" not in str(caught.value)
    with pytest.raises(QpwcError, match="is there already"):
        convert(tmp_path / "images", "-o", tmp_path / "there")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# As rgb.txt of a TUM sequence has it, and what is said of it.
ROWS = {
    "1305031102175 a.png": "'1305031102175' is outside of the time that ROS can say",  # milliseconds
    "-1 a.png": "'-1' is outside",
    "2147483647.9999999999 a.png": "is outside",  # would be 2147483648 as a whole number of nanoseconds
    "inf a.png": "'inf' is outside",
    "nan a.png": "'nan' is no time",
    "1e999999999 a.png": "is no time",
    "1 a\0.png": "is no name of a file",
    b"\xff\xfe\x01 a.png": "is not text",
}


@pytest.mark.parametrize("row", ROWS, ids=ascii)
def test_listing_that_makes_no_sense_is_one_line(tmp_path, row):
    save(tmp_path / "tum" / "a.png", FRAMES[0])
    content = row if isinstance(row, bytes) else row.encode()
    (tmp_path / "tum" / "rgb.txt").write_bytes(b"1 a.png\n" + content + b"\n")
    with pytest.raises(QpwcError) as caught:
        convert(tmp_path / "tum", "-o", tmp_path / "bag")
    assert ROWS[row] in str(caught.value) and "\n" not in str(caught.value)
    if ROWS[row].startswith("'"):
        assert f"rgb.txt:2: {ROWS[row]}" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["tum"]


@pytest.mark.parametrize(
    "stamp, words",
    [
        ("1403715273262142976000", "data.csv:2: .* is outside"),  # picoseconds
        ("9" * 5000, "data.csv:2: .* is no time in nanoseconds"),
        ("²", "data.csv:2: '²' is no time in nanoseconds"),
        ("x" * 200_000, "data.csv: field larger"),
        ("\udcff", "data.csv: is not text"),
    ],
    ids=["unit", "too long", "no digit", "too long a field", "no text"],
)
def test_euroc_stamp_that_makes_no_sense_is_one_line(tmp_path, stamp, words):
    camera = tmp_path / "V1_01" / "mav0" / "cam0"
    camera.mkdir(parents=True)
    (camera / "data.csv").write_bytes(f"#t\n{stamp},a.png\n".encode(errors="surrogateescape"))
    with pytest.raises(QpwcError, match=words):
        convert(tmp_path / "V1_01", "-o", tmp_path / "bag")
    assert [p.name for p in tmp_path.iterdir()] == ["V1_01"]


@pytest.mark.parametrize(
    "name, time, latitude, words",
    [
        ("image_02", "2039-09-26 13:02:25.1", None, "timestamps.txt:1: .* is outside"),
        ("oxts", "2011-09-26 13:02:25.1", -90, "0.txt: -90 is no latitude"),
    ],
    ids=["time", "place"],
)
def test_kitti_of_no_time_or_place_is_one_line(tmp_path, name, time, latitude, words):
    save(tmp_path / "drive" / "image_02" / "data" / f"{0:010d}.png", FRAMES[0])
    (tmp_path / "drive" / "image_02" / "timestamps.txt").write_text("2011-09-26 13:02:25.1\n")
    (tmp_path / "drive" / "oxts" / "data").mkdir(parents=True)
    (tmp_path / "drive" / "oxts" / "data" / f"{0:010d}.txt").write_text(f"{latitude} 8.4 110 0 0 0")
    (tmp_path / "drive" / name / "timestamps.txt").write_text(f"{time}\n")
    with pytest.raises(QpwcError, match=words):
        convert(tmp_path / "drive", "-o", tmp_path / "bag")
    assert [p.name for p in tmp_path.iterdir()] == ["drive"]


@pytest.mark.parametrize("rate", ["1e-10", "1e-300", "5e-324"])
def test_rate_that_leads_out_of_time_is_one_line(tmp_path, rate):
    for number, frame in enumerate(FRAMES[:2]):
        save(tmp_path / "images" / f"{number}.png", frame)
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (160, 120))
    for frame in FRAMES:
        writer.write(frame[..., ::-1])
    writer.release()
    for source in ("images", "v.avi"):
        with pytest.raises(QpwcError, match=f"{source}: frame 1, at .* frames/s, is outside"):
            convert(tmp_path / source, "-o", tmp_path / "bag", "--rate", rate)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "v.avi"]
