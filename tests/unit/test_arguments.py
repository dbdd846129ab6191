"""What is checked before a command starts to work."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepmim_scale.arguments import writable
from deepmim_scale.errors import UserError


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
