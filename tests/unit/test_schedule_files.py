"""Schedules in files: read back as written, written by hand, and refused in one line if damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepmim_scale.cli import main
from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.errors import UserError
from deepmim_scale.plan.resolve import read_schedule, training_plan
from deepmim_scale.presets import load_preset
from deepmim_scale.train.pretrain import main as pretrain

Content = dict[str, Any]
Edit = Callable[[Content], object]
PUBLISHED = {
    "schedule",
    "layout",
    "placement",
    "microbatches",
    "makespan",
    "idle_fraction",
    "speedup_over_1f1b",
    "ranks",
}


def write(folder: Path, words: str) -> Path:
    """A file as `deepmim-scale schedule --json` writes it."""
    file = folder / "schedule.json"
    main(["schedule", *words.split(), "--json", str(file)])
    return file


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1", "dib", "dib_w"])
def test_read_back_as_written(name: str, tmp_path: Path) -> None:
    words = f"--preset debug --stages 3 --microbatches 5 --schedule {name}"
    file = write(tmp_path, words)
    content = json.loads(file.read_text())
    assert content.keys() >= PUBLISHED
    assert all(rank.keys() >= {"idle_fraction", "instructions"} for rank in content["ranks"])
    layout, schedule = read_schedule(str(file), load_preset("debug").model)
    assert (schedule.name, schedule.num_microbatches, len(layout)) == (name, 5, 3)
    again = tmp_path / "again.json"
    read = ["schedule", "--preset", "debug", "--schedule-file", str(file)]
    main([*read, "--json", str(again)])
    assert json.loads(again.read_text()) == content
    assert read_schedule(str(again), load_preset("debug").model) == (layout, schedule)


def test_equal_to_what_a_run_builds(tmp_path: Path) -> None:
    """Only proportions of times matter, so the command and a run build one schedule."""
    model = load_preset("debug").model
    words = "--preset debug --stages 2 --microbatches 4 --schedule 1f1b"
    file = write(tmp_path, words)
    config = RunConfig(model=model, stages=2, schedule="1f1b")
    built = training_plan(config, 4)
    read = training_plan(config.replace(schedule_file=str(file)), 4)
    assert read.built.schedule == built.built.schedule
    assert (read.layout, read.text) == (built.layout, built.text)
    assert read.built.timeline == built.built.timeline


def test_folded_files_name_their_placement(tmp_path: Path) -> None:
    words = "--preset debug_mirl --stages 3 --placement v --microbatches 3"
    file = write(tmp_path, words)
    config = RunConfig(model=load_preset("debug_mirl").model, stages=3, schedule_file=str(file))
    plan = training_plan(config, 3)
    assert plan.built.schedule.pipeline.placement == "v"
    assert len(plan.layout) == 6


def by_hand() -> Content:
    """Two stages, two micro-batches, in an order that no builder makes."""

    def step(kind: str, stage: int, m: int, payload: str = "") -> Content:
        words: Content = {"kind": kind, "stage": stage, "microbatch": m}
        return words | ({"payload": payload, "peer": 1 - stage} if payload else {})

    first = [
        step("forward", 0, 0),
        step("forward", 0, 1),
        step("send", 0, 0, "activation"),
        step("send", 0, 1, "activation"),
        step("decoder_forward", 0, 0),
        step("decoder_forward", 0, 1),
        step("decoder_backward", 0, 0),
        step("decoder_backward", 0, 1),
        step("receive", 0, 0, "gradient"),
        step("encoder_backward", 0, 0),
        step("receive", 0, 1, "gradient"),
        step("encoder_backward", 0, 1),
        step("flush", 0, -1),
    ]
    second = [
        step("receive", 1, 0, "activation"),
        step("receive", 1, 1, "activation"),
        step("forward", 1, 0),
        step("forward", 1, 1),
        step("decoder_forward", 1, 0),
        step("decoder_backward", 1, 0),
        step("encoder_backward", 1, 0),
        step("send", 1, 0, "gradient"),
        step("decoder_forward", 1, 1),
        step("decoder_backward", 1, 1),
        step("encoder_backward", 1, 1),
        step("send", 1, 1, "gradient"),
        step("flush", 1, -1),
    ]
    return {
        "format": 1,
        "schedule": "mine",
        "placement": "linear",
        "layout": "3d3d/3d3d",
        "microbatches": 2,
        "style": {},
        "ranks": [{"rank": 0, "instructions": first}, {"rank": 1, "instructions": second}],
    }


def save(folder: Path, content: Any) -> str:
    file = folder / "mine.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_a_schedule_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path, by_hand())
    main(["schedule", "--preset", "debug", "--schedule-file", file])
    out = capsys.readouterr().out
    assert "debug, 3d3d/3d3d, 2 micro-batches" in out
    assert " mine: " in out
    plan = training_plan(
        RunConfig(model=load_preset("debug").model, stages=2, schedule_file=file), 2
    )
    assert plan.text == "3d3d/3d3d"
    # What the run adds: a wait after each receive of format 1, and the sums over replicas.
    added = ("wait", "reduce_decoders", "reduce_encoder")
    orders = [[s.kind for s in rank if s.kind not in added] for rank in plan.built.schedule.ranks]
    assert orders == [[s["kind"] for s in rank["instructions"]] for rank in by_hand()["ranks"]]


def steps(content: Content, rank: int) -> list[Content]:
    found: list[Content] = content["ranks"][rank]["instructions"]
    return found


def swap(rank: int, first: int, second: int) -> Edit:
    def edit(content: Content) -> None:
        found = steps(content, rank)
        found[first], found[second] = found[second], found[first]

    return edit


def move(rank: int, source: int, target: int) -> Edit:
    return lambda content: steps(content, rank).insert(target, steps(content, rank).pop(source))


def change(rank: int, number: int, **values: Any) -> Edit:
    return lambda content: steps(content, rank)[number].update(values)


def put(**values: Any) -> Edit:
    return lambda content: content.update(values)


# What is done to the file, and how the line goes on after the file's name
DAMAGE: dict[str, tuple[Edit, str]] = {
    "no flush": (
        lambda c: steps(c, 0).pop(),
        "rank 0: ends with encoder_backward of stage 0, micro-batch 1, not with flush",
    ),
    "flush before the end": (
        move(1, 12, 3),
        "rank 1: ends with send gradient of stage 1, micro-batch 1 (peer: stage 0), not with flush",
    ),
    "no receive": (
        lambda c: steps(c, 1).pop(0),
        "rank 1: activation from stage 0 to stage 1, micro-batch 0: 0 receives, not 1",
    ),
    "no send": (
        lambda c: steps(c, 1).pop(7),
        "rank 1: gradient from stage 1 to stage 0, micro-batch 0: 0 sends, not 1",
    ),
    "a message of nobody": (
        change(0, 3, payload="prediction"),
        "rank 0: activation from stage 0 to stage 1, micro-batch 1: 0 sends, not 1",
    ),
    "a message too many": (
        lambda c: steps(c, 0).insert(0, dict(steps(c, 0)[2], payload="prediction")),
        "rank 0: prediction from stage 0 to stage 1, micro-batch 0: 1 sends, not 0",
    ),
    "micro-batches in another order": (
        swap(0, 4, 5),
        "rank 0: decoder_forward of stage 0, micro-batch 1 before micro-batch 0",
    ),
    "messages in another order": (
        swap(0, 2, 3),
        "rank 0: send activation of stage 0, micro-batch 1 (peer: stage 1) before micro-batch 0",
    ),
    "before its source": (
        move(0, 4, 0),
        (
            "rank 0: decoder_forward of stage 0, micro-batch 0 comes before what it needs, forward "
            "of stage 0, micro-batch 0"
        ),
    ),
    "before its message": (
        move(1, 0, 2),
        "rank 1: receive activation of stage 1, micro-batch 1 (peer: stage 0) before micro-batch 0",
    ),
    "used before it is received": (
        swap(0, 8, 9),
        (
            "rank 0: encoder_backward of stage 0, micro-batch 0 comes before what it needs, "
            "gradient from stage 1 to stage 0, micro-batch 0"
        ),
    ),
    "sent before it is made": (
        move(0, 2, 0),
        (
            "rank 0: send activation of stage 0, micro-batch 0 (peer: stage 1) comes before what "
            "it needs, forward of stage 0, micro-batch 0"
        ),
    ),
    "deadlock": (
        move(0, 8, 2),
        (
            "schedule mine never ends: rank 0 at wait gradient of stage 0, micro-batch 0 "
            "(peer: stage 1); rank 1 at wait activation"
        ),
    ),
    "twice": (
        lambda c: steps(c, 1).insert(3, dict(steps(c, 1)[2])),
        "rank 1: forward of stage 1, micro-batch 0: 2 times, not 1",
    ),
    "missing": (
        lambda c: steps(c, 1).pop(9),
        "rank 1: decoder_backward of stage 1, micro-batch 1: 0 times, not 1",
    ),
    "of another rank": (
        change(1, 2, stage=0),
        "rank 1: forward of stage 1, micro-batch 0: 0 times, not 1",
    ),
    "of no stage": (
        change(0, 0, stage=-5),
        "rank 0: forward of stage 0, micro-batch 0: 0 times, not 1",
    ),
    "a message of another rank": (
        change(0, 2, stage=7),
        "rank 0: send activation of stage 7, micro-batch 0 (peer: stage 1) belongs to another rank",
    ),
    "to no stage": (
        change(0, 2, peer=9),
        "rank 0: activation from stage 0 to stage 1, micro-batch 0: 0 sends, not 1",
    ),
    "unknown kind": (
        change(0, 1, kind="backward"),
        "rank 0, instruction 1: kind='backward': unknown; use one of forward, decoder",
    ),
    "a list as kind": (change(0, 1, kind=["forward"]), "rank 0, instruction 1: kind=['forward']"),
    "unknown payload": (
        change(0, 2, payload="weights"),
        "rank 0, instruction 2: payload='weights': unknown; use one of activation, gradient",
    ),
    "a payload that is not sent": (
        change(0, 1, payload="weights"),
        "rank 0, instruction 1: send, receive and wait, and only these, have a payload and a peer",
    ),
    "no peer": (
        lambda c: steps(c, 0)[2].pop("peer"),
        "rank 0, instruction 2: send, receive and wait, and only these, have a payload and a peer",
    ),
    "unknown key": (change(1, 0, when=3), "rank 1, instruction 0: {"),
    "text for a number": (
        change(1, 0, microbatch="0"),
        "rank 1, instruction 0: stage, microbatch and peer must be whole numbers",
    ),
    "true for a number": (
        change(1, 0, stage=True),
        "rank 1, instruction 0: stage, microbatch and peer must be whole numbers",
    ),
    "no object": (
        lambda c: steps(c, 1).insert(0, "forward"),  # type: ignore[arg-type]
        "rank 1, instruction 0: 'forward': must be an object with kind, microbatch, payload",
    ),
    "no instructions": (
        lambda c: steps(c, 1).clear(),
        "rank 1: has no instructions; it must end with flush",
    ),
    "instructions as text": (
        lambda c: c["ranks"][0].update(instructions="forward"),
        "rank 0: instructions='forward': instructions must be of type list",
    ),
    "a rank too many": (
        lambda c: c["ranks"].append({"instructions": []}),
        "has 3 ranks, this pipeline 2; use the --stages and --placement that it was made for",
    ),
    "ranks in another order": (
        lambda c: c["ranks"].reverse(),
        "rank 0: must be an object with rank=0 and instructions",
    ),
    "format of the future": (
        put(format=99),
        "format=99: this release reads formats 1 to 2; use the release that wrote it",
    ),
    "no format": (lambda c: c.pop("format"), "missing: format must be of type int"),
    "no ranks": (lambda c: c.pop("ranks"), "missing: ranks must be of type list"),
    "no micro-batches": (put(microbatches=0), "microbatches=0: must be 1 to 4096"),
    "too many micro-batches": (put(microbatches=10**12), "microbatches=1000000000000: must be 1"),
    "half a micro-batch": (put(microbatches=1.5), "microbatches=1.5: microbatches must be of type"),
    "other micro-batches": (
        put(microbatches=3),
        "rank 0: forward of stage 0, micro-batch 2: 0 times, not 1",
    ),
    "another depth": (put(layout="3d3d/3d"), "layout=3d3d/3d: adds up to 9 blocks in 2 stages"),
    "decoders elsewhere": (put(layout="6d/3d3d"), "layout=6d/3d3d: decoders after blocks [6, 9"),
    "no layout": (lambda c: c.pop("layout"), "layout=None: must be text as 6d/2d/2d/2d"),
    "unknown placement": (put(placement=["v"]), "placement=['v']: must be one of linear, v"),
    "folded": (put(placement="v"), "placement=v: deepmim is defined for placement linear"),
    "unknown style": (put(style={"fast": True}), "style={'fast': True}: must hold true or false"),
    "a number as style": (put(style={"colocated": 1}), "style={'colocated': 1}: must hold true"),
    "fused decoders": (
        put(style={"fused_decoders": True}),
        "rank 0: decoder of stage 0, micro-batch 0: 0 times, not 1",
    ),
    "styles that exclude each other": (
        put(style={"fused_decoders": True, "colocated": True}),
        "style: fused_decoders and colocated exclude each other",
    ),
    "weight gradients missing": (
        put(style={"split_backward": True}),
        "rank 0: decoder_weight_gradient of stage 0, micro-batch 0: 0 times, not 1",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, expected = DAMAGE[name]
    content = by_hand()
    edit(content)
    file = save(tmp_path, content)
    with pytest.raises(SystemExit) as stop:
        main(["schedule", "--preset", "debug", "--schedule-file", file])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: {expected}"), error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_files_that_hold_no_object(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["schedule", "--preset", "debug", "--schedule-file", str(file)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ")
    assert error.count("\n") == 1


def test_pairs_are_not_fused(tmp_path: Path) -> None:
    file = write(tmp_path, "--preset debug_mirl --stages 3 --microbatches 2")
    content = json.loads(file.read_text())
    content["style"] = {"fused_decoders": True}
    with pytest.raises(UserError, match="fused_decoders cannot be where losses join two decoders"):
        read_schedule(save(tmp_path, content), load_preset("debug_mirl").model)


def test_flags_that_do_not_go_with_a_file(tmp_path: Path) -> None:
    file = save(tmp_path, by_hand())
    whole = RunConfig(model=load_preset("debug").model, stages=2, schedule_file=file)
    words = "--preset debug --stages 2 --microbatches 2 --schedule dib_w"
    split = str(write(tmp_path, words))
    cases: dict[str, tuple[RunConfig, int]] = {
        "layout=6d|6d: schedule_file=": (whole.replace(layout="6d|6d"), 2),
        "stages=3: schedule_file=": (whole.replace(stages=3), 2),
        "microbatches=4: schedule_file=": (whole, 4),
        "reschedule_after=5: schedule_file=": (whole.replace(reschedule_after=5), 2),
        f"{file}: rank 1: gradient from stage 1 to stage 0, micro-batch 0: 1 sends, not 0": (
            whole.replace(gradient_flow="local"),
            2,
        ),
        "reduction=per_microbatch: schedule_file=": (
            whole.replace(schedule_file=split, reduction="per_microbatch"),
            2,
        ),
        "compile=True: schedule=dib_w queues": (
            whole.replace(schedule_file=split, compile=True),
            2,
        ),
    }
    for expected, (config, microbatches) in cases.items():
        with pytest.raises(UserError) as caught:
            training_plan(config, microbatches)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(expected)


def test_pairs_keep_their_weight_gradients(tmp_path: Path) -> None:
    """zb_h1 of a paired method is drawn for comparison; a run refuses it."""
    words = "--preset debug_mirl --stages 2 --microbatches 2 --schedule zb_h1"
    file = str(write(tmp_path, words))
    config = RunConfig(model=load_preset("debug_mirl").model, stages=2, schedule_file=file)
    with pytest.raises(UserError, match="which mirl is not defined for"):
        training_plan(config, 2)


@pytest.mark.parametrize(
    ("flag", "value"), [("--stages", "3"), ("--microbatches", "9"), ("--layout", "6d|6d")]
)
def test_flags_of_the_command_that_disagree(
    flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path, by_hand())
    with pytest.raises(SystemExit) as stop:
        main(["schedule", "--preset", "debug", "--schedule-file", file, flag, value])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag.removeprefix('--')}={value}: {file} has ")
    assert error.count("\n") == 1


def test_pretrain_refuses_a_damaged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = by_hand()
    steps(content, 1).pop()
    file = save(tmp_path, content)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--preset", "debug", "--stages", "2", "--microbatches", "2", "--data", "nowhere"]
    with pytest.raises(SystemExit) as stop:
        pretrain([*words, "--schedule-file", file])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: rank 1: ends with send gradient")
    assert error.count("\n") == 1


def test_a_model_of_other_taps(tmp_path: Path) -> None:
    model: ModelConfig = load_preset("debug").model.replace(taps=(6, 12))
    with pytest.raises(UserError, match="decoders after blocks"):
        read_schedule(save(tmp_path, by_hand()), model)
