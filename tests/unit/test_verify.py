"""Every kind of bad or unusual file has its documented outcome (docs/data.md, table of files)."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deepmim_scale.config import ModelConfig, RunConfig
from deepmim_scale.data import verify
from deepmim_scale.data.backend import BadImage
from deepmim_scale.data.commands import VerifyArguments, run_verify
from deepmim_scale.data.folder_source import FolderSource, open_folder
from deepmim_scale.data.manifest import scan_folder
from deepmim_scale.data.sample_plan import SamplePlan
from deepmim_scale.data.source import OnBad, good_ids
from deepmim_scale.data.step_loader import FeedOptions, Share, Span, build_step_loader
from deepmim_scale.data.torch_backend import image_reader, stream
from deepmim_scale.data.verify import captured_stderr, verify_folder
from deepmim_scale.errors import UserError
from deepmim_scale.image_format import ImageFormat

NUM_GOOD = 7
BACKENDS = ["torch"] + ["dali"] * (importlib.util.find_spec("nvidia.dali") is not None)


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(path: Path, size: tuple[int, int] = (60, 80), **options: Any) -> bytes:
    picture(*size).save(path.with_suffix(".tmp"), format="JPEG", quality=92, **options)
    data = path.with_suffix(".tmp").read_bytes()
    path.with_suffix(".tmp").unlink()
    return data


def orientation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def flipped(path: Path) -> bytes:
    """200 bytes in the middle of a JPEG, as in the measurement this table comes from."""
    data = jpeg(path, size=(300, 400))
    place, middle = len(data) // 2, np.random.default_rng(3).integers(0, 255, 200, dtype=np.uint8)
    return data[:place] + middle.tobytes() + data[place + 200 :]


def sixteen_bits(path: Path) -> None:
    values = np.linspace(0, 65535, 3600).astype(np.uint16).reshape(60, 60)
    Image.fromarray(values).save(path)


Case = tuple[str, Callable[[Path], object], str, str | None]
# name, how to write it, outcome of scan (sees, refuses, ignores), of verify
CASES: dict[str, Case] = {
    "zero-byte": ("x.jpg", lambda p: p.write_bytes(b""), "refuses", "unreadable"),
    "truncated": ("x.jpg", lambda p: p.write_bytes(jpeg(p)[:1200]), "sees", "unreadable"),
    "header truncated": ("x.jpg", lambda p: p.write_bytes(jpeg(p)[:60]), "refuses", "unreadable"),
    "random bytes": ("x.jpg", lambda p: p.write_bytes(bytes(range(256))), "refuses", "unreadable"),
    "HTML": ("x.jpg", lambda p: p.write_bytes(b"<html>404</html>"), "refuses", "unreadable"),
    "over PIL's limit": (
        "x.png",
        lambda p: Image.new("1", (20000, 10000)).save(p),
        "refuses",
        "unreadable",
    ),
    "bits flipped": ("x.jpg", lambda p: p.write_bytes(flipped(p)), "sees", "damaged"),
    "CMYK": ("x.jpg", lambda p: picture().convert("CMYK").save(p), "sees", "good"),
    "gray": ("x.jpg", lambda p: picture().convert("L").save(p), "sees", "good"),
    "16-bit PNG": ("x.png", sixteen_bits, "sees", "good"),
    "WebP": ("x.webp", lambda p: picture().save(p), "sees", "good"),
    "PNG named .jpg": ("x.jpg", lambda p: picture().save(p, format="PNG"), "sees", "good"),
    "EXIF turned": ("x.jpg", lambda p: p.write_bytes(jpeg(p, exif=orientation())), "sees", "good"),
    "1 x 1": ("x.png", lambda p: picture(1, 1).save(p), "sees", "good"),
    "large": ("x.jpg", lambda p: picture(2000, 3000).save(p), "sees", "good"),
    "GIF": ("x.gif", lambda p: picture().save(p), "ignores", None),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str, str | None]:
    (tmp_path / "class").mkdir()
    for i in range(NUM_GOOD):
        picture(seed=i).save(tmp_path / "class" / f"{i}.jpg")
    name, write, scan, kind = CASES[request.param]
    write(tmp_path / "class" / name)
    return tmp_path, f"class/{name}", scan, kind


def train(source: FolderSource, backend: str, on_bad: OnBad) -> tuple[torch.Tensor, torch.Tensor]:
    """Two epochs in batches of 4: all ids and all images."""
    config = RunConfig(model=ModelConfig(method="mae", img_size=32, patch_size=8))
    if backend == "dali":
        from deepmim_scale.data import dali

        decoder = functools.partial(
            dali.stream, source=source, size=(32, 32), threads=1, max_batch=4
        )
    else:
        decoder = functools.partial(
            stream, read_image=image_reader(source), image=ImageFormat(3, 32, 32), threads=1
        )
    plan = SamplePlan(len(source), 1, 4)
    span, options = Span(0, 2 * plan.steps_per_epoch), FeedOptions(on_bad=on_bad)
    loader = build_step_loader(config, source, plan, Share(), span, options, backend=decoder)
    batches = [batch for (batch,) in loader]
    ids = torch.cat([batch.tensors()["sample_ids"] for batch in batches])
    return ids, torch.cat([batch.images for batch in batches]).float()


def test_outcomes(
    case: tuple[Path, str, str, str | None], capfd: pytest.CaptureFixture[str]
) -> None:
    root, name, scan, kind = case
    if scan == "refuses":
        with pytest.raises(UserError, match=f"1 unreadable images: {name}; run .* data verify"):
            open_folder(root)
        assert scan_folder(root).sizes[:, 0].tolist().count(0) == 1
    source = open_folder(root, on_bad="replace")
    names = source.manifest.names
    assert (name in names) == (scan != "ignores")
    assert [names[i] for i in source.bad] == [name] * (scan == "refuses")
    if scan != "sees":
        assert any("ignored: 1 .gif" in note or name in note for note in source.notes)

    results = {}
    for backend in BACKENDS:
        if scan == "sees" and kind == "unreadable":
            with pytest.raises(BadImage, match=f"{name}: .*; run .* data verify"):
                train(source, backend, "fail")
        ids, images = results[backend] = train(source, backend, "replace")
        per_epoch = len(source) // 4 * 4
        assert len(ids) == 2 * per_epoch
        if kind == "unreadable":
            assert names.index(name) not in ids.tolist()
        else:  # nothing is lost and nothing comes twice
            assert all(len(set(epoch.tolist())) == per_epoch for epoch in ids.split(per_epoch))
    if len(results) == 2 and kind != "damaged":  # decoders differ in what they make of damage
        (ids, images), (dali_ids, dali_images) = results.values()
        assert torch.equal(ids, dali_ids)
        assert (images - dali_images).abs().mean() < 1.5

    report = verify_folder(root, threads=2)
    assert report["images"] == NUM_GOOD + (kind is not None)
    found = {finding["file"]: finding["kind"] for finding in report["bad"]}
    assert found == ({name: kind} if kind in ("unreadable", "damaged") else {})
    checked = open_folder(root)
    assert (checked.sha, checked.manifest.names) == (source.sha, names)
    good = [names[i] for i in good_ids(checked)]
    assert (name in good) == (kind == "good")
    if kind == "unreadable":  # once known, it is replaced as before, and silently
        capfd.readouterr()
        for backend, (ids, images) in results.items():
            again_ids, again_images = train(checked, backend, "fail")
            assert torch.equal(again_ids, ids)
            assert torch.equal(again_images, images)
        assert "replaces" not in capfd.readouterr().err


def test_command_reports_and_training_honours_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(3):
            picture(seed=i).save(tmp_path / split / "a" / f"{i}.jpg")
    (tmp_path / "train" / "a" / "1.jpg").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        run_verify(VerifyArguments(dir=str(tmp_path), report=str(tmp_path / "r.json")))
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "2 of 3 images good, 1 unreadable, 0 damaged" in out
    assert "a/1.jpg: unreadable: not an image" in out
    reports = json.loads((tmp_path / "r.json").read_text())
    assert [report["good"] for report in reports] == [2, 3]
    assert json.loads((tmp_path / "train" / "verify.json").read_text()) == reports[0]
    assert good_ids(open_folder(tmp_path / "train")).tolist() == [0, 2]


NAMES = [
    b"tab\t.jpg",
    b"line\nbreak.jpg",
    "line\u2028break.jpg".encode(),
    b"next\xc2\x85.jpg",
    b"\xff.jpg",
    b'"quoted".jpg',
    "\N{SNOWMAN} plain.jpg".encode(),
]


def test_quarantine_takes_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture().save(tmp_path / "good.jpg")
    for name in NAMES:
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(SystemExit):
        run_verify(VerifyArguments(dir=str(tmp_path)))
    out = capsys.readouterr().out
    assert len(out.encode().splitlines()) == 1 + len(NAMES), "a line for each file"
    assert "\N{SNOWMAN} plain.jpg: unreadable" in out
    source = open_folder(tmp_path)
    assert [source.manifest.names[i] for i in good_ids(source)] == ["good.jpg"]


def test_damaged_files_are_no_failure(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(flipped(tmp_path / "x.jpg"))
    run_verify(VerifyArguments(dir=str(tmp_path)))
    assert json.loads((tmp_path / "verify.json").read_text())["damaged"] == 1


@pytest.mark.parametrize("words", [{"threads": 0}, {"threads": -1}, {"report": "/proc/nowhere/x"}])
def test_mistakes_come_before_the_work(words: dict[str, Any], tmp_path: Path) -> None:
    picture().save(tmp_path / "0.jpg")
    ((key, value),) = words.items()
    with pytest.raises(UserError, match=f"^{'json' if key == 'report' else key}={value}: "):
        run_verify(VerifyArguments(dir=str(tmp_path), **words))
    assert [path.name for path in tmp_path.iterdir()] == ["0.jpg"]


def test_interrupted_check_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(9):
        picture(seed=i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "1.jpg").write_bytes(b"")
    monkeypatch.setattr(verify, "CHUNK", 2)
    checked: list[int] = []
    honest = verify._unreadable

    def counting(read: Callable[[int], bytes], i: int) -> str | None:
        if len(checked) == 6:
            raise KeyboardInterrupt
        checked.append(i)
        return honest(read, i)

    with monkeypatch.context() as patch:
        patch.setattr(verify, "_unreadable", counting)
        with pytest.raises(KeyboardInterrupt):
            verify_folder(tmp_path, threads=1)
    assert not (tmp_path / "verify.json").exists()
    checked.clear()
    monkeypatch.setattr(verify, "_unreadable", lambda read, i: checked.append(i))
    report = verify_folder(tmp_path, threads=1)
    assert checked == [6, 7, 8]
    assert [finding["file"] for finding in report["bad"]] == ["1.jpg"]
    picture(90, 90).save(tmp_path / "0.jpg")  # other files: all over again
    checked.clear()
    assert verify_folder(tmp_path, threads=1)["unreadable"] == 0
    assert len(checked) == 9


def test_stderr_of_c_libraries_is_captured_and_restored() -> None:
    code = (
        "import os\n"
        "from deepmim_scale.data.verify import captured_stderr\n"
        "with captured_stderr() as text:\n"
        "    os.write(2, b'inside')\n"
        "    assert text() == 'inside', text()\n"
        "os.write(2, b'after')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr == "after"
    with captured_stderr() as text:
        os.write(2, b"here")
        assert text() == "here"
