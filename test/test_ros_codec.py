"""Every camera encoding against values worked out by hand, and messages that lie about themselves."""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from qpwc_ros.codec import ENCODINGS, ImageError, decode_compressed, decode_image, fill_compressed, fill_image

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@dataclass
class Message:
    """The fields of sensor_msgs/Image that the codec reads."""

    height: int
    width: int
    encoding: str
    step: int
    data: bytes = field(repr=False)
    is_bigendian: int = 0


@dataclass
class Compressed:
    """The fields of sensor_msgs/CompressedImage that the codec reads."""

    data: bytes = field(repr=False)
    format: str = "jpeg"


RGB = np.random.default_rng(3).integers(0, 256, (10, 12, 3), np.uint8)
COLOUR = (200, 90, 30)


def message(
    pixels: np.ndarray, encoding: str, height: int, width: int, padding: int = 0, big: bool = False
) -> Message:
    """`pixels` (rows, ...) as a message whose rows have `padding` bytes of garbage behind them."""
    pixels = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<"))
    rows = [row.tobytes() + b"\xa5" * padding for row in pixels]
    return Message(height, width, encoding, len(rows[0]), b"".join(rows), int(big))


@pytest.mark.parametrize("padding", [0, 1, 37])
@pytest.mark.parametrize("order", ["rgb", "bgr", "rgba", "bgra"])
def test_colour_8_bit(order, padding):
    stored = np.dstack([RGB[..., "rgb".index(c)] if c != "a" else RGB[..., 0] for c in order])
    picture = decode_image(message(stored, order + "8", 10, 12, padding))
    assert np.array_equal(picture.rgb, RGB) and not picture.grey


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["rgb", "bgr", "rgba", "bgra"])
def test_colour_16_bit_is_scaled_as_cv_bridge_does(order, big):
    values = np.random.default_rng(4).integers(0, 65536, (10, 12, 3), np.uint16)
    stored = np.dstack([values[..., "rgb".index(c)] if c != "a" else values[..., 0] for c in order])
    picture = decode_image(message(stored, order + "16", 10, 12, 3, big))
    expected = np.rint(values * (255.0 / 65535.0))
    assert np.array_equal(picture.rgb, expected)


