"""What decoders learn to predict: the interface of a target, split in facts and arithmetic.

The facts (`ObjectiveSpec`) need no torch: configuration, planner and command line read them. The
arithmetic (`Objective`) makes targets and losses of a micro-batch; `build` imports torch.
Legend: B images, L patches, K visible patches, P width of a target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from deepmim_scale.errors import UserError
from deepmim_scale.methods.base import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from deepmim_scale.batch import Batch, Masking
    from deepmim_scale.config import ModelConfig, RunConfig


@dataclass(frozen=True)
class TeacherSize:
    """A frozen vision transformer that runs beside training, for the planner."""

    depth: int
    width: int
    num_tokens: int
    mlp_ratio: float = 4.0
    out_dim: int = 0
    """Width of a projection of its tokens; 0 where there is none."""


class Objective(ABC):
    """Targets and losses of one model; what a frozen or missing teacher needs not is filled in."""

    @abstractmethod
    def prepare(self, batch: Batch, masking: Masking) -> Any:
        """Targets of a micro-batch: made once on each rank that has decoders, when first needed."""

    @abstractmethod
    def loss(
        self, name: str, predictions: Sequence[Tensor], targets: Any, grad_scale: float
    ) -> Tensor:
        """Loss `name` of its decoders' predictions [B, L-K, P] of the masked patches, a scalar.

        grad_scale is the gradient that backward will bring: fused kernels store gradients with it.
        """

    # Most targets have no teacher, or one that stays as it is: doing nothing is right for them.
    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move teachers to the device."""

    def after_step(self, parameters: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Learn from the updated weights of the trained model, by their global names."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to go on; nothing for frozen teachers."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Inverse of `state`."""


class Networks(Protocol):
    """Where objectives get models of ours from, without knowing how they are built."""

    def config_of(self, run: str) -> RunConfig:
        """Configuration of a run's folder; UserError if it holds none. Needs no torch."""
        ...

    def trained(self, run: str) -> nn.Module:
        """Whole model of a run with the weights of its newest checkpoint."""
        ...

    def fresh(self, config: RunConfig) -> nn.Module:
        """Whole model as a run of `config` starts with it."""
        ...


def _no_teacher(config: RunConfig, networks: Networks) -> None:
    return None


def _no_size(model: ModelConfig) -> TeacherSize | None:
    return None


def _accept(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class ObjectiveSpec:
    """One kind of target; `--target NAME` chooses it, `--target NAME:ARGUMENT` with an argument."""

    name: str
    width: Callable[[ModelConfig], int]
    """P, values that a decoder predicts for each patch."""
    build: Callable[[ModelConfig, Any], Objective]
    """From the model's configuration and what `load_teacher` returned."""
    load_teacher: Callable[[RunConfig, Networks], Any] = _no_teacher
    """The teacher on the CPU; UserError where it cannot be had. Every rank calls it."""
    check_model: Callable[[ModelConfig], None] = _accept
    """ValueError for a model that this target is not defined for."""
    check_run: Callable[[RunConfig, Networks], None] = _accept
    """UserError for what can be told of a run without torch."""
    teacher_size: Callable[[ModelConfig], TeacherSize | None] = _no_size
    """What the planner counts for the teacher."""
    takes_argument: bool = False
    is_pixels: bool = False
    """Predictions can be drawn as pictures and exported as an MAE decoder."""
    sums_pairs: bool = False
    """A loss may sum two predictions (paired methods)."""
    whole_model: bool = False
    """The teacher follows the whole encoder: one stage only."""


def missing_teacher(target: str, shape: str) -> ValueError:
    """For a model that is called without what its targets are made of."""
    return ValueError(f"target={target}: needs {shape} from its teacher; pass teacher=")


def one_line(error: Exception) -> str:
    """What another library has to say, for a message of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:280]


def check_width(model: ModelConfig, teacher: str, width: int) -> None:
    """UserError unless the model predicts features as wide as the teacher's."""
    if width != model.teacher_dim:
        raise UserError(
            f"teacher_dim={model.teacher_dim}: the features of {teacher} are {width} wide; "
            f"use --teacher-dim {width}"
        )


def require_rgb(model: ModelConfig) -> None:
    """ValueError unless a teacher that was trained on RGB can see the images."""
    require(model.in_chans == 3, "in_chans", model.in_chans, f"target {model.target} sees RGB")


def build_cosine(model: ModelConfig, teacher: Any) -> Objective:
    """`build` of the targets that are a frozen teacher's features, compared by cosine."""
    from deepmim_scale.objectives.features import CosineObjective

    return CosineObjective(model, teacher)
