import struct

import cv2
import numpy as np
import pytest

from qpwc_core.errors import FormatError
from qpwc_core.flow_io import read_flow, write_flow
from qpwc_core.images import read_image, write_image


@pytest.fixture
def flow():
    return np.random.default_rng(0).uniform(-100, 100, (5, 7, 2)).astype(np.float32)


@pytest.fixture
def valid():
    return np.random.default_rng(1).random((5, 7)) > 0.3


@pytest.mark.parametrize("suffix, tolerance", [(".flo", 0), (".npy", 0), (".png", 0.5 / 64)])
def test_what_is_written_is_read_back(tmp_path, flow, valid, suffix, tolerance):
    path = tmp_path / f"flow{suffix}"
    write_flow(path, flow, valid)
    read, read_valid = read_flow(path)
    assert read.dtype == np.float32 and read_valid.dtype == bool
    np.testing.assert_array_equal(read_valid, valid)
    np.testing.assert_allclose(read[valid], flow[valid], rtol=0, atol=tolerance)
    assert not read[~valid].any()


def test_flo_bytes_are_middleburys(tmp_path):
    path = tmp_path / "a.flo"
    content = struct.pack("<fii", 202021.25, 2, 1) + struct.pack("<4f", 1.5, -2, 1e10, 1e10)
    path.write_bytes(content)
    flow, valid = read_flow(path)
    np.testing.assert_array_equal(flow, [[[1.5, -2], [0, 0]]])
    np.testing.assert_array_equal(valid, [[True, False]])
    write_flow(tmp_path / "b.flo", flow, valid)
    assert (tmp_path / "b.flo").read_bytes() == content


@pytest.mark.parametrize("suffix", [".npy", ".pfm"])
def test_middleburys_mark_means_unknown_in_other_formats_too(tmp_path, suffix):
    """As in a file made of what another program read from a .flo."""
    path = tmp_path / f"a{suffix}"
    write_flow(path, np.array([[[1.5, -2], [1e10, 1e10], [0, -1e10]]], np.float32))
    flow, valid = read_flow(path)
    np.testing.assert_array_equal(flow, [[[1.5, -2], [0, 0], [0, 0]]])
    np.testing.assert_array_equal(valid, [[True, False, False]])


def test_kitti_png_is_the_devkits(tmp_path):
    """u16 = value · 64 + 2^15 in the file's channels 1 and 2, validity in 3; OpenCV reverses the channels."""
    path = tmp_path / "a.png"
    write_flow(path, np.array([[[1.0, -2.0], [3.0, 4.0]]], np.float32), np.array([[True, False]]))
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(stored, [[[32768 + 64, 32768 - 128, 1], [0, 0, 0]]])


def test_kitti_png_holds_its_full_range_and_refuses_more(tmp_path):
    path = tmp_path / "a.png"
    edges = np.array([[[-512.0, 511.984375]]], np.float32)
    write_flow(path, edges)
    np.testing.assert_array_equal(read_flow(path)[0], edges)
    with pytest.raises(FormatError, match="512"):
        write_flow(path, np.full((1, 1, 2), 512, np.float32))
    np.testing.assert_array_equal(read_flow(path)[0], edges)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "magic"),
        (b"PIEH\x02\x00", "truncated"),
        (b"GIF8" + bytes(20), "magic"),
        (struct.pack("<4sii", b"PIEH", 0, 5), "size"),
        (struct.pack("<4sii", b"PIEH", -3, 5), "size"),
        (struct.pack("<4sii", b"PIEH", 2_000_000_000, 2_000_000_000), "size"),
        (struct.pack("<4sii", b"PIEH", 2, 2) + bytes(31), "truncated"),
        (struct.pack("<4sii", b"PIEH", 2, 2) + bytes(33), "too long"),
    ],
)
def test_damaged_flo_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "bad.flo"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=reason) as error:
        read_flow(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_pngs_are_no_flow(tmp_path):
    path = tmp_path / "picture.png"
    for content in (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint16)):
        cv2.imwrite(str(path), content)
        with pytest.raises(FormatError, match="16-bit"):
            read_flow(path)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(FormatError, match="PNG"):
        read_flow(path)


def test_other_npys_are_no_flow(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 4, 3), np.float32))
    with pytest.raises(FormatError, match=r"\(4, 4, 3\)"):
        read_flow(path)
    np.save(path, np.zeros((4, 4, 2), np.int32))
    with pytest.raises(FormatError, match="int32"):
        read_flow(path)
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(FormatError, match="npy"):
        read_flow(path)
    for content in (b"", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4',", b"PK\x03\x04 no archive"):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="npy"):
            read_flow(path)


def test_bad_arguments_name_what_is_wrong(tmp_path, flow):
    with pytest.raises(FormatError, match=r"\.gif"):
        write_flow(tmp_path / "a.gif", flow)
    with pytest.raises(ValueError, match=r"\(5, 7, 1\)"):
        write_flow(tmp_path / "a.flo", flow[..., :1])
    with pytest.raises(ValueError, match=r"\(7, 5\)"):
        write_flow(tmp_path / "a.flo", flow, np.ones((7, 5), bool))
    with pytest.raises(ValueError, match="finite"):
        write_flow(tmp_path / "a.flo", np.full((2, 2, 2), np.nan, np.float32))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        read_flow(tmp_path / "none.flo")


def test_failed_writing_keeps_the_old_file_and_leaves_nothing_else(tmp_path, flow, monkeypatch):
    path = tmp_path / "a.flo"
    path.write_bytes(b"precious")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_flow(path, flow)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"precious"]


def test_images_keep_their_colours(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    image[..., 0] = 200  # red
    write_image(tmp_path / "a.png", image)
    assert cv2.imread(str(tmp_path / "a.png"))[0, 0].tolist() == [0, 0, 200]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image)


def test_files_that_are_no_images_are_named(tmp_path):
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(FormatError, match=r"a\.png"):
            read_image(tmp_path / "a.png")
    with pytest.raises(FormatError, match=r"\.doc"):
        write_image(tmp_path / "a.doc", np.zeros((4, 4, 3), np.uint8))


def test_a_written_file_has_ordinary_permissions_and_links_stay_links(tmp_path):
    (tmp_path / "plain").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    write_image(tmp_path / "link.png", np.zeros((4, 4, 3), np.uint8))
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode
