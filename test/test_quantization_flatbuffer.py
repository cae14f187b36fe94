"""Changes made in finished files: what they compute stays what it was."""

import numpy as np
import pytest

pytest.importorskip("tensorflow")

from core_scenes import shifted, texture
from tensorflow.lite.tools import flatbuffer_utils

from qpwc_core.quantization import flatbuffer
from qpwc_core.runtime.engine import Engine
from qpwc_core.runtime.models import find_model, read_model_info


@pytest.fixture(scope="module")
def path():
    return find_model("qpwc_fast")


def encoded_pair(path):
    """The smallest input, an engine, and what encode gives for two pictures, by the names of match's inputs."""
    size = min(read_model_info(path).sizes, key=lambda size: size.height * size.width)
    engine = Engine(path, threads=1)
    canvas = texture(size.height + 8, size.width + 8)
    features = {}
    for side, dx in (("prev_", 0), ("next_", 3)):
        image = shifted(canvas, dx, 0, size.height, size.width)
        encoded = engine.run(size.encode, {"image": image[np.newaxis]})
        features.update({side + name: array for name, array in encoded.items()})
    return size, engine, {name: features[name] for name in engine.inputs(size.match)}


def test_an_output_in_float_is_what_its_numbers_stand_for(path, tmp_path):
    size, engine, _ = encoded_pair(path)
    name, spec = next((name, spec) for name, spec in engine.outputs(size.encode).items() if spec.dtype == np.int8)
    model = flatbuffer_utils.read_model(str(path))
    flatbuffer.float_output(model, name)
    flatbuffer.write(model, tmp_path / "changed.tflite")
    changed = Engine(tmp_path / "changed.tflite", threads=1)
    image = texture(size.height, size.width)[np.newaxis]
    before, after = (one.run(size.encode, {"image": image}) for one in (engine, changed))
    assert after[name].dtype == np.float32
    np.testing.assert_allclose(after[name], (before[name].astype(np.float32) - spec.zero_point) * spec.scale, rtol=1e-6)
    for other in before.keys() - {name}:
        np.testing.assert_array_equal(after[other], before[other])


def test_inputs_of_other_ranges_are_rounded_anew(path, tmp_path):
    """match is made to take coarser numbers than encode gives: converted in the file or by hand, the flow is the same."""
    size, engine, features = encoded_pair(path)
    model = flatbuffer_utils.read_model(str(path))
    signature = next(one for one in model.signatureDefs if flatbuffer.text(one.signatureKey) == size.match)
    by_hand = dict(features)
    for entry in signature.inputs:
        name = flatbuffer.text(entry.name)
        # Not what is matched: it is padded first, which has one scale for what comes in and goes out.
        if "match" in name:
            continue
        quantization = model.subgraphs[signature.subgraphIndex].tensors[entry.tensorIndex].quantization
        quantization.scale = [2 * scale for scale in quantization.scale]
        zero = engine.inputs(size.match)[name].zero_point
        by_hand[name] = np.rint((features[name].astype(float) - zero) / 2 + zero).astype(np.int8)
    assert any((by_hand[name] != features[name]).any() for name in features)
    flatbuffer.write(model, tmp_path / "coarser.tflite")
    expected = Engine(tmp_path / "coarser.tflite", threads=1).run(size.match, by_hand)["flow"]
    flatbuffer.requantize_inputs(model, size.encode, size.match)
    flatbuffer.write(model, tmp_path / "mended.tflite")
    mended = Engine(tmp_path / "mended.tflite", threads=1)
    assert mended.inputs(size.match) == engine.inputs(size.match)
    # Numbers half-way between two may go either way.
    assert np.abs(mended.run(size.match, features)["flow"] - expected).mean() < 0.1
