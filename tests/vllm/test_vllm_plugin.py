"""The plugin beside the rest: what importing it brings in, and what it says to other versions of vLLM."""

import logging
import subprocess
import sys

import pytest
import vllm
from vllm.model_executor.models import ModelRegistry

from hf_xlstm.vllm import OLDEST, TOO_NEW, register, version


def test_importing_the_package_does_not_import_vllm():
    code = "import sys, hf_xlstm; assert not {'vllm', 'hf_xlstm.vllm'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_folder_does_not_hide_vllm():
    import hf_xlstm.vllm.model as model

    assert model.VllmConfig.__module__.startswith("vllm.")
    assert vllm.__file__ != sys.modules["hf_xlstm.vllm"].__file__


def test_this_version_is_supported():
    assert OLDEST <= version(vllm.__version__) < TOO_NEW
    for _ in range(2):
        register()
    assert "xLSTMForCausalLM" in ModelRegistry.get_supported_archs()


@pytest.mark.parametrize("other", ["0.31.2", "0.34.0", "1.0", "dev"])
def test_another_version_is_told_and_left_alone(other, monkeypatch, caplog):
    monkeypatch.setattr(vllm, "__version__", other)
    monkeypatch.setattr(ModelRegistry, "register_model", lambda *args: pytest.fail("registered"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    assert f"This is vLLM {other}, where xLSTM models are not available" in caplog.text
