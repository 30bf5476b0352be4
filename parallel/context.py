"""Context parallelism: attention over documents that are sharded over several hdp ranks.

Each micro-batch names its sharded documents (``Documents.ring``), so this module has no fixed ring.
"""

# B batch, L length, T = B*L, N query heads, K key/value heads, H head width

from __future__ import annotations

from torch import Tensor

from allometry.models.attention import Attend, attend, backend_of, filled
from allometry.models.documents import Documents
from allometry.models.transformer import Transformer
from allometry.parallel.hdp.prefix import prefix_over_ring
from allometry.parallel.hdp.ring import ring_attention
from allometry.parallel.mesh import Mesh


class ContextAttention:
    """Replacement of ``Attention.core``: ring attention for sharded documents, else local.

    ``here`` computes local attention.
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

        Values that are narrower than keys are padded with zeros for the ring. Documents with a
        ring must not be longer than ``window``
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
        # Choose the back end of eager mode: the fastest compiled back end is compiled for one L,
        # and here each micro-batch has its own L.
        backend = backend_of(q_BLNH, documents, compiled=False, window=window).name
        return attend(q_BLNH, k_BLKH, v_BLKH, documents, scale, backend, window=window)


def apply_context(part: Transformer, mesh: Mesh) -> None:
    """Replace the attention of all blocks of ``part`` by attention over the ranks of ``mesh.hdp``.

    Every rank calls this function, before blocks are wrapped or compiled.
    """
    name = mesh.hdp.group.group_name
    for block in part.blocks.values():
        block.attention.core = ContextAttention(name, block.attention.core)
        prefix = getattr(block.attention, "prefix", None)
        if prefix is not None:
            prefix.over_ring = prefix_over_ring(name)
