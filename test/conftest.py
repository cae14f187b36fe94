import pytest

from qpwc_core import FlowEstimator


@pytest.fixture(scope="session")
def estimator():
    """The bundled default model, int8."""
    return FlowEstimator.load()
