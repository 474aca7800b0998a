"""Benchmarks of hf_xlstm, run as scripts: `python benchmarks/cpu/generation.py`. README.md here describes them."""
