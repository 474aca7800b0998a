"""The chunkwise mLSTM as a listing, to be read before the optimised form in eager.py, which computes the same.

A chunk of L tokens is one masked attention, and the state carries what came before it: the work is that of matrix
products, and grows with T L instead of T^2. Plain PyTorch, differentiable as it stands; nothing runs it but its test.
Dimension letters: B batch, T time, H heads, K query/key head dim, V value head dim, L tokens of a chunk.
"""

import torch
import torch.nn.functional as F

from .reference import MLSTMState


def mlstm_chunkwise_listing(q, k, v, igate, fgate, state: MLSTMState, chunk_size: int, eps: float = 1e-6):
    """q, k (B, H, T, K), v (B, H, T, V), gates (B, H, T); returns h (B, H, T, V) and the final state.

    With b_t the sum of log f from the chunk's start to t, and j <= t two tokens of the chunk, every exponent is
    relative to a stabilizer m that cancels (Beck et al. 2024, appendix A):

        log D_jt = b_t - b_j + i_j                          of token j in the output of token t
        m_t      = max(b_t + m, max_j log D_jt)             where m, C, n are the state before the chunk
        S_jt     = exp(log D_jt - m_t) (k_j . q_t)
        h_t      = (sum_j S_jt v_j + exp(b_t + m - m_t) C^T q_t) / (max(|s_t|, exp(-m_t)) + eps)
        s_t      =  sum_j S_jt     + exp(b_t + m - m_t) n . q_t

    The last column of D, t = L, holds the weights with which the tokens enter the next state.
    """
    c, n, m = state  # (B, H, K, V), (B, H, K), (B, H)
    q, log_f, outputs = q * q.shape[-1] ** -0.5, F.logsigmoid(fgate), []
    for q_, k_, v_, i, f in zip(*(x.split(chunk_size, dim=2) for x in (q, k, v, igate, log_f))):
        b = f.cumsum(-1)  # [L]
        log_d = (b[..., None, :] - b[..., :, None] + i[..., :, None]).transpose(-1, -2)  # [L_t, L_j]
        past = torch.ones_like(log_d, dtype=torch.bool).tril()
        log_d = log_d.masked_fill(~past, -torch.inf)
        log_carry = b + m[..., None]  # [L]
        m_t = torch.maximum(log_carry, log_d.amax(-1)).detach()

        s_inside = torch.exp(log_d - m_t[..., None]) * (q_ @ k_.mT)  # [L_t, L_j]
        carry = torch.exp(log_carry - m_t)[..., None]
        numerator = s_inside @ v_ + carry * (q_ @ c)
        s = s_inside.sum(-1, keepdim=True) + carry * (q_ @ n[..., None])
        outputs.append(numerator / (torch.maximum(s.abs(), torch.exp(-m_t)[..., None]) + eps))

        m, keep = m_t[..., -1], carry[..., -1, :]  # [1]
        k_into = k_ * torch.exp(log_d[..., -1, :] - m[..., None])[..., None]
        c, n = keep[..., None] * c + k_into.mT @ v_, keep * n + k_into.sum(-2)
    return torch.cat(outputs, dim=2), (c, n, m)
