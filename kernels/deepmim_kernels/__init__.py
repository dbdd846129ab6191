"""Fused kernels for masked image modelling, with a plain torch reference beside each.

>>> from deepmim_kernels import masked_mse
>>> loss = masked_mse(pred, images, ids=masked_ids, patch_size=16)  # doctest: +SKIP
"""

from deepmim_kernels._dispatch import use_backend, use_triton
from deepmim_kernels.api import decoder_assemble, gather_patches, masked_cosine, masked_mse

__all__ = [
    "decoder_assemble",
    "gather_patches",
    "masked_cosine",
    "masked_mse",
    "use_backend",
    "use_triton",
]
