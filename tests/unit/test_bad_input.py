"""Every mistake gets one line with key, value and remedy, exit code 2, and no process group."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image

from deepmim_scale.arguments import parse_run
from deepmim_scale.cli import main as deepmim_scale
from deepmim_scale.config import RunConfig
from deepmim_scale.train.prepare import describe, prepare
from deepmim_scale.train.pretrain import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "train" / "a").mkdir(parents=True)
    for number in range(16):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / "train" / "a" / f"{number}.png")
    return folder


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, f"not one line: {captured.err}"
    assert not dist.is_initialized()
    return captured.err


CASES = {
    "unknown flag": (["--detph", "3"], "--detph: unknown flag; did you mean --depth?"),
    "unknown preset": (["--preset", "vit"], "preset=vit: unknown; choose one of quickstart"),
    "not a number": (["--depth", "deep"], "--depth: invalid literal"),
    "tap beyond depth": (["--taps", "6,14"], "taps=6,14: must end at block 12 (depth)"),
    "taps unordered": (["--taps", "8,6,12"], "taps=8,6,12: must be increasing"),
    "image and patch": (["--img-size", "65"], "img_size=65: must be divisible by patch_size=8"),
    "heads": (["--num-heads", "5"], "embed_dim=64: must be divisible by num_heads=5; e.g. 60 or"),
    "mask": (["--mask-ratio", "1"], "mask_ratio=1.0: leaves 0 of 64 patches visible"),
    "batch": (["--global-batch", "12"], "global_batch=12: must be divisible by microbatch_size"),
    "two batches": (["--global-batch", "16", "--microbatches", "3"], "global_batch=16 needs 2"),
    "too little data": (["--global-batch", "64"], "larger than the data set of 16 images"),
    "negative": (["--blr", "-1"], "blr=-1.0: must not be negative"),
    "resume": (["--resume", "required"], "resume=required:"),
    "no apex": (["--optimizer", "apex"], "optimizer=apex: NVIDIA apex is not installed"),
    "config and preset": (
        ["--config", "run.json"],
        "config=run.json: is a whole run and takes no preset=debug; give one of the two",
    ),
    "infinite rate": (["--blr", "inf"], "error: blr=inf: must be finite"),
    "infinite length": (["--epochs", "inf"], "error: epochs=inf: must be finite"),
    "infinite wait": (["--timeout", "inf"], "error: timeout=inf: must be finite"),
    "infinite warm-up": (["--warmup-epochs", "inf"], "error: warmup_epochs=inf: must be finite"),
    "no ratio": (["--mask-ratio", "nan"], "error: mask_ratio=nan: must be finite"),
    "negative seed": (["--seed", "-1"], "seed=-1: must lie in [0, 2**31)"),
    "large seed": (["--seed", str(2**31)], "seed=2147483648: must lie in [0, 2**31)"),
    # int(64 * 0.02) = 1 in the encoder, int(32 * 0.02) = 0 in a decoder
    "thin MLP": (["--mlp-ratio", "0.02"], "mlp_ratio=0.02: leaves an MLP without hidden units"),
    "negative MLP": (["--mlp-ratio", "-4"], "mlp_ratio=-4.0: leaves an MLP without hidden units"),
    "gray images": (["--in-chans", "1"], "in_chans=1: images are read as RGB; leave it at 3"),
    "no step": (
        ["--epochs", "0.001"],
        "epochs=0.001: less than a step, an epoch has 2 steps; raise --epochs or give --steps",
    ),
    "short profile": (
        ["--profile", "--steps", "12"],
        "profile=True: traces steps 11 to 13, the run has 12 steps; give more --steps or leave",
    ),
    "depth alone": (
        ["--depth", "24"],
        "taps=3,6,9,12: must end at block 24 (depth), so that every block is trained; "
        "use --taps even",
    ),
    "no decoder": (["--taps", "even:0"], "error: taps=even:0: must be even, even:N (N from 1) or"),
    "too many decoders": (
        ["--taps", "even:13"],
        "taps=even:13: more decoders than blocks; use at most even:12 (depth)",
    ),
    "switch with =": (
        ["--norm-pix=false"],
        "--norm-pix=false: takes no value; use --norm-pix or --no-norm-pix",
    ),
    "switch with a word": (
        ["--norm_pix", "False"],
        "--norm-pix=False: takes no value; use --norm-pix or --no-norm-pix",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_command_line(name: str, data: Path, tmp_path: Path, capsys) -> None:
    words, expected = CASES[name]
    base = ["--preset", "debug", "--data", str(data), "--output", str(tmp_path / "run")]
    assert expected in error_of([*base, *words], capsys)


def test_bfloat16_runs_on_a_cpu(data: Path, tmp_path: Path) -> None:
    words = [
        "--preset",
        "debug_mae",
        "--depth",
        "2",
        "--data",
        str(data),
        "--steps",
        "1",
        "--deepspeed_config",
        str(ROOT / "ds_configs" / "a100_bf16.json"),
        "--output",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [sys.executable, "launcher/pretrain.py", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 1/1" in done.stdout
    assert "taps=(2,)" in done.stdout, "MAE's tap follows the depth"


def test_no_preset(capsys) -> None:
    assert "preset: missing; give --preset with one of quickstart" in error_of([], capsys)
    assert "preset: missing" in error_of(["--no-norm-pix", "--prefetch", "3"], capsys)
    for words, near in ((["--presett", "debug"], "preset"), (["--confg=run.json"], "config")):
        assert f"{words[0]}: unknown flag; did you mean --{near}?" in error_of(words, capsys)


def test_config_file(tmp_path: Path, capsys) -> None:
    assert "nowhere.json: cannot be read" in error_of(["--config", "nowhere.json"], capsys)
    path = tmp_path / "run.json"
    path.write_text("[1]")
    assert f"{path}: must hold a JSON object" in error_of(["--config", str(path)], capsys)
    path.write_text('{"blr": Infinity}')
    assert "error: blr=inf: must be finite" in error_of(["--config", str(path)], capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [],
            ["preset debug: data=DATA output=RUN steps=1", "8 = 8 x 1 micro-batch x 1 replica; lr"],
        ),
        (
            ["--microbatches", "2"],
            [
                "preset debug: data=DATA output=RUN steps=1 microbatches=2",
                "16 = 8 x 2 micro-batches x 1 replica; lr",
            ],
        ),
    ],
)
def test_start_says_what_was_set(
    words: list[str], expected: list[str], data: Path, tmp_path: Path
) -> None:
    base = ["--preset", "debug", "--data", str(data), "--output", str(tmp_path), "--steps", "1"]
    lines = list(describe(prepare(parse_run([*base, *words], prog="pretrain"))))
    assert lines[0].replace(str(data), "DATA").replace(str(tmp_path), "RUN") == expected[0]
    assert any(line.startswith(expected[1]) for line in lines)


def test_a_run_needs_no_preset(data: Path, tmp_path: Path) -> None:
    config = RunConfig(
        data=str(data), output=str(tmp_path), steps=1, global_batch=16, microbatch_size=16
    )
    assert next(describe(prepare(config))).startswith("preset none: data=")


def test_help_of_a_group(capsys) -> None:
    for words in (["data", "--help"], ["data", "-h"], ["data"]):
        deepmim_scale(words)
        out = capsys.readouterr().out
        assert "data scan " in out
        assert "evaluate" not in out
    with pytest.raises(SystemExit) as stop:
        deepmim_scale(["data", "scna"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: data scna: unknown command; see deepmim-scale data --help\n"
    )


def test_data_folder(tmp_path: Path, capsys) -> None:
    base = ["--preset", "debug", "--output", str(tmp_path / "run")]
    assert "data: missing" in error_of(base, capsys)
    missing = tmp_path / "missing"
    assert f"data={missing}: must be an image folder" in error_of(
        [*base, "--data", str(missing)], capsys
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "readme.md").write_text("nothing here")
    found = error_of([*base, "--data", str(empty)], capsys)
    assert "no images" in found
    assert "1 .md" in found


def test_output_folder(tmp_path: Path, data: Path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    words = ["--preset", "debug", "--data", str(data), "--output", str(tmp_path)]
    assert "holds other files; choose an empty folder" in error_of(words, capsys)


JSONS = {
    "syntax": ('{\n  "zero_optimization": {,}\n}', "no valid JSON at line 2 column 25"),
    "top-level typo": (
        {"grandient_accumulation_steps": 2},
        "did you mean gradient_accumulation_steps?",
    ),
    "nested typo": (
        {"zero_optimization": {"stage": 2, "reduce_bucket": 5}},
        "zero_optimization.reduce_bucket: unknown key; did you mean "
        "zero_optimization.reduce_bucket_size?",
    ),
    "stage": ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3: must be 2"),
    "type": (
        {"gradient_clipping": "much", "zero_optimization": {"stage": 2}},
        "gradient_clipping='much': must be a number",
    ),
    "elsewhere": ({"optimizer": {}, "zero_optimization": {"stage": 2}}, "optimizer: not taken"),
    "disagrees": (
        {"gradient_accumulation_steps": 7, "zero_optimization": {"stage": 2}},
        "gradient_accumulation_steps=7: the command line gives 1",
    ),
    "fp16 on a CPU": (
        {
            "torch_autocast": {"enabled": True, "dtype": "float16"},
            "zero_optimization": {"stage": 2},
        },
        "float16 needs a GPU",
    ),
    "list": ("[]", "must hold a JSON object"),
    **{
        key: ({key: value, "zero_optimization": {"stage": 2}}, f"{key}: not taken from this file")
        for key, value in (
            ("wall_clock_breakdown", True),
            ("prescale_gradients", True),
            ("gradient_predivide_factor", 2.0),
            ("seq_parallel_communication_data_type", "fp32"),
        )
    },
    "no such type": (
        {"communication_data_type": "int8", "zero_optimization": {"stage": 2}},
        "communication_data_type='int8': must be one of fp16, bf16, fp32",
    ),
    "no printing": (
        {"steps_per_print": 0, "zero_optimization": {"stage": 2}},
        "steps_per_print=0: must be at least 1",
    ),
    "no bucket": (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}},
        "zero_optimization.reduce_bucket_size=0: must be at least 1",
    ),
    "endless bucket": (
        {"zero_optimization": {"stage": 2, "allgather_bucket_size": float("inf")}},
        "zero_optimization.allgather_bucket_size=inf: must be at least 1",
    ),
    "dtype": (
        {"torch_autocast": {"enabled": True, "dtype": "fp16"}, "zero_optimization": {"stage": 2}},
        "must be bfloat16 or float16",
    ),
}


@pytest.mark.parametrize("name", JSONS)
def test_deepspeed_json(name: str, data: Path, tmp_path: Path, capsys) -> None:
    content, expected = JSONS[name]
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    words = ["--preset", "debug", "--data", str(data), "--output", str(tmp_path / "run")]
    found = error_of([*words, "--deepspeed_config", str(path)], capsys)
    assert expected in found


def test_wrong_apex(data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    site = tmp_path / "site"
    (site / "apex").mkdir(parents=True)
    (site / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(site))
    words = ["--preset", "debug", "--data", str(data), "--output", str(tmp_path / "run")]
    assert "PyPI's web toolkit" in error_of([*words, "--optimizer", "apex"], capsys)


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "deepmim_scale.cli"],
        ["launcher/pretrain.py"],
    ],
)
def test_help_is_quick(command: list[str]) -> None:
    """It imports none of the libraries that take seconds."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0
    assert "pretrain" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "deepmim_scale.arguments" in imported, "the list of imports is empty"
    slow = {"torch", "torchvision", "deepspeed", "timm", "matplotlib", "tensorboard", "triton"}
    assert not imported & slow


def test_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "launcher/pretrain.py", "--preset", "debug", "--taps", "99"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: taps=99: must end at block 12 (depth), so that every block is trained; "
        "use --taps even\n"
    )
