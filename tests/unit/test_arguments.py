"""The command line: its help, its flags' names, and what is checked before a command works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deepmim_scale
from deepmim_scale import arguments
from deepmim_scale.arguments import parse_run, run_command, writable
from deepmim_scale.cli import COMMANDS
from deepmim_scale.cli import main as deepmim_scale_main
from deepmim_scale.config import RunConfig
from deepmim_scale.errors import RunFailure, UserError
from deepmim_scale.flags import MAE_FLAGS, flags_of, given_flags, modernize
from deepmim_scale.plan.cost import model_cost
from deepmim_scale.presets import PRESETS, load_preset

ROOT = Path(__file__).resolve().parents[2]


def test_writable_leaves_files_as_they_are(tmp_path: Path) -> None:
    new, old = tmp_path / "deep" / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    assert (writable("json", str(new)), writable("json", old)) == (new, old)
    assert new.parent.is_dir()
    assert not new.exists(), "a command that fails must leave no empty file"
    assert old.read_text() == "kept"


@pytest.mark.parametrize("path", ["/proc/nowhere/x.json", "FILE/x.json", "FOLDER"])
def test_not_writable(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = path.replace("FILE", f"{tmp_path}/file").replace("FOLDER", str(tmp_path))
    with pytest.raises(UserError, match=r"^json=\S+: cannot be written \(.+\); choose another$"):
        writable("json", path)


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Each flag of the help with its text; a flag that stands there twice fails."""
    with pytest.raises(SystemExit) as stop:
        parse_run([*words, "--help"], prog="pretrain")
    assert stop.value.code == 0
    texts: dict[str, str] = {}
    flag = ""
    for line in capsys.readouterr().out.splitlines():
        found = re.match(r"(?:\u2502 |  )(--[a-z][\w-]*)", line)
        if found:
            flag = found[1]
            assert flag not in texts, f"{flag} stands in the help twice"
            texts[flag] = ""
        elif re.match(" [^ ]|[\u256d\u2570]", line):  # title or end of a group
            flag = ""
        if flag:
            texts[flag] += line.strip("\u2502 ") + " "
    return texts


def flat(config: RunConfig) -> dict[str, Any]:
    values = dict(config)
    return {key: value for key, value in values.items() if key != "model"} | dict(config.model)


def shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("preset", ["", "quickstart", "debug_mirl", "deepmim_clip_vit_b_12"])
def test_help_shows_the_true_defaults(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = help_of(["--preset", preset] if preset else [], capsys)
    expected = flat(load_preset(preset) if preset else RunConfig())
    named = {"from_step": "--from"}
    flags = {key: named.get(key, f"--{key.replace('_', '-')}") for key in [*expected, "config"]}
    assert set(texts) == set(flags.values())
    for key, value in expected.items():
        text = " ".join(texts[flags[key]].split())
        defaults = re.findall(r"\(default: ([^()]*)\)$", text)
        if value in ("", None, ()):
            assert not re.search(r"\(default: (''|None)?\)", text), f"{key}: {text}"
        else:
            assert defaults == [shown(value)], f"{key}: {text}"
        assert text.count("(default") <= 1, f"{key}: {text}"


def test_help_says_where_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    texts = help_of([], capsys)
    words = set(re.findall(r"\w+", texts["--preset"]))
    assert words >= set(PRESETS)
    metavars = {"preset": "NAME", "config": "FILE", "data": "DIR", "output": "DIR"}
    metavars |= {"deepspeed-config": "FILE", "schedule-file": "FILE", "teacher": "NAME|FILE|RUN"}
    for flag, metavar in metavars.items():
        assert texts[f"--{flag}"].split()[1] == metavar


def test_help_of_a_saved_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"blr": 0.5}')
    assert "(default: 0.5)" in help_of(["--config", str(path)], capsys)["--blr"]


