from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from asr_kd.errors import UserError
from asr_kd.temporary import room_for, temporary

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    return tmp_path / "copies"


@pytest.mark.parametrize("named", [False, True])  # where the system has no /proc, files have names
def test_what_is_written_is_read_by_its_path_and_gone_at_the_end(
    folder: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named:
        monkeypatch.setattr("asr_kd.temporary._OPENED", folder / "none")
    with temporary() as (file, path):
        file.write(b"one")
        file.flush()
        assert path.is_file() and path.stat().st_size == 3 and path.read_bytes() == b"one"
        path.write_bytes(b"of another")
        assert file.seek(0) == 0 and file.read() == b"of another"
        assert len(list(folder.iterdir())) == named
    assert not list(folder.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_process_that_is_killed_leaves_nothing(folder: Path) -> None:
    def work() -> None:
        with temporary() as (file, _):
            file.write(bytes(100_000))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=work)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL and not list(folder.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"/gone: no temporary file can be written there \(.*\); set TMPDIR"), temporary():  # fmt: skip
        pass


def test_a_full_disk_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"/copies: no space left for a copy of a\.wav; free some, or set TMPDIR"), room_for("a copy of a.wav"):  # fmt: skip
        raise OSError(errno.ENOSPC, "No space left on device")
