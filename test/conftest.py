import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpwc_core import FlowEstimator

ROOT = Path(__file__).resolve().parents[1]


# Tests that start processes, talk over DDS or hold time limits: they are not run beside others.
SERIAL = ("test_cli", "test_docs_", "test_packaging_", "test_replay_", "test_ros_")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith(SERIAL):
            item.add_marker("serial")


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


@pytest.fixture()
def clean_client(client):
    """Leave no topic of a test to the next."""
    yield
    for topic in [topic for topic in client.received if topic != "/diagnostics"]:
        client.ignore(topic)
        del client.received[topic]
    for topic in list(client._publishers):
        client.unpublish(topic)


@pytest.fixture(scope="session")
def example_plugin(tmp_path_factory):
    """Environment variables with which a node finds the package of test/example_plugin installed."""
    pytest.importorskip("setuptools", reason="building the example package needs setuptools")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    # A copy: building leaves files in the source folder.
    subprocess.run(["cp", "-r", str(ROOT / "test" / "example_plugin"), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source / "example_plugin")], check=True)
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(target)])}
