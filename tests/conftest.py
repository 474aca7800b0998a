"""For all tests: one thread per process, kernels that are interpreted where there is no GPU, poisoned memory, and
caches of Hugging Face's libraries in a folder of their own."""

import os
import tempfile


os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests are many and small, and run side by side; before torch
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms demand it on a GPU

# A GPU's verdicts on kernels (cells/selfcheck.py) would else go to, or come from, the user's cache.
os.environ["HF_HOME"] = (home := tempfile.TemporaryDirectory(prefix="hf_xlstm-tests-")).name

import pytest
import torch


if not torch.cuda.is_available():  # before any test imports triton, which decides for good when it is imported
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory holds NaN, that of integers their largest value, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
