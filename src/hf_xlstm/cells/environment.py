"""The environment variables of this package. Each is read when it is used, here and nowhere else;
`python -m hf_xlstm.env` shows them."""

import os


VARIABLES = {
    "HF_XLSTM_BACKEND": "triton, torch or reference: the implementation of the cells where a model says auto",
    "HF_XLSTM_SAVE_STATES": "1 keeps chunk states of the mLSTM's Triton kernels for the backward pass",
}


def backend_override() -> str | None:
    """What stands in for `backend="auto"`, or None."""
    return os.environ.get("HF_XLSTM_BACKEND") or None


def saves_states() -> bool:
    """Whether the mLSTM's Triton training passes keep the chunk states for the backward pass instead of computing them
    again.

    For 65,536 tokens, 8 heads of 256 x 512 and bfloat16 that saves moving 1.9 GB and takes 1.1 GB of memory. A
    compiled graph keeps the value that the variable had when it was traced.
    """
    return os.environ.get("HF_XLSTM_SAVE_STATES") == "1"
