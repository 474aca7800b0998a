"""`python -m hf_xlstm.env`: versions, devices, and which implementation of the cells would run, and why."""

import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__
from .ops import BACKENDS, backend_and_reason


PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "triton", "peft", "trl")


def report() -> str:
    """The text that goes into a bug report."""
    lines = [f"hf_xlstm {__version__}", f"python {sys.version.split()[0]}, {platform.platform()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    lines.append(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        devices.append(f"cuda:{index}")
    override = os.environ.get("HF_XLSTM_BACKEND")
    lines.append(f"HF_XLSTM_BACKEND: {override or 'not set'} (one of {', '.join(BACKENDS)})")
    for device in devices:
        for op in ("mlstm", "slstm"):
            x = torch.empty(1, 1, 4, 64, dtype=torch.bfloat16, device=device)
            backend, reason = backend_and_reason(op, "auto", x, x)
            lines.append(f"{op} on {device}: {backend} ({reason})")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
