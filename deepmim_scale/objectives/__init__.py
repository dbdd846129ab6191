"""What decoders predict."""

import importlib.util

from deepmim_scale.errors import UserError


def require_open_clip() -> None:
    """UserError where the package of CLIP teachers is missing; imports neither it nor torch."""
    if importlib.util.find_spec("open_clip") is None:
        raise UserError(
            "loss=cosine: its teacher needs open_clip, which is not installed; "
            "pip install open_clip_torch"
        )
