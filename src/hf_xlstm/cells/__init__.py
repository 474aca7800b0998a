"""The two cells of xLSTM. Each folder holds the definition (`reference`) and its faster implementations side by side;
`hf_xlstm.ops` is the door to them."""

BACKENDS = ("auto", "triton", "torch", "reference")