@pytest.mark.parametrize("big", [False, True])
def test_grey(big):
    grey = RGB[..., 0]
    for encoding in ("mono8", "8UC1"):
        picture = decode_image(message(grey, encoding, 10, 12, 5))
        assert picture.grey and all(np.array_equal(picture.rgb[..., c], grey) for c in range(3))
    wide = grey.astype(np.uint16) * 257
    picture = decode_image(message(wide, "mono16", 10, 12, 1, big))
    assert picture.grey and np.array_equal(picture.rgb[..., 1], grey)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_mosaic_of_one_colour(pattern, bits):
    dtype, scale = (np.uint8, 1) if bits == 8 else (np.uint16, 257)
    mosaic = np.zeros((16, 20), dtype)
    for k, c in enumerate(pattern):
        mosaic[k // 2 :: 2, k % 2 :: 2] = COLOUR["rgb".index(c)] * scale
    picture = decode_image(message(mosaic, f"bayer_{pattern}{bits}", 16, 20, 2))
    assert (picture.rgb == COLOUR).all()


def yuv_of(rgb):
    """BT.601 limited range, the definition of the YUV encodings."""
    r, g, b = (v / 255.0 for v in rgb)
    y = 16 + 65.481 * r + 128.553 * g + 24.966 * b
    u = 128 - 37.797 * r - 74.203 * g + 112.0 * b
    v = 128 + 112.0 * r - 93.786 * g - 18.214 * b
    return round(y), round(u), round(v)


@pytest.mark.parametrize(
    ("encoding", "order"), [("yuv422", "uyvy"), ("uyvy", "uyvy"), ("yuv422_yuy2", "yuyv"), ("yuyv", "yuyv")]
)
def test_yuv_4_2_2(encoding, order):
    y, u, v = yuv_of(COLOUR)
    row = np.tile(np.uint8([{"y": y, "u": u, "v": v}[c] for c in order]), 6)
    picture = decode_image(message(np.tile(row, (10, 1)), encoding, 10, 12, 8))
    assert np.abs(picture.rgb.astype(int) - COLOUR).max() <= 2


@pytest.mark.parametrize(("encoding", "order"), [("nv12", "uv"), ("nv21", "vu")])
def test_yuv_4_2_0(encoding, order):
    y, u, v = yuv_of(COLOUR)
    luma = np.full((10, 12), y, np.uint8)
    chroma = np.tile(np.uint8([{"u": u, "v": v}[c] for c in order]), (5, 6))
    picture = decode_image(message(np.vstack([luma, chroma]), encoding, 10, 12, 4))
    assert picture.rgb.shape == (10, 12, 3) and np.abs(picture.rgb.astype(int) - COLOUR).max() <= 2


def test_result_does_not_share_memory_with_the_message():
    data = bytearray(RGB.tobytes())
    picture = decode_image(Message(10, 12, "rgb8", 36, data))
    data[:] = bytes(len(data))
    assert np.array_equal(picture.rgb, RGB)


def test_last_row_may_lack_its_padding():
    msg = message(RGB, "rgb8", 10, 12, 7)
    msg.data = msg.data[:-7]
    assert np.array_equal(decode_image(msg).rgb, RGB)


GOOD = message(RGB, "rgb8", 10, 12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 0}, "0x10"),
        ({"height": 0}, "12x0"),
        ({"step": 35}, "step 35 is less than the 36 bytes"),
        ({"step": 37}, "360 bytes where its size and step need 369"),
        ({"data": GOOD.data[:-1]}, "359 bytes"),
        ({"data": b""}, "0 bytes"),
        ({"encoding": "32FC1"}, "'32FC1' is not one of a camera image"),
        ({"encoding": "16UC1"}, "16UC1"),
        ({"encoding": ""}, "''"),
        ({"encoding": "yuv422", "width": 11}, "even size"),
        ({"encoding": "nv12", "height": 9}, "even size"),
        ({"width": 2**32 - 1, "height": 2**32 - 1, "step": 2**32 - 1}, "max_pixels"),
        # 65536 · 65536 · 1 is zero in 32 bits
        ({"width": 65536, "height": 65536, "step": 65536, "encoding": "mono8"}, "max_pixels"),
    ],
)
def test_lying_images_are_refused_with_the_reason(changes, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(replace(GOOD, **changes))
    assert "\n" not in str(caught.value)


def test_max_pixels_is_inclusive():
    assert decode_image(GOOD, max_pixels=120).rgb.shape == (10, 12, 3)
    with pytest.raises(ImageError, match=r"12x10 is over max_pixels \(119\)"):
        decode_image(GOOD, max_pixels=119)


def smooth(height=48, width=64):
    y, x = np.mgrid[:height, :width]
    return np.dstack([255 * x / width, 255 * y / height, 255 - 255 * x / width]).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_compressed_colour_and_grey(suffix):
    rgb = smooth()
    file = cv2.imencode(suffix, rgb[..., ::-1])[1].tobytes()
    tolerance = 0 if suffix == ".png" else 12
    picture = decode_compressed(Compressed(file, "rgb8; jpeg compressed bgr8"))
    assert not picture.grey and np.abs(picture.rgb.astype(int) - rgb).max() <= tolerance
    # As image_transport says when it stored the channels in the other order.
    swapped = decode_compressed(Compressed(file, "bgr8; jpeg compressed rgb8"))
    assert np.array_equal(swapped.rgb[..., ::-1], picture.rgb)
    grey = decode_compressed(Compressed(cv2.imencode(suffix, rgb[..., 0])[1].tobytes(), "mono8"))
    assert grey.grey and np.abs(grey.rgb[..., 2].astype(int) - rgb[..., 0]).max() <= tolerance


@pytest.mark.parametrize("declared", ["16UC1", "32FC1", "16SC1", "64FC3"])
def test_what_a_compressed_image_says_it_was_is_refused_as_the_image_itself(declared):
    depth = np.arange(480, dtype=np.uint16).reshape(20, 24) * 100
    file = cv2.imencode(".png", depth)[1].tobytes()
    with pytest.raises(ImageError) as raw:
        decode_image(Message(20, 24, declared, 24 * 16, bytes(24 * 16 * 20)))
    for text in (f"{declared}; png compressed ", f"{declared}; compressedDepth png", f"{declared};png", declared):
        with pytest.raises(ImageError) as caught:
            decode_compressed(Compressed(file, text))
        # cv_bridge, where there is one, has something to add to the raw one.
        assert str(raw.value).startswith(str(caught.value)) and repr(declared) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["png", "", "mono16; png compressed mono16", "mono16; png compressed ", "something; png compressed"]
)
def test_a_compressed_image_of_16_bit_is_grey_where_it_does_not_say_that_it_is_something_else(text):
    grey = smooth()[..., 0]
    file = cv2.imencode(".png", grey.astype(np.uint16) * 257)[1].tobytes()
    picture = decode_compressed(Compressed(file, text))
    assert picture.grey and np.abs(picture.rgb[..., 1].astype(int) - grey).max() <= 1


@pytest.mark.parametrize("text", ["8UC1; png compressed ", "8UC3; png compressed bgr8", "bayer_rggb8; png compressed "])
def test_a_compressed_image_of_a_type_that_is_read_raw_is_read(text):
    file = cv2.imencode(".png", smooth())[1].tobytes()
    assert np.array_equal(decode_compressed(Compressed(file, text)).rgb, smooth()[..., ::-1])


