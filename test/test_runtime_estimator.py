import sys
import threading

import cv2
import numpy as np
import pytest
from core_scenes import constant_flow, shifted, texture

from qpwc_core import FlowEstimator, FrameInterpolator
from qpwc_core.errors import QpwcError
from qpwc_core.metrics import epe, psnr
from qpwc_core.runtime.engine import import_runtime
from qpwc_core.runtime.models import find_model, read_model_info

FAST = "qpwc_fast"


def inputs_of(model: str) -> list[tuple[int, int]]:
    """(height, width) of a bundled model's inputs."""
    return [(size.height, size.width) for size in read_model_info(find_model(model)).sizes]


INPUTS = inputs_of(FAST)


@pytest.fixture(scope="module")
def fast():
    """The bundled fast model, int8, whose flow is not refined; images are not enlarged."""
    return FlowEstimator.load(FAST, enlarge=1, refine=False)


@pytest.fixture(scope="module")
def pair():
    """Two images, 240×320, the second moved by (4, -3) pixels."""
    canvas = texture(280, 360, smoothness=3)
    return shifted(canvas, 0, 0, 240, 320), shifted(canvas, 4, -3, 240, 320)


@pytest.mark.parametrize("size", [(32, 32), (48, 640), (100, 33), (240, 320), (375, 1242), (480, 640)])
def test_any_size_gives_flow_of_that_size(estimator, size):
    flow = estimator(texture(*size, seed=1), texture(*size, seed=2))
    assert flow.shape == (*size, 2) and flow.dtype == np.float32
    assert np.isfinite(flow).all()


def test_translation_is_seen_in_pixels_of_the_image(estimator, pair):
    truth = constant_flow(240, 320, 4, -3)
    inner = (slice(20, -20), slice(20, -20))
    assert epe(estimator(*pair)[inner], truth[inner]) < 1
    # The other way round it is the other way round.
    assert epe(estimator(*pair[::-1])[inner], -truth[inner]) < 1


def test_stream_is_bit_for_bit_the_pairwise_result(estimator):
    canvas = texture(200, 240)
    frames = [shifted(canvas, 2 * i, i, 120, 160) for i in range(4)]
    streamed = list(estimator.stream(iter(frames)))
    assert len(streamed) == 3
    for i, flow in enumerate(streamed):
        np.testing.assert_array_equal(flow, estimator(frames[i], frames[i + 1]))


def test_stream_of_fewer_than_two_frames_is_empty(estimator, pair):
    assert list(estimator.stream([])) == list(estimator.stream(pair[:1])) == []


def test_bidirectional_is_both_calls(estimator, pair):
    forward, backward = estimator.bidirectional(*pair)
    np.testing.assert_array_equal(forward, estimator(*pair))
    np.testing.assert_array_equal(backward, estimator(*pair[::-1]))
    encoded = estimator.bidirectional(estimator.encode(pair[0]), pair[1])
    np.testing.assert_array_equal(encoded[0], forward)


def test_results_belong_to_the_caller(estimator, pair):
    features = estimator.encode(pair[0])
    flow = estimator.match(features, estimator.encode(pair[1]))
    kept = flow.copy()
    other = estimator(texture(240, 320, seed=5), texture(240, 320, seed=6))
    np.testing.assert_array_equal(flow, kept)
    assert not np.shares_memory(flow, other)
    np.testing.assert_array_equal(estimator.match(features, estimator.encode(pair[1])), kept)


