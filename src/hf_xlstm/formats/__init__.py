"""Checkpoints of other implementations: names and shapes of their tensors, and fields of their configurations."""
