"""The scaling study: cells, order, resumption, statistics, refusals, files; nothing is trained."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepmim_scale.arguments import parse
from deepmim_scale.cli import main
from deepmim_scale.config import RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.json_file import replace_text
from deepmim_scale.study import report, runner
from deepmim_scale.study.cells import Cell, build_cells
from deepmim_scale.study.settings import StudyArguments, check_folder, command, resolve

SMALL = [
    "--preset",
    "debug",
    "--depths",
    "4,8",
    "--stages",
    "2",
    "--steps",
    "12",
    "--warmup-steps",
    "2",
    "--gpus-per-node",
    "2",
    "--data",
    "pictures",
]
NAMES = ["d4_p1_dib", "d4_p2_1f1b", "d4_p2_dib", "d8_p1_dib", "d8_p2_1f1b", "d8_p2_dib"]


def study(output: Path, *words: str) -> StudyArguments:
    return resolve(
        parse(StudyArguments, ["--output", str(output), *words], prog="study"), num_gpus=0
    )


def cells_of(output: Path, *words: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in build_cells(study(output, *words))}


def write_run(
    folder: Path, run: str, rates: Sequence[float], losses: Sequence[float | None]
) -> None:
    """metrics.jsonl of a run, as the trainer writes it."""
    path = folder / "runs" / run / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "loss": loss,
            "losses": {"block02": 1.0, "block04": loss},
            "images_per_second": rate,
            "images_per_second_per_gpu": rate / 2,
            "tflops_per_gpu": rate / 1000,
            "peak_memory_gib": [1.0, 1.0 + step],
            "idle_fraction": [0.1, 0.3],
        }
        for step, (rate, loss) in enumerate(zip(rates, losses, strict=True), start=1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_cells(tmp_path: Path) -> None:
    found = cells_of(tmp_path, *SMALL)
    assert list(found) == NAMES, "by depth, its baseline first"
    baseline, pipeline = found["d8_p1_dib"].job, found["d8_p2_1f1b"].job
    assert baseline is not None
    assert pipeline is not None
    assert (baseline.replicas, baseline.microbatches) == (2, 1)
    assert (pipeline.replicas, pipeline.microbatches) == (1, 2)
    assert baseline.config.model == pipeline.config.model, "the same mathematics"
    assert baseline.config.model.taps == (2, 4, 6, 8), "as many taps as the preset's"
    assert (pipeline.config.save_every, pipeline.config.validate_every) == (0, 0)


def test_taps_and_placements_follow_the_method(tmp_path: Path) -> None:
    own = cells_of(tmp_path, "--dry-run", "--depths", "12,24")
    taps = {name: cell.job.config.model.taps for name, cell in own.items() if cell.job}
    assert taps["d12_p1_dib"] == (6, 8, 10, 12), "the preset's own at its own depth"
    assert taps["d24_p4_dib"] == (6, 12, 18, 24)
    mirl = cells_of(
        tmp_path,
        "--dry-run",
        "--preset",
        "debug_mirl",
        "--depths",
        "12,13,18",
        "--stages",
        "2,3",
        "--gpus-per-node",
        "6",
    )
    placements = {name: c.job.config.placement for name, c in mirl.items() if c.job}
    assert (placements["d18_p2_dib"], placements["d18_p3_dib"]) == ("linear", "v")
    assert mirl["d13_p1_dib"].problem.startswith("depth=13: must be divisible by num_segments=6")


def test_users_flags_come_last(tmp_path: Path) -> None:
    found = cells_of(tmp_path, *SMALL, "--", "--taps", "even:2", "--save-every", "5")
    job = found["d4_p2_dib"].job
    assert job is not None
    assert job.config.model.taps == (2, 4)
    assert job.config.save_every == 5


def test_cells_that_cannot_be(tmp_path: Path) -> None:
    found = cells_of(
        tmp_path, *SMALL, "--stages", "2,3", "--gpus-per-node", "6", "--global-batch", "24"
    )
    assert found["d4_p2_dib"].problem == ""
    assert found["d4_p1_dib"].problem.startswith("global_batch=24: must be divisible by")
    found = cells_of(tmp_path, *SMALL, "--stages", "3")
    assert found["d4_p3_dib"].problem == "stages=3: must divide the 2 processes"
    found = cells_of(
        tmp_path, *SMALL, "--schedules", "dib_w,dib", "--", "--reduction", "per_microbatch"
    )
    assert found["d4_p2_dib_w"].problem.startswith("reduction=per_microbatch: schedule=dib_w")
    assert found["d4_p2_dib"].job is not None
    with pytest.raises(UserError, match="no cell can be run; the first, d4_p1_dib: --detph: unk"):
        build_cells(study(tmp_path, *SMALL, "--", "--detph", "4"))


def test_order_and_resumption(tmp_path: Path) -> None:
    args = study(tmp_path, *SMALL, "--depths", "4", "--repeats", "3")
    cells = build_cells(args)
    forth, back = NAMES[:3], NAMES[2::-1]
    todo = [cell.run(repeat) for cell, repeat in runner.unfinished(args, cells)]
    assert todo == [
        f"{name}_r{k}" for k, names in enumerate((forth, back, forth)) for name in names
    ]
    done, short, torn = todo[1], todo[2], todo[3]
    write_run(tmp_path, done, [1.0] * 12, [1.0] * 12)
    write_run(tmp_path, short, [1.0] * 11, [1.0] * 11)
    write_run(tmp_path, torn, [1.0] * 12, [1.0] * 12)
    path = tmp_path / "runs" / torn / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    left = [cell.run(repeat) for cell, repeat in runner.unfinished(args, cells)]
    assert left == [run for run in todo if run != done]


def test_launch_commands(tmp_path: Path) -> None:
    args = study(tmp_path, *SMALL, "--nodes", "2", "--hostfile", "hosts")
    words = runner.launch_command(args, build_cells(args)[1], "run")
    text = " ".join(words)
    assert "deepspeed.launcher.runner --num_accelerators 2 --hostfile hosts --num_nodes 2" in text
    assert "--module deepmim_scale.train.pretrain --preset debug" in text
    assert words[-2:] == ["--output", str(tmp_path / "runs" / "run")]
    alone = study(tmp_path, *SMALL, "--gpus-per-node", "1", "--stages", "1")
    words = runner.launch_command(alone, build_cells(alone)[0], "run")
    assert words[:3] == [sys.executable, "-m", "deepmim_scale.train.pretrain"]


def test_ratio_interval() -> None:
    rng = np.random.default_rng(1)
    base = 100 + rng.normal(size=(1, 400))
    ratio, low, high = report.ratio_interval(1.5 * base, base)
    assert ratio == pytest.approx(1.5)
    assert 1.49 < low < 1.5 < high < 1.51
    assert (ratio, low, high) == report.ratio_interval(1.5 * base, base), "a fixed seed"
    # Repeats are drawn in pairs: a machine that is twice as slow for a while changes no ratio.
    drift = np.array([[100.0], [50.0], [80.0]]) + rng.normal(size=(3, 50)) / 100
    _, low, high = report.ratio_interval(2 * drift, drift)
    assert 1.999 < low < high < 2.001
    # Repeats that disagree widen it, however steady their steps are.
    _, low, high = report.ratio_interval(drift, np.full_like(drift, 50.0))
    assert low < 1.01
    assert high > 1.99


def test_rows(tmp_path: Path) -> None:
    args = study(tmp_path, *SMALL, "--depths", "4", "--stages", "2,3")
    steps = np.arange(12.0)
    falling = [5.0 - 0.1 * step for step in range(12)]
    write_run(tmp_path, "d4_p1_dib_r0", (100 + steps).tolist(), falling)
    write_run(tmp_path, "d4_p2_1f1b_r0", [1.0, 1.0, *(50 + steps[2:])], falling)
    write_run(
        tmp_path, "d4_p2_dib_r0", (200 + steps).tolist(), [*falling[:5], None, *falling[6:11], 4.0]
    )
    rows = {
        row["schedule"] + str(row["stages"]): row
        for row in report.build_rows(args, build_cells(args))
    }
    base, slow, fast = rows["dib1"], rows["1f1b2"], rows["dib2"]
    assert base["images_per_second"] == pytest.approx(106.5), "steps 3 to 12"
    assert (base["ratio"], base["equal_loss"]) == (1.0, None)
    assert slow["images_per_second"] == pytest.approx(56.5), "without its slow warm-up"
    assert slow["images_per_second_p20"] == pytest.approx(53.8)
    assert slow["images_per_second_p80"] == pytest.approx(59.2)
    assert slow["ratio"] == pytest.approx(56.5 / 106.5)
    assert slow["ratio_low"] < slow["ratio"] < slow["ratio_high"]
    assert (slow["idle"], slow["peak_memory_gib"]) == (pytest.approx(0.2), 13.0)
    assert (slow["loss"], slow["last_decoder_loss"]) == (pytest.approx(3.9), pytest.approx(3.9))
    assert (slow["equal_loss"], slow["loss_difference"]) == (True, 0.0)
    assert fast["equal_loss"] is False
    assert fast["loss_difference"] == pytest.approx(0.1 / 3.9)
    assert fast["mfu"] is None, "a CPU has no peak"
    rates = [row["predicted_images_per_second"] for row in (slow, base)]
    assert slow["predicted_ratio"] == rates[0] / rates[1]
    assert rows["dib3"]["status"] == "not legal"
    assert report.notes(list(rows.values())) == [
        "losses differ from the baseline's, at most (d4_p2_dib by 2.6e-02)",
        "not legal: stages=3: must divide the 2 processes (d4_p3_1f1b, d4_p3_dib)",
    ]


def test_files_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made-up runs, shown by the real command: a dry run draws what is measured."""
    pytest.importorskip("matplotlib")
    for name in NAMES:
        write_run(tmp_path, f"{name}_r0", [10.0] * 12, [1.0] * 12)
    args = study(tmp_path, *SMALL)
    (tmp_path / "study.json").write_text(
        json.dumps({"settings": args.model_dump(mode="json"), "environment": {"device": "abacus"}})
    )
    words = ["--dry-run" if word == "--data" else word for word in SMALL if word != "pictures"]
    main(["study", "--output", str(tmp_path), *words])
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["environment"] == {"device": "abacus"}, "where it was measured"
    assert content["settings"]["data"] == "pictures"
    assert [row["status"] for row in content["rows"]] == ["done"] * 6
    with (tmp_path / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["images_per_second"]) for row in rows] == [10.0] * 6
    assert rows[1]["equal_loss"] == "True"
    page = (tmp_path / "study.md").read_text()
    assert "Measured: device abacus." in page
    assert sum(line.startswith("| ") for line in page.splitlines()) == 7
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"
    assert "| same loss |" in capsys.readouterr().out


