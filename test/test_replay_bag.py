"""Reading bags: what is in them comes out, and what is wrong with them is said in one line."""

from __future__ import annotations

import numpy as np
import pytest
from replay_bags import START, STORE, moving_frames, write_bag, write_ros1_bag
from rosbags.rosbag2 import CompressionMode, StoragePlugin, Writer
from ruamel.yaml import YAML  # rosbags needs it too

from qpwc_ros.replay.bag import Bag, BagError, raw_stamp_ns
from qpwc_ros.replay.decode import pixels


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
def test_of_a_truncated_bag_the_front_is_read(tmp_path, storage, share):
    stamps = write_bag(tmp_path / "bag", moving_frames(40, 1, 0), storage=storage)
    data = next(p for p in (tmp_path / "bag").iterdir() if p.name != "metadata.yaml")
    content = data.read_bytes()
    data.write_bytes(content[: int(len(content) * share)])
    if share < 0.1:
        refusal(tmp_path / "bag")
        return
    read = []
    with Bag(tmp_path / "bag") as bag, pytest.raises(BagError, match=r"damaged: \d+ of 40") as caught:
        for frame in bag.frames():
            read.append(frame)
    assert [f.stamp for f in read] == stamps[: len(read)]
    # All of it but the frame that is cut in two, and what the storage keeps in other pages.
    assert len(read) >= 40 * share - 3
    np.testing.assert_array_equal(pixels(read[5].message), moving_frames(40, 1, 0)[5])
    assert data.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_hole_in_sqlite_is_stepped_over(tmp_path):
    stamps = write_bag(tmp_path / "bag", moving_frames(40, 1, 0), storage="sqlite3")
    data = next((tmp_path / "bag").glob("*.db3"))
    content = bytearray(data.read_bytes())
    # Every page here belongs to the table of messages; without its type byte a page is no page.
    for page in range(len(content) // 2 // 4096, len(content) // 2 // 4096 + 60):
        content[page * 4096 : (page + 1) * 4096] = bytes(4096)
    data.write_bytes(content)
    read = []
    with Bag(tmp_path / "bag") as bag, pytest.raises(BagError, match="damaged"):
        for frame in bag.frames():
            read.append(frame.stamp)
    assert 20 < len(read) < 40 and set(read) <= set(stamps) and read[-1] == stamps[-1]


def test_a_recording_without_its_metadata_is_read_from_its_files(tmp_path):
    stamps = write_bag(tmp_path / "bag", moving_frames(5, 1, 0))
    (tmp_path / "bag" / "metadata.yaml").unlink()
    with Bag(tmp_path / "bag") as bag:
        assert [frame.stamp for frame in bag.frames()] == stamps


@pytest.mark.parametrize("mode", [CompressionMode.FILE, CompressionMode.MESSAGE])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_zstd(tmp_path, storage, mode):
    frames = moving_frames(6, 2, 1)
    stamps = write_bag(tmp_path / "bag", frames, storage=storage, compression=mode)
    with Bag(tmp_path / "bag") as bag:
        read = list(bag.frames())
    assert [frame.stamp for frame in read] == stamps
    np.testing.assert_array_equal(pixels(read[3].message), frames[3])


def test_damaged_zstd(tmp_path):
    write_bag(tmp_path / "bag", moving_frames(40, 2, 1), compression=CompressionMode.FILE)
    data = next((tmp_path / "bag").glob("*.zstd"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size * 3 // 4])
    read = []
    with Bag(tmp_path / "bag") as bag, pytest.raises(BagError, match="compression is damaged"):
        for frame in bag.frames():
            read.append(frame)
    assert 10 < len(read) < 40


def split(path, parts):
    """One recording made of several bags, as rosbag2 splits them: the files, and one metadata.yaml."""
    path.mkdir()
    names, counts = [], {}
    for number, part in enumerate(parts):
        data = next(p for p in part.iterdir() if p.name != "metadata.yaml")
        names.append(f"{path.name}_{number}{data.suffix}")
        data.rename(path / names[-1])
        metadata = YAML(typ="safe").load(part / "metadata.yaml")
        info = metadata["rosbag2_bagfile_information"]
        for topic in info["topics_with_message_count"]:
            name = topic["topic_metadata"]["name"]
            counts[name] = counts.get(name, 0) + topic["message_count"]
    for topic in info["topics_with_message_count"]:
        topic["message_count"] = counts[topic["topic_metadata"]["name"]]
    info["relative_file_paths"] = names
    info["message_count"] = sum(counts.values())
    YAML(typ="safe").dump(metadata, path / "metadata.yaml")


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_split_bag(tmp_path, storage):
    frames = moving_frames(12, 1, 0)
    stamps = [START + k * 10**8 for k in range(12)]
    parts = []
    for number in range(3):
        parts.append(tmp_path / f"part{number}")
        mine = slice(4 * number, 4 * number + 4)
        write_bag(parts[-1], frames[mine], storage=storage, stamps=stamps[mine], start=stamps[4 * number])
    split(tmp_path / "bag", parts)
    with Bag(tmp_path / "bag") as bag:
        assert bag.count == 12
        assert [frame.stamp for frame in bag.frames()] == stamps
    lost = next((tmp_path / "bag").glob("bag_1.*"))
    lost.write_bytes(lost.read_bytes()[:50])
    with Bag(tmp_path / "bag") as bag, pytest.raises(BagError, match=lost.name):
        read = []
        for frame in bag.frames():
            read.append(frame.stamp)
    assert read == stamps[:4] + stamps[8:]


@pytest.mark.parametrize("compression", [None, "BZ2", "LZ4"])
def test_ros1(tmp_path, compression):
    frames = moving_frames(5, 2, 1)
    stamps = write_ros1_bag(tmp_path / "old.bag", frames, compression)
    with Bag(tmp_path / "old.bag") as bag:
        assert (bag.topic, bag.message_type, bag.count) == ("/cam/image_raw", "sensor_msgs/msg/Image", 5)
        read = list(bag.frames())
    assert [frame.stamp for frame in read] == stamps
    for frame, original in zip(read, frames):
        # What is written to the results and sent to the node is a message of ROS 2.
        message = STORE.deserialize_cdr(frame.raw, "sensor_msgs/msg/Image")
        np.testing.assert_array_equal(pixels(message), original)
        info = STORE.deserialize_cdr(frame.info, "sensor_msgs/msg/CameraInfo")
        assert info.k[0] == 100 and info.header.frame_id == "camera"


def test_ros1_cut_off(tmp_path):
    stamps = write_ros1_bag(tmp_path / "old.bag", moving_frames(40, 2, 1), None)
    content = (tmp_path / "old.bag").read_bytes()
    (tmp_path / "old.bag").write_bytes(content[: len(content) // 2])
    read = []
    with Bag(tmp_path / "old.bag") as bag, pytest.raises(BagError, match="cut off"):
        for frame in bag.frames():
            read.append(frame.stamp)
    assert 15 < len(read) < 25 and read == stamps[: len(read)]


def test_garbage_metadata(tmp_path):
    write_bag(tmp_path / "bag", moving_frames(2, 1, 0))
    (tmp_path / "bag" / "metadata.yaml").write_text(": [ what\nis: this")
    refusal(tmp_path / "bag")


def test_frames_around_the_damage_are_read(tmp_path):
    stamps = write_bag(tmp_path / "bag", moving_frames(40, 1, 0), storage="mcap")
    data = next((tmp_path / "bag").glob("*.mcap"))
    content = bytearray(data.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300_000] = b"\xff" * 300_000  # index and footer stay
    data.write_bytes(content)
    good = []
    with Bag(tmp_path / "bag") as bag, pytest.raises(BagError, match=r"damaged: 3\d of 40 .*cannot be read"):
        for frame in bag.frames():
            good.append(frame.stamp)
    # 300 kB are six frames at most; those behind them are still there.
    assert 33 <= len(good) < 40
    assert good == sorted(set(good)) and good[0] == stamps[0] and good[-1] == stamps[-1]


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


def test_frames_that_ros_has_no_time_for_are_left_out(tmp_path):
    later = 3_000_000_000 * 10**9  # 2065
    write_bag(tmp_path / "bag", moving_frames(3, 1, 0), stamps=[0, 10**18, 0], start=later)
    read = []
    with Bag(tmp_path / "bag") as bag, pytest.raises(BagError, match="1 of 3 frames .* 3000000000 s, later than"):
        for frame in bag.frames():
            read.append(frame.stamp)
    assert read == [10**18]
