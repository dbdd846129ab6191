"""--compile: every block by itself, each shape once, no graph break, the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from deepmim_scale.config import RunConfig
from deepmim_scale.models import build_model, local_backward
from deepmim_scale.models.blocks import compile_blocks
from deepmim_scale.presets import debug, debug_mae, debug_mirl

# Encoder block, decoder block, decoder block at masked tokens. MIRL has one decoder block that is
# traced for two lengths of memory (then for any) and both kinds of query.
NUM_GRAPHS = {debug: 3, debug_mae: 3, debug_mirl: 5}


@pytest.mark.parametrize("preset", NUM_GRAPHS)
def test_compiled_blocks(preset: Callable[[], RunConfig]) -> None:
    torch._dynamo.reset()
    model = build_model(preset)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    noise = torch.rand(2, 64, generator=generator)
    plain = local_backward(model, images, noise=noise)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        compiled = local_backward(model, images, noise=noise)
    assert counter.frame_count == NUM_GRAPHS[preset]
    torch.testing.assert_close(compiled.loss, plain.loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)


def test_a_whole_decoder_is_one_graph() -> None:
    torch._dynamo.reset()
    model = build_model(debug)
    decoder = model.decoders["block03"]
    masking = model.masking(torch.empty(2), torch.rand(2, 64))
    feature = torch.randn(2, 17, 64)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(feature, masking=masking), decoder(feature, masking=masking)
    )
