"""Counts against the official models' parameters and FLOPs, and against hand-made formulas."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deepmim_scale.config import ModelConfig
from deepmim_scale.methods import method_of
from deepmim_scale.methods.base import prediction
from deepmim_scale.plan import cost as costs
from deepmim_scale.plan.hardware import GPUS, gpu_named, mfu
from deepmim_scale.plan.messages import num_bytes
from deepmim_scale.precision import Precision
from deepmim_scale.presets import PRESETS, load_preset

if TYPE_CHECKING:
    from torch import Tensor

MIRL_S = [1.049, 1.093, 1.138, 1.182, 1.227, 1.272]
MIRL_B = [3.390, 3.536, 3.681, 3.826, 3.971, 4.116]
# Official constructors and FlopCounterMode at 224/16, mask 0.75 (GFLOP, forward / with backward):
# preset, total, trainable, encoder blocks, encoder forward, decoders forward, forward, training.
OFFICIAL = [
    ("mae_vit_b_12", 111907840, 111655680, 85054464, 8.586, [10.745], 19.562, 58.456),
    ("mae_vit_l_24", 329541888, 329239296, 302309376, 30.445, [10.758], 41.512, 124.226),
    ("deepmim_clip_vit_b_12", 138969344, 138717184, 85054464, 8.586, [5.418] * 4, 30.490, 91.238),
    ("deepmim_vit_b_12", 139494656, 139242496, 85054464, 8.586, [5.470] * 4, 30.696, 91.857),
    ("mirl_vit_s_54", 113673984, 113142144, 95821056, 9.763, MIRL_S, 16.853, 50.445),
    ("mirl_vit_b_48", 397169408, 396409856, 340217856, 34.343, MIRL_B, 57.133, 171.169),
]
TRAINING_GFLOPS = {"deepmim_vit_b_24": 117.6, "deepmim_vit_b_36": 143.4, "deepmim_vit_b_48": 169.1}


def model(preset: str, **changes: Any) -> ModelConfig:
    return load_preset(preset).model.replace(**changes)


@pytest.mark.parametrize("row", OFFICIAL, ids=lambda row: row[0])
def test_official_figures(row: tuple[Any, ...]) -> None:
    preset, parameters, trainable, blocks, encoder, decoders, forward, training = row
    config = model(preset, masked_query=False)
    whole = costs.model_cost(config).whole
    block = costs.encoder_block_cost(config)
    assert (whole.parameters, whole.trainable) == (parameters, trainable)
    assert block.trainable * config.depth == blocks
    assert block.forward_flops * config.depth / 1e9 == pytest.approx(encoder, abs=5.1e-4)
    found = [costs.decoder_cost(config, i).forward_flops / 1e9 for i in range(len(config.taps))]
    assert found == pytest.approx(decoders, abs=1e-3)
    assert whole.forward_flops / 1e9 == pytest.approx(forward, abs=5.1e-4)
    assert whole.training_flops / 1e9 == pytest.approx(training, abs=5.1e-4)


def test_flop_counter_digits() -> None:
    whole = costs.model_cost(model("deepmim_vit_b_12", masked_query=False)).whole
    assert (whole.forward_flops, whole.training_flops) == (30_696_194_048, 91_857_371_136)


@pytest.mark.parametrize(("preset", "gflops"), TRAINING_GFLOPS.items())
def test_depth_sweep(preset: str, gflops: float) -> None:
    whole = costs.model_cost(model(preset, masked_query=False)).whole
    assert whole.training_flops / 1e9 == pytest.approx(gflops, abs=0.05)


@pytest.mark.parametrize("preset", PRESETS)
def test_stages_add_up(preset: str) -> None:
    config = model(preset)
    cuts = [0, *config.taps]
    stages = [costs.stage_cost(config, a, b).whole for a, b in itertools.pairwise(cuts)]
    whole, parts = costs.model_cost(config).whole, costs.total(stages)
    assert parts.trainable == whole.trainable
    assert parts.forward_flops == whole.forward_flops
    assert parts.training_flops == whole.training_flops
    shared = 0 if config.method == "mirl" else len(config.taps) - 1
    assert parts.frozen - whole.frozen == shared * costs.position_table_cost(config).frozen


def test_masked_query_saves_work() -> None:
    config = model("deepmim_vit_b_12")
    full = config.replace(masked_query=False)
    block = costs.block_cost(512, 4.0, 197)
    last = costs.block_cost(512, 4.0, 197, 147)
    assert 1 - last.forward_flops / block.forward_flops == pytest.approx(0.21, abs=0.01)
    now, then = costs.decoder_cost(config, 0), costs.decoder_cost(full, 0)
    assert now.trainable == then.trainable
    head = 2 * 50 * 512 * 768  # CLS and visible tokens leave the head too
    assert then.forward_flops - now.forward_flops == (
        block.forward_flops - last.forward_flops + head
    )


def test_attention_has_no_weight_gradient() -> None:
    block = costs.block_cost(64, 4.0, 10)
    assert block.weight_gradient_flops == 2 * 12 * 64 * 64 * 10
    assert block.backward_flops == 2 * block.forward_flops


def test_saved_values_match_measurement() -> None:
    """Measured saved tensors of DeepMIM ViT-B/12 in fp32, MB per image: joint, local backward."""
    config = model("deepmim_vit_b_12", masked_query=False)
    joint = costs.model_cost(config)
    local = joint.encoder + costs.decoder_cost(config, 0)
    assert 4 * joint.whole.saved_values / 1e6 == pytest.approx(142.3, rel=0.03)
    assert 4 * local.saved_values / 1e6 == pytest.approx(57.8, rel=0.03)


@pytest.mark.parametrize("queries", [None, 30])
def test_activation_bytes_under_autocast(queries: int | None) -> None:
    """What autograd keeps of a block, from batches of 1 and 3: parameters' copies fall out."""
    torch = pytest.importorskip("torch")
    from deepmim_scale.models.blocks import DecoderBlock, transformer_block

    width, tokens = 256, 40
    block = transformer_block(width, 4, 4.0, DecoderBlock)
    ids = None if queries is None else torch.arange(queries).unsqueeze(0)

    def saved_bytes(batch: int) -> int:
        storages: dict[int, tuple[int, Tensor]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no address twice
            return tensor

        x = torch.randn(batch, tokens, width, requires_grad=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            block(x, ids if ids is None else ids.expand(batch, -1))
        return sum(size for size, _ in storages.values())

    measured = (saved_bytes(3) - saved_bytes(1)) / 2
    counted = costs.block_cost(width, 4.0, tokens, queries).activation_bytes
    assert counted == pytest.approx(measured, rel=0.02)


def test_memory_of_a_model_under_autocast() -> None:
    """Local backward of 4 blocks and a decoder; CPU gathers keep more than the GPU's kernels."""
    torch = pytest.importorskip("torch")
    from deepmim_scale.models import build_model, local_backward
    from deepmim_scale.plan.timing import layout_of, memory_of

    path = Path(__file__).resolve().parents[2] / "benchmarks" / "saved_activations.py"
    peak_saved_bytes = runpy.run_path(str(path))["peak_saved_bytes"]
    config = model("deepmim_vit_b_12", depth=4, taps=(4,))
    network = build_model(config)

    def step(batch: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            images = torch.randn(batch, 3, config.img_size, config.img_size)
            local_backward(network, images, noise=torch.rand(batch, config.num_patches))
        network.zero_grad()

    small, large = (peak_saved_bytes(network, lambda b=b: step(b)) for b in (1, 2))
    memory = memory_of(config, layout_of(config, 1), 1)[0]
    assert memory.encoder + memory.largest_decoder == pytest.approx(large - small, rel=0.06)


def test_teacher() -> None:
    """CLIP's ViT-B/16: open_clip's own parameters and FLOPs; students are counted without it."""
    config = model("deepmim_clip_vit_b_12")
    teacher = costs.teacher_cost(config)
    assert (teacher.trainable, teacher.frozen) == (0, 86_192_640)
    assert teacher.training_flops == teacher.forward_flops
    open_clip = pytest.importorskip("open_clip")
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    visual = open_clip.create_model(
        "ViT-B-16-quickgelu", load_weights=False, pretrained_text=False
    ).visual.to("meta")
    visual.output_tokens = True
    assert sum(p.numel() for p in visual.parameters()) == teacher.frozen
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, tokens = visual(torch.empty(2, 3, 224, 224, device="meta"))
        tokens @ visual.proj
    assert counter.get_total_flops() == 2 * teacher.forward_flops
    stage = costs.stage_cost(config, 0, 8)
    assert stage.executed == stage.whole + teacher
    assert costs.stage_cost(config, 0, 2).teacher == costs.Cost()
    assert costs.stage_cost(model("deepmim_vit_b_12"), 0, 8).teacher == costs.Cost()


def test_boundary_bytes() -> None:
    """16-bit bytes of a micro-batch of 128 at each segment's end of MIRL ViT-B-48."""
    config, images = model("mirl_vit_b_48"), 128

    def size(config: ModelConfig, block: int, precision: Precision) -> int:
        return images * num_bytes(method_of(config).boundary(config, block), precision)

    hidden = size(model("deepmim_vit_b_48"), 12, Precision.PURE_BFLOAT16)
    assert hidden == 9_830_400
    whole = [size(config, tap, Precision.PURE_BFLOAT16) for tap in config.taps[:-1]]
    assert whole == [hidden + 6_553_600 * count for count in (2, 3, 4, 5, 6)]
    # Under autocast the residual stream crosses in fp32.
    autocast = size(config, config.taps[0], Precision.BFLOAT16)
    assert autocast == 2 * hidden + 6_553_600 * 2
    assert images * num_bytes([prediction(config)], Precision.BFLOAT16) == 28_901_376


@pytest.mark.parametrize("replicas", [1, 3, 8])
def test_zero2_state(replicas: int) -> None:
    """fp32 weights and their 16-bit copy, fp32 gradients, 12 bytes of optimizer; the teacher."""
    student, teacher = costs.Cost(trainable=24_000), costs.Cost(frozen=1000)
    cost = costs.StageCost(student, costs.Cost(), costs.Cost())
    sharded = costs.zero2_state_bytes(cost, replicas, "per_microbatch")
    assert sharded == 6 * 24_000 + 16 * 24_000 // replicas
    whole = costs.zero2_state_bytes(cost, replicas)
    assert whole == 10 * 24_000 + 12 * 24_000 // replicas
    taught = costs.StageCost(student, costs.Cost(), teacher)
    assert costs.zero2_state_bytes(taught, replicas) == whole + 4000
    assert costs.gradient_traffic_bytes(taught, replicas) == (
        costs.gradient_traffic_bytes(cost, replicas)
    )


def test_zero2_traffic() -> None:
    """16-bit gradients go to the owners of their shards, weights back in 32 or 16 bits."""
    cost = costs.StageCost(costs.Cost(trainable=1000), costs.Cost(), costs.Cost())
    assert costs.gradient_traffic_bytes(cost, 2) == 1000
    assert costs.weight_traffic_bytes(cost, 4) == 3000
    assert costs.weight_traffic_bytes(cost, 4, "16bit") == 1500
    assert costs.gradient_traffic_bytes(cost, 1) == costs.weight_traffic_bytes(cost, 1) == 0


@pytest.mark.parametrize("replicas", [1, 3, 8])
def test_state_of_other_kinds(replicas: int) -> None:
    """Bytes a parameter: 6 of weights, 4 of gradients, 12 of optimizer; 2, 2 and 12 if pure."""
    cost = costs.StageCost(costs.Cost(trainable=24_000), costs.Cost(), costs.Cost())
    found = {
        (zero3, pure): costs.state_bytes(cost, replicas, zero3=zero3, pure=pure)
        for zero3 in (False, True)
        for pure in (False, True)
    }
    shard = 24_000 // replicas
    assert found[False, False] == costs.zero2_state_bytes(cost, replicas)
    assert found[False, True] == 4 * 24_000 + 12 * shard
    assert found[True, False] == 22 * shard
    assert found[True, True] == 16 * shard


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Tesla V100-SXM2-32GB", "v100-32g"),
        ("Tesla V100-SXM3-32GB", "v100-32g"),
        ("Tesla V100-PCIE-32GB", None),  # 112 TFLOP/s
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("A100-SXM4-40GB", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", "a100-80g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H100 PCIe", None),  # 756
        ("NVIDIA H100 NVL", None),  # 835
        ("NVIDIA H200", "h200-141g"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_gpu_named(name: str, key: str | None) -> None:
    assert gpu_named(name) == (GPUS[key] if key else None)


def test_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from deepmim_scale.train.metrics import known_gpu

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A1000")
    assert known_gpu(torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert known_gpu(torch.device("cuda")) == GPUS["h200-141g"]
    assert known_gpu(torch.device("cpu")) is None


def test_mfu_of_the_papers() -> None:
    """MAE and DeepMIM ViT-B, 1600 epochs on 32 V100 in 108 and 115 hours."""
    for preset, hours, expected in (("mae_vit_b_12", 108, 0.077), ("deepmim_vit_b_12", 115, 0.114)):
        flops = costs.model_cost(model(preset, masked_query=False)).whole.training_flops
        rate = 1_281_167 * 1600 / (hours * 3600) / 32
        assert mfu(flops, rate, GPUS["v100-32g"]) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("masked_query", [False, True])
@pytest.mark.parametrize("preset", ["debug", "debug_mae", "debug_mirl"])
def test_equals_flop_counter_on_our_models(preset: str, masked_query: bool) -> None:
    """torch's FlopCounterMode on the models themselves, unfused attention, digit for digit."""
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from deepmim_scale.models import build_model

    config, num_images = model(preset, masked_query=masked_query), 3
    network = build_model(config, device="meta")
    whole = costs.model_cost(config).whole
    parameters = list(network.parameters())
    assert sum(p.numel() for p in parameters) == whole.parameters
    assert sum(p.numel() for p in parameters if p.requires_grad) == whole.trainable
    network = network.to("meta")  # position tables are computed on the CPU
    images = torch.empty(num_images, 3, config.img_size, config.img_size, device="meta")
    noise = torch.empty(num_images, config.num_patches, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = network(images, noise=noise).loss
        assert counter.get_total_flops() == num_images * whole.forward_flops
        loss.backward()
        assert counter.get_total_flops() == num_images * whole.training_flops


def test_the_teacher_is_the_one_that_is_named() -> None:
    """Sizes of open_clip's ViT-L are three times those of the default ViT-B."""
    pytest.importorskip("open_clip")
    base = load_preset("deepmim_clip_vit_b_12").model
    large = base.replace(teacher="ViT-L-14", teacher_dim=768)
    costs_of = costs.teacher_cost(base), costs.teacher_cost(large)
    assert costs_of[1].forward_flops > 3 * costs_of[0].forward_flops
    assert costs_of[1].frozen > 3 * costs_of[0].frozen
    assert costs.teacher_cost(base.replace(target="pixel")).frozen == 0
