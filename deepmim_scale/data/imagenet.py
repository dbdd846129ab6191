"""Classes of images that no folder names: ILSVRC's development kit, or a file of names and classes.

ILSVRC's validation tar is flat. Its labels are in ILSVRC2012_devkit_t12.tar.gz as numbers, which
meta.mat there maps to the names of the training tars.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path

from deepmim_scale.data.container_members import is_image
from deepmim_scale.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
MAX_BYTES = 1 << 28  # of a file of labels


def read_labels(path: str) -> dict[str, str]:
    """Name of an image -> its class, from a development kit or from lines `NAME CLASS`.

    The words of a line may be parted by blanks, tabs or commas, and what follows them is ignored,
    as is a first line without an image. Raises UserError if the file cannot be read so.
    """
    file = Path(path)
    try:
        if file.name.endswith((".tar.gz", ".tgz")):
            return _read_devkit(file)
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"labels={path}: has more than {MAX_BYTES} bytes; give another file")
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        raise UserError(f"labels={path}: cannot be read: {error}; give another file") from error
    labels = {}
    for number, line in enumerate(lines, start=1):
        words = re.split(r"[\s,]+", line.strip())
        if len(words) >= 2 and is_image(words[0]):
            labels[os.path.basename(words[0])] = words[1]
        elif len(words) >= 2 and re.fullmatch(r"ILSVRC2012_val_\d{8}", words[0]):
            labels[f"{words[0]}.JPEG"] = words[1]
        elif number > 1 and line.strip():
            raise UserError(f"labels={path}: line {number} is no NAME CLASS; correct it")
    if not labels:
        raise UserError(f"labels={path}: names no images; write lines NAME CLASS")
    return labels


def _read_devkit(file: Path) -> dict[str, str]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"labels={file}: needs scipy; pip install scipy") from error
    parts: dict[str, bytes] = {}
    with tarfile.open(file, "r:gz") as tar:
        for member in tar:
            name = os.path.basename(member.name)
            if name in (TRUTH, META) and member.isreg() and member.size <= MAX_BYTES:
                content = tar.extractfile(member)
                parts[name] = content.read() if content else b""
    if len(parts) < 2:
        raise UserError(f"labels={file}: lacks {TRUTH} or {META}; download it again")
    try:
        synsets = loadmat(io.BytesIO(parts[META]), squeeze_me=True)["synsets"]
        classes = {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in synsets}
        numbers = [int(word) for word in parts[TRUTH].split()]
        named = [classes[number] for number in numbers]
    except (ValueError, KeyError, TypeError, IndexError, NotImplementedError) as error:
        raise UserError(f"labels={file}: {META} cannot be read; download it again") from error
    return {f"ILSVRC2012_val_{i:08}.JPEG": name for i, name in enumerate(named, start=1)}