@pytest.mark.parametrize("size", INPUTS)
def test_an_image_of_an_input_size_is_not_resized(fast, size):
    """What comes out is the network's own flow, up to the upsampling of its grid."""
    images = [texture(*size, seed=seed) for seed in (1, 2)]
    interpreter = import_runtime()[0].Interpreter(str(fast.info.path), num_threads=fast.threads)
    interpreter.allocate_tensors()
    chosen = next(one for one in fast.info.sizes if (one.height, one.width) == size)
    encode, match = map(interpreter.get_signature_runner, (chosen.encode, chosen.match))
    features = {}
    for side, image in zip(("prev_", "next_"), images):
        features.update({side + name: value.copy() for name, value in encode(image=image[None]).items()})
    flow = match(**{name: features[name] for name in match.get_input_details()})["flow"][0]
    np.testing.assert_array_equal(fast(*images), cv2.resize(flow, size[::-1]))


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("model, size", [(model, size) for model in ("qpwc", FAST) for size in inputs_of(model)])
def test_translation_is_seen_by_every_input_size(precision, model, size):
    estimator = FlowEstimator.load(model, precision=precision, enlarge=1)
    chosen = estimator.info.size_for(*size)
    assert (chosen.height, chosen.width) == size
    canvas = texture(size[0] + 40, size[1] + 40, smoothness=3)
    inner = (slice(20, -20), slice(20, -20))
    for dx, dy in ((0, 0), (4, -3), (-9, 6)):
        flow = estimator(shifted(canvas, 0, 0, *size), shifted(canvas, dx, dy, *size))
        assert epe(flow[inner], constant_flow(*size, dx, dy)[inner]) < 1


def test_every_bundled_model_has_the_common_sizes(fast, estimator):
    assert INPUTS[:4] == [(480, 640), (352, 640), (384, 512), (256, 320)]
    assert inputs_of("qpwc")[:4] == INPUTS[:4]
    assert fast.info.size_for(64, 64).encode == "encode_256x320"
    assert estimator.info.size_for(64, 64).encode == "encode_256x320"


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize(
    "image, fast, accurate",
    [
        ((480, 640), "640x480", "640x480"),
        ((360, 640), "736x416", "640x352"),
        ((384, 512), "640x480", "640x480"),
        ((240, 320), "512x384", "512x384"),
        ((120, 160), "320x256", "320x256"),
        ((480, 848), "736x416", "832x480"),
        ((540, 960), "736x416", "960x544"),
        ((720, 1280), "736x416", "1120x640"),
        ((1080, 1920), "736x416", "1120x640"),
        ((960, 1280), "640x480", "1088x832"),
        ((436, 1024), "832x352", "1024x448"),
        ((375, 1242), "960x288", "1248x384"),
        ((500, 741), "672x448", "768x512"),
        ((640, 480), "640x480", "640x480"),  # upright ones lie in it
        ((1920, 1080), "736x416", "1120x640"),
        ((741, 500), "672x448", "768x512"),
    ],
)
def test_common_images_have_an_input_that_suits_them(precision, image, fast, accurate):
    for model, expected in ((FAST, fast), ("qpwc", accurate)):
        assert str(read_model_info(find_model(model, precision)).size_for(*image)) == expected


@pytest.mark.parametrize("model", ["qpwc", FAST])
def test_an_upright_image_is_seen_as_large_as_a_wide_one(model):
    """Lying in the network's input; in images of that size nothing else is done to it."""
    canvas = texture(256 + 40, 320 + 40, smoothness=1.5)
    wide = [shifted(canvas, dx, dy, 256, 320) for dx, dy in ((0, 0), (5, -2))]
    upright = [np.ascontiguousarray(image.transpose(1, 0, 2)) for image in wide]
    plain = FlowEstimator.load(model, enlarge=1, refine=False)
    # But for the order in which the two sides are enlarged to the image's.
    np.testing.assert_allclose(plain(*upright), plain(*wide).transpose(1, 0, 2)[..., ::-1], rtol=0, atol=1e-5)
    refined = FlowEstimator.load(model, enlarge=1, refine=True)
    inner = (slice(20, -20), slice(20, -20))
    lying_error = epe(refined(*wide)[inner], constant_flow(256, 320, 5, -2)[inner])
    assert epe(refined(*upright)[inner], constant_flow(320, 256, -2, 5)[inner]) < min(lying_error + 0.02, 0.3)
    np.testing.assert_array_equal(list(plain.stream(upright))[0], plain(*upright))


