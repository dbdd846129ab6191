"""Models of our own runs, for objectives that learn from them (`objectives.base.Networks`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepmim_scale.config import RunConfig
from deepmim_scale.runs.folder import load_run_config

if TYPE_CHECKING:
    from deepmim_scale.models import Model


def config_of(run: str) -> RunConfig:
    """Configuration of a run's folder."""
    return load_run_config(run)


def fresh(config: RunConfig) -> Model:
    """The whole model as a run of `config` starts with it."""
    from deepmim_scale.models import build_model

    return build_model(config.model, seed=config.seed)


def trained(run: str, from_step: str = "") -> Model:
    """The whole model of a run with the weights of a checkpoint (default: the newest)."""
    from deepmim_scale.checkpoint.files import resolve
    from deepmim_scale.checkpoint.load import load_weights

    model = fresh(load_run_config(run))
    load_weights(resolve(run, from_step), model)
    return model.eval()
