"""Reading bags: what is in them comes out, and what is wrong with them is said in one line."""

from __future__ import annotations

import numpy as np
import pytest
from replay_bags import STORE, moving_frames, write_bag
from rosbags.rosbag2 import StoragePlugin, Writer

from qpwc_ros.replay.bag import Bag, BagError, raw_stamp_ns
from qpwc_ros.replay.evaluate import pixels


def refusal(path, topic=None) -> str:
    with pytest.raises(BagError) as caught:
        with Bag(path, topic) as bag:
            list(bag.frames())
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("compressed", [False, True])
def test_frames_come_out_as_they_went_in(tmp_path, storage, compressed):
    frames = moving_frames(5, 2, 1)
    topic = "/cam/image_raw/compressed" if compressed else "/cam/image_raw"
    stamps = write_bag(
        tmp_path / "bag", frames, storage=storage, compressed=compressed, topics=(topic,), with_imu=True
    )
    with Bag(tmp_path / "bag") as bag:
        assert (bag.topic, bag.compressed, bag.count) == (topic, compressed, 5)
        read = list(bag.frames())
    assert [frame.stamp for frame in read] == stamps
    assert [raw_stamp_ns(frame.raw) for frame in read] == stamps
    assert [raw_stamp_ns(frame.info) for frame in read] == stamps
    for frame, original in zip(read, frames):
        np.testing.assert_array_equal(pixels(frame.message), original)  # PNG keeps every bit


@pytest.mark.parametrize("storage, suffix", [("mcap", "mcap"), ("sqlite3", "db3")])
def test_the_data_file_alone_is_enough(tmp_path, storage, suffix):
    write_bag(tmp_path / "bag", moving_frames(3, 1, 0), storage=storage)
    (tmp_path / "bag" / "metadata.yaml").unlink()
    with Bag(next((tmp_path / "bag").glob(f"*.{suffix}"))) as bag:
        assert len(list(bag.frames())) == 3


def test_missing_bag(tmp_path):
    assert "no such bag" in refusal(tmp_path / "nothing")


def test_directory_and_file_that_are_no_bags(tmp_path):
    assert "metadata.yaml" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a bag" in refusal(tmp_path / "notes.txt")


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_truncated_bag(tmp_path, storage, share):
    write_bag(tmp_path / "bag", moving_frames(20, 1, 0), storage=storage)
    data = next(p for p in (tmp_path / "bag").iterdir() if p.name != "metadata.yaml")
    content = data.read_bytes()
    data.write_bytes(content[: int(len(content) * share)])
    refusal(tmp_path / "bag")


def test_garbage_metadata(tmp_path):
    write_bag(tmp_path / "bag", moving_frames(2, 1, 0))
    (tmp_path / "bag" / "metadata.yaml").write_text(": [ what\nis: this")
    refusal(tmp_path / "bag")


def test_frames_before_the_damage_are_read(tmp_path):
    write_bag(tmp_path / "bag", moving_frames(40, 1, 0), storage="mcap")
    data = next((tmp_path / "bag").glob("*.mcap"))
    content = bytearray(data.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300_000] = b"\xff" * 300_000  # index and footer stay
    data.write_bytes(content)
    good = []
    with Bag(tmp_path / "bag") as bag, pytest.raises(BagError, match=r"damaged after \d+ frames"):
        for frame in bag.frames():
            good.append(frame.stamp)
    assert 5 < len(good) < 40


def test_bag_without_images_says_what_it_has(tmp_path):
    with Writer(tmp_path / "bag", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        for topic, kind in (("/odom", "nav_msgs/msg/Odometry"), ("/imu", "sensor_msgs/msg/Imu")):
            writer.add_connection(topic, kind, typestore=STORE)
    text = refusal(tmp_path / "bag")
    assert "/odom (nav_msgs/msg/Odometry)" in text and "/imu (sensor_msgs/msg/Imu)" in text


def test_of_several_cameras_one_must_be_chosen(tmp_path):
    write_bag(tmp_path / "bag", moving_frames(3, 1, 0), topics=("/left/image_raw", "/right/image_raw"))
    text = refusal(tmp_path / "bag")
    assert "/left/image_raw" in text and "/right/image_raw" in text and "--topic" in text
    with Bag(tmp_path / "bag", "/right/image_raw") as bag:
        assert bag.topic == "/right/image_raw"
        assert len(list(bag.frames())) == 3
    assert "/left/image_raw" in refusal(tmp_path / "bag", "/up/image_raw")


def test_frames_whose_stamps_do_not_increase_are_left_out(tmp_path):
    start = 10**18
    given = [start, start + 5, start + 5, start + 3, start + 9]
    write_bag(tmp_path / "bag", moving_frames(5, 1, 0), stamps=given)
    with Bag(tmp_path / "bag") as bag:
        assert [frame.stamp for frame in bag.frames()] == [start, start + 5, start + 9]
        assert bag.skipped == 2


def test_frames_without_stamps_get_the_time_of_recording(tmp_path):
    write_bag(tmp_path / "bag", moving_frames(3, 1, 0), stamps=[0, 0, 0])
    with Bag(tmp_path / "bag") as bag:
        read = list(bag.frames())
    assert [raw_stamp_ns(frame.raw) for frame in read] == [frame.stamp for frame in read]
    assert np.diff([frame.stamp for frame in read]).tolist() == [10**8, 10**8]
    np.testing.assert_array_equal(
        pixels(STORE.deserialize_cdr(read[1].raw, "sensor_msgs/msg/Image")), pixels(read[1].message)
    )
