"""One thread per test process: the tests are many and small, and run side by side (before torch is imported)."""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


if not torch.cuda.is_available():  # before any test imports triton, which decides for good when it is imported
    os.environ["TRITON_INTERPRET"] = "1"
