"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

# B batch, L length, D width, N heads, q, c widths of the query and the key/value latents,
# n, r components of a query without and with rotation, v width of a value, H = n + r

from __future__ import annotations

import torch
from torch import Tensor, nn

from allometry.configs.model import ModelConfig
from allometry.models.attention import Attend, attend
from allometry.models.layers import Linear, RMSNorm
from allometry.models.products import Stacked, multiply, separate
from allometry.models.rotary import Geometry, rotate
from allometry.scaling.inventory import Specs


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, eq. 37-47).

    Queries are RMSNorm(W_DQ x) [q] times W_UQ [N (n + r)]; the last r components of each head are
    rotated. Without ``q_lora_rank`` queries are W_Q x. RMSNorm(W_DKV x) [c] times W_UKV
    [N (n + v)] gives n key components and the value of each head; W_KR x [r], rotated and shared
    by all heads, gives the other r key components. W_O multiplies the output of all heads [N v].
    For example, DeepSeek-V2-Lite has N = 16, n = v = 128, r = 64, c = 512 and no ``q_lora_rank``.

    ``latent_q`` contains W_DQ, ``wq`` W_UQ or W_Q, ``latent_kv`` W_DKV and W_KR, ``wkv`` W_UKV.
    Context parallelism replaces ``core``.
    """

    def __init__(self, specs: Specs, model: ModelConfig, scale: float, layer: int) -> None:
        super().__init__()
        latent = model.latent_attention
        assert latent is not None
        self.core: Attend = attend
        self.scale, self.window = scale, model.window_of(layer)
        self.key_widths = latent.qk_nope_head_dim, latent.qk_rope_head_dim
        self.value_width = latent.v_head_dim
        self.latent_widths = latent.kv_lora_rank, latent.qk_rope_head_dim
        low_rank = latent.q_lora_rank is not None
        self.latent_q = Linear(specs["latent_q.weight"]) if low_rank else None
        self.q_norm = RMSNorm(specs["q_norm.weight"], latent.norm_eps) if low_rank else None
        self.wq = Linear(specs["wq.weight"])
        self.latent_kv = Linear(specs["latent_kv.weight"])
        self.kv_norm = RMSNorm(specs["kv_norm.weight"], latent.norm_eps)
        self.wkv = Linear(specs["wkv.weight"])
        self.wo = Linear(specs["wo.weight"])
        # The weights that multiply the input of the branch, in one product.
        down = [w for w in (self.latent_q, self.latent_kv) if w is not None]
        self.qkv = Stacked(*((w, "weight") for w in down))

    def forward(self, x_BLD: Tensor, geometry: Geometry) -> Tensor:
        """Return [B, L, D]."""
        q_BLM, kv_BLM, rotated_BLr = self.project(*self.compress(x_BLD))
        turn = geometry.turn if self.window is None else geometry.windowed
        q_BLNH = q_BLM.unflatten(2, (-1, sum(self.key_widths)))
        plain_BLNn, turning_BLNr = q_BLNH.split(self.key_widths, dim=-1)
        q_BLNH = torch.cat([plain_BLNn, rotate(turning_BLNr, *turn)], dim=-1)
        widths = self.key_widths[0], self.value_width
        kv_BLN = kv_BLM.unflatten(2, (-1, sum(widths)))
        plain_BLNn, v_BLNv = kv_BLN.split(widths, dim=-1)
        if self.value_width == sum(self.key_widths):  # otherwise padding to that width copies v
            v_BLNv = v_BLNv.contiguous()  # a view would keep the keys in memory until backward
        shared_BLNr = rotate(rotated_BLr[:, :, None], *turn).expand(-1, -1, kv_BLN.shape[2], -1)
        k_BLNH = torch.cat([plain_BLNn, shared_BLNr], dim=-1)
        o_BLNv = self.core(
            q_BLNH, k_BLNH, v_BLNv, geometry.documents, self.scale, window=self.window
        )
        return self.wo(o_BLNv.flatten(2))

    def compress(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments of ``project``, computed for each token separately.

        Query latents [B, L, q] (``x_BLD`` itself without ``q_lora_rank``), key/value latents
        [B, L, c], and the key components shared by all heads, before rotation [B, L, r].
        """
        made = multiply(x_BLD, self.qkv)
        *queries, shared_BLM = separate(made, self.qkv.rows())
        latent_BLc, rotated_BLr = shared_BLM.split(self.latent_widths, dim=-1)
        q_BLq = x_BLD if self.q_norm is None else self.q_norm(queries[0])
        return q_BLq, self.kv_norm(latent_BLc), rotated_BLr

    def project(
        self, q_BLq: Tensor, latent_BLc: Tensor, rotated_BLr: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, L, N H], keys and values [B, L, N (n + v)], and ``rotated_BLr``."""
        return self.wq(q_BLq), self.wkv(latent_BLc), rotated_BLr
