import json
import os
import subprocess
import sys

import numpy as np
import pytest

from qpwc_core.errors import ModelError
from qpwc_core.runtime.estimator import FlowEstimator
from qpwc_core.runtime.models import (
    default_model,
    find_model,
    list_models,
    model_directories,
    read_model_info,
)
from qpwc_core.runtime.metadata import read_metadata
from qpwc_core.runtime.refinement import DEFAULT_ITERATIONS


@pytest.fixture(scope="module")
def bundled():
    """Content of a bundled model."""
    return find_model(default_model()).read_bytes()


def test_both_precisions_of_the_default_model_are_bundled():
    names = {(info.name, info.precision) for info in list_models()}
    assert {(default_model(), "int8"), (default_model(), "float32")} <= names


def test_every_bundled_model_is_what_its_name_says_and_loads():
    for info in list_models():
        assert info.path.name == f"{info.name}_{info.precision}.tflite"
        assert find_model(info.name, info.precision) == info.path
        assert FlowEstimator.load(info.name, precision=info.precision, threads=1).info == info


def test_a_path_is_taken_as_it_is(tmp_path, bundled):
    path = tmp_path / "mine.tflite"
    path.write_bytes(bundled)
    assert find_model(path, "float32") == path
    assert read_model_info(path).precision == "int8"


def test_a_path_may_be_below_home(tmp_path, monkeypatch, bundled):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.tflite").write_bytes(bundled)
    assert find_model("~/mine.tflite") == tmp_path / "mine.tflite"


def test_models_are_found_beside_other_packages(tmp_path, monkeypatch, bundled):
    directory = tmp_path / "share" / "qpwc_ros" / "models"
    directory.mkdir(parents=True)
    (directory / "other_int8.tflite").write_bytes(bundled)
    monkeypatch.setenv("AMENT_PREFIX_PATH", os.pathsep.join(["", str(tmp_path / "none"), str(tmp_path)]))
    assert model_directories()[-1] == directory
    assert find_model("other") == directory / "other_int8.tflite"


def test_missing_models_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"none\.tflite: no such"):
        find_model(tmp_path / "none.tflite")
    with pytest.raises(ModelError, match="nothing_int8.*bundled: .*_int8"):
        find_model("nothing")
    with pytest.raises(ValueError, match="int4"):
        find_model("qpwc_fast", "int4")
    with pytest.raises(ModelError, match="none.tflite"):
        read_model_info(tmp_path / "none.tflite")


def refusal(path, content):
    """The message with which a file of this content is refused."""
    path.write_bytes(content)
    with pytest.raises(ModelError) as error:
        FlowEstimator.load(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99999])
def test_truncated_models_are_refused(tmp_path, bundled, part):
    refusal(tmp_path / "a.tflite", bundled[: int(len(bundled) * part)])


@pytest.mark.parametrize("model, sixteenths", [("qpwc", 4), ("qpwc_fast", 4), ("qpwc_fast", 7)])
def test_a_model_whose_weights_are_damaged_is_refused_when_it_runs(tmp_path, model, sixteenths):
    """Loading does not show it; the network then looks for things where nothing is, or gives no numbers."""
    content = bytearray(find_model(model, "float32").read_bytes())
    start = sixteenths * len(content) // 64 * 4
    content[start : start + 4096] = 4096 * b"\xff"
    path = tmp_path / "a.tflite"
    path.write_bytes(content)
    estimator = FlowEstimator.load(path)
    with pytest.raises(ModelError, match=f"{path}: cannot be run") as error:
        estimator(*np.zeros((2, 64, 64, 3), np.uint8))
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    assert "not a .tflite" in refusal(tmp_path / "a.tflite", b"hello, this is no model at all")
    assert "damaged" in refusal(tmp_path / "a.tflite", b"\xff\xff\xff\x7fTFL3" + bytes(40))
    assert "damaged" in refusal(tmp_path / "a.tflite", b"\x08\0\0\0TFL3\0\0\0\x80" + bytes(40))


def test_a_model_without_our_metadata_is_refused(tmp_path, bundled):
    name = b"\x04\0\0\0qpwc\0"
    assert bundled.count(name) == 1
    message = refusal(tmp_path / "a.tflite", bundled.replace(name, b"\x04\0\0\0else\0"))
    assert "no metadata entry 'qpwc'" in message


def with_metadata(path, bundled, change):
    """Writes a bundled model whose metadata `change`, a function of the dictionary, has made other, not longer."""
    path.write_bytes(bundled)
    metadata = read_metadata(path)
    before = json.dumps(metadata, sort_keys=True).encode()
    assert bundled.count(before) == 1
    after = json.dumps(change(metadata), sort_keys=True).encode()
    assert len(after) <= len(before)
    path.write_bytes(bundled.replace(before, after.ljust(len(before))))
    return path


def of_format_1(metadata):
    """As it was when a file had one size."""
    sizes = metadata.pop("sizes")
    return {**metadata, **sizes[0], "format": 1}


