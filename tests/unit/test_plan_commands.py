"""`plan` and `schedule`: their files, warnings and messages."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from deepmim_scale.arguments import parse
from deepmim_scale.cli import COMMANDS
from deepmim_scale.errors import UserError


def run(command: str, *flags: str) -> None:
    module, arguments, function, _ = COMMANDS[command]
    code = importlib.import_module(f"deepmim_scale.{module}")
    given = parse(getattr(code, arguments), flags, prog=command)
    getattr(code, function)(given)


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    run(
        "plan",
        "--preset",
        "mirl_vit_b_48",
        "--nodes",
        "4",
        "--gpus-per-node",
        "8",
        "--gpu",
        "v100-32g",
        "--network",
        "25gbe",
        "--json",
        str(path),
    )
    report = json.loads(path.read_text())
    assert report["best"] == report["plans"][0]
    fields = {
        "stages",
        "replicas",
        "microbatch",
        "schedule",
        "step_seconds",
        "images_per_second",
        "memory_bytes",
    }
    assert all(fields <= plan.keys() for plan in report["plans"])
    assert "best: data parallelism alone, ideally overlapped, --stages 1" in capsys.readouterr().out


def test_memory_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-B/48 in 8 stages at half of 1F1B's activations; less than any order needs is told."""
    words = "schedule --preset deepmim_vit_b_48 --taps even:8 --stages 8 --microbatches 8"
    peaks = {}
    for name, limit in (("1f1b", "1"), ("dib_w", "0.5"), ("dib_w", "0.01")):
        file = tmp_path / "s.json"
        run(*words.split(), "--schedule", name, "--memory-limit", limit, "--json", str(file))
        report = json.loads(file.read_text())
        peaks[name, limit] = max(rank["peak_activation_bytes"] for rank in report["ranks"])
        told = capsys.readouterr().out
        assert ("warning: memory_limit=0.01" in told) == (limit == "0.01")
        if limit == "0.5":
            assert report["idle_fraction"] <= report["least_idle_fraction"] + 0.01
    assert peaks["dib_w", "0.01"] < peaks["dib_w", "0.5"] <= 0.5 * peaks["1f1b", "1"]


def test_schedule_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    run(
        "schedule",
        "--preset",
        "deepmim_vit_b_12",
        "--taps",
        "even",
        "--stages",
        "4",
        "--microbatches",
        "8",
        "--schedule",
        "dib_w",
        "--json",
        f"{tmp_path}/s.json",
        "--picture",
        f"{tmp_path}/s.png",
        "--trace",
        f"{tmp_path}/s.trace.json",
    )
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["layout"] == "3d/3d/3d/3d"
    assert report["speedup_over_1f1b"] >= 0.97 * 1.32
    least = report["least_idle_fraction"]
    assert least == pytest.approx(0.032, abs=0.001)
    assert least <= report["idle_fraction"] <= least + 0.01
    assert len(report["ranks"]) == 4
    idle = [rank["idle_fraction"] for rank in report["ranks"]]
    assert sum(idle) / 4 == pytest.approx(report["idle_fraction"])
    assert all(rank["instructions"][-1]["kind"] == "flush" for rank in report["ranks"])
    assert all(rank["peak_activation_bytes"] > 0 for rank in report["ranks"])
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    events = json.loads((tmp_path / "s.trace.json").read_text())["traceEvents"]
    # Every micro-batch of every rank: 2 decoder and 3 encoder instructions.
    boxes = [event for event in events if event.get("cat") not in (None, "wait")]
    assert len(boxes) == 4 * 8 * 5
    end = max(event["ts"] + event["dur"] for event in boxes)
    assert end == pytest.approx(report["makespan"] * 1e6)
    assert "1f1b" in capsys.readouterr().out


def test_fewer_microbatches_than_stages_warns(capsys: pytest.CaptureFixture[str]) -> None:
    run("schedule", "--preset", "debug", "--stages", "4", "--microbatches", "2")
    assert "idle" in capsys.readouterr().err


