"""Read images out of containers by their ranges; nothing is extracted and no name is followed."""

from __future__ import annotations

import contextlib
import functools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepmim_scale.data.header import edge_digest
from deepmim_scale.data.index import CODECS

OPEN_FILES = 128  # a data set may have thousands of shards, a process 1024 descriptors
DEFLATE = CODECS.index("deflate")


class OpenFile:
    """A file descriptor for reading from many threads; closed when the last of them lets it go."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Ranges lie apart: what the system would read ahead by itself is of no use.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __len__(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of a range; raises OSError if the file ends before it does."""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # network file systems and ranges above 2 GiB come in parts
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"the container ends at byte {len(self)}, within this image")
            data += more
        return data

    def will_read(self, offset: int, size: int) -> None:
        """Ask the system to fetch a range into its cache meanwhile."""
        os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)


class RangeReader:
    """The images that `entries` (index.ENTRY [N]) point to, in the containers `paths`."""

    def __init__(self, paths: Sequence[Path], entries: np.ndarray) -> None:
        self._paths, self._entries = paths, entries
        self._open = functools.lru_cache(OPEN_FILES)(OpenFile)

    def read(self, sample_id: int) -> bytes:
        """One image; raises OSError if it is not the one that was scanned."""
        file, offset, stored, codec, inner, unpacked, size, digest, *_ = self._entries[
            sample_id
        ].item()
        data = self._open(self._paths[file]).read(offset, stored)
        if codec:
            data = unpack(data, codec, unpacked)[inner : inner + size]
        if edge_digest(data) != digest:
            raise OSError("changed since the scan; run `deepmim-scale data scan` again")
        return data

    def read_ahead(self, sample_ids: np.ndarray) -> None:
        """Let the system fetch these images; errors are left to `read`."""
        for file, offset, stored, *_ in self._entries[sample_ids].tolist():
            with contextlib.suppress(OSError):
                self._open(self._paths[file]).will_read(offset, stored)


def unpack(data: bytes, codec: int, size: int) -> bytes:
    """Exactly `size` bytes out of a packed range, never more; raises OSError."""
    if codec == DEFLATE:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            out = inflate.decompress(data, size + 1)
        except zlib.error as error:
            raise OSError(f"does not unpack: {error}") from error
        if len(out) != size:
            raise OSError(f"unpacks to other than the {size} bytes that the container promises")
        return out
    import pyarrow

    try:
        return pyarrow.decompress(data, size, CODECS[codec], asbytes=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise OSError(f"does not unpack: {error}") from error
