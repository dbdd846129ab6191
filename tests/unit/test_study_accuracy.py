"""A study's accuracies: which checkpoints are evaluated, how often, and what the numbers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from deepmim_scale.arguments import parse
from deepmim_scale.cli import main
from deepmim_scale.errors import UserError
from deepmim_scale.plan.cost import model_cost
from deepmim_scale.study import accuracy, runner
from deepmim_scale.study.cells import Cell, build_cells
from deepmim_scale.study.settings import StudyArguments, check_folder, resolve
from deepmim_scale.study.statistics import interval, verdict

SMALL = ["--preset", "debug", "--depths", "4,8", "--stages", "2", "--gpus-per-node", "2"]
SMALL += ["--steps", "12", "--warmup-steps", "2", "--data", "pictures"]
EVALUATE = ["--evaluate", "knn --k 5,finetune --epochs 2"]


def study(output: Path, *words: str) -> tuple[StudyArguments, list[Cell]]:
    given = parse(StudyArguments, ["--output", str(output), *SMALL, *words], prog="study")
    args = resolve(given, num_gpus=0)
    return args, build_cells(args)


def finish(args: StudyArguments, run: str) -> None:
    """A run that came to its last step."""
    folder = runner.run_folder(args, run)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": args.steps}) + "\n")


def write(args: StudyArguments, task: accuracy.Task, **blocks: float) -> None:
    accuracy.result_file(args, task).write_text(json.dumps(blocks))


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.0, 5.0, 4.5, 4.0, 3.9], list(range(40))])
def test_interval_is_students(values: list[float]) -> None:
    mean, low, high = interval(values)
    expected = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    # Beyond 11 values the normal distribution stands in.
    assert (low, high) == pytest.approx(expected, rel=1e-3 if len(values) < 12 else 0.03)
    assert interval([7.0]) == (7.0, None, None)


def test_verdicts_need_intervals_without_zero() -> None:
    base = {"0": 50.0, "1": 60.0, "2": 70.0}
    assert verdict({k: v + 2 + 0.1 * float(k) for k, v in base.items()}, base).endswith(": better")
    assert verdict({k: v - 2 - 0.1 * float(k) for k, v in base.items()}, base).endswith(": worse")
    noisy = {"0": 55.0, "1": 57.0, "2": 72.0}
    assert verdict(noisy, base).endswith("no difference shown")
    assert verdict({"1": 61.0}, base) == "+1.0 points, one seed shows nothing"
    assert verdict({"9": 1.0}, base) == "no seed in common"


def test_each_seed_and_the_checkpoint_of_equal_flops(tmp_path: Path) -> None:
    args, cells = study(tmp_path, *EVALUATE, "--repeats", "2")
    found = [task.label for task in accuracy.tasks(args, cells)]
    one = ["d4_p1_dib_r0_knn_images", "d4_p1_dib_r0_finetune_images"]
    two = ["knn_images", "knn_flops", "finetune_images", "finetune_flops"]
    assert found[:6] == [*one, *(f"d8_p1_dib_r0_{name}" for name in two)]
    assert len(found) == 12
    steps = {task.budget: task.step for task in accuracy.tasks(args, cells) if task.cell.depth == 8}
    costs = [model_cost(c.job.config.model).whole.training_flops for c in cells if c.job]
    shallow, deep = min(costs), max(costs)
    assert steps["images"] == 12
    assert steps["flops"] == round(12 * shallow / deep)
    job = next(cell.job for cell in cells if cell.name == "d8_p1_dib")
    assert job is not None
    assert job.config.save_every == job.config.keep_every == steps["flops"]
    seeds = [runner.launch_command(args, cells[0], cells[0].run(r))[-1] for r in (0, 1)]
    assert seeds == ["0", "1"]


def test_commands(tmp_path: Path) -> None:
    args, cells = study(tmp_path, *EVALUATE)
    knn, finetune = accuracy.tasks(args, cells)[:2]
    checkpoint = str(tmp_path / "runs/d4_p1_dib_r0/checkpoints/step_00000012")
    words = accuracy.words_of(args, knn, tmp_path / "x.json")[3:]
    head = ["evaluate", "knn", checkpoint, "--pool", "mean", "--json", str(tmp_path / "x.json")]
    assert words == [*head, "--k", "5"]
    words = accuracy.words_of(args, finetune, tmp_path / "x")[3:]
    assert words[:4] == ["finetune", checkpoint, "--data", "pictures"]
    assert words[-2:] == ["--epochs", "2"]
    assert words[words.index("--seed") + 1] == "0"


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    args, cells = study(tmp_path, "--evaluate", "knn,attentive")
    assert accuracy.unfinished(args, cells) == [], "no run is finished"
    finish(args, "d8_p1_dib_r0")
    todo = accuracy.unfinished(args, cells)
    assert [t.label[13:] for t in todo] == [
        "knn_images",
        "knn_flops",
        "attentive_images",
        "attentive_flops",
    ]
    write(args, todo[0], block08=50.0)
    assert accuracy.unfinished(args, cells) == todo[1:]


def test_rows_table_and_questions(tmp_path: Path) -> None:
    args, cells = study(tmp_path / "a", "--evaluate", "knn", "--repeats", "3")
    for task in accuracy.tasks(args, cells):
        finish_once = runner.run_folder(args, task.cell.run(task.repeat))
        if not finish_once.exists():
            finish(args, task.cell.run(task.repeat))
        base = (
            50.0 + 10 * task.repeat + (3 if task.budget == "images" else 0) * (task.cell.depth == 8)
        )
        write(args, task, block02=20.0, **{f"block{task.cell.depth:02d}": base + 0.1 * task.repeat})
    rows = accuracy.write_files(args, cells)
    deep = [r for r in rows if (r["depth"], r["budget"], r["last"]) == (8, "images", True)]
    assert deep[0]["draws"] == {"0": 53.0, "1": 63.1, "2": 73.2}
    assert deep[0]["mean"] == pytest.approx(63.1)
    shallow = [r for r in rows if r["depth"] == 4 and r["last"]]
    assert {r["budget"] for r in shallow} == {"images", "flops"}, "it is both budgets"
    flops = {r["depth"]: r["training_flops"] for r in rows if r["budget"] == "flops"}
    assert flops[8] == pytest.approx(flops[4], rel=0.1)
    lines = accuracy.verdicts(rows)
    assert any("equal images: does depth help? 8 blocks over 4: +3.0" in line for line in lines)
    assert next(line for line in lines if "equal images" in line).endswith(": better")
    assert "+0.0 points" in next(line for line in lines if "equal flops" in line)
    page = (tmp_path / "a/accuracy.md").read_text()
    assert "| debug | 8 | block08 | 63.1 (" in page
    # Another study beside it answers which of the two is better at each depth.
    other, others = study(tmp_path / "b", "--evaluate", "knn", "--beside", str(tmp_path / "a"))
    finish(other, "d4_p1_dib_r0")
    write(other, accuracy.tasks(other, others)[0], block04=40.0)
    both = accuracy.write_files(other, others)
    assert len(both) > len(rows)


def test_what_an_evaluation_found(tmp_path: Path) -> None:
    args, cells = study(tmp_path, *EVALUATE)
    knn, finetune = accuracy.tasks(args, cells)[:2]
    rows: list[dict[str, Any]] = [
        {"encoder": "-", "features": "raw pixels", "pool": "-", "accuracy": 99.0},
        {"encoder": "untrained", "features": "block04", "pool": "mean", "accuracy": 98.0},
        {"encoder": "trained", "features": "block04", "pool": "mean", "accuracy": 60.0},
        {"encoder": "trained", "features": "block02", "pool": "mean", "accuracy": 70.0},
        {"encoder": "trained", "features": "block04", "pool": "class", "accuracy": 65.0},
    ]
    file = tmp_path / "out.json"
    file.write_text(json.dumps({"rows": rows}))
    assert accuracy._accuracies(knn, file) == {"block02": 70.0, "block04": 65.0}
    (tmp_path / "run").mkdir()
    result = {"best": {"accuracy": 81.0}, "last": {"accuracy": 80.0}}
    (tmp_path / "run/result.json").write_text(json.dumps(result))
    assert accuracy._accuracies(finetune, tmp_path / "run") == {"whole": 80.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evaluate", "svm"], "evaluate=svm: must be one of knn, linear"),
        (["--evaluate", "knn,knn --k 3"], "evaluate=knn: must be one of"),
        (["--evaluate", "knn", "--", "--seed", "3"], "--seed: is set by the study's own flags"),
        (["--beside", "nowhere"], "beside=nowhere: holds no accuracy.json"),
    ],
)
def test_mistakes(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        study(tmp_path, *words)


def test_a_study_without_checkpoints_cannot_be_evaluated(tmp_path: Path) -> None:
    args, _ = study(tmp_path)
    (tmp_path / "runs").mkdir(parents=True)
    content = {"settings": args.model_dump(mode="json"), "environment": {}, "rows": []}
    (tmp_path / "study.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="evaluate="):
        check_folder(study(tmp_path, "--evaluate", "knn")[0])
    args, _ = study(tmp_path, "--evaluate", "knn")
    content["settings"] = args.model_dump(mode="json")
    (tmp_path / "study.json").write_text(json.dumps(content))
    check_folder(study(tmp_path, "--evaluate", "knn,linear")[0])
    with pytest.raises(UserError, match="depths=2: the shallowest, 4, is what equal FLOPs"):
        check_folder(study(tmp_path, "--evaluate", "knn", "--depths", "2,4")[0])


@pytest.mark.soak
def test_a_real_study(photographs: Path, tmp_path: Path) -> None:
    """Killed after its first run, it ends with the numbers of one that was not."""
    data = photographs.parent / "samples"
    words = ["study", "--preset", "debug", "--depths", "2,4", "--stages", "1", "--steps", "4"]
    words += ["--warmup-steps", "1", "--gpus-per-node", "1", "--data", str(data), "--repeats", "2"]
    words += ["--evaluate", "knn", "--output"]
    numbers = []
    for name, cut in (("whole", False), ("cut", True)):
        folder = tmp_path / name
        if cut:
            main([*words, str(folder), "--depths", "2", "--repeats", "1"])
            (folder / "runs/d2_p1_dib_r0_knn_images.json").unlink()
        main([*words, str(folder)])
        numbers.append(json.loads((folder / "accuracy.json").read_text())["rows"])
        assert (folder / "accuracy.png").is_file()
    assert numbers[0] == numbers[1]
    assert {row["depth"] for row in numbers[0]} == {2, 4}