def test_a_file_of_the_format_before_loads_with_its_one_size(tmp_path, bundled, estimator):
    path = with_metadata(tmp_path / "old.tflite", bundled, of_format_1)
    old = FlowEstimator.load(path)
    assert old.info.sizes == estimator.info.sizes[:1]
    assert old.info.figures == estimator.info.figures
    images = np.random.default_rng(0).integers(0, 256, (2, 480, 640, 3), np.uint8)
    np.testing.assert_array_equal(old(*images), estimator(*images))
    small = images[:, :240, :320]
    assert old(*small).shape == (240, 320, 2)


@pytest.mark.parametrize("key", ["height", "width", "encode", "match"])
def test_a_file_of_the_format_before_that_lacks_a_part_is_refused(tmp_path, bundled, key):
    def without(metadata):
        metadata = of_format_1(metadata)
        del metadata[key]
        return metadata

    path = with_metadata(tmp_path / "old.tflite", bundled, without)
    with pytest.raises(ModelError, match=f"lacks '{key}'"):
        FlowEstimator.load(path)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ([], "no sizes"),
        ({}, "'sizes' = {}, expected list"),
        ([480, 640], "480 where an object should be"),
        ([{"height": "480", "width": 640, "encode": "encode", "match": "match"}], "'height' = '480', expected int"),
        ([{"height": 479, "width": 640, "encode": "encode", "match": "match"}], "640x479 pixels, which is no whole"),
        ([{"height": 480, "width": 640, "encode": "encode", "match": "other"}], "lacks the signature 'other'"),
        ([{"height": 480, "width": 640, "encode": "encode_256x320", "match": "match"}], "tensor 'image'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, bundled, sizes, message):
    path = with_metadata(tmp_path / "a.tflite", bundled, lambda metadata: {**metadata, "sizes": sizes})
    with pytest.raises(ModelError, match=message):
        FlowEstimator.load(path)


@pytest.mark.parametrize("enlarge", [0.5, float("inf"), float("nan")])
def test_an_enlargement_that_cannot_be_is_refused(tmp_path, bundled, enlarge):
    path = with_metadata(tmp_path / "a.tflite", bundled, lambda metadata: {**metadata, "figures": {}, "enlarge": enlarge})
    with pytest.raises(ModelError, match="'enlarge' = .*, expected a number from 1 up"):
        FlowEstimator.load(path)


def test_a_file_that_says_nothing_of_enlarging_and_refining_does_neither(tmp_path, bundled):
    def before(metadata):
        return {key: value for key, value in metadata.items() if key not in ("enlarge", "refine", "refine_iterations")}

    info = FlowEstimator.load(with_metadata(tmp_path / "old.tflite", bundled, before)).info
    assert info.enlarge == 1 and info.refine is False and info.refine_iterations == DEFAULT_ITERATIONS


@pytest.mark.parametrize("iterations", [[3], [3, 3, 3], [-1, 3], [1.5, 3], ["3", 3]])
def test_iterations_that_cannot_be_are_refused(tmp_path, bundled, iterations):
    path = with_metadata(tmp_path / "a.tflite", bundled, lambda old: {**old, "figures": {}, "refine_iterations": iterations})
    with pytest.raises(ModelError, match="'refine_iterations' = .*, expected two whole numbers from 0 up"):
        FlowEstimator.load(path)


def test_a_file_of_a_later_format_is_refused(tmp_path, bundled):
    path = with_metadata(tmp_path / "a.tflite", bundled, lambda metadata: {**metadata, "format": 3})
    with pytest.raises(ModelError, match="metadata format 3, this program reads 1 to 2"):
        FlowEstimator.load(path)


@pytest.mark.parametrize(
    "key", ["format", "name", "precision", "sizes", "height", "width", "flow_stride", "encode", "match"]
)
def test_metadata_that_lacks_a_part_is_refused(tmp_path, bundled, key):
    at = bundled.index(f'"{key}":'.encode())
    changed = bundled[:at] + b'"_' + bundled[at + 2 :]  # the key's first letter is another
    message = refusal(tmp_path / "a.tflite", changed)
    assert key in message


def test_metadata_that_is_no_json_is_refused(tmp_path, bundled):
    assert "JSON" in refusal(tmp_path / "a.tflite", bundled.replace(b'"format":', b'"format";'))


@pytest.mark.parametrize("index", range(9))
def test_metadata_that_contradicts_the_network_is_refused(tmp_path, bundled, index):
    def change(metadata):
        metadata["sizes"][index]["height"] -= metadata["flow_stride"]
        return metadata

    path = with_metadata(tmp_path / "a.tflite", bundled, change)
    assert "tensor 'image'" in refusal(path, path.read_bytes())


def test_importing_the_package_is_light():
    code = "import sys, qpwc_core; print({'numpy', 'cv2', 'tensorflow', 'ai_edge_litert'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_running_a_model_does_not_import_tensorflow_or_the_training_side():
    code = (
        "import sys, numpy as np; from qpwc_core import FlowEstimator, FrameInterpolator;"
        "i = FrameInterpolator.load(); a = np.zeros((64, 64, 3), np.uint8); i(a, a);"
        "print([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'tf_keras', 'rclpy', 'qpwc_ros')"
        " or m.startswith(('qpwc_core.model.', 'qpwc_core.training', 'qpwc_core.data'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