def test_activations_beyond_the_gpu_warn(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--preset deepmim_vit_b_48 --stages 2 --microbatches 8 --schedule gpipe --gpu v100-16g"
    run("schedule", *flags.split(), "--microbatch-size", "64")
    warning = capsys.readouterr().err
    assert "warning: gpu=v100-16g: rank 0: keeps" in warning
    assert "use a smaller microbatch_size" in warning
    run("schedule", *flags.split(), "--microbatch-size", "2")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("plan --preset debug --gpu v101", "gpu=v101: unknown; use one of v100-16g"),
        ("plan --preset debug --network isdn", "network=isdn: unknown; use one of 10gbe"),
        ("plan --preset debug --nodes 0", "nodes=0: must be positive"),
        ("plan --preset nope", "preset=nope: unknown"),
        ("plan --preset debug --global-batch 100", "global_batch=100: .*use a multiple of 64"),
        ("schedule --preset debug --stages 13 --microbatches 2", "stages=13: deepmim .* 1 to 12"),
        ("schedule --preset debug --stages 2 --microbatches 0", "microbatches=0: must be positive"),
        (
            "schedule --preset debug --stages 2 --microbatches 2 --placement v",
            "placement=v: deepmim is defined for placement linear",
        ),
        (
            "schedule --preset debug_mirl --stages 4 --microbatches 2",
            "stages=4: mirl .* can be cut into 1, 2, 3, 6 stages",
        ),
        (
            "schedule --preset debug_mirl --stages 3 --microbatches 2 --schedule dib_w",
            "schedule=dib_w: mirl is defined for schedule gpipe, 1f1b, dib",
        ),
        (
            "schedule --preset debug --stages 2 --microbatches 2 --layout 3d|3d|3d3d",
            "layout=.*: has 3 stages, but stages=2",
        ),
        ("schedule --preset debug --stages 2 --microbatches 2 --taps 5,6", "taps=5,6: must end"),
        (
            "schedule --preset debug --stages 2 --microbatches 2 --microbatch-size -3",
            "microbatch_size=-3: must be positive",
        ),
        ("plan --preset debug --global-batch 0", "global_batch=0: must be positive"),
        (
            "schedule --preset debug --stages 2 --microbatches 2 --picture a.gif",
            "picture=a.gif: must end in .png or .svg",
        ),
        (
            "schedule --preset debug --stages 2 --microbatches 2 --trace /proc/none/t",
            "trace=/proc/none/t: cannot be written",
        ),
        ("plan --preset debug --json /proc/none/p", "json=/proc/none/p: cannot be written"),
    ],
)
def test_mistakes(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(*flags.split())
    assert "\n" not in str(error.value)


def test_network_as_a_number_and_model_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gbit/s, efficiency and latency of a network; flags of the model on top of the preset."""
    words = ["--preset", "debug", "--nodes", "2", "--gpus-per-node", "1", "--global-batch", "64"]

    def best(stages: int, *flags: str) -> dict[str, Any]:
        file = tmp_path / "plan.json"
        run("plan", *words, *flags, "--json", str(file))
        plans = json.loads(file.read_text())["plans"]
        return next(
            p
            for p in plans
            if p["stages"] == stages and p["kind"] != "zero3" and p["overlap"] == "overlapped"
        )

    assert best(1, "--network", "10") == best(1, "--network", "10gbe")
    half = best(1, "--network", "0.02", "--network-efficiency", "0.5")
    assert half == best(1, "--network", "0.01")
    assert "debug on 2 x a100-80g, 0.01 Gbit/s between nodes" in capsys.readouterr().out
    latency, fast = ("--network-latency", "5000"), ("--network", "10")
    late = best(1, *fast, *latency)
    assert late["reduction_seconds"] - best(1, *fast)["reduction_seconds"] == pytest.approx(0.01)
    # The first activation and the last gradient hide behind nothing.
    late, soon = best(2, *fast, *latency), best(2, *fast)
    assert late["compute_seconds"] - soon["compute_seconds"] >= 0.01
    assert soon["step_seconds"] == best(2, *fast, "--network-efficiency", "1")["step_seconds"]
    wide = best(1, *fast, "--embed-dim", "256", "--depth", "8", "--taps", "even")
    assert wide["reduction_bytes"] > best(1, *fast)["reduction_bytes"]
    assert "debug embed_dim=256 depth=8 taps=(2, 4, 6, 8) on" in capsys.readouterr().out
    with pytest.raises(UserError, match="network=fast: unknown; use one of 10gbe"):
        run("plan", *words, "--network", "fast")