def test_small_images_are_enlarged_as_wished():
    """It makes their flow more accurate, and more expensive."""
    canvas = texture(240 + 40, 320 + 40, smoothness=1.5)
    images = [shifted(canvas, dx, dy, 240, 320) for dx, dy in ((0, 0), (2, -1))]
    errors = []
    for enlarge, expected in ((1, "320x256"), (1.3, "512x384"), (2, "640x480")):
        estimator = FlowEstimator.load(FAST, enlarge=enlarge)
        assert str(estimator.encode(images[0]).size) == expected
        errors.append(epe(estimator(*images), constant_flow(240, 320, 2, -1)))
    assert errors[2] < errors[0]
    with pytest.raises(ValueError, match="enlarge must be a number from 1 up, got 0.5"):
        FlowEstimator.load(FAST, enlarge=0.5)
    with pytest.raises(ValueError, match="enlarge must be a number from 1 up, got '1.3'"):
        FlowEstimator.load(FAST, enlarge="1.3")


def test_refinement_is_what_the_model_says_and_can_be_chosen():
    """It brings a motion between pixels nearer to the truth, and without it the flow is the network's."""
    canvas = texture(280, 360, smoothness=3)
    prev = canvas[20:260, 20:340]
    next_ = cv2.warpAffine(canvas, np.float32([[1, 0, 2.4], [0, 1, -1.3]]), (360, 280))[20:260, 20:340]
    truth, inner = constant_flow(240, 320, 2.4, -1.3), (slice(20, -20), slice(20, -20))
    errors = {}
    for model in ("qpwc", FAST):
        assert FlowEstimator.load(model).refines
        for refine in (True, False):
            estimator = FlowEstimator.load(model, refine=refine)
            assert estimator.refines is refine
            errors[model, refine] = epe(estimator(prev, next_)[inner], truth[inner])
    assert errors["qpwc", True] < 0.7 * errors["qpwc", False]
    assert errors[FAST, True] < 0.7 * errors[FAST, False]


def test_features_made_without_refinement_are_refused_by_what_refines(pair):
    plain, refining = (FlowEstimator.load(FAST, refine=refine) for refine in (False, True))
    features = [plain.encode(image) for image in pair]
    with pytest.raises(ValueError, match="prev was encoded by an estimator that does not refine"):
        refining.match(*features)
    both = [refining.encode(image) for image in pair]
    np.testing.assert_array_equal(plain.match(*both), plain.match(*features))


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (101, 640)])
def test_refined_flow_of_equal_images_is_almost_none(size):
    image = texture(*size)
    assert np.abs(FlowEstimator.load(FAST, refine=True)(image, image)).mean() < 0.5
    assert np.abs(FlowEstimator.load("qpwc")(image, image)).mean() < 0.5


@pytest.mark.parametrize("size", INPUTS)
def test_flow_of_network_size_is_a_copy_too(estimator, size):
    image = texture(*size)
    kept = image.copy()
    estimator(image, image)
    np.testing.assert_array_equal(image, kept)


def test_grey_is_as_rgb_of_equal_channels(estimator, pair):
    grey = [image[..., 0] for image in pair]
    expected = estimator(*(np.dstack([image] * 3) for image in grey))
    np.testing.assert_array_equal(estimator(*grey), expected)
    np.testing.assert_array_equal(estimator(*(image[..., None] for image in grey)), expected)


