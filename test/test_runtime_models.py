import os
import subprocess
import sys

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


def test_other_files_are_refused(tmp_path):
    assert "not a .tflite" in refusal(tmp_path / "a.tflite", b"hello, this is no model at all")
    assert "damaged" in refusal(tmp_path / "a.tflite", b"\xff\xff\xff\x7fTFL3" + bytes(40))
    assert "damaged" in refusal(tmp_path / "a.tflite", b"\x08\0\0\0TFL3\0\0\0\x80" + bytes(40))


def test_a_model_without_our_metadata_is_refused(tmp_path, bundled):
    name = b"\x04\0\0\0qpwc\0"
    assert bundled.count(name) == 1
    message = refusal(tmp_path / "a.tflite", bundled.replace(name, b"\x04\0\0\0else\0"))
    assert "no metadata entry 'qpwc'" in message


@pytest.mark.parametrize(
    "key", ["format", "name", "precision", "height", "width", "flow_stride", "encode", "match"]
)
def test_metadata_that_lacks_a_part_is_refused(tmp_path, bundled, key):
    at = bundled.index(f'"{key}":'.encode())
    changed = bundled[:at] + b'"_' + bundled[at + 2 :]  # the key's first letter is another
    message = refusal(tmp_path / "a.tflite", changed)
    assert key in message


def test_metadata_that_is_no_json_is_refused(tmp_path, bundled):
    assert "JSON" in refusal(tmp_path / "a.tflite", bundled.replace(b'"format":', b'"format";'))


def test_metadata_that_contradicts_the_network_is_refused(tmp_path, bundled):
    info = list_models()[0]
    height = str(info.height).encode()
    at = bundled.index(b'"height":')
    other = str(info.height - info.flow_stride).encode().rjust(len(height))
    changed = bundled[:at] + bundled[at:].replace(height, other, 1)
    assert "tensor 'image'" in refusal(tmp_path / "a.tflite", changed)


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
