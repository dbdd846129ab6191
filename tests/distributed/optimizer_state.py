"""AdamW's moments by DeepSpeed's own accessors: the judge of what is saved and loaded."""

from __future__ import annotations

from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor

from deepmim_scale.parallel import zero, zero_state


def optimizer_state(engine: zero.Engine) -> dict[str, Tensor]:
    """Both moments of a stage in full, as `exp_avg/<name>`; every replica calls it."""
    zero_state._link_optimizer_state(engine)
    return {
        f"{moment}/{name}": safe_get_full_optimizer_state(parameter, moment).cpu()
        for name, parameter in zero_state._trainable(engine)
        for moment in zero_state.MOMENTS
    }