def test_views_are_as_their_copies(estimator, pair):
    mirrored = [image[:, ::-1] for image in pair]
    np.testing.assert_array_equal(estimator(*mirrored), estimator(*(image.copy() for image in mirrored)))


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 64, 4), np.uint8), r"\(64, 64, 4\)"),
        (np.zeros((64, 64, 2), np.uint8), r"\(64, 64, 2\)"),
        (np.zeros((1, 64, 64, 3), np.uint8), r"\(1, 64, 64, 3\)"),
        (np.zeros(64, np.uint8), r"\(64,\)"),
        (np.zeros((31, 64, 3), np.uint8), r"\(31, 64, 3\)"),
        (np.zeros((64, 0, 3), np.uint8), r"\(64, 0, 3\)"),
        ([[0]], "list"),
        (None, "NoneType"),
    ],
)
def test_bad_images_are_named(estimator, image, message):
    good = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=f"prev.*{message}"):
        estimator(image, good)
    with pytest.raises(ValueError, match=f"next.*{message}"):
        estimator(good, image)
    with pytest.raises(ValueError, match=message):
        estimator.encode(image)


def test_different_sizes_are_named(estimator):
    images = [np.zeros((64, 64, 3), np.uint8), np.zeros((64, 96, 3), np.uint8)]
    message = r"\(64, 64\).*\(64, 96\)"
    with pytest.raises(ValueError, match=message):
        estimator(*images)
    with pytest.raises(ValueError, match=message):
        estimator.match(*map(estimator.encode, images))
    with pytest.raises(ValueError, match=message):
        list(estimator.stream(images))


def test_images_in_place_of_features_are_named(estimator, pair):
    with pytest.raises(ValueError, match="next must be what `encode` makes of an image, got ndarray"):
        estimator.match(estimator.encode(pair[0]), pair[1])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"refine": "never"}, "refine must be True, False or None, got 'never'"),
        ({"delegate": "libmine.so"}, "delegate must be a Delegate or None, got 'libmine.so'"),
    ],
)
def test_options_that_do_not_do_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        FlowEstimator.load(**option)


def test_features_of_another_model_are_refused(estimator, pair):
    other = FlowEstimator.load(precision="float32")
    with pytest.raises(ValueError, match="float32"):
        estimator.match(other.encode(pair[0]), estimator.encode(pair[1]))


def test_features_of_another_enlargement_are_refused_in_words_that_say_so(pair):
    plain, larger = (FlowEstimator.load(FAST, enlarge=enlarge) for enlarge in (1, 1.3))
    with pytest.raises(ValueError, match="prev was encoded with enlarge=1, here it is 1.3"):
        larger.match(plain.encode(pair[0]), larger.encode(pair[1]))


def test_images_too_long_to_warp_are_named(estimator):
    """What is refined is half as large."""
    long = np.zeros((32, 65_534, 3), np.uint8)
    with pytest.raises(ValueError, match="32767x16 is too large to refine, at most 32766"):
        estimator(long, long)
    image = long[:, :32_767]
    with pytest.raises(ValueError, match=r"at most 32766 pixels a side can be warped, got \(32, 32767\)"):
        FrameInterpolator(estimator)(image, image)


@pytest.mark.parametrize("dot_products", [True, False])
@pytest.mark.parametrize("available", ["int8", "float32"])
def test_auto_takes_the_precision_that_a_model_has(tmp_path, monkeypatch, dot_products, available):
    directory = tmp_path / "share" / "qpwc_ros" / "models"
    directory.mkdir(parents=True)
    (directory / f"mine_{available}.tflite").symlink_to(find_model(FAST, available))
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    monkeypatch.setattr("qpwc_core.runtime.precision.has_dot_products", lambda: dot_products)
    assert FlowEstimator.load("mine", precision="auto").info.precision == available
    with pytest.raises(QpwcError, match="no bundled model 'none_int8'"):
        FlowEstimator.load("none", precision="auto")


def test_int8_and_float_agree(estimator, pair):
    assert epe(estimator(*pair), FlowEstimator.load(precision="float32")(*pair)) < 0.5


def test_threads_and_kernels_do_not_change_the_flow(pair):
    flow = FlowEstimator.load(precision="float32", threads=1)(*pair)
    assert epe(FlowEstimator.load(precision="float32", threads=4)(*pair), flow) < 1e-3
    assert epe(FlowEstimator.load(precision="float32", threads=1, xnnpack=False)(*pair), flow) < 1e-2


