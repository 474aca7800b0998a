"""The two cells of xLSTM. Each folder holds the definition (`reference`) and its faster implementations side by side;
`hf_xlstm.ops` is the door to them."""

import re


BACKENDS = ("auto", "triton", "torch", "reference")

# Where the operators are registered that run without Triton: "hf_xlstm" here. A copy of this file beside a checkpoint
# has a namespace of its own, named after the directory, which may have characters that a namespace cannot have.
NAMESPACE = re.sub(r"[^0-9A-Za-z_]", lambda x: f"_{ord(x[0]):x}_", __package__.removesuffix(".cells"))