@pytest.mark.parametrize(("suffix", "bits", "tolerance"), [(".png", 8, 0), (".png", 16, 0), (".jpg", 8, 4)])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_a_compressed_mosaic_has_the_colours_of_the_raw_one(pattern, bits, suffix, tolerance):
    mosaic = np.empty((20, 24), np.uint8)
    for k, colour in enumerate(pattern):
        mosaic[k // 2 :: 2, k % 2 :: 2] = {"r": 200, "g": 120, "b": 40}[colour]
    stored = mosaic if bits == 8 else mosaic.astype(np.uint16) * 257
    file = cv2.imencode(suffix, stored, [cv2.IMWRITE_JPEG_QUALITY, 100] if suffix == ".jpg" else [])[1].tobytes()
    name = f"bayer_{pattern}{bits}"
    raw = decode_image(Message(20, 24, name, 24 * bits // 8, stored.tobytes()))
    picture = decode_compressed(Compressed(file, f"{name}; {'png' if suffix == '.png' else 'jpeg'} compressed "))
    assert not picture.grey and np.array_equal(raw.rgb[10, 12], [200, 120, 40])
    assert np.abs(picture.rgb.astype(int) - raw.rgb).max() <= tolerance


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_compressed_file_cut_anywhere_is_refused(suffix):
    file = cv2.imencode(suffix, smooth())[1].tobytes()
    for length in range(0, len(file) - 8, 7):
        with pytest.raises(ImageError):
            decode_compressed(Compressed(file[:length]))
    # Some cameras pad their JPEGs with zeros.
    assert decode_compressed(Compressed(file + bytes(100))).rgb.shape == (48, 64, 3)


def test_a_small_file_that_claims_a_huge_image_is_refused_before_unpacking():
    jpeg = bytearray(cv2.imencode(".jpg", smooth())[1].tobytes())
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(ImageError, match="65535x65535 is over max_pixels"):
        decode_compressed(Compressed(bytes(jpeg)))
    png = bytearray(cv2.imencode(".png", smooth())[1].tobytes())
    png[16:24] = (1 << 30).to_bytes(4, "big") * 2
    with pytest.raises(ImageError, match="max_pixels"):
        decode_compressed(Compressed(bytes(png)))


def test_a_chunk_that_claims_more_than_the_file_has_is_refused_before_it_is_allocated():
    png = bytearray(cv2.imencode(".png", smooth())[1].tobytes())
    at = png.index(b"IDAT") - 4
    for length in (len(png), 2**31 - 1, 2**32 - 1):
        png[at : at + 4] = length.to_bytes(4, "big")
        with pytest.raises(ImageError, match="corrupt"):
            decode_compressed(Compressed(bytes(png)))


def test_other_formats_are_refused():
    for data in (b"GIF89a" + bytes(50), b"\x89PNG" + bytes(50), b"\xff\xd8", bytes(60)):
        with pytest.raises(ImageError):
            decode_compressed(Compressed(data))


def test_written_images_are_read_back():
    for encoding, pixels in (("rgb8", RGB), ("bgr8", RGB[..., ::-1]), ("mono8", RGB[..., 0])):
        msg = fill_image(SimpleNamespace(), pixels, encoding)
        assert (msg.height, msg.width, msg.encoding) == (10, 12, encoding)
        expected = RGB if encoding != "mono8" else np.dstack([RGB[..., 0]] * 3)
        assert np.array_equal(decode_image(msg).rgb, expected)
    flow = np.random.default_rng(5).normal(size=(6, 7, 2)).astype(np.float32)
    msg = fill_image(SimpleNamespace(), flow[:, ::-1], "32FC2")
    assert msg.step == 56 and np.array_equal(
        np.frombuffer(msg.data, np.float32).reshape(6, 7, 2), flow[:, ::-1]
    )


def test_written_jpeg_keeps_the_colours():
    rgb = smooth()
    msg = fill_compressed(SimpleNamespace(), rgb, quality=95)
    assert msg.format == "bgr8; jpeg compressed bgr8"
    assert np.abs(decode_compressed(msg).rgb.astype(int) - rgb).mean() < 2
    assert fill_compressed(SimpleNamespace(), rgb[..., 0]).format == "mono8; jpeg compressed mono8"


@hypothesis.settings(max_examples=1000, deadline=None, derandomize=True)
@hypothesis.given(
    encoding=st.sampled_from([*ENCODINGS, "32FC1", "nonsense"]),
    height=st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1)),
    width=st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1)),
    step=st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)),
    big=st.integers(0, 255),
    data=st.binary(max_size=400),
)
def test_any_image_is_decoded_or_refused(encoding, height, width, step, big, data):
    decoded_or_refused(Message(height, width, encoding, step, data, big))


