"""Images in messages: decoded to RGB arrays, and arrays written into messages.

Works on anything that has the fields of sensor_msgs/Image or sensor_msgs/CompressedImage (rclpy's messages,
those a bag reader makes), so it imports no ROS. Colours come out as cv_bridge would give them for "rgb8":
16-bit values are scaled by 255/65535, Bayer mosaics go through OpenCV's bilinear demosaicing. Two liberties
are taken where cv_bridge refuses: 8UC1, 8UC3 and 8UC4 are read as mono8, bgr8 and bgra8, which is what
programs that publish OpenCV arrays without naming an encoding mean.

Every size in a message is the sender's claim. It is checked in Python integers, which do not overflow, before
anything is allocated from it.
"""

from __future__ import annotations

import array
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

#: More pixels than this are refused unless the caller says otherwise (16.8 megapixels).
MAX_PIXELS = 1 << 24


class ImageError(ValueError):
    """A message that is no usable camera image; the text says why, in one line."""


@dataclass(frozen=True)
class Encoding:
    """How the pixels of one sensor_msgs encoding lie in memory and become RGB.

    Attributes:
        channels: interleaved values per pixel of a row.
        bits: 8 or 16 bits per value.
        to_rgb: OpenCV conversion code, or None where the values already are RGB.
        rows: rows in memory for every two image rows (3 for the 4:2:0 layouts).
        even_width, even_height: the layout shares colour between neighbours, so the size must be even.
        grey: there is no colour in it.
    """

    channels: int
    bits: int
    to_rgb: int | None
    rows: int = 2
    even_width: bool = False
    even_height: bool = False
    grey: bool = False


def _encodings() -> dict[str, Encoding]:
    table = {}
    for bits in (8, 16):
        table[f"mono{bits}"] = Encoding(1, bits, cv2.COLOR_GRAY2RGB, grey=True)
        table[f"rgb{bits}"] = Encoding(3, bits, None)
        table[f"bgr{bits}"] = Encoding(3, bits, cv2.COLOR_BGR2RGB)
        table[f"rgba{bits}"] = Encoding(4, bits, cv2.COLOR_RGBA2RGB)
        table[f"bgra{bits}"] = Encoding(4, bits, cv2.COLOR_BGRA2RGB)
        # OpenCV names a mosaic by the second and third pixel of its second row, ROS by the first two of each.
        table[f"bayer_rggb{bits}"] = Encoding(1, bits, cv2.COLOR_BayerBG2RGB)
        table[f"bayer_bggr{bits}"] = Encoding(1, bits, cv2.COLOR_BayerRG2RGB)
        table[f"bayer_gbrg{bits}"] = Encoding(1, bits, cv2.COLOR_BayerGR2RGB)
        table[f"bayer_grbg{bits}"] = Encoding(1, bits, cv2.COLOR_BayerGB2RGB)
    table["8UC1"], table["8UC3"], table["8UC4"] = table["mono8"], table["bgr8"], table["bgra8"]
    uyvy = Encoding(2, 8, cv2.COLOR_YUV2RGB_UYVY, even_width=True)
    yuyv = Encoding(2, 8, cv2.COLOR_YUV2RGB_YUYV, even_width=True)
    table["yuv422"] = table["uyvy"] = uyvy
    table["yuv422_yuy2"] = table["yuyv"] = yuyv
    table["nv12"] = Encoding(1, 8, cv2.COLOR_YUV2RGB_NV12, rows=3, even_width=True, even_height=True)
    table["nv21"] = Encoding(1, 8, cv2.COLOR_YUV2RGB_NV21, rows=3, even_width=True, even_height=True)
    return table


#: Every encoding decoded here, by its sensor_msgs name.
ENCODINGS = _encodings()
# OpenCV's names of types, which say nothing of colours: depth is 16UC1 or 32FC1.
_BARE_TYPE = re.compile(r"(8|16|32|64)[USF]C\d+")


@dataclass(frozen=True)
class Picture:
    """A decoded image: `rgb` is uint8 (H, W, 3); `grey` says that the source had no colour."""

    rgb: np.ndarray
    grey: bool


