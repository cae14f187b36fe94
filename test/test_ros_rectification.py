"""Rectification against lenses whose distortion is written out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from qpwc_ros.rectification import RectificationError, Rectifier, calibration_key

K = [200.0, 0.0, 160.0, 0.0, 200.0, 120.0, 0.0, 0.0, 1.0]
P = [180.0, 0.0, 150.0, -18.0, 0.0, 190.0, 130.0, 0.0, 0.0, 0.0, 1.0, 0.0]
#: A turn about the vertical axis, as between the cameras of a stereo pair.
TURN = [math.cos(0.05), 0.0, math.sin(0.05), 0.0, 1.0, 0.0, -math.sin(0.05), 0.0, math.cos(0.05)]
PLUMB_BOB = [-0.25, 0.06, 0.001, -0.002, 0.01]
FISHEYE = [-0.02, 0.01, -0.004, 0.001]


def camera_info(**changes):
    roi = SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0)
    values = {"width": 320, "height": 240, "binning_x": 0, "binning_y": 0, "roi": roi}
    values.update(distortion_model="plumb_bob", d=PLUMB_BOB, k=K, r=TURN, p=P)
    return SimpleNamespace(**{**values, **changes})


def brightness(x, y):
    """A smooth picture, known between the pixels too."""
    return 128 + 60 * np.sin(x / 17) + 60 * np.cos(y / 13)


def distort(model, d, x, y):
    """Where a lens images the normalized point (x, y)."""
    if model == "equidistant":
        # J. Kannala, S. Brandt, A generic camera model, 2006, in the form of OpenCV's fisheye module.
        r = np.hypot(x, y)
        theta = np.arctan(r)
        scale = theta * sum(c * theta ** (2 * k) for k, c in enumerate([1.0, *d])) / np.maximum(r, 1e-12)
        return x * scale, y * scale
    k1, k2, p1, p2, k3, k4, k5, k6 = [*d, *[0.0] * (8 - len(d))]  # the Brown–Conrady model, rational
    r2 = x * x + y * y
    radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
    return (
        x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
        y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
    )


@pytest.mark.parametrize(
    ("model", "d"),
    [
        ("plumb_bob", PLUMB_BOB),
        ("rational_polynomial", [*PLUMB_BOB, 0.1, 0.05, 0.02]),
        ("equidistant", FISHEYE),
        ("equidistant", [0.0] * 4),
    ],
)
def test_each_pixel_shows_what_the_lens_saw_in_its_direction(model, d):
    rectify = Rectifier(camera_info(distortion_model=model, d=d), 320, 240)
    rows, columns = np.mgrid[:240, :320].astype(np.float64)
    seen = np.dstack([brightness(columns, rows)] * 3).round().astype(np.uint8)
    # The direction of each pixel of the rectified camera, turned back into the camera's own frame.
    directions = np.stack([(columns - P[2]) / P[0], (rows - P[6]) / P[5], np.ones_like(rows)])
    x, y, z = np.einsum("ij,jhw->ihw", np.reshape(TURN, (3, 3)).T, directions)
    u, v = distort(model, d, x / z, y / z)
    u, v = K[0] * u + K[2], K[4] * v + K[5]
    inside = (u > 1) & (u < 318) & (v > 1) & (v < 238)
    assert inside.mean() > 0.5
    difference = np.abs(rectify(seen)[..., 1] - brightness(u, v))[inside]
    assert difference.max() < 3 and difference.mean() < 0.6

    info = rectify.info
    assert list(info.d) == [0.0] * 5 and list(info.r) == np.eye(3).ravel().tolist()
    assert list(info.k) == [180.0, 0.0, 150.0, 0.0, 190.0, 130.0, 0.0, 0.0, 1.0] and list(info.p) == P


def test_a_calibration_for_twice_the_size_gives_the_same_picture_at_half():
    big = np.dstack([np.kron(np.random.default_rng(0).integers(0, 256, (30, 40)), np.ones((16, 16)))] * 3)
    big = cv2.GaussianBlur(big.astype(np.uint8), (0, 0), 5)
    small = cv2.resize(big, (320, 240), interpolation=cv2.INTER_AREA)
    doubled = camera_info(width=640, height=480, k=[*np.multiply(K[:6], 2), 0, 0, 1])
    doubled.p = [*np.multiply(P[:8], 2), 0.0, 0.0, 1.0, 0.0]
    at_full, at_half = Rectifier(doubled, 640, 480), Rectifier(doubled, 320, 240)
    expected = cv2.resize(at_full(big), (320, 240), interpolation=cv2.INTER_AREA)
    # The two differ by half a pixel's shift of a smooth picture: pixel centres do not scale with K.
    assert np.abs(at_half(small)[20:-20, 20:-20].astype(int) - expected[20:-20, 20:-20]).mean() < 3
    assert at_half.info.k[0] == 180.0 and at_half.info.width == 320
    assert list(doubled.d) == PLUMB_BOB  # the camera's own message is left alone


def test_without_distortion_and_rotation_the_image_stays_as_it_is():
    p = [*K[:3], 0.0, *K[3:6], 0.0, 0.0, 0.0, 1.0, 0.0]
    image = np.random.default_rng(1).integers(0, 256, (240, 320, 3), np.uint8)
    for d in ([], [0.0] * 5):
        info = camera_info(distortion_model="", d=d, r=np.eye(3).ravel().tolist(), p=p)
        assert np.array_equal(Rectifier(info, 320, 240)(image), image)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"distortion_model": "thin_prism"}, "distortion model 'thin_prism' is unknown"),
        ({"distortion_model": ""}, "distortion model '' is unknown"),
        ({"d": [0.1] * 3}, "plumb_bob has 4 or 5 coefficients, not 3"),
        ({"distortion_model": "equidistant"}, "equidistant has 4 coefficients, not 5"),
        ({"distortion_model": "equidistant", "d": []}, "equidistant has 4 coefficients, not 0"),
        ({"k": [0.0] * 9}, "not calibrated"),
        ({"p": [0.0] * 12}, "not calibrated"),
        ({"r": [0.0] * 9}, "no rotation"),
        ({"d": [math.nan] * 5}, "not finite"),
        ({"width": 320, "height": 320}, "camera_info is for 320x320 images, these are 320x240"),
        ({"width": 0}, "0x240"),
    ],
)
def test_a_calibration_that_cannot_be_used_is_refused_with_the_reason(changes, reason):
    with pytest.raises(RectificationError, match=reason) as caught:
        Rectifier(camera_info(**changes), 320, 240)
    assert "\n" not in str(caught.value)


def test_the_key_changes_with_the_calibration_only():
    assert calibration_key(camera_info()) == calibration_key(camera_info(header="another"))
    roi = SimpleNamespace(x_offset=8, y_offset=0, width=0, height=0)
    for changes in ({"d": FISHEYE}, {"k": P[:9]}, {"binning_x": 2}, {"roi": roi}):
        assert calibration_key(camera_info(**changes)) != calibration_key(camera_info())
