import math

import numpy as np
import pytest
from core_scenes import MovingSquare, constant_flow, texture

from qpwc_core.metrics import (
    bootstrap_interval,
    census_error,
    coverage_mask,
    epe,
    epe_by_band,
    fl_all,
    forward_backward_confidence,
    outlier_rate,
    photometric_error,
    psnr,
    ssim,
)


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


def test_error_by_band_of_true_displacement():
    gt = np.zeros((1, 5, 2), np.float32)
    gt[0, :, 0] = 0, 9.99, 10, 39, 41
    pred = gt + np.array([1, 2, 3, 4, 5], np.float32)[None, :, None] * np.float32([0, 1])
    bands = epe_by_band(pred, gt)
    assert [count for _, count in bands] == [2, 2, 1]
    assert [total for total, _ in bands] == pytest.approx([3, 7, 5])
    only_last = np.array([[False] * 4 + [True]])
    assert epe_by_band(pred, gt, only_last)[:2] == [(0, 0), (0, 0)]


def test_coverage_is_where_the_flow_ends_inside():
    assert coverage_mask(constant_flow(6, 8, 0, 0)).all()
    mask = coverage_mask(constant_flow(6, 8, 3, -2))
    assert mask[2:, :5].all() and not mask[:2].any() and not mask[:, 5:].any()
    flow = constant_flow(6, 8, 0, 0)
    flow[1, 1], flow[2, 2] = np.nan, np.inf
    assert np.argwhere(~coverage_mask(flow)).tolist() == [[1, 1], [2, 2]]


def test_photometric_error_is_in_grey_levels():
    image = np.full((8, 8, 3), 100, np.uint8)
    other = image.copy()
    other[:, :4] -= 10
    assert photometric_error(image, image) == 0
    assert photometric_error(other, image) == 5
    left = np.zeros((8, 8), bool)
    left[:, :4] = True
    assert photometric_error(other, image, left) == 10
    with pytest.raises(ValueError, match="no pixel"):
        photometric_error(other, image, np.zeros((8, 8), bool))


def test_census_error_sees_structure_and_not_brightness():
    rng = np.random.default_rng(0)
    image = (rng.integers(0, 8, (40, 50)) * 20).astype(np.uint8)  # steps of 0 or ≥ 20, far from the margin of 4
    assert census_error(image, image) == 0
    assert census_error(image + np.uint8(50), image) == 0
    # Negated, every neighbour that is darker becomes brighter: all comparisons differ but those of equals.
    steps = [
        image[2 + dy : 38 + dy, 2 + dx : 48 + dx] != image[2:38, 2:48]
        for dy in range(-2, 3)
        for dx in range(-2, 3)
        if (dy, dx) != (0, 0)
    ]
    assert census_error(255 - image, image) == pytest.approx(np.mean(steps))
    flat = np.full((40, 50), 100, np.uint8)
    assert census_error(flat + rng.integers(-2, 3, flat.shape).astype(np.uint8), flat) == 0  # noise
    far = np.zeros((40, 50), bool)
    far[30:, :] = True
    damaged = image.copy()
    damaged[:20] = 0
    assert census_error(damaged, image, far) == 0 < census_error(damaged, image, ~far)
    rgb = np.dstack([image] * 3)
    assert census_error(255 - rgb, rgb) == census_error(255 - image, image)
    with pytest.raises(ValueError, match="5 pixels"):
        census_error(image[:4], image[:4])


def test_bootstrap_interval_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(5, 2, 4000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert bootstrap_interval(values) == (low, high)  # the same each time
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_interval_heeds_that_neighbours_resemble_each_other():
    rng = np.random.default_rng(2)
    alone = rng.normal(size=500)
    runs = np.repeat(rng.normal(size=100), 5)
    wide, narrow = (np.diff(bootstrap_interval(v))[0] / v.std() for v in (runs, alone))
    assert wide > 1.5 * narrow


def test_bootstrap_interval_of_little():
    assert bootstrap_interval([3.0]) == (3, 3)
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2, 2)
    for wrong in ([], [1.0, math.nan], [[1.0]]):
        with pytest.raises(ValueError, match="finite"):
            bootstrap_interval(wrong)
