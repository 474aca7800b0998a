"""The element-wise parts around the cells, with backward passes that recompute instead of store.

Written as plain PyTorch, each would keep two or three intermediates as large as the activations for its backward pass;
here it keeps its inputs, or its output, only. In a training step of a 50M model that is a fifth of all memory.
"""

import torch
import torch.nn.functional as F

from .cells.numerics import gate_dtype, is_batched


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / rms(x) over the last dimension, computed in float32 and cast back before the weight."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)[0]
    x32 = _wide(x)
    if x.is_cpu and not torch.compiler.is_compiling():
        # PyTorch's own `rms_norm` has no kernel there: it is 8 operations, of which several write a tensor like x
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        rstd = torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
        y = (x32 * rstd).to(x.dtype)
        return y.mul_(weight) if y.dtype == weight.dtype else y * weight
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x32, x.shape[-1:], eps=eps).to(x.dtype) * weight


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up"""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def soft_cap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(x / cap), or x without a cap"""
    if cap is None:
        return x
    return _SoftCap.apply(x, cap) if torch.is_grad_enabled() else x.div(cap).tanh_().mul_(cap)


def gated_head_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """sigmoid(gate) * weight * layer_norm(x over each head), the norm in float32 and cast back before the weight.
    x (B, T, H, V), gate (B, T, H V), weight (H V) to (B, T, H V)."""
    if torch.is_grad_enabled():
        return _GatedHeadNorm.apply(x, gate, weight, eps)[0]
    return head_norm(x, eps).mul_(weight).mul_(torch.sigmoid(gate))


def head_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over each head without weight, in float32: (B, T, H, V) to (B, T, H V)."""
    return F.layer_norm(_wide(x), x.shape[-1:], eps=eps).to(x.dtype).flatten(-2)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """The sum over all rows of -log softmax(logits)[label], without those labelled `ignore_index`. logits (N, V),
    labels (N,). Takes the memory of one more tensor like the logits, PyTorch's own of three."""
    if torch.compiler.is_compiling():
        return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return _CrossEntropy.apply(logits, labels, ignore_index)[0]


def mean_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | int | None = None, ignore_index: int = -100
) -> torch.Tensor:
    """The cross entropy of logits (N, classes) and labels (N,), summed and divided by `count`, by default the number
    of labels that are not `ignore_index`. Where that is 0, loss and gradients are 0, and not 0 / 0."""
    labels = labels.to(logits.device)
    if count is None:
        count = (labels != ignore_index).sum()
    count = count.to(logits.device).clamp_min(1) if torch.is_tensor(count) else max(count, 1)
    return cross_entropy(logits, labels, ignore_index) / count


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(gate_dtype(x.dtype))


# The Functions below save what their forward passes computed. In a backward pass that is itself differentiated (grad
# mode is on there) it would count as a constant, so it is computed again from the inputs: derivatives of every order
# are exact, and the ordinary backward pass costs nothing more.


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, eps):
        x32 = _wide(x)
        rstd = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (x32 * rstd).to(x.dtype) * weight, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.eps = inputs
        _, rstd = output
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)

    @staticmethod
    def backward(ctx, dy, _):
        x, weight, rstd = ctx.saved_tensors
        x32 = _wide(x)
        if torch.is_grad_enabled():
            rstd = x32.square().mean(-1, keepdim=True).add(ctx.eps).rsqrt()
        normed = x32 * rstd
        dweight = _wide(dy * normed.to(x.dtype)).sum_to_size(weight.shape).to(weight.dtype)
        dnormed = _wide(dy * weight)
        projection = (dnormed * normed).mean(-1, keepdim=True)
        dnormed = torch.addcmul(dnormed, normed, projection, value=-1)
        return (dnormed * rstd).to(x.dtype), dweight, None


class _SwiGLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate, up):
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dsilu = dy * up
        if torch.is_grad_enabled():  # PyTorch's kernel for it has no derivative
            sigmoid = torch.sigmoid(gate)
            dgate = dsilu * sigmoid * (1 + gate * (1 - sigmoid))
        else:
            dgate = torch.ops.aten.silu_backward(dsilu, gate)
        return dgate, dy * F.silu(gate)


class _SoftCap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, cap):
        return x.div(cap).tanh_().mul_(cap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.cap = inputs
        ctx.save_for_backward(output)  # an output is no constant: derivatives pass through it

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(dy, y / ctx.cap), None


class _GatedHeadNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, gate, weight, eps):
        y, mean, rstd = torch.native_layer_norm(_wide(x), x.shape[-1:], None, None, eps)
        return y.to(x.dtype).flatten(-2) * weight * torch.sigmoid(gate), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        *saved, ctx.eps = inputs
        _, mean, rstd = output
        ctx.save_for_backward(*saved, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)

    @staticmethod
    def backward(ctx, dout, *_):
        x, gate, weight, mean, rstd = ctx.saved_tensors
        x32 = _wide(x)
        normed = head_norm(x, ctx.eps) if torch.is_grad_enabled() else ((x32 - mean) * rstd).to(x.dtype).flatten(-2)
        sigmoid = torch.sigmoid(gate)
        dgate = torch.ops.aten.sigmoid_backward(dout * (normed * weight), sigmoid)
        dy = dout * sigmoid
        dweight = _wide(dy * normed).sum_to_size(weight.shape).to(weight.dtype)
        dnormed = _wide(dy * weight).view(x.shape)
        mask = [True, False, False]  # PyTorch differentiates this kernel through mean and rstd
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(dnormed, x32, x.shape[-1:], mean, rstd, None, None, mask)
        return dx.to(x.dtype), dgate, dweight, None


class _CrossEntropy(torch.autograd.Function):
    ROWS = 256
    generate_vmap_rule = True

    @staticmethod
    def forward(logits, labels, ignore_index):
        valid = labels != ignore_index
        labels = torch.where(valid, labels, 0)
        normalizer = torch.cat([rows.logsumexp(-1) for rows in logits.split(_CrossEntropy.ROWS)])
        loss = torch.where(valid, normalizer - logits.gather(-1, labels[:, None]).squeeze(-1), 0).sum()
        return loss, labels, valid, normalizer

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, labels, valid, normalizer = output
        ctx.save_for_backward(inputs[0], labels, valid, normalizer)
        ctx.mark_non_differentiable(labels, valid, normalizer)

    @staticmethod
    def backward(ctx, dloss, *_):
        logits, labels, valid, normalizer = ctx.saved_tensors
        drow = (dloss * valid)[:, None]
        minus_one = logits.new_full((len(labels), 1), -1.0)
        if torch.is_grad_enabled() or is_batched(dloss):
            dlogits = logits.softmax(-1).scatter_add(-1, labels[:, None], minus_one)
            return dlogits * drow, None, None
        dlogits = torch.sub(logits, normalizer[:, None]).exp_()
        dlogits.scatter_add_(-1, labels[:, None], minus_one)
        return dlogits.mul_(drow), None, None
