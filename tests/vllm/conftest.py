"""vLLM in the process of the tests, one thread, on the CPU. `make test-vllm` has an environment for them."""

import os
from importlib.util import find_spec


INSTALLED = find_spec("vllm")
if INSTALLED is None or INSTALLED.origin is None:  # without an origin it is this folder
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
