"""JSON files as people save them: every fault is one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepmim_scale.errors import UserError
from deepmim_scale.json_file import read_json

FAULTS: dict[str, tuple[bytes, str]] = {
    "UTF-16": ('{"seed": 1}'.encode("utf-16"), "no UTF-8 text at byte 0; give a JSON file"),
    "binary": (b'{"\x80\x03\xff', "no UTF-8 text at byte 2"),
    "empty": (b"", "no valid JSON at line 1 column 1"),
    "null bytes": (b"\0" * 64, "no valid JSON at line 1 column 1"),
    "deep": (b'{"a":' + b"[" * 200_000, "nested too deeply; write plain objects"),
    "twice": (b'{"seed": 1, "seed": 2}', "seed: given twice in one object; keep one"),
    "twice inside": (b'{"model": {"depth": 1, "depth": 1}}', "depth: given twice"),
    "not a number": (b'{"blr": NaN}', "blr=nan: must be finite"),
    "infinite": (b'{"blr": -Infinity}', "blr=-inf: must be finite"),
    "too large": (b'{"blr": 1e999}', "blr=inf: must be finite"),
    "in a list": (b'{"hybrid_alphas": [0, NaN]}', "hybrid_alphas=nan: must be finite"),
    "endless digits": (b'{"seed": ' + b"9" * 5000 + b"}", "cannot be read (Exceeds the limit"),
    "comma": (b'{"seed": 1,\n}', "no valid JSON at line"),
    "list": (b"[]", 'must hold a JSON object; write {"key": value}'),
    "null": (b"null", "must hold a JSON object"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str, tmp_path: Path) -> None:
    content, expected = FAULTS[name]
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere.json", ".", "a\0b"])
def test_no_file(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(.+\); check the"):
        read_json(f"{tmp_path}/{path}")


def test_good_files(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text('{"data": "Bilder/größer", "seeds": [1, 2.5]}', encoding=encoding)
        assert read_json(str(path)) == {"data": "Bilder/größer", "seeds": [1, 2.5]}
