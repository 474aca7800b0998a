"""One thread per test process: the tests are many and small, and run side by side (before torch is imported)."""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
