"""Context parallelism: attention in which a document's tokens may lie on several hdp ranks.

Which documents do is said with each micro-batch (``Documents.ring``); nothing is fixed here.
"""

# B batch, L length, T = B*L, N query heads, K key/value heads, H head width

from __future__ import annotations

from torch import Tensor

from allometry.models.attention import Attend, attend, backend_of, filled
from allometry.models.documents import Documents
from allometry.models.transformer import Transformer
from allometry.parallel.hdp.ring import ring_attention
from allometry.parallel.mesh import Mesh


class ContextAttention:
    """Takes the place of ``Attention.core``: a ring where documents name one, else all is here.

    ``here`` computes what needs no ring.
    """

    def __init__(self, group_name: str, here: Attend = attend) -> None:
        self._group_name, self._here = group_name, here

    def __call__(
        self,
        q_BLNH: Tensor,
        k_BLKH: Tensor,
        v_BLKH: Tensor,
        documents: Documents | None,
        scale: float,
        *,
        window: int | None = None,
    ) -> Tensor:
        """Return causal attention [B, L, N, H] within each document.

        Keys and values travel together in a ring, narrower values filled up with zeros. Where
        documents have a ring, no ``window`` is shorter than they are
        (``scaling.context.check_context``).
        """
        if documents is not None and documents.ring is not None:
            width = v_BLKH.shape[-1]
            if width < q_BLNH.shape[-1]:
                v_BLKH = filled(v_BLKH, q_BLNH.shape[-1])
            q, k, v = (x.flatten(0, 1) for x in (q_BLNH, k_BLKH, v_BLKH))
            o_TNH, _ = ring_attention(q, k, v, documents.ring, self._group_name, scale)
            o_BLNH = o_TNH.view(q_BLNH.shape)
            return o_BLNH if width == q_BLNH.shape[-1] else o_BLNH[..., :width]
        if self._here is not attend:
            return self._here(q_BLNH, k_BLKH, v_BLKH, documents, scale, window=window)
        # As if not compiled: what is fastest in compiled code is compiled for one L, and here each
        # micro-batch has its own.
        backend = backend_of(q_BLNH, documents, compiled=False, window=window).name
        return attend(q_BLNH, k_BLKH, v_BLKH, documents, scale, backend, window=window)


def apply_context(part: Transformer, mesh: Mesh) -> None:
    """Let the attention of ``part`` reach over the ranks of ``mesh.hdp``.

    Every rank calls this alike, before blocks are wrapped or compiled.
    """
    name = mesh.hdp.group.group_name
    for block in part.blocks.values():
        block.attention.core = ContextAttention(name, block.attention.core)