def test_dry_run_in_a_process(tmp_path: Path) -> None:
    """12 to 48 blocks, 1 to 4 stages, two schedules."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "deepmim_scale.cli",
            "study",
            "--output",
            str(tmp_path / "study"),
            "--dry-run",
            "--gpus-per-node",
            "8",
            "--gpu",
            "v100-32g",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "study" / "study.json").read_text())["rows"]
    assert len(rows) == 4 * 5
    for row in rows:
        assert row["predicted_images_per_second"] > 0
        assert 0 < row["predicted_mfu"] < 0.38
        assert row["images_per_second"] is None
        assert row["loss"] is None
        assert row["status"] == "not run"
    assert [row["predicted_ratio"] for row in rows if row["stages"] == 1] == [1.0] * 4
    deepest = {(r["stages"], r["schedule"]): r for r in rows if r["depth"] == 48}
    assert deepest[4, "dib"]["simulated_idle"] < deepest[4, "1f1b"]["simulated_idle"]
    assert not (tmp_path / "study" / "runs").exists()
    assert "predicted images/s" in done.stdout


def test_failed_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes that fail in the three ways there are, then a second start that mends two."""
    out = tmp_path / "study"
    scripts = {
        "d4_p1_dib_r0": "print('[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried')",
        "d4_p2_1f1b_r0": "print('error: rank 1, forward: boom'); print('error: rank 0, waits')",
        "d4_p2_dib_r0": "import os; os.kill(os.getpid(), 9)",
    }

    def script(args: StudyArguments, cell: Cell, run: str) -> list[str]:
        launched.append(run)
        return [sys.executable, "-c", scripts[run]]

    launched: list[str] = []
    monkeypatch.setattr(runner, "launch_command", script)
    words = ["study", "--output", str(out), *SMALL, "--depths", "4"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 1
    assert launched == list(scripts)
    told = capsys.readouterr().out
    assert "[2/3] d4_p2_1f1b_r0: failed: rank 1, forward: boom; 0 s, about 0 s left" in told
    rows = json.loads((out / "study.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed"] * 3
    assert rows[0]["note"].startswith("out of memory: torch.OutOfMemoryError: CUDA out of memory")
    assert rows[2]["note"] == "killed by signal 9, as the system does when memory runs out"

    for run in ("d4_p1_dib_r0", "d4_p2_dib_r0"):
        write_run(tmp_path / run, run, [10.0] * 12, [1.0] * 12)
        source, target = tmp_path / run / "runs" / run, out / "runs" / run
        scripts[run] = f"import shutil; shutil.copytree({str(source)!r}, {str(target)!r})"
    launched.clear()
    for attempt in range(2):
        with pytest.raises(SystemExit):
            main(words)
        expected = list(scripts) if attempt == 0 else ["d4_p2_1f1b_r0"]
        assert launched == expected, "what is measured is not run again"
        launched.clear()
    rows = json.loads((out / "study.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["done", "failed", "done"]


def test_the_error_behind_pdsh(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\nnode-1.cluster slots=1\nnode-2.cluster slots=1\n")
    args = study(tmp_path / "study", *SMALL, "--hostfile", str(hosts))
    log = runner.log_of(args, "d4_p1_dib_r0")
    log.parent.mkdir(parents=True)
    said = ["node-2.cluster: error: kernels=triton: needs a GPU; use --kernels auto", "exit code 2"]
    log.write_text("\n".join(["pdsh@here: node-2.cluster: ssh exited with code 2", *said]) + "\n")
    assert runner.failure(args, "d4_p1_dib_r0").startswith("kernels=triton: needs a GPU")


def test_files_are_whole_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    replace_text(path, "old")
    with path.open() as reader:  # opened before, as another task of an array may
        replace_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_cut_off_run_is_no_failure(tmp_path: Path) -> None:
    args = study(tmp_path, *SMALL)
    (tmp_path / "runs").mkdir()
    log = runner.log_of(args, "d4_p1_dib_r0")
    log.write_text("starting\nerror: so far\n")
    assert runner.failure(args, "d4_p1_dib_r0") == ""
    log.write_text("starting\nerror: so far\n\nexit code 1\n")
    assert runner.failure(args, "d4_p1_dib_r0") == "so far"
    assert runner.failure(args, "d4_p2_dib_r0") == ""


def test_another_study_is_refused(tmp_path: Path) -> None:
    args = study(tmp_path, *SMALL, "--", "--blr", "1e-3")
    assert check_folder(args) == args, "an empty folder"
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="holds other files; choose an empty folder"):
        check_folder(args)
    content: dict[str, Any] = {"settings": args.model_dump(mode="json"), "environment": {}}
    (tmp_path / "study.json").write_text(json.dumps(content))
    extended = study(
        tmp_path,
        *SMALL,
        "--depths",
        "4,8,12",
        "--repeats",
        "2",
        "--schedules",
        "1f1b,dib,dib_w",
        "--gpu",
        "v100-32g",
        "--",
        "--blr",
        "1e-3",
    )
    assert check_folder(extended) == extended
    for words, key in [
        (["--steps", "13", "--", "--blr", "1e-3"], "steps=13: .* with steps=12"),
        (["--global-batch", "32", "--", "--blr", "1e-3"], "global_batch=32: .* global_batch=16"),
        ([], "flags="),
    ]:
        with pytest.raises(UserError, match=f"{key}.*choose another --output") as error:
            check_folder(study(tmp_path, *SMALL, *words))
        assert "\n" not in str(error.value)
    (tmp_path / "runs").rmdir()
    assert check_folder(study(tmp_path, *SMALL)).flags == (), "predictions bind to nothing"


MISTAKES = {
    "--preset debug": "data: missing; give an image folder, or --dry-run",
    "--dry-run --preset vit": "preset=vit: unknown; choose one of quickstart",
    "--dry-run --depths 4,x": "depths=4,x: must be whole numbers as 12,24",
    "--dry-run --depths 0": "depths=0: must be positive",
    "--dry-run --schedules dib,zb": "schedules=zb: unknown; use gpipe, 1f1b, dib, dib_w",
    "--dry-run --steps 5": "warmup_steps=10: must be less than steps=5",
    "--dry-run --gpu abacus": "gpu=abacus: unknown; use one of v100-16g",
    "--dry-run --depth 4": "--depth: unknown flag; did you mean --depths?",
    "--dry-run 4": "4: unknown word; flags of pretrain come after `--`",
    "--dry-run -- --steps 4": "--steps: is set by the study's own flags, those before `--`",
    "--data x --nodes 2": "nodes=2: need --hostfile FILE",
    "--dry-run --stages 5 --gpus-per-node 4 --microbatch-size 3": "no cell can be run; the first",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "--output", str(tmp_path / "study"), *words.split()])
    told = capsys.readouterr()
    assert stop.value.code == 2
    assert told.err.startswith(f"error: {MISTAKES[words]}")
    assert told.err.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_the_command_on_the_page_is_the_study(tmp_path: Path) -> None:
    args = study(tmp_path, *SMALL, "--dry-run", "--", "--blr", "1e-3")
    words = shlex.split(command(args))
    assert words[:2] == ["deepmim-scale", "study"]
    assert parse(StudyArguments, words[2:], prog="study") == args


def test_save_every() -> None:
    with pytest.raises(UserError, match="save_every=-1: must not be negative"):
        RunConfig(save_every=-1)
