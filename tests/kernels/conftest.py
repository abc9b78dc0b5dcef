"""What the kernels' tests share. Triton runs in its interpreter: tests/conftest.py chose it before any import."""

import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "kernels", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile("kernels")

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no triton"))]


@pytest.fixture(autouse=True)
def _poison():
    """Whatever is allocated without being filled holds NaN (or the largest integer), so that it shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each implementation in turn."""
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
