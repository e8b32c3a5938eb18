"""The device of the tests that are marked gpu."""

import os

import pytest
import torch

from train.processes.group import ProcessGroup


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU; with GPU_TESTS=tiny the CPU, on which gpu_check.py --tiny shows that the tests themselves are sound."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if os.environ.get("GPU_TESTS") != "tiny":
        pytest.skip("no GPU; `make gpu-check` runs these tests where there is one")
    return torch.device("cpu")


@pytest.fixture
def alone(device: torch.device) -> ProcessGroup:
    return ProcessGroup(0, 1, device)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """A GPU, for what no CPU does."""
    if device.type != "cuda":
        pytest.skip("a CPU does not do this, or only after a minute of C++ compilation")
    return device
