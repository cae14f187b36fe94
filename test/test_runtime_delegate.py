"""External delegates, through a real shared library, and the choice of a precision."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys

import numpy as np
import pytest
from numpy.linalg import _umath_linalg  # a shared library that is no delegate

from qpwc_core import Delegate, FlowEstimator
from qpwc_core.errors import ModelError, QpwcError
from qpwc_core.runtime import precision
from qpwc_core.runtime.models import default_model, find_model

#: A delegate that takes no operation, and writes the options it was given and that it was asked into a file.
#: The structure is TfLiteDelegate of TFLite's c/common.h, as far as the runtime reads it.
SOURCE = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct delegate { void* data; int (*prepare)(void*, struct delegate*); void* unused[3]; int64_t flags; void* opaque; };
static void note(const char* path, const char* key, const char* value) {
  FILE* file = fopen(path, "a");
  if (file) { fprintf(file, "%s=%s\n", key, value); fclose(file); }
}
static int prepare(void* context, struct delegate* self) { note(self->data, "asked", "yes"); return 0; }
void* tflite_plugin_create_delegate(char** keys, char** values, size_t count, void (*report)(const char*)) {
  const char* path = NULL;
  for (size_t i = 0; i < count; ++i) if (!strcmp(keys[i], "log")) path = values[i];
  if (!path) { report("the option log is missing"); return NULL; }
  for (size_t i = 0; i < count; ++i) note(path, keys[i], values[i]);
  struct delegate* made = calloc(1, sizeof *made);
  made->data = strdup(path);
  made->prepare = prepare;
  return made;
}
void tflite_plugin_destroy_delegate(void* made) {  /* the runtime also hands over NULL, when none was made */
  if (made) { free(((struct delegate*)made)->data); free(made); }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a delegate with")
    directory = tmp_path_factory.mktemp("delegate")
    (directory / "delegate.c").write_text(SOURCE)
    path = directory / "libdelegate.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(directory / "delegate.c")], check=True)
    return str(path)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), np.uint8)
    return images[0], images[1]


def test_a_delegate_gets_its_options_and_is_asked(tmp_path, library, pair, estimator):
    log = tmp_path / "log.txt"
    delegated = FlowEstimator.load(delegate=Delegate(library, {"log": str(log), "device": "npu0"}))
    lines = log.read_text().splitlines()
    assert f"log={log}" in lines and "device=npu0" in lines and "asked=yes" in lines
    np.testing.assert_array_equal(delegated(*pair), estimator(*pair))


def test_a_delegate_that_refuses_is_named_with_its_reason(library):
    with pytest.raises(QpwcError, match=f"{library}: cannot be used as a delegate .*the option log is missing"):
        FlowEstimator.load(delegate=Delegate(library))


@pytest.fixture
def unraisable(monkeypatch) -> list:
    """What Python says "Exception ignored in" of."""
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    return ignored


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_what_is_no_library_is_named(tmp_path, unraisable, content):
    path = tmp_path / "libnpu.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QpwcError, match=f"{path}: cannot be used as a delegate") as failure:
        FlowEstimator.load(delegate=Delegate(str(path)))
    assert "\n" not in str(failure.value)
    del failure
    gc.collect()
    assert not unraisable


def test_a_library_that_is_no_delegate_is_named(unraisable):
    path = _umath_linalg.__file__
    with pytest.raises(QpwcError, match=f"{path}: cannot be used as a delegate .*tflite_plugin_") as failure:
        FlowEstimator.load(delegate=Delegate(path))
    del failure
    gc.collect()
    assert not unraisable


def test_dot_products_decide_for_int8_without_measuring(monkeypatch):
    monkeypatch.setattr(precision, "processor_features", lambda: frozenset({"fp", "asimddp"}))
    assert precision.choose(lambda candidate: pytest.fail(f"measured {candidate}")) == "int8"


@pytest.mark.parametrize("faster", ["int8", "float32"])
def test_without_them_the_faster_precision_is_taken(monkeypatch, faster):
    monkeypatch.setattr(precision, "processor_features", lambda: frozenset({"avx2"}))
    now = [0.0]
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])

    def measure(candidate: str):
        def run() -> None:
            now[0] += 1.0 if candidate == faster else 2.0

        return run

    assert precision.choose(measure) == faster


def test_auto_loads_one_of_the_two(monkeypatch):
    chosen = FlowEstimator.load(precision="auto", threads=1)
    assert chosen.info.name == default_model()
    assert chosen.info.precision == "int8" or not precision.has_dot_products()
    # A file is what it is, whatever is asked for.
    path = find_model(default_model(), "float32")
    assert FlowEstimator.load(path, precision="auto", threads=1).info.precision == "float32"


def test_auto_of_no_model_is_an_error_of_that_name():
    with pytest.raises(ModelError, match="no bundled model 'nothing_int8'"):
        FlowEstimator.load("nothing", precision="auto")