def decoded_or_refused(msg):
    try:
        picture = decode_image(msg)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert picture.rgb.shape == (msg.height, msg.width, 3) and picture.rgb.dtype == np.uint8


# Drawing is what takes the time, so these two make 20 messages of each drawn string: 11,000 in all.
CASES = 20


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
@hypothesis.given(data=st.binary(min_size=600, max_size=900))
def test_random_bytes_as_images(data):
    names = [*ENCODINGS, "32FC1"]
    for k in range(CASES):
        kind, name, height, width, step, big = struct.unpack_from("<BBIIIB", data, 15 * k)
        if kind < 200:  # small enough for the data to suffice now and then
            height, width, step = 1 + height % 12, 1 + width % 12, step % 64
        decoded_or_refused(Message(height, width, names[name % len(names)], step, data[300:], big))


FILES = [cv2.imencode(suffix, smooth(16, 16))[1].tobytes() for suffix in (".jpg", ".png")]


@hypothesis.settings(max_examples=500, deadline=None, derandomize=True)
@hypothesis.given(
    data=st.one_of(
        st.binary(max_size=200),
        st.tuples(st.sampled_from(FILES), st.integers(0, 900), st.binary(min_size=1, max_size=8)).map(
            lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + len(t[2]) :]
        ),
    )
)
def test_any_compressed_image_is_decoded_or_refused(data):
    unpacked_or_refused(data)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(data=st.binary(min_size=12 * CASES, max_size=12 * CASES))
def test_random_bytes_in_compressed_images(data):
    for k in range(CASES):
        which, at, length, *patch = struct.unpack_from("<BHB8B", data, 12 * k)
        file = bytearray(FILES[which % 2])
        at, length = at % len(file), 1 + length % 8
        file[at : at + length] = bytes(patch[:length])
        unpacked_or_refused(bytes(file))


def unpacked_or_refused(data):
    try:
        picture = decode_compressed(Compressed(data), max_pixels=100_000)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert picture.rgb.ndim == 3 and picture.rgb.dtype == np.uint8


def test_agrees_with_cv_bridge():
    cv_bridge = pytest.importorskip(
        "cv_bridge", reason="cv_bridge comes with a ROS installation, not from PyPI"
    )
    messages = pytest.importorskip("sensor_msgs.msg")
    rng = np.random.default_rng(6)
    for name, encoding in ENCODINGS.items():
        if name.startswith("8UC") or encoding.rows != 2 or name in ("uyvy", "yuyv"):
            continue  # what cv_bridge refuses, or knows in some releases only
        dtype = np.uint8 if encoding.bits == 8 else np.uint16
        stored = rng.integers(0, np.iinfo(dtype).max, (16, 20 * encoding.channels), dtype)
        msg = fill_image(messages.Image(), stored, name)
        msg.width = 20
        expected = cv_bridge.CvBridge().imgmsg_to_cv2(msg, "rgb8")
        assert np.array_equal(decode_image(msg).rgb, expected), name


class StrangerBridge:
    """In place of cv_bridge: knows two encodings that this project does not, one of them of colour."""

    def encoding_to_dtype_with_channels(self, encoding):
        return {"gbr16": (np.uint16, 3), "32FC1": (np.float32, 1)}[encoding]

    def imgmsg_to_cv2(self, msg, desired_encoding):
        assert desired_encoding == "rgb8"
        if msg.encoding != "gbr16":
            raise ValueError(f"[{msg.encoding}] is not a color format")
        shape, strides = (msg.height, msg.width, 3), (msg.step, 6, 2)
        return (np.ndarray(shape, np.uint16, msg.data, strides=strides)[..., [2, 0, 1]] >> 8).astype(np.uint8)


def test_what_only_cv_bridge_knows_is_left_to_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv_bridge", SimpleNamespace(CvBridge=StrangerBridge))
    stored = RGB[..., [1, 2, 0]].astype(np.uint16) * 257
    good = message(stored, "gbr16", 10, 12, 4)
    assert np.array_equal(decode_image(good).rgb, RGB)
    for changes, reason in (
        ({"step": good.step + 1}, "bytes where its size and step need"),
        ({"step": good.step - 1}, "not one of a camera image"),  # cv_bridge would garble the rows
        ({"step": 71}, "step 71 is less than the 72 bytes"),
        ({"encoding": "32FC1", "step": 5}, "'32FC1' is not one of a camera image: .*not a color format"),
        ({"encoding": "nonsense"}, "'nonsense' is not one of a camera image"),
    ):
        with pytest.raises(ImageError, match=reason):
            decode_image(replace(good, **changes))
