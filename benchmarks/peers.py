"""Models of about one size with random weights: hf_xlstm, and those of Transformers it is measured beside."""

import torch
import transformers
from packaging.version import Version
from transformers import Cache, PreTrainedModel
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.utils import ModelOutput, is_xlstm_available

import hf_xlstm


HF_XLSTM, IN_TREE = "hf_xlstm", "in_tree"
PEERS = {
    HF_XLSTM: "hf_xlstm",
    IN_TREE: "xLSTM of Transformers",
    "llama": "Llama",
    "mamba2": "Mamba-2",
    "deltanet": "gated DeltaNet",
}
# The in-tree xLSTM runs plain PyTorch by itself, and on a GPU these kernels where the `xlstm` package is installed.
IN_TREE_KERNELS = {
    "chunkwise_kernel": "chunkwise--triton_xl_chunk",
    "sequence_kernel": "native_sequence__triton",
    "step_kernel": "triton",
}
ONE_CACHE_NAME = Version(transformers.__version__) >= Version("5.24.0.dev0")

transformers.logging.set_verbosity_error()  # which optional packages peers would like is not the question here


def build(
    peer: str,
    *,
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_heads: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    **fields,
) -> PreTrainedModel:
    """A random model in eval mode. The sizes are those of the xLSTM, and the others have about as many parameters.
    `fields` go to the configuration of the peer."""
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}
    sizes |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # generation never ends early
    xlstm = hf_xlstm.xLSTMConfig(**sizes, num_heads=num_heads)
    head_dim = 64 if hidden_size <= 1024 else 128  # of attention
    attention = {
        "intermediate_size": xlstm.ffn_dim,
        "num_attention_heads": hidden_size // head_dim,
        "num_key_value_heads": hidden_size // head_dim,
        "head_dim": head_dim,
        "attn_implementation": "sdpa",
    }
    if peer == HF_XLSTM:
        config, model_class = hf_xlstm.xLSTMConfig, hf_xlstm.xLSTMForCausalLM
        fields = {"num_heads": num_heads} | fields
    elif peer == IN_TREE:
        config, model_class = transformers.xLSTMConfig, transformers.xLSTMForCausalLM
        kernels = IN_TREE_KERNELS if torch.device(device).type == "cuda" and is_xlstm_available() else {}
        fields = {"num_heads": num_heads} | kernels | fields
    elif peer == "llama":
        config, model_class = transformers.LlamaConfig, transformers.LlamaForCausalLM
        fields = attention | {"max_position_embeddings": 2**17} | fields
    elif peer == "mamba2":
        config, model_class = transformers.Mamba2Config, transformers.Mamba2ForCausalLM
        sizes["num_hidden_layers"] *= 2  # a block has no feed-forward layer
        fields = {"num_heads": hidden_size // 32, "head_dim": 64, "n_groups": 1} | fields
    elif peer == "deltanet":
        # Qwen3.5 with the heads of the xLSTM. Its cache needs one layer of attention, which is the last one.
        config, model_class = Qwen3_5TextConfig, Qwen3_5ForCausalLM
        linear = {
            "layer_types": ["linear_attention"] * (num_hidden_layers - 1) + ["full_attention"],
            "linear_num_key_heads": num_heads,
            "linear_num_value_heads": num_heads,
            "linear_key_head_dim": xlstm.qk_head_dim,
            "linear_value_head_dim": xlstm.v_head_dim,
        }
        fields = attention | linear | fields
    else:
        raise ValueError(f"Unknown peer {peer!r}; there are {', '.join(PEERS)}.")
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class(config(**sizes, **fields))
    if peer in (HF_XLSTM, IN_TREE):
        open_gates(model)
    return model.to(dtype).eval()


@torch.no_grad()
def open_gates(model: PreTrainedModel) -> None:
    """An mLSTM as initialised stores next to nothing: here the gates depend on the input and let it in."""
    for name, parameter in model.named_parameters():
        if name.endswith("igate_preact.bias"):
            parameter.zero_()
        elif parameter.ndim == 2:
            parameter.normal_(std=0.02)


def cache_argument(peer: str) -> str:
    """The name under which a peer's `forward` takes its cache. Transformers 5.24 gave all of them one."""
    if peer == HF_XLSTM or ONE_CACHE_NAME:
        return "cache"
    return "cache_params" if peer in (IN_TREE, "mamba2") else "past_key_values"


def cache_of(generated: ModelOutput) -> Cache:
    """The cache that `generate(return_dict_in_generate=True)` hands back."""
    return generated.cache if ONE_CACHE_NAME else generated.past_key_values
