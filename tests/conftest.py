"""What all tests share: the device they run on, the markers, and the end of the rank pools."""
import functools
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("PYEP_DEVICE", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pyep itself, where it is not installed

import hypothesis  # noqa: E402
import ranks  # noqa: E402

# For all tests: that the machine is busy makes no example wrong.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


@functools.cache
def gpus():
    """The number of GPUs."""
    from cuda.bindings import driver

    driver.cuInit(0)
    error, count = driver.cuDeviceGetCount()
    return count if error == driver.CUresult.CUDA_SUCCESS else 0


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a GPU; skipped unless PYEP_DEVICE=cuda")
    config.addinivalue_line("markers", "multi_gpu: runs on two GPUs or more; skipped unless PYEP_DEVICE=cuda")


def pytest_runtest_setup(item):
    """Skip what needs GPUs, unless the tests are meant to run on them: then a GPU that is missing is a failure."""
    needs_two = item.get_closest_marker("multi_gpu")
    if (needs_two or item.get_closest_marker("gpu")) and os.environ["PYEP_DEVICE"] != "cuda":
        pytest.skip("needs PYEP_DEVICE=cuda")
    if needs_two and gpus() < 2:
        pytest.skip(f"needs 2 GPUs, there are {gpus()}")


def pytest_sessionfinish():
    ranks.close_pools()


@pytest.fixture(scope="session")
def device():
    """The engine that the tests use: "cpu" or "cuda"."""
    return os.environ["PYEP_DEVICE"]
