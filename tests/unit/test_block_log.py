"""`--log-blocks` on the whole model in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepmim_scale.errors import UserError
from deepmim_scale.models import build_model
from deepmim_scale.parallel import zero
from deepmim_scale.presets import debug
from deepmim_scale.train.block_log import BlockLog


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_magnitudes_of_two_micro_batches() -> None:
    model = build_model(debug, seed=1)
    log = BlockLog(model, 12, torch.device("cpu"))
    batches = [{"images": torch.randn(2, 3, 64, 64), "noise": torch.rand(2, 64)} for _ in range(2)]
    plain = [model(**batch).loss for batch in batches]
    squares = torch.zeros(12)
    with log.watching():
        watched = [model(**batch).loss for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True)), "only read"
    for batch in batches:
        hidden = model.embed(batch["images"], model.masking(batch["images"], batch["noise"]))[0]
        for number, block in enumerate(model.blocks.values()):
            hidden = block(hidden)
            squares[number] += hidden.detach().square().mean() / 2
    found = log.magnitudes()
    assert list(found) == [f"block{number:02d}" for number in range(1, 13)]
    assert list(found.values()) == pytest.approx(squares.sqrt().tolist(), rel=1e-5)
    model(**batches[0])
    assert log.magnitudes() == found, "nothing is watched outside"
    with log.watching():
        pass
    assert set(log.magnitudes().values()) == {0.0}, "each step begins anew"


def test_gradients_are_asked_for_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def norms(engine: Any, owners: list[str], owner: Any) -> dict[str, torch.Tensor]:
        asked.update(owners=owners, owner=owner)
        return {name: torch.tensor(float(i)) for i, name in enumerate(owners)}

    monkeypatch.setattr(zero, "gradient_norms", norms)
    log = BlockLog(build_model(debug, device="meta"), 12, torch.device("cpu"))
    assert log.gradient_norms(None)["block12"] == 11.0
    owner = asked["owner"]
    assert owner("blocks.11.attn.qkv.weight") == "block12"
    assert owner("decoders.block06.blocks.1.mlp.fc1.bias") == owner("cls_token") == "rest"
    assert {owner(name) for name, _ in build_model(debug, device="meta").named_parameters()} == {
        *asked["owners"]
    }


def test_not_with_compiled_blocks() -> None:
    with pytest.raises(UserError, match="log_blocks=5: a compiled block cannot"):
        debug().replace(compile=True, log_blocks=5)
