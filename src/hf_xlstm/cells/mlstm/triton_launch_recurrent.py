"""How the mLSTM kernels that go step by step are launched. Inputs are checked by the callers; tensors are as in
triton_launch.py, which launches the chunkwise kernels."""

import torch
import triton

from ..triton_common import strides
from . import triton_recurrent as kernels


def recurrent(q, k, v, igate, fgate, mask, initial, final, scale, eps, state_indices=None):
    """h and (s, m), like `triton_launch.forward`, step by step. C may be updated in place, n and m not.

    With `state_indices` (B,), sequence b starts from row state_indices[b] of `initial`, and its C ends in the same row
    of `final`; where the index is negative, h is 0 and no state is read or written. n and m of `final` are (B, ...).
    """
    (B, T, H, K), V = q.shape, v.shape[-1]
    h = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    s, m_tokens = (torch.empty(B, H, T, dtype=torch.float32, device=v.device) for _ in range(2))
    BK = triton.next_power_of_2(K)
    BV = min(triton.next_power_of_2(V), max(16, min(32, 8192 // BK)))
    kernels.recurrent_kernel[(B * H * triton.cdiv(V, BV),)](
        p_q=q,
        p_k=k,
        p_v=v,
        p_igate=igate,
        p_fgate=fgate,
        p_mask=mask,
        p_state_indices=state_indices,
        p_c_initial=initial[0],
        p_n_initial=initial[1],
        p_m_initial=initial[2],
        p_c_final=final[0],
        p_n_final=final[1],
        p_m_final=final[2],
        p_h=h,
        p_s=s,
        p_m_tokens=m_tokens,
        T=T,
        scale=scale,
        eps=eps,
        **strides(q=q, k=k, v=v, i=igate, f=fgate, m=mask),
        stride_c_row=H * K * V if initial[0] is None else initial[0].stride(0),
        stride_n_row=H * K if initial[1] is None else initial[1].stride(0),
        stride_m_row=H if initial[2] is None else initial[2].stride(0),
        H=H,
        K=K,
        V=V,
        BK=BK,
        BV=BV,
        num_warps=4,
    )
    return h, (s, m_tokens)


def step(q, k, v, igate, fgate, state, state_indices, scale, eps) -> torch.Tensor:
    """h (B, 1, H, V) of one token for each sequence. The state is updated in place: the rows of c, n, m that
    `state_indices` (B,) names, or row b of sequence b. Rows may lie apart, but must be dense in themselves.

    Two launches: the programs of a head each update a tile of C, and all read its n and m, so that none may overwrite
    these. The second one does.
    """
    c, n, m = state
    B, _, H, K = q.shape
    n_new, m_new = n.new_empty(B, H, K), m.new_empty(B, H)
    h, _ = recurrent(q, k, v, igate, fgate, None, state, (c, n_new, m_new), scale, eps, state_indices)
    kernels.keep_kernel[(B * H,)](
        p_n_new=n_new,
        p_m_new=m_new,
        p_state_indices=state_indices,
        p_n=n,
        p_m=m,
        stride_n_row=n.stride(0),
        stride_m_row=m.stride(0),
        H=H,
        K=K,
        BK=triton.next_power_of_2(K),
        num_warps=1,
    )
    return h
