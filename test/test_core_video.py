import pytest
from core_scenes import shifted, texture

from qpwc_core.errors import FormatError, QpwcError
from qpwc_core.metrics import psnr
from qpwc_core.video import VideoReader, VideoWriter


@pytest.fixture
def frames():
    canvas = texture(120, 160, smoothness=6)
    return [shifted(canvas, 2 * i, 0, 80, 96) for i in range(5)]


def write(path, frames, fps=25.0, **options):
    height, width = frames[0].shape[:2]
    with VideoWriter(path, fps, (width, height), **options) as writer:
        for frame in frames:
            writer.write(frame)


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


def test_mpeg4_is_there_when_asked_for(tmp_path, frames):
    write(tmp_path / "a.mp4", frames, codec="mp4v")
    assert len(list(VideoReader(tmp_path / "a.mp4"))) == 5


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


def test_bad_arguments_are_named(tmp_path, frames):
    with pytest.raises(FormatError, match=r"\.gif"):
        VideoWriter(tmp_path / "a.gif", 25, (96, 80))
    with pytest.raises(FormatError, match="zzzz"):
        VideoWriter(tmp_path / "a.mp4", 25, (96, 80), codec="zzzz")
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