@pytest.mark.parametrize("threads", [0, 257, 2.5, "2"])
def test_a_number_of_threads_that_does_not_do_is_named(threads):
    with pytest.raises(ValueError, match=f"threads.*{threads}"):
        FlowEstimator.load(threads=threads)
    assert FlowEstimator.load(threads=np.int64(1)).threads == 1


def test_one_estimator_serves_several_threads(estimator, pair):
    expected = estimator(*pair)
    results = []
    threads = [threading.Thread(target=lambda: results.append(estimator(*pair))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(np.array_equal(flow, expected) for flow in results)


def test_threads_with_images_of_different_sizes_do_not_disturb_each_other(estimator):
    """Each alternates between two input sizes, out of step with the other."""
    pairs = [
        (texture(*size, seed=2 * seed), texture(*size, seed=2 * seed + 1))
        for seed, size in enumerate([(480, 640), (240, 320), (360, 640), (384, 512)])
    ]
    expected = [estimator(*pair) for pair in pairs]
    results = []

    def work(order):
        # Both images are encoded before either is matched, so the other thread's come between them.
        for _ in range(5):
            encoded = [(index, [estimator.encode(image) for image in pairs[index]]) for index in order]
            results.extend((index, estimator.match(*features)) for index, features in encoded)

    threads = [threading.Thread(target=work, args=(order,)) for order in ((0, 1), (2, 3, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 25
    for index, flow in results:
        np.testing.assert_array_equal(flow, expected[index])


def test_features_of_different_input_sizes_are_refused(estimator):
    small, large = (estimator.encode(texture(*size)) for size in ((240, 320), (480, 640)))
    with pytest.raises(ValueError, match=r"\(240, 320\).*\(480, 640\)"):
        estimator.match(small, large)


@pytest.mark.parametrize("threads", [0, -1, 257, 99_999_999_999])
def test_bad_threads_are_named(threads):
    with pytest.raises(ValueError, match=str(threads)):
        FlowEstimator.load(threads=threads)


def test_litert_is_preferred_and_its_absence_is_one_line(monkeypatch, estimator):
    assert estimator.runtime.startswith("ai-edge-litert ")
    for module in ("ai_edge_litert", "tflite_runtime", "tensorflow.lite.python"):
        monkeypatch.setitem(sys.modules, f"{module}.interpreter", None)
    with pytest.raises(QpwcError, match="pip install ai-edge-litert"):
        FlowEstimator.load()


def test_interpolated_frame_is_between(estimator, pair):
    interpolate = FrameInterpolator(estimator)
    canvas = texture(280, 360, smoothness=3)
    prev, next, truth = (shifted(canvas, 2 * i, -4 * i, 240, 320) for i in (0, 2, 1))
    middle = interpolate(prev, next)
    assert middle.shape == (240, 320, 3) and middle.dtype == np.uint8
    inner = (slice(20, -20), slice(20, -20))
    average = ((prev.astype(int) + next) // 2).astype(np.uint8)
    assert psnr(middle[inner], truth[inner]) > psnr(average[inner], truth[inner]) + 5
    near = interpolate(prev, next, t=0.05)
    assert psnr(near, prev) > psnr(near, next)


def test_interpolating_equal_frames_gives_that_frame(estimator, pair):
    assert psnr(FrameInterpolator(estimator)(pair[0], pair[0]), pair[0]) > 40


def test_interpolation_of_grey_is_rgb(estimator, pair):
    grey = pair[0][..., :1]
    assert FrameInterpolator(estimator)(grey, grey).shape == (240, 320, 3)


@pytest.mark.parametrize("t", [0, 1, -1, 2, float("nan"), float("inf"), "0.5", None])
def test_interpolation_refuses_times_outside(estimator, pair, t):
    with pytest.raises(ValueError, match="t must"):
        FrameInterpolator(estimator)(*pair, t=t)
