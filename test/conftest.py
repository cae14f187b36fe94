import pytest

from qpwc_core import FlowEstimator


@pytest.fixture(scope="session")
def estimator():
    """The bundled default model, int8."""
    return FlowEstimator.load()


@pytest.fixture(scope="module")
def client():
    """A ROS node of the tests' own, for tests over DDS."""
    from ros_harness import Client  # needs ROS 2, which is not everywhere

    client = Client()
    yield client
    client.close()
