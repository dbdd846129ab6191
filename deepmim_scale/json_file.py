"""JSON files that people write: what Python's reader lets pass or fails on is told in one line.

And files of ours that others may read at any moment.
"""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path
from typing import Any

from deepmim_scale.errors import UserError


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a UTF-8 JSON file; UserError with line and column, or the key."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise UserError(f"{path}: {key}: given twice in one object; keep one")
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, float) and not math.isfinite(part):
                    raise UserError(f"{path}: {key}={part}: must be finite; give a number")
            content[key] = value
        return content

    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # editors may put a mark before it
        content = json.loads(text, object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        rule = f"no UTF-8 text at byte {error.start}"
        raise UserError(f"{path}: {rule}; give a JSON file, saved as UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        rule = f"no valid JSON at {where} ({error.msg})"
        raise UserError(f"{path}: {rule}; correct it there") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; write plain objects") from None
    except UserError:
        raise
    except ValueError as error:  # a path with a null byte, a number of thousands of digits
        raise UserError(f"{path}: cannot be read ({error}); check the file") from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: must hold a JSON object; write {{"key": value}}')
    return content


def replace_text(path: str | Path, text: str) -> None:
    """Write a file that is whole at any moment, whoever else reads or writes it."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
