"""Every mistake in flags and folders gets one line with key, value and remedy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deepmim_scale.arguments import parse_run
from deepmim_scale.cli import main as deepmim_scale
from deepmim_scale.config import RunConfig
from deepmim_scale.train.prepare import describe, prepare

ROOT = Path(__file__).resolve().parents[2]
ErrorOf = Callable[[list[str]], str]


CASES: dict[str, tuple[list[str], str]] = {
    "unknown flag": (["--detph", "3"], "--detph: unknown flag; did you mean --depth?"),
    "unknown preset": (["--preset", "vit"], "preset=vit: unknown; choose one of quickstart"),
    "not a number": (["--depth", "deep"], "error: depth=deep: must be a whole number"),
    "tap beyond depth": (["--taps", "6,14"], "taps=6,14: must end at block 12 (depth)"),
    "taps unordered": (["--taps", "8,6,12"], "taps=8,6,12: must be increasing"),
    "image and patch": (["--img-size", "65"], "img_size=65: must be divisible by patch_size=8"),
    "heads": (["--num-heads", "5"], "embed_dim=64: must be divisible by num_heads=5; e.g. 60 or"),
    "mask": (["--mask-ratio", "1"], "mask_ratio=1.0: leaves 0 of 64 patches visible"),
    "batch": (["--global-batch", "12"], "global_batch=12: must be divisible by microbatch_size"),
    "two batches": (["--global-batch", "16", "--microbatches", "3"], "global_batch=16 needs 2"),
    "too little data": (["--global-batch", "64"], "larger than the data set of 16 images"),
    "negative": (["--blr", "-1"], "error: blr=-1.0: must be positive"),
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
    "negative MLP": (["--mlp-ratio", "-4"], "error: mlp_ratio=-4.0: must be positive"),
    "gray images": (
        ["--in-chans", "1"],
        "has no statistics of its channels; run `deepmim-scale data stats",
    ),
    "no step": (
        ["--epochs", "0.001"],
        "epochs=0.001: less than a step, an epoch has 2 steps; raise --epochs or give --steps",
    ),
    "short profile": (
        ["--profile", "--steps", "12"],
        "profile=True: traces steps 11 to 13, the run has 12 steps; give more --steps or leave",
    ),
    "late trace": (
        ["--trace", "13", "--steps", "12"],
        "trace=13: the run has 12 steps; give one of them",
    ),
    "depth alone": (
        ["--depth", "24"],
        (
            "taps=3,6,9,12: must end at block 24 (depth), so that every block is trained; "
            "use --taps even"
        ),
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
    "long wait": (["--timeout", "1e20"], "error: timeout=1e+20: must be at most 1e6"),
    "long run": (["--epochs", "1e300"], "error: epochs=1e+300: must be at most 1e6"),
    "long warm-up": (["--warmup-epochs", "1e300"], "warmup_epochs=1e+300: must lie in [0, 1e6]"),
    "never valid": (["--validate-every", "1e300"], "validate_every=1e+300: must lie in [0, 1e6]"),
    "no rate": (["--blr", "0"], "error: blr=0.0: must be positive"),
    "wild rate": (["--blr", "1e10"], "error: blr=10000000000.0: must be at most 1000"),
    "deep": (["--depth", "99999"], "error: depth=99999: must be at most 1024"),
    "wide": (["--embed-dim", "1" * 400], "must be at most 65536"),
    "gap in taps": (["--taps", "3,,12"], "error: taps=3,,12: must be even, even:N (N from 1) or"),
    "two lengths": (
        ["--steps", "5", "--epochs", "10"],
        "error: steps=5: is a length, as epochs=10 is; give one of the two",
    ),
    "micro-batches": (
        ["--microbatches", "1000000"],
        "error: microbatches=1000000: must be at most 4096",
    ),
    "large batch": (
        ["--global-batch", "1000000"],
        (
            "error: global_batch=1000000: needs 125000 micro-batches of microbatch_size=8 on 1 "
            "replica, at most 4096 are built; raise --microbatch-size or lower --global-batch"
        ),
    ),
    "MAE's size": (["--loss", "cosine"], "error: teacher=ViT-B-16-quickgelu: 197 tokens from"),
    "no value": (["--blr"], "error: --blr: needs a value; give one after it"),
    "no preset's name": (["--preset"], "error: --preset: needs a value; give one after it"),
    "true": (["--seed", "true"], "error: seed=true: must be a whole number"),
    "several": (["--hybrid-alphas", "0", "x"], "error: hybrid_alphas=0,x: must be a number, or"),
    "choice": (["--optimizer", "lamb"], "error: optimizer=lamb: must be one of adamw, apex"),
    "stray word": (["train"], "error: train: unknown word; flags begin with --, see pretrain"),
    "two lines": (["--target", "a\nb"], "error: target=a b: unknown; choose one of pixel"),
    "old target": (["--loss", "mse"], "error: target=mse: unknown; choose one of pixel, clip"),
    "hybrid": (["--hybrid", "nowhere"], "error: nowhere: is no run (config.json is missing)"),
    "their checkpoint": (
        ["--resume", "checkpoint-799.pth"],
        (
            "error: resume=checkpoint-799.pth: must be one of auto, never, required; MAE's "
            "--resume is --resume auto, which goes on in the folder --output, here"
        ),
    ),
    "MAE's flag": (
        ["--batch_size", "64"],
        "error: --batch_size: unknown flag; MAE's --batch_size is --microbatch-size here",
    ),
    "MAE's flag, with =": (
        ["--num-workers=10"],
        "error: --num-workers=10: unknown flag; MAE's --num_workers is --loader-threads here",
    ),
    "before other mistakes": (
        ["--depth", "24", "--amp"],
        "error: --amp: unknown flag; MAE's --amp is --deepspeed_config, e.g. ds_configs/",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_command_line(name: str, data: Path, tmp_path: Path, error_of: ErrorOf) -> None:
    words, expected = CASES[name]
    base = ["--preset", "debug", "--data", str(data), "--output", str(tmp_path / "run")]
    assert expected in error_of([*base, *words])


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


def test_no_preset(error_of: ErrorOf) -> None:
    assert "preset: missing; give --preset with one of quickstart" in error_of([])
    assert "preset: missing" in error_of(["--no-norm-pix", "--prefetch", "3"])
    for words, near in ((["--presett", "debug"], "preset"), (["--confg=run.json"], "config")):
        assert f"{words[0]}: unknown flag; did you mean --{near}?" in error_of(words)


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


def test_help_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_data_folder(tmp_path: Path, error_of: ErrorOf) -> None:
    base = ["--preset", "debug", "--output", str(tmp_path / "run")]
    assert "data: missing" in error_of(base)
    missing = tmp_path / "missing"
    assert f"data={missing}: must be an image folder" in error_of([*base, "--data", str(missing)])
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "readme.md").write_text("nothing here")
    found = error_of([*base, "--data", str(empty)])
    assert "no images" in found
    assert "1 .md" in found


def test_output_folder(tmp_path: Path, data: Path, error_of: ErrorOf) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    words = ["--preset", "debug", "--data", str(data), "--output", str(tmp_path)]
    assert "holds other files; choose an empty folder" in error_of(words)


def test_wrong_apex(
    data: Path, tmp_path: Path, error_of: ErrorOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "apex").mkdir(parents=True)
    (site / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(site))
    words = ["--preset", "debug", "--data", str(data), "--output", str(tmp_path / "run")]
    assert "PyPI's web toolkit" in error_of([*words, "--optimizer", "apex"])


@pytest.mark.parametrize(
    "command",
    [["-m", "deepmim_scale.cli"], ["launcher/pretrain.py"], ["-m", "deepmim_scale.cli", "presets"]],
)
def test_help_needs_no_torch(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0
    assert "pretrain" in done.stdout or "presets" in done.stdout
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tyro" in modules, "the list of imports is there"
    slow = {"torch", "torchvision", "deepspeed", "open_clip", "timm", "matplotlib", "triton"}
    assert not modules & slow


LARGE = ["--global-batch 1000000", "--microbatches 1000000", "--loss cosine", "--depth 99999"]


@pytest.mark.parametrize("words", LARGE)
def test_nothing_is_built_before(
    words: str, data: Path, error_of: ErrorOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: object) -> None:
        raise AssertionError("the check comes too late")

    monkeypatch.setattr("deepmim_scale.train.prepare.training_plan", built)
    monkeypatch.setattr("deepmim_scale.objectives.clip_teacher.load_teacher", built)
    error_of(["--preset", "debug", "--data", str(data), *words.split()])


def test_method_beside_a_preset(data: Path) -> None:
    for method, taps in (
        ("mae", (12,)),
        ("mirl", (2, 4, 6, 8, 10, 12)),
        ("deepmim", (3, 6, 9, 12)),
    ):
        words = ["--preset", "debug", "--data", str(data), "--method", method]
        assert parse_run(words, prog="pretrain").model.taps == taps


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
