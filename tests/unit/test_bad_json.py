"""Every mistake in a file, of --config or of DeepSpeed, gets one line with key and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ErrorOf = Callable[[list[str]], str]


def test_no_config_file(tmp_path: Path, error_of: ErrorOf) -> None:
    assert "nowhere.json: cannot be read" in error_of(["--config", "nowhere.json"])
    path = tmp_path / "run.json"
    path.write_text("[1]")
    assert f"{path}: must hold a JSON object" in error_of(["--config", str(path)])


# What a file holds, and what is said behind its name.
FILES: dict[str, tuple[str | bytes, str]] = {
    "UTF-16": ('{"seed": 1}'.encode("utf-16"), "no UTF-8 text at byte 0; give a JSON file"),
    "binary": (bytes(range(128, 256)), "no UTF-8 text at byte 0"),
    "deep": ('{"model":' * 100_000, "nested too deeply; write plain objects"),
    "key twice": ('{"seed": 1, "seed": 2}', "seed: given twice in one object; keep one"),
    "infinite": ('{"blr": Infinity}', "blr=inf: must be finite"),
    "true for a number": ('{"seed": true}', "seed=true: must not be true or false"),
    "true inside": ('{"model": {"depth": true}}', "depth=true: must not be true or false"),
    "another version": ('{"sede": 1}', "sede=1: unknown key; did you mean seed?"),
    "another version's model": ('{"model": {"num_experts": 8}}', "num_experts=8: unknown key;"),
    "another version's value": ('{"optimizer": "lamb"}', "optimizer=lamb: must be one of adamw"),
    "another version's preset": ('{"preset": "vit_22b"}', "preset=vit_22b: unknown; choose one of"),
    "rule": ('{"model": {"taps": [3, 6]}}', "taps=3,6: must end at block 12 (depth)"),
    "no object": ('{"model": 12}', "model=12: must be an object"),
}


@pytest.mark.parametrize("name", FILES)
def test_config_file_names_itself(name: str, tmp_path: Path, error_of: ErrorOf) -> None:
    content, expected = FILES[name]
    path = tmp_path / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert error_of(["--config", str(path)]).startswith(f"error: {path}: {expected}")


def test_config_file_with_flags(tmp_path: Path, error_of: ErrorOf) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"model": {"taps": [3, 12]}}')
    found = error_of(["--config", str(path), "--depth", "24"])
    assert found.startswith(f"error: {path}: taps=3,12: must end at block 24"), "the file's taps"
    found = error_of(["--config", str(path), "--blr", "0"])
    assert found.startswith("error: blr=0.0: must be positive"), "the flag's own value"


JSONS: dict[str, tuple[str | dict[str, Any], str]] = {
    "syntax": ('{\n  "zero_optimization": {,}\n}', "no valid JSON at line 2 column 25"),
    "top-level typo": (
        {"grandient_accumulation_steps": 2},
        "did you mean gradient_accumulation_steps?",
    ),
    "nested typo": (
        {"zero_optimization": {"stage": 2, "reduce_bucket": 5}},
        (
            "zero_optimization.reduce_bucket: unknown key; did you mean "
            "zero_optimization.reduce_bucket_size?"
        ),
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
        "allgather_bucket_size=inf: must be finite",
    ),
    "dtype": (
        {"torch_autocast": {"enabled": True, "dtype": "fp16"}, "zero_optimization": {"stage": 2}},
        "must be bfloat16 or float16",
    ),
}


@pytest.mark.parametrize("name", JSONS)
def test_deepspeed_json(name: str, data: Path, tmp_path: Path, error_of: ErrorOf) -> None:
    content, expected = JSONS[name]
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    words = ["--preset", "debug", "--data", str(data), "--output", str(tmp_path / "run")]
    found = error_of([*words, "--deepspeed_config", str(path)])
    assert expected in found