def documented() -> dict[str, str]:
    """MAE's flags of docs/pretrain.md, and what stands beside each."""
    page = (ROOT / "docs" / "pretrain.md").read_text()
    table = page.partition("## MAE's flags and ours")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `--")]
    return {flag: ours for theirs, ours in rows for flag in re.findall(r"--\w+", theirs)}


def test_the_documented_flags_are_the_hints() -> None:
    rows, known = documented(), flags_of(RunConfig)
    assert set(MAE_FLAGS) <= set(rows), "every hint is documented"
    for flag, ours in rows.items():
        named = re.findall(r"--[\w-]+", ours)
        if flag in MAE_FLAGS:
            hinted = re.findall(r"--[\w-]+", MAE_FLAGS[flag])
            assert set(hinted) <= {*named, "--output"}, flag
            assert bool(hinted) == bool(named), flag
        elif flag != "--local_rank":  # the launcher's, taken without a word
            assert named[0] == flag.replace("_", "-"), f"{flag} has our name or a hint"
    for name in re.findall(r"--[\w-]+", " ".join(MAE_FLAGS.values())):
        assert name.replace("_", "-") in {**known, "--preset": False}


def test_flags_as_given() -> None:
    words = [
        "--taps",
        "3",
        "6",
        "12",
        "--blr=-1",
        "--norm_pix",
        "--json",
        "a=b",
        "--",
        "--steps",
        "5",
    ]
    expected = {"--taps": "3,6,12", "--blr": "-1", "--norm-pix": "", "--json": "a=b"}
    assert given_flags(words) == expected


def test_older_flags() -> None:
    assert modernize(["--loss", "cosine", "--hybrid=RUN"]) == [
        *("--target", "cosine"),
        *("--target", "hybrid", "--teacher", "RUN"),
    ]
    config = parse_run(["--preset", "debug", "--hybrid", "RUN"], prog="pretrain")
    assert (config.model.target, config.model.teacher) == ("hybrid", "RUN")
    config = parse_run(["--preset", "debug", "--loss=cosine"], prog="pretrain")
    assert config.model.target == "clip"


def test_flags_under_another_name() -> None:
    from deepmim_scale.evaluate.commands import KnnArguments

    assert "--json" in flags_of(KnnArguments)
    assert "--json-file" not in flags_of(KnnArguments)


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("blr=a\nb: rule"), 2), (RunFailure("broken\n"), 1)]
)
@pytest.mark.parametrize("local_rank", ["", "0", "1"])
def test_one_rank_of_a_machine_speaks(
    error: Exception,
    code: int,
    local_rank: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)

    def command() -> None:
        os.environ["LOCAL_RANK"] = "0"  # as two processes that share a GPU are told
        raise error

    monkeypatch.setattr(arguments, "SECONDS_TO_SPEAK", 0.0)
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert stop.value.code == code
    assert capsys.readouterr().err.count("\n") == (local_rank != "1")


def test_one_line_under_torchrun(tmp_path: Path) -> None:
    code = """
import os
from deepmim_scale.arguments import run_command
from deepmim_scale.errors import UserError
def command():
    os.environ["LOCAL_RANK"] = "0"
    raise UserError("key=value: rule; remedy")
run_command(command)
"""
    script = tmp_path / "run.py"
    script.write_text(code)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 1, "torchrun reports that a process failed"
    assert done.stderr.count("error: key=value: rule; remedy") == 1, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    deepmim_scale_main(["--version"])
    version = re.escape(deepmim_scale.__version__)
    assert re.fullmatch(rf"deepmim_scale {version}\n", capsys.readouterr().out)
    assert re.fullmatch(r"\d+\.\d+\.\d+", deepmim_scale.__version__)
    asked = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == deepmim_scale.__version__


def test_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "presets.json"
    deepmim_scale_main(["presets", "--json", str(path)])
    head, *lines, legend = capsys.readouterr().out.splitlines()
    rows = json.loads(path.read_text())
    assert [line.split()[0] for line in lines] == [row["preset"] for row in rows] == list(PRESETS)
    assert "GFLOPs/image" in head
    assert "blocks x width" in legend
    by_name = {row["preset"]: row for row in rows}
    clip, plain = by_name["deepmim_clip_vit_b_12"], by_name["deepmim_vit_b_12"]
    assert plain["parameters"] == 139_494_656  # of the official constructor, see test_models.py
    assert (plain["method"], plain["target"], clip["target"]) == ("deepmim", "pixel", "clip")
    assert plain["encoder"] == {"depth": 12, "width": 768, "heads": 12}
    assert plain["decoders"] == {"taps": [6, 8, 10, 12], "depth": 4, "width": 512}
    cost = model_cost(load_preset("deepmim_vit_b_12").model)
    assert plain["training_gflops_per_image"] == pytest.approx(
        cost.executed.training_flops / 1e9, abs=1e-3
    )
    assert clip["training_gflops_per_image"] > plain["training_gflops_per_image"], "its teacher"
    assert by_name["mirl_vit_b_48"]["recipe"] == "russellllaputa/MIRL"
    assert by_name["quickstart"]["recipe"] == "deepmim_scale"


def test_presets_in_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    deepmim_scale_main([])
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {words}\s", out, re.MULTILINE) for words in COMMANDS)
    assert "--version" in out


COMMAND_LINES = {
    "study": "output: missing; give --output",
    "study --output RUN --depths 12,x --dry-run": "depths=12,x: must be whole numbers as 12,24",
    "study --output RUN --steps many --dry-run": "steps=many: must be a whole number",
    "study --output RUN --data": "--data: needs a value; give one after it",
    "study --output RUN stray --dry-run": "stray: unknown word; flags of pretrain come after `--`",
    "plan --nodes 2": "preset: missing; give --preset",
    "plan --preset debug --nodes 0": "nodes=0: must be positive",
    "data scan": "dir: missing; give it behind the command",
    "evaluate knn --jsn x": "--jsn: unknown flag; did you mean --json?",
    "schedule --preset debug --stages 2 --microbatches 1000000": "microbatches=1000000: must be at",
    "presets --json /proc/nowhere/x": "json=/proc/nowhere/x: cannot be written (",
    "presets debug": "debug: unknown word; flags begin with --, see deepmim-scale presets --help",
    "preset": "preset: unknown command; see deepmim-scale --help",
}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_says_it_in_one_line(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        deepmim_scale_main(line.replace("RUN", str(tmp_path / "run")).split())
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith(f"error: {COMMAND_LINES[line]}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "must hold a JSON object"),
        ("{}", "settings: missing; it is no study's"),
        ('{"settings": {}, "environment": 5}', "environment: missing; it is no study's"),
    ],
)
def test_a_study_goes_on_only_in_its_own_folder(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "study.json").write_text(content)
    words = ["study", "--output", str(tmp_path), "--dry-run", "--gpus-per-node", "4"]
    with pytest.raises(SystemExit) as stop:
        deepmim_scale_main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/study.json: {expected}")


def test_a_run_of_another_version_is_named(tmp_path: Path) -> None:
    from deepmim_scale.runs.folder import load_run_config

    (tmp_path / "config.json").write_text('{"model": {"num_experts": 8}}')
    with pytest.raises(UserError, match=r"config\.json: num_experts=8: unknown key"):
        load_run_config(tmp_path)
