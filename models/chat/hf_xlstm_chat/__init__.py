"""A small xLSTM that chats.

`path` is its directory, for AutoModelForCausalLM and AutoTokenizer. `python -m hf_xlstm_chat` talks to it.
"""

from pathlib import Path

import hf_xlstm  # noqa: F401  registers xLSTM with the Auto classes


path = str(Path(__file__).parent / "model")
