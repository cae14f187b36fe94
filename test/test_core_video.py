import contextlib
import os
import resource
import struct

import numpy as np
import pytest
from core_scenes import shifted, texture
from uneven_videos import write_uneven

from qpwc_core.errors import FormatError, QpwcError
from qpwc_core.metrics import psnr
from qpwc_core.video import VideoReader, VideoWriter


@pytest.fixture
def frames():
    canvas = texture(120, 160, smoothness=6)
    return [shifted(canvas, 2 * i, 0, 80, 96) for i in range(5)]


@pytest.fixture
def noise():
    """Frames that no codec makes small."""
    return list(np.random.default_rng(0).integers(0, 256, (20, 80, 96, 3), np.uint8))


def write(path, frames, fps=25.0, **options):
    height, width = frames[0].shape[:2]
    with VideoWriter(path, fps, (width, height), **options) as writer:
        for frame in frames:
            writer.write(frame)


def test_a_name_may_be_a_time(tmp_path, frames, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("12:30:05.mp4", frames, codec="mp4v")
    with VideoReader("12:30:05.mp4") as video:
        assert len(list(video)) == 5


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_frames_come_back_in_their_colours_and_order(tmp_path, frames, suffix):
    path = tmp_path / f"a{suffix}"
    try:
        write(path, frames)
    except FormatError as error:
        pytest.skip(str(error))
    with VideoReader(path) as video:
        assert video.fps == pytest.approx(25, rel=0.01)
        assert (video.width, video.height) == (96, 80)
        read = list(video)
    assert len(read) == 5
    for frame, original in zip(read, frames):
        assert psnr(frame, original) > 25
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_varying_rate_is_measured_and_does_not_count_as_cut_off(tmp_path, frames):
    """As in recordings of screens: the file says its highest rate, and has fewer frames than that makes."""
    path = tmp_path / "a.webm"
    write_uneven(path, frames * 4, lambda time: time if time < 400 else 4 * time - 1200)
    with VideoReader(path) as video:
        assert video.fps == pytest.approx(25, rel=0.01) and video.frame_count == 47
        counted = []
        assert video.measured_fps(lambda: counted.append(1)) == pytest.approx(19 / 1.840, rel=0.01)
        assert len(counted) == 20 and video.frames_read == 0
        next(iter(video))
        assert video.time == 0
        assert len(list(video)) == 19 and video.time == pytest.approx(1.840)
        assert not video.cut_off
    os.truncate(path, path.stat().st_size * 3 // 4)
    with VideoReader(path) as video:
        assert 5 < len(list(video)) < 18
        assert video.cut_off


@pytest.mark.parametrize("suffix, codec", [(".avi", "MJPG"), (".webm", "VP80"), (".mp4", "mp4v")])
@pytest.mark.parametrize("fps", [29.97, 60])
def test_an_even_rate_is_what_the_file_says(tmp_path, frames, suffix, codec, fps):
    """Though times are rounded, in WebM to milliseconds."""
    for count in (2, 5):
        write(tmp_path / f"a{suffix}", frames[:count], fps, codec=codec)
        with VideoReader(tmp_path / f"a{suffix}") as video:
            assert video.measured_fps() == video.fps == pytest.approx(fps, abs=0.02)


def test_mpeg4_is_there_when_asked_for(tmp_path, frames):
    write(tmp_path / "a.mp4", frames, codec="mp4v")
    assert len(list(VideoReader(tmp_path / "a.mp4"))) == 5


@pytest.mark.parametrize("fps", [59.9401, 119.753, 239.76])
def test_mpeg4_takes_uneven_frame_rates(tmp_path, frames, fps):
    write(tmp_path / "a.mp4", frames, fps, codec="mp4v")
    with VideoReader(tmp_path / "a.mp4") as video:
        assert video.fps == pytest.approx(fps, abs=0.006)


def test_odd_sides_lose_a_pixel(tmp_path, frames):
    write(tmp_path / "a.mp4", [frame[:79, :95] for frame in frames], codec="mp4v")
    with VideoReader(tmp_path / "a.mp4") as video:
        assert (video.width, video.height) == (94, 78)
        assert psnr(next(iter(video)), frames[0][:78, :94]) > 25


def test_nothing_appears_before_the_end_and_nothing_changes_on_failure(tmp_path, frames):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(RuntimeError):
        with VideoWriter(path, 25, (96, 80), codec="mp4v") as writer:
            writer.write(frames[0])
            assert path.read_bytes() == b"precious"
            raise RuntimeError
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"precious"]


def test_an_incomplete_file_does_not_replace(tmp_path, frames):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"precious")
    writer = VideoWriter(path, 25, (96, 80), codec="mp4v")  # and no frame: as when each write fails
    with pytest.raises(QpwcError, match=r"a\.mp4"):
        writer.close()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"precious"]


