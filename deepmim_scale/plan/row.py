"""One way to run a model on a cluster, with what it is predicted to need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepmim_scale.methods.base import Placement
from deepmim_scale.pipeline.ir import Reduction
from deepmim_scale.plan.cost import Recompute, WeightGather
from deepmim_scale.plan.hardware import Gpu
from deepmim_scale.plan.rates import Calibration

MEMORY_SHARE = 0.9
"""Of a GPU's memory; the rest is for communication buckets, work space and fragmentation."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network_gbytes: float
    """What transfers get of a node's card, per direction, GB/s."""
    latency_seconds: float = 0.0
    """That a message between nodes takes beside its bytes."""
    calibration: Calibration | None = None
    """What instructions take on these GPUs; without it their FLOPs at `Gpu.utilization`."""

    @property
    def num_gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node


Kind = Literal["data_parallel", "pipeline", "zero3"]
Overlap = Literal["none", "overlapped"]
Weights = Literal["autocast", "pure_16bit"]


@dataclass(frozen=True)
class Plan:
    """One way to run, with what it is predicted to need."""

    kind: Kind
    overlap: Overlap
    """none: communication follows computation; overlapped: beside it, ideally without stages."""
    weights: Weights
    """autocast: fp32 weights; pure_16bit: what autocast would round is kept in 16 bits only."""
    weight_gather: WeightGather
    recompute: Recompute
    stages: int
    replicas: int
    microbatch: int
    """Images."""
    microbatches: int
    schedule: str
    placement: Placement
    reduction: Reduction
    layout: str
    step_seconds: float
    compute_seconds: float
    """Of the step without its reduction and gathering: computations, bubbles, late messages."""
    images_per_second: float
    mfu: float
    idle_fraction: float
    reduction_seconds: float
    """Of the slowest rank's gradient reduction and gathering of updated weights, hidden or not."""
    memory_bytes: int
    """Largest of all ranks: weights (a teacher's too), gradients, optimizer, activations."""
    activation_bytes: int
    boundary_bytes: int
    """Sent by the busiest rank in one step, all directions."""
    reduction_bytes: int
    """Gradients, and updated weights after the step, that the busiest rank sends in one step."""
    fits: bool

    @property
    def is_executed(self) -> bool:
        """Whether it is what a run does: the other rows are there to be compared with."""
        own = self.overlap == "overlapped" and self.kind != "zero3"
        return own and self.weights == "autocast" and self.recompute == "none"

    @property
    def limit(self) -> str:
        """What most of the step goes to beside useful work, in words."""
        exposed = self.step_seconds - self.compute_seconds
        if self.kind != "pipeline":
            slow = self.reduction_seconds > self.compute_seconds
            return "communication" if slow or self.overlap == "none" else "computation"
        idle = self.idle_fraction * self.compute_seconds
        return "reduction and weight gather" if exposed > idle else "bubbles and late messages"


def flops_rate(cluster: Cluster, microbatch: int) -> float:
    """FLOP/s of a GPU at micro-batches of so many images."""
    gpu = cluster.gpu
    return gpu.peak_tflops * 1e12 * gpu.utilization * microbatch / (microbatch + 2)


def replica_seconds(
    cluster: Cluster, replicas: int, num_bytes: float, num_collectives: int = 1
) -> float:
    """Time for a stage's replicas to send so many bytes each in so many sums or gathers.

    Beyond a node they share its card, and each collective goes once around a ring of messages.
    """
    if replicas <= cluster.gpus_per_node:
        return num_bytes / (cluster.gpu.intra_gbytes * 1e9)
    latency = num_collectives * (replicas - 1) * cluster.latency_seconds
    return num_bytes / (cluster.network_gbytes * 1e9) + latency


def usable_bytes(gpu: Gpu) -> int:
    """Memory that a plan may fill."""
    return int(MEMORY_SHARE * gpu.memory_gib * 2**30)
