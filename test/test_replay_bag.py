"""Reading bags: what is in them comes out, and what is wrong with them is said in one line."""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest
from replay_bags import START, STORE, moving_frames, run_replay, write_bag, write_ros1_bag
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


HOUR = 3600 * 10**9


@pytest.mark.parametrize(
    "wrong, lost",
    [({0}, {0}), ({4}, {4}), ({4, 6}, {4, 6}), ({9}, set())],
    ids=["the first", "one", "two", "the last, which may be right"],
)
def test_frame_whose_stamp_leaps_ahead_costs_no_other(tmp_path, wrong, lost):
    good = [START + k * 10**8 for k in range(10)]
    given = [stamp + (k in wrong) * HOUR * (k + 1) for k, stamp in enumerate(good)]
    write_bag(tmp_path / "bag", moving_frames(10, 1, 0, 32, 32), stamps=given)
    with Bag(tmp_path / "bag") as bag:
        assert [frame.stamp for frame in bag.frames()] == [given[k] for k in range(10) if k not in lost]
        assert bag.skipped == len(lost)


def test_stamps_that_leap_with_the_time_of_recording_or_for_good_are_right(tmp_path):
    # A gap in the recording; and a camera that is told the time after a while.
    lapse = write_bag(tmp_path / "lapse", moving_frames(5, 1, 0, 32, 32), rate=1 / 3600)
    told = [10**9 * (k + 1) if k < 3 else START + k * 10**8 for k in range(8)]
    write_bag(tmp_path / "told", moving_frames(8, 1, 0, 32, 32), stamps=told)
    for name, stamps in (("lapse", lapse), ("told", told)):
        with Bag(tmp_path / name) as bag:
            assert [frame.stamp for frame in bag.frames()] == stamps and bag.skipped == 0


def test_a_clock_that_is_set_back_is_told_with_what_it_costs(tmp_path):
    given = [START + k * 10**8 + (k < 4) * HOUR for k in range(10)]
    write_bag(tmp_path / "bag", moving_frames(10, 1, 0, 32, 32), stamps=given)
    read = []
    with Bag(tmp_path / "bag") as bag, pytest.raises(BagError, match="set back: 6 of 10 frames .* not evaluated"):
        for frame in bag.frames():
            read.append(frame.stamp)
    assert read == given[:4]


def test_one_stamp_far_behind_is_only_that_frame(tmp_path):
    given = [START + k * 10**8 - (k == 4) * HOUR for k in range(8)]
    write_bag(tmp_path / "bag", moving_frames(8, 1, 0, 32, 32), stamps=given)
    with Bag(tmp_path / "bag") as bag:
        assert [frame.stamp for frame in bag.frames()] == given[:4] + given[5:]
        assert bag.skipped == 1


def write_killed(tmp_path: Path, **options: object) -> tuple[Path, list[int]]:
    """As `write_bag`, in SQLite's write-ahead log, as a killed recorder leaves it, with its metadata; and the stamps."""
    stamps = write_bag(tmp_path / "whole", moving_frames(12, 1, 0), storage="sqlite3", **options)
    data = tmp_path / "whole" / "whole.db3"
    connection = sqlite3.connect(data, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    late = connection.execute("SELECT * FROM messages WHERE id > 12").fetchall()
    connection.execute("DELETE FROM messages WHERE id > 12")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.executemany("INSERT INTO messages VALUES (?, ?, ?, ?)", late)
    bag = tmp_path / "whole_killed"
    bag.mkdir()
    for path in data.parent.iterdir():  # before SQLite tidies up
        shutil.copy(path, bag)
    connection.close()
    assert (bag / "whole.db3-wal").stat().st_size > 0
    return bag, stamps


@pytest.fixture
def killed(tmp_path):
    """A recording of which a part is in the log."""
    return write_killed(tmp_path)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.mark.parametrize("given", ["directory", "without metadata", "file", "damaged"])
def test_what_is_in_a_write_ahead_log_is_read_too(killed, temporary, given):
    bag, stamps = killed
    if given != "directory":
        (bag / "metadata.yaml").unlink()
    if given == "damaged":  # past the first pages, so that it is read without an index
        content = bytearray((bag / "whole.db3").read_bytes())
        content[-40 * 4096 :: 4096] = bytes(len(content[-40 * 4096 :: 4096]))
        (bag / "whole.db3").write_bytes(content)
    before = {path.name: path.read_bytes() for path in bag.iterdir()}
    read = []
    with Bag(bag / "whole.db3" if given == "file" else bag) as opened:
        try:
            for frame in opened.frames():
                read.append(frame.stamp)
        except BagError as error:
            assert given == "damaged" and str(temporary) not in str(error)
    assert read == stamps if given != "damaged" else read[-6:] == stamps[-6:]
    assert {path.name: path.read_bytes() for path in bag.iterdir()} == before
    assert list(temporary.iterdir()) == []


def test_file_that_its_write_ahead_log_cannot_mend_is_one_line(killed, temporary):
    bag, _ = killed
    (bag / "whole.db3").write_bytes(b"not SQLite's" * 1000)
    assert "cannot be read: whole.db3-wal: cannot be used (" in refusal(bag)
    assert list(temporary.iterdir()) == []


def test_no_room_for_the_copy_that_a_write_ahead_log_needs(killed, temporary, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    monkeypatch.setattr(shutil, "copyfile", full)
    assert f"in {temporary}: No space left on device" in refusal(killed[0])
    assert list(temporary.iterdir()) == []


def test_a_recording_is_copied_once_for_all_that_read_it(tmp_path, temporary, monkeypatch):
    bag, _ = write_killed(tmp_path, topics=("/cam/image_raw", "/gt/flow"))
    copied, copyfile = [], shutil.copyfile

    def counted(source, target):
        copied.append(Path(source).name)
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", counted)
    given = ("--estimator", "dis", "--truth", "/gt/flow")
    assert run_replay(bag, *given, "--report", tmp_path / "out") == 0
    assert sorted(copied) == ["whole.db3", "whole.db3-wal"]
    assert list(temporary.iterdir()) == []
    notes = json.loads((tmp_path / "out" / "metrics.json").read_text())["notes"]
    assert any("ground truth /gt/flow: 11 could not be used" in note for note in notes)  # they are rgb8, and all read


def test_an_opened_recording_is_read_by_several(killed, temporary):
    bag, stamps = killed
    with Bag(bag) as opened:
        for _ in range(2):
            with Bag(opened, need_images=False) as again:
                assert again.path == bag
                assert len(list(again.messages({"/cam/image_raw": "sensor_msgs/msg/Image"}))) == len(stamps)
        assert len(list(temporary.iterdir())) == 1
        assert [frame.stamp for frame in opened.frames()] == stamps
    assert list(temporary.iterdir()) == []


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
