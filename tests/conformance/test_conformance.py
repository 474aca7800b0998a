"""Hugging Face's own model tests, which one run of `python -m tests.conformance` covers."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_transformers_own_tests_pass():
    pytest.importorskip("parameterized", reason="Hugging Face's tests need it")
    command = [sys.executable, "-m", "tests.conformance", "-n", "2"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