def decode_image(msg: Any, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a sensor_msgs/Image.

    The result never shares memory that can change with the message; rows may be padded (any step), and 16-bit
    values may be of either endianness.

    Raises:
        ImageError: the encoding is not that of a camera image, or size, step and data do not fit together, or
            there are more than `max_pixels` pixels.
    """
    height, width, step = int(msg.height), int(msg.width), int(msg.step)
    encoding = ENCODINGS.get(msg.encoding)
    _check_size(width, height, max_pixels)
    if encoding is None:
        return _decode_with_cv_bridge(msg, step)
    if (encoding.even_width and width % 2) or (encoding.even_height and height % 2):
        raise ImageError(f"encoding {msg.encoding} needs an even size, got {width}x{height}")
    rows = height * encoding.rows // 2
    row_bytes = width * encoding.channels * encoding.bits // 8
    data = _bytes_of(msg.data)
    _check_layout(step, row_bytes, rows, len(data))
    pixels = np.ndarray((rows, row_bytes), np.uint8, buffer=data, strides=(step, 1))
    pixels = np.ascontiguousarray(pixels)
    if encoding.bits == 16:
        order = ">u2" if msg.is_bigendian else "<u2"
        pixels = pixels.view(order).astype(np.uint16, copy=False)
    pixels = pixels.reshape(rows, width, encoding.channels) if encoding.channels > 1 else pixels
    try:
        rgb = pixels.copy() if encoding.to_rgb is None else cv2.cvtColor(pixels, encoding.to_rgb)
    except cv2.error as error:  # a mosaic of one pixel, say
        raise ImageError(f"{width}x{height} {msg.encoding} image cannot be converted: {error.err}") from None
    if encoding.bits == 16:
        rgb = cv2.convertScaleAbs(rgb, alpha=255.0 / 65535.0)
    return Picture(rgb, encoding.grey)


def decode_compressed(msg: Any, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a sensor_msgs/CompressedImage that holds a JPEG or PNG file.

    The size is read from the file's own header before it is unpacked, so a small file that claims a huge
    image is refused at no cost. A file that was cut off is refused too, where OpenCV would return a half-grey
    image. `format` is followed where it says that colours were stored in RGB order ("... compressed rgb8"),
    that a file of one channel is a Bayer mosaic ("bayer_rggb8; png compressed "), or that the image was none of
    a camera ("16UC1; png compressed").

    Raises:
        ImageError: no camera image, no JPEG or PNG, cut off, corrupt, or more than `max_pixels` pixels.
    """
    declared = msg.format.partition(";")[0].strip()
    # Anything else there may be the name of a codec, which the file itself tells better.
    if _BARE_TYPE.fullmatch(declared) and declared not in ENCODINGS:
        raise _no_camera_image(declared)
    data = bytes(_bytes_of(msg.data))
    kind = compressed_format(data)
    if kind == "jpeg":
        width, height, grey = _jpeg_header(data)
    elif kind == "png":
        width, height, grey = _png_header(data)
    elif not data:
        raise ImageError("compressed image without data")
    else:
        raise ImageError(f"compressed image is neither JPEG nor PNG (format {msg.format[:40]!r})")
    _check_size(width, height, max_pixels)
    # image_transport stores a mosaic as it is. Read as grey, its pattern would stand still before all that moves.
    mosaic = grey and declared.startswith("bayer_") and declared in ENCODINGS
    try:
        flags = cv2.IMREAD_GRAYSCALE if mosaic else cv2.IMREAD_COLOR
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
        if stored is None or stored.shape[:2] != (height, width):
            raise ImageError("compressed image cannot be decoded: the file is corrupt")
        if mosaic:
            return Picture(cv2.cvtColor(stored, ENCODINGS[declared].to_rgb), False)
    except cv2.error as error:
        raise ImageError(f"compressed image cannot be decoded: {error.err}") from None
    swapped = "compressed rgb" in msg.format
    return Picture(stored if swapped else cv2.cvtColor(stored, cv2.COLOR_BGR2RGB), grey)


def compressed_format(data: bytes) -> str | None:
    """What a file is by how it begins, "jpeg" or "png"; None for all that a CompressedImage does not hold."""
    if data[:2] == b"\xff\xd8":
        return "jpeg"
    return "png" if data[:8] == b"\x89PNG\r\n\x1a\n" else None


def fill_image(msg: Any, pixels: np.ndarray, encoding: str) -> Any:
    """Write an array (H, W) or (H, W, C) into a sensor_msgs/Image and return it; the header stays as it is.

    The array's dtype and channels must be those of `encoding`; this machine's byte order is written.
    """
    pixels = np.ascontiguousarray(pixels)
    msg.height, msg.width = pixels.shape[:2]
    msg.encoding = encoding
    msg.is_bigendian = sys.byteorder == "big"
    msg.step = pixels.nbytes // pixels.shape[0]
    msg.data = _message_bytes(pixels)
    return msg


def fill_compressed(msg: Any, rgb: np.ndarray, *, quality: int = 90) -> Any:
    """Write uint8 (H, W, 3) RGB or (H, W) grey as JPEG into a sensor_msgs/CompressedImage and return it."""
    if rgb.ndim == 2:
        name, stored = "mono8", rgb
    else:
        name, stored = "bgr8", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    _, file = cv2.imencode(".jpg", stored, (cv2.IMWRITE_JPEG_QUALITY, int(quality)))
    msg.format = f"{name}; jpeg compressed {name}"
    msg.data = _message_bytes(file)
    return msg


def _message_bytes(values: np.ndarray) -> array.array:
    # rclpy takes an array('B') as it is; an ndarray or a list is checked element by element, which takes 30
    # to 70 ms for one VGA image.
    out = array.array("B")
    out.frombytes(memoryview(values).cast("B"))
    return out


def _bytes_of(data: Any) -> memoryview:
    try:
        view = memoryview(data)
    except TypeError:
        view = memoryview(bytes(data))
    return view.cast("B") if view.nbytes else memoryview(b"")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise ImageError(f"image size {width}x{height} is empty")
    if width * height > max_pixels:
        raise ImageError(f"image size {width}x{height} is over max_pixels ({max_pixels})")


def _check_layout(step: int, row_bytes: int, rows: int, available: int) -> None:
    if step < row_bytes:
        raise ImageError(f"step {step} is less than the {row_bytes} bytes of a row")
    needed = step * (rows - 1) + row_bytes
    if available < needed:
        raise ImageError(f"image data has {available} bytes where its size and step need {needed}")


def _no_camera_image(encoding: str) -> ImageError:
    return ImageError(f"encoding {encoding[:40]!r} is not one of a camera image")


def _decode_with_cv_bridge(msg: Any, step: int) -> Picture:
    """Leave what this module does not know to cv_bridge where the machine has it."""
    refusal = _no_camera_image(msg.encoding)
    try:
        import cv_bridge
    except Exception:  # ROS 1's package of that name fails in many ways with a current numpy
        raise refusal from None
    try:
        bridge = cv_bridge.CvBridge()
        dtype, channels = bridge.encoding_to_dtype_with_channels(msg.encoding)
        pixel = channels * np.dtype(dtype).itemsize
        # Depth, say, is refused for what it is, whatever its size and data are.
        blank = dict(height=2, width=2, step=2 * pixel, data=bytes(4 * pixel), is_bigendian=0)
        bridge.imgmsg_to_cv2(SimpleNamespace(encoding=msg.encoding, **blank), "rgb8")
        _check_layout(step, int(msg.width) * pixel, int(msg.height), len(_bytes_of(msg.data)))
        if step % np.dtype(dtype).itemsize:
            raise refusal  # cv_bridge garbles the rows of such an image
        rgb = np.asarray(bridge.imgmsg_to_cv2(msg, "rgb8"))
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{refusal}: {str(error).splitlines()[0] if str(error) else error!r}") from None
    return Picture(rgb, False)


def _jpeg_header(data: bytes) -> tuple[int, int, bool]:
    """Width, height and greyness from a JPEG's frame header; ISO/IEC 10918-1, annex B."""
    position, size = 2, None
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise ImageError("JPEG header is corrupt")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:  # the picture itself begins
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and position + 10 <= len(data):
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            size = width, height, data[position + 9] == 1
        position += 2 + length
    if size is None:
        raise ImageError("JPEG has no frame header: cut off or corrupt")
    if data.find(b"\xff\xd9", position) < 0:
        raise ImageError(f"JPEG is cut off after {len(data)} bytes")
    return size


def _png_header(data: bytes) -> tuple[int, int, bool]:
    """Width, height and greyness from a PNG's IHDR chunk; ISO/IEC 15948, clauses 5 and 11."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ImageError("PNG header is corrupt")
    # Every chunk has to lie in the file: OpenCV allocates what a chunk claims, up to 4 GB, before reading it.
    position = 8
    while data[position + 4 : position + 8] != b"IEND":
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        if position + 12 > len(data):
            raise ImageError(f"PNG is cut off after {len(data)} bytes, or corrupt")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return width, height, data[25] in (0, 4)
