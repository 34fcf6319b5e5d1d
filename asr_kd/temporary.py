"""Temporary files, of which nothing is left when their process has ended, however it ended."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from asr_kd.errors import UserError

#: errors of a full local disk
FULL = (errno.ENOSPC, errno.EDQUOT)
#: the files that a process has open, by their numbers (Linux)
_OPENED = Path("/proc/self/fd")


@contextlib.contextmanager
def temporary(mode: str = "w+b") -> Iterator[tuple[IO[Any], Path]]:
    """An empty file in the temporary folder, and the path by which this process can open it, within the context.

    Where the system allows it, the file has no name: one of a process that is killed takes no space, and nobody has to find it. UserError
    when no temporary folder can be written.
    """
    encoding = None if "b" in mode else "utf-8"
    with contextlib.ExitStack() as stack:
        try:
            if _OPENED.is_dir():
                file = stack.enter_context(tempfile.TemporaryFile(mode, encoding=encoding))
                path = _OPENED / str(file.fileno())
            else:
                file = stack.enter_context(tempfile.NamedTemporaryFile(mode, prefix="asr-kd-", encoding=encoding))
                path = Path(file.name)
        except OSError as error:
            if error.errno in FULL:
                raise
            where = os.environ.get("TMPDIR") or tempfile.tempdir or "TMPDIR"
            raise UserError(
                f"{where}: no temporary file can be written there ({error.strerror or error}); set TMPDIR to a folder that can"
            ) from None
        yield file, path


@contextlib.contextmanager
def room_for(what: object) -> Iterator[None]:
    """Name the disk of the temporary folder where it has no space left for `what`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"{tempfile.gettempdir()}: no space left for {what}; free some, or set TMPDIR to a larger disk"
            ) from error
        raise
