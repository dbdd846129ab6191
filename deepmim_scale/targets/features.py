"""A teacher's token features as targets: DeepMIM-CLIP (OliverRensu/DeepMIM, forward_loss).

Legend: B images, L patches, K' masked patches, P teacher width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_features(teacher: Tensor, ids: Tensor) -> Tensor:
    """Features [B, K', P] at the patches ids [B, K'] of teacher [B, L+1, P] (CLS first)."""
    return teacher[:, 1:].gather(1, ids.unsqueeze(-1).expand(-1, -1, teacher.shape[-1]))


def cosine_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean of 2 - 2 cos(pred, target) over masked tokens [B, K', P]; at least float32 inside."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    cosine = (F.normalize(pred.to(dtype), dim=-1) * F.normalize(target.to(dtype), dim=-1)).sum(-1)
    return (2 - 2 * cosine).mean()
