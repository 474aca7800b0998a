"""The vLLM plugin: `vllm serve` and `vllm.LLM` take checkpoints of this package.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its processes. Nothing
else imports this folder: `import hf_xlstm` does not need vLLM. Inside it, `vllm` is always the installed package.
"""

import logging
import re


# The first release the tests run on, and the first one nobody has looked at.
OLDEST, TOO_NEW = (0, 32), (0, 34)
# Tokens of prompt and reply for which vLLM makes room where nothing is asked for. A state has no limit; vLLM's own
# buffers take 5 bytes per token and request of it.
DEFAULT_MAX_MODEL_LEN = 131_072

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own logger, whose level and format it takes


def register() -> None:
    """Entry point: makes xLSTM known to vLLM, or says why it does not. It may be called more than once."""
    import vllm

    if not OLDEST <= version(vllm.__version__) < TOO_NEW:
        # An exception here would stop vLLM for every other model, too.
        logger.error(
            "hf_xlstm serves xLSTM with vLLM %d.%d up to, not including, %d.%d. "
            "This is vLLM %s, where xLSTM models are not available.",
            *OLDEST,
            *TOO_NEW,
            vllm.__version__,
        )
        return
    from vllm.model_executor.models import ModelRegistry

    import hf_xlstm  # noqa: F401  its configuration takes the place of Transformers' own for "xlstm"

    from .patches import apply_patches

    ModelRegistry.register_model("xLSTMForCausalLM", f"{__name__}.model:XLSTMForCausalLM")
    apply_patches(DEFAULT_MAX_MODEL_LEN)


def version(text: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) if it has none, as a build from a bare source tree."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)