@contextlib.contextmanager
def full_disk(size):
    """No file can become larger than `size` bytes, as when no more are left on the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix, codec", [(".avi", "MJPG"), (".webm", "VP80"), (".mp4", "mp4v")])
def test_a_full_disk_keeps_the_old_video(tmp_path, noise, suffix, codec):
    """Also where the file opens, and shows its first frames, without its end."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"precious")
    write(tmp_path / f"whole{suffix}", noise, codec=codec)
    size = (tmp_path / f"whole{suffix}").stat().st_size
    with full_disk(size // 2), pytest.raises(QpwcError, match=rf"a\{suffix}: the video of 20 frames could not"):
        write(path, noise, codec=codec)
    assert path.read_bytes() == b"precious"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_of_the_disk_names_the_video_and_not_its_temporary_file(tmp_path, frames):
    for path, occupied in ((tmp_path / "none" / "a.avi", False), (tmp_path / "a.avi", True)):
        if occupied:
            path.mkdir()
        with pytest.raises(OSError) as failure:
            write(path, frames)
        assert failure.value.filename == str(path) and ".a-" not in str(failure.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.avi"]


@pytest.mark.parametrize("suffix, codec", [(".avi", "MJPG"), (".webm", "VP80")])
def test_a_video_that_is_cut_off_is_told_from_one_that_is_whole(tmp_path, noise, suffix, codec):
    path = tmp_path / f"a{suffix}"
    write(path, noise, codec=codec)
    with VideoReader(path) as video:
        assert not video.cut_off  # nothing has been read yet
        next(iter(video))
        assert not video.cut_off and video.frames_read == 1  # whoever stops early knows
    with VideoReader(path) as video:
        assert len(list(video)) == video.frames_read == video.frame_count == 20
        assert not video.cut_off
    os.truncate(path, path.stat().st_size // 2)
    with VideoReader(path) as video:
        next(iter(video))
        assert not video.cut_off
        assert 1 <= len(list(video)) < 15
        assert video.cut_off and video.frame_count == 20


@pytest.mark.parametrize(
    "claimed, read, cut_off",
    [(0, 5, False), (5, 5, False), (6, 5, False), (7, 5, True), (100, 90, False), (100, 89, True), (3, 5, False)],
)
def test_an_estimate_of_the_frames_may_be_a_little_wrong(tmp_path, frames, claimed, read, cut_off):
    write(tmp_path / "a.avi", frames)
    with VideoReader(tmp_path / "a.avi") as video:
        assert len(list(video)) == 5
        video.frame_count, video.frames_read = claimed, read
        assert video.cut_off is cut_off


def boxes(content):
    """(kind, bytes) of each of an MP4 file's boxes."""
    position = 0
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        yield kind, content[position : position + length]
        position += length


def test_an_mp4_file_that_is_whole_may_show_fewer_frames_than_it_has(tmp_path, noise):
    """Those that were trimmed do; their last boxes, and so a cut, are elsewhere."""
    path = tmp_path / "a.mp4"
    write(path, noise, codec="mp4v")
    content = path.read_bytes()
    edit = content.index(b"elst") + 12  # behind version, flags and number of entries
    (duration,) = struct.unpack(">I", content[edit : edit + 4])
    path.write_bytes(content[:edit] + struct.pack(">I", duration // 2) + content[edit + 4 :])
    with VideoReader(path) as video:
        assert len(list(video)) == 10 and video.frame_count == 20
        assert not video.cut_off

    # The index in front, as for the web: such a file opens without its end.
    parts = dict(boxes(content))
    index = bytearray(parts.pop(b"moov"))
    table = index.index(b"stco") + 8
    (count,) = struct.unpack(">I", index[table : table + 4])
    for place in range(table + 4, table + 4 + 4 * count, 4):
        (offset,) = struct.unpack(">I", index[place : place + 4])
        index[place : place + 4] = struct.pack(">I", offset + len(index))
    web = parts.pop(b"ftyp") + bytes(index) + b"".join(parts.values())
    for share, cut_off in ((1, False), (0.5, True)):
        path.write_bytes(web[: int(share * len(web))])
        with VideoReader(path) as video:
            assert (len(list(video)) < 20) is cut_off
            assert video.cut_off is cut_off


def test_a_name_that_is_not_utf_8_is_refused_in_letters_that_print(tmp_path, frames):
    """OpenCV crashes on it."""
    write(tmp_path / "a.avi", frames)
    path = tmp_path / os.fsdecode(b"caf\xe9.avi")
    with pytest.raises(FormatError, match=r"caf\\xe9\.avi.*UTF-8") as failure:
        write(path, frames)
    str(failure.value).encode()
    (tmp_path / "a.avi").rename(path)
    with pytest.raises(FormatError, match=r"caf\\xe9\.avi.*UTF-8"):
        VideoReader(path)
    assert list(tmp_path.iterdir()) == [path]


def test_bad_arguments_are_named(tmp_path, frames):
    with pytest.raises(FormatError, match=r"\.gif"):
        VideoWriter(tmp_path / "a.gif", 25, (96, 80))
    with pytest.raises(FormatError, match="frames of 96x80 as zzzz"):
        VideoWriter(tmp_path / "a.mp4", 25, (96, 80), codec="zzzz")
    with pytest.raises(FormatError, match="frames of 12288x64 as mp4v"):  # MPEG-4 has no more than 8191
        VideoWriter(tmp_path / "a.mp4", 25, (12_288, 64), codec="mp4v")
    with pytest.raises(OSError):
        VideoWriter(tmp_path / "none" / "a.mp4", 25, (96, 80))
    for fps in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="fps"):
            VideoWriter(tmp_path / "a.mp4", fps, (96, 80))
    for frame, message in ((frames[0][:40], r"\(40, 96, 3\)"), (frames[0].astype(float), "float64")):
        with pytest.raises(ValueError, match=message):
            with VideoWriter(tmp_path / "a.mp4", 25, (96, 80), codec="mp4v") as writer:
                writer.write(frame)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_videos_are_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        VideoReader(tmp_path / "none.mp4")
    for content in (b"", b"text" * 100):
        (tmp_path / "a.mp4").write_bytes(content)
        with pytest.raises(FormatError, match=r"a\.mp4"):
            VideoReader(tmp_path / "a.mp4")
