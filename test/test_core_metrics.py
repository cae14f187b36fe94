import math

import numpy as np
import pytest
from core_scenes import MovingSquare, constant_flow, texture

from qpwc_core.metrics import epe, fl_all, forward_backward_confidence, outlier_rate, psnr, ssim


def test_epe_is_the_mean_distance():
    zero = np.zeros((4, 6, 2), np.float32)
    assert epe(zero, constant_flow(4, 6, 3, 4)) == 5
    half = zero.copy()
    half[:2] = (3, 4)
    assert epe(half, zero) == 2.5
    valid = np.zeros((4, 6), bool)
    valid[:2] = True
    assert epe(half, zero, valid) == 5


def test_outliers_are_counted_beyond_the_threshold():
    gt = np.zeros((1, 4, 2), np.float32)
    pred = np.array([[[0, 0], [3, 0], [3.01, 0], [np.nan, 0]]], np.float32)
    assert outlier_rate(pred, gt) == 0.5
    assert outlier_rate(pred, gt, threshold_px=1) == 0.75


def test_fl_all_needs_both_criteria():
    gt = constant_flow(1, 4, 100, 0)
    error = np.array([[[2, 0], [4, 0], [5.5, 0], [np.nan, 0]]], np.float32)  # 5 % of 100 is 5
    assert fl_all(gt + error, gt) == 0.5
    small = constant_flow(1, 4, 10, 0)
    assert fl_all(small + error, small) == 0.75


def test_sparse_truth_may_be_anything_where_not_valid():
    gt = np.full((2, 2, 2), np.nan, np.float32)
    gt[0, 0] = 0
    assert epe(np.zeros((2, 2, 2), np.float32), gt, np.isfinite(gt).all(-1)) == 0
    with pytest.raises(ValueError, match="no pixel"):
        epe(gt, gt, np.zeros((2, 2), bool))
    with pytest.raises(ValueError, match=r"\(2, 2, 2\).*\(3, 2, 2\)"):
        epe(gt, np.zeros((3, 2, 2), np.float32))


def test_psnr_is_10_log_of_the_squared_error():
    image = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(image, image) == math.inf
    assert psnr(image, image + np.uint8(10)) == pytest.approx(10 * math.log10(255**2 / 100))
    assert psnr(image + np.uint8(200), image) == psnr(
        image, image + np.uint8(200)
    )  # wraps to 44: no overflow
    with pytest.raises(ValueError, match="float32"):
        psnr(image.astype(np.float32), image)


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    image = texture(40, 50)
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 20, image.shape), 0, 255).astype(np.uint8)
    expected = metrics.structural_similarity(
        noisy,
        image,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=-1,
    )
    assert ssim(noisy, image) == pytest.approx(expected, abs=1e-6)


def test_ssim_of_known_cases():
    image = texture(40, 50)
    assert ssim(image, image) == pytest.approx(1)
    # Of two constants only the luminance term remains.
    a, b, c1 = 50, 100, (0.01 * 255) ** 2
    flat = np.full((16, 16), a, np.uint8)
    assert ssim(flat, np.full_like(flat, b)) == pytest.approx(
        (2 * a * b + c1) / (a * a + b * b + c1), abs=1e-6
    )


def test_confidence_is_one_where_the_flows_cancel():
    forward = constant_flow(20, 30, 4, -3)
    confidence = forward_backward_confidence(forward, -forward)
    assert confidence.shape == (20, 30) and confidence.dtype == np.float32
    assert (confidence[3:, :-4] == 1).all()
    assert (confidence[:2] == 0).all() and (confidence[:, -3:] == 0).all()  # ends outside the image


def test_confidence_is_half_at_sundarams_threshold_and_falls_with_the_mismatch():
    values = []
    for mismatch in (0, 0.3, math.sqrt(0.5), 1, 3):
        forward = np.zeros((9, 9, 2), np.float32)
        backward = constant_flow(9, 9, mismatch, 0)
        values.append(forward_backward_confidence(forward, backward)[4, 4])
    # At |B'|² = 0.5 the threshold is 0.01 · 0.5 + 0.5.
    assert values[2] == pytest.approx(2 ** -(0.5 / 0.505), abs=1e-5)
    assert values[0] == 1 and all(a > b for a, b in zip(values, values[1:])) and values[-1] < 1e-4


def test_confidence_marks_what_gets_covered():
    square = MovingSquare(motion=20)
    confidence = forward_backward_confidence(square.flow(0, 1), square.flow(1, -1))
    inside = slice(square.top + 1, square.top + square.side - 1)
    assert (confidence[inside, square.left : square.left + square.side] == 1).all()
    covered = slice(square.left + square.side + 1, square.left + square.side + square.motion - 1)
    assert (confidence[inside, covered] < 1e-3).all()


def test_confidence_of_flow_that_is_not_finite_is_zero():
    forward = np.zeros((8, 8, 2), np.float32)
    forward[2, 3], forward[4, 5] = np.nan, np.inf
    confidence = forward_backward_confidence(forward, np.zeros_like(forward))
    assert np.isfinite(confidence).all()
    assert confidence[2, 3] == confidence[4, 5] == 0 and confidence[6, 6] == 1
