"""The model of the xLSTM paper, token by token in plain PyTorch, on parameters as the `xlstm` package stores them."""

import torch
import torch.nn.functional as F


def parameter_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Weights of an `xLSTMLMModel` with the "vanilla" sLSTM. `config` has plain numbers: inner and ffn are widths."""
    D, V, heads, inner = config["width"], config["vocab"], config["heads"], config["inner"]
    shapes = {"token_embedding.weight": (V, D), "lm_head.weight": (V, D)}
    if config["post_norm"]:
        shapes["xlstm_block_stack.post_blocks_norm.weight"] = (D,)
    for index, kind in enumerate(config["blocks"]):
        block = f"xlstm_block_stack.blocks.{index}."
        layer = f"{block}xlstm."
        shapes[f"{block}xlstm_norm.weight"] = (D,)
        if kind == "m":
            projections = {"proj_up": (2 * inner, D), "proj_down": (D, inner)}
            projections |= {name: (inner // config["block"], *[config["block"]] * 2) for name in QKV}
            shapes |= {f"{layer}{name}.weight": shape for name, shape in projections.items()}
            if config["bias"]:
                biases = dict.fromkeys(QKV, inner) | {"proj_up": 2 * inner, "proj_down": D}
                shapes |= {f"{layer}{name}.bias": (size,) for name, size in biases.items()}
            shapes |= {f"{layer}conv1d.conv.weight": (inner, 1, config["taps"]), f"{layer}conv1d.conv.bias": (inner,)}
            for gate in ("igate", "fgate"):
                shapes |= {f"{layer}mlstm_cell.{gate}.weight": (heads, 3 * inner)}
                shapes |= {f"{layer}mlstm_cell.{gate}.bias": (heads,)}
            shapes |= {f"{layer}mlstm_cell.outnorm.weight": (inner,), f"{layer}learnable_skip": (inner,)}
        else:
            N, F_ = config["slstm_heads"], config["ffn"]
            d = D // N
            if config["slstm_taps"]:
                shapes |= {f"{layer}conv1d.conv.weight": (D, 1, config["slstm_taps"])}
                shapes |= {f"{layer}conv1d.conv.bias": (D,)}
            shapes |= {f"{layer}{gate}.weight": (N, d, d) for gate in ("igate", "fgate", "zgate", "ogate")}
            shapes |= {f"{layer}slstm_cell._recurrent_kernel_": (N, 4 * d, d), f"{layer}slstm_cell._bias_": (4 * D,)}
            if config["group_norm"]:
                shapes[f"{layer}group_norm.weight"] = (D,)
            shapes |= {f"{block}ffn_norm.weight": (D,)}
            shapes |= {f"{block}ffn.proj_up.weight": (2 * F_, D), f"{block}ffn.proj_down.weight": (D, F_)}
    return shapes


QKV = ("q_proj", "k_proj", "v_proj")


def logits_and_states(p: dict[str, torch.Tensor], config: dict, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
    """ids (B, T); logits (B, T, vocab), and per block the cell's state after the last token with the true c and n,
    free of their stabilizer, and the last inputs of the convolution `conv` (B, taps - 1, width)."""
    states = [{} for _ in config["blocks"]]
    logits = []
    for token in ids.unbind(1):
        x = p["token_embedding.weight"][token]
        for index, kind in enumerate(config["blocks"]):
            block = f"xlstm_block_stack.blocks.{index}."
            weights = {name.removeprefix(block): w for name, w in p.items() if name.startswith(block)}
            y = layer_norm(x, weights["xlstm_norm.weight"])
            if kind == "m":
                x = x + mlstm_layer(y, weights, config, states[index])
            else:
                x = x + slstm_layer(y, weights, config, states[index])
                up, gate = (weights["ffn.proj_up.weight"] @ layer_norm(x, weights["ffn_norm.weight"]).mT).mT.chunk(
                    2, -1
                )
                x = x + (F.gelu(up) * gate) @ weights["ffn.proj_down.weight"].mT
        if config["post_norm"]:
            x = layer_norm(x, p["xlstm_block_stack.post_blocks_norm.weight"])
        logits.append(x @ p["lm_head.weight" if "lm_head.weight" in p else "token_embedding.weight"].mT)
    return torch.stack(logits, 1), states


def layer_norm(x: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight)


def blockwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    return x @ torch.block_diag(*weight).mT + bias


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: dict) -> torch.Tensor:
    taps = weight.shape[-1]
    window = torch.cat([state.get("conv", x.new_zeros(len(x), taps - 1, x.shape[-1])), x[:, None]], 1)
    state["conv"] = window[:, 1:]
    return F.silu((window * weight[:, 0].mT).sum(1) + bias)


def mlstm_layer(x: torch.Tensor, p: dict, config: dict, state: dict) -> torch.Tensor:
    heads = config["heads"]
    p = {name.removeprefix("xlstm."): w for name, w in p.items()}
    u, gate = (x @ p["proj_up.weight"].mT + p.get("proj_up.bias", 0)).chunk(2, -1)
    a = convolve(u, p["conv1d.conv.weight"], p["conv1d.conv.bias"], state)
    q, k, v = (
        blockwise(y, p[f"{name}.weight"], p.get(f"{name}.bias", 0)) for name, y in zip(QKV, (a, a, u), strict=True)
    )
    qkv = torch.cat([q, k, v], -1)
    i, f = (qkv @ p[f"mlstm_cell.{g}.weight"].mT + p[f"mlstm_cell.{g}.bias"] for g in ("igate", "fgate"))
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
    # unstabilized: the numbers here are small
    f, i = torch.sigmoid(f)[..., None], torch.exp(i)[..., None]
    outer = k[..., :, None] * v[..., None, :]
    state["c"] = i[..., None] * outer + (f[..., None] * state["c"] if "c" in state else 0)
    state["n"] = i * k + (f * state["n"] if "n" in state else 0)
    q = q / q.shape[-1] ** 0.5
    numerator = (q[..., None, :] @ state["c"]).squeeze(-2)
    h = numerator / (q * state["n"]).sum(-1, keepdim=True).abs().clamp_min(1)
    h = layer_norm(h, 0.0).flatten(-2) * (1 + p["mlstm_cell.outnorm.weight"])
    return ((h + p["learnable_skip"] * a) * F.silu(gate)) @ p["proj_down.weight"].mT + p.get("proj_down.bias", 0)


def slstm_layer(x: torch.Tensor, p: dict, config: dict, state: dict) -> torch.Tensor:
    N = config["slstm_heads"]
    p = {name.removeprefix("xlstm."): w for name, w in p.items()}
    a = x
    if config["slstm_taps"]:
        a = convolve(x, p["conv1d.conv.weight"], p["conv1d.conv.bias"], state)
    # the map of the input gate is stored under the forget gate's name, and the other way round
    inputs = [blockwise(y, p[f"{g}.weight"]) for g, y in (("fgate", a), ("igate", a), ("zgate", x), ("ogate", x))]
    bias = p["slstm_cell._bias_"].chunk(4)
    old = state.get("h", torch.zeros_like(x)).unflatten(-1, (N, -1))
    recurrent = [
        torch.einsum("bni,noi->bno", old, r).flatten(1) for r in p["slstm_cell._recurrent_kernel_"].chunk(4, 1)
    ]
    i, f, z, o = (sum(terms) for terms in zip(inputs, bias, recurrent, strict=True))
    f, i = torch.sigmoid(f), torch.exp(i)
    state["c"] = i * torch.tanh(z) + (f * state["c"] if "c" in state else 0)
    state["n"] = i + (f * state["n"] if "n" in state else 0)
    state["h"] = torch.sigmoid(o) * state["c"] / state["n"]
    h = layer_norm(state["h"].unflatten(-1, (N, -1)), 0.0).flatten(-2)
    return h * (1 + p["group_norm.weight"]) if config["group_norm"] else h
