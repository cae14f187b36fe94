"""The bundled models give the same flow everywhere: on each processor, with any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
from golden import MODELS, flow_path, golden_flow


def distances(golden: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """How far each flow vector is from the golden one, in pixels."""
    assert flow.shape == golden.shape
    return np.linalg.norm(flow - golden, axis=-1)


@pytest.fixture
def golden(name, precision) -> np.ndarray:
    return np.load(flow_path(name, precision), allow_pickle=False)


@pytest.mark.parametrize("name, precision", MODELS)
def test_the_golden_pair_has_something_to_get_wrong(golden):
    assert np.linalg.norm(golden, axis=-1).mean() > 10


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name, precision", MODELS)
def test_the_golden_flow(golden, name, precision, threads):
    """Float kernels differ in the last digit from processor to processor; hardly ever does that round otherwise."""
    distance = distances(golden, golden_flow(name, precision, threads=threads))
    assert distance.mean() <= 0.02
    assert np.percentile(distance, 99.9) <= 0.5


@pytest.mark.parametrize("name, precision", MODELS)
def test_without_the_fast_kernels_the_flow_is_about_the_same(golden, name, precision):
    """Those of float compute the same; those of int8 round each sum in another way."""
    distance = distances(golden, golden_flow(name, precision, xnnpack=False))
    length = np.linalg.norm(golden, axis=-1).mean()
    assert distance.mean() <= (0.1 * length if precision == "int8" else 0.001)
