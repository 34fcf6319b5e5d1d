from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from asr_kd.errors import UserError
from asr_kd.shards.leases import SHARED, WRITER, Leases, check_unused, sole_writer

FORK = multiprocessing.get_context("fork")


def test_a_lease_has_one_holder_until_it_is_given_back(tmp_path: Path) -> None:
    with Leases(tmp_path / "leases") as one, Leases(tmp_path / "leases") as other:
        assert one.take("a") and not other.take("a") and other.take("b")
        one.give_back("a")
        assert other.take("a")
    assert not (tmp_path / "leases").exists()


def test_an_interrupt_at_any_line_leaves_no_lease_behind(tmp_path: Path) -> None:
    folder, ended = tmp_path / "leases", False

    def at_line(number: int) -> Any:
        left = itertools.count(number, -1)

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if event == "line" and next(left) == 0:
                raise KeyboardInterrupt
            return trace

        return lambda frame, *_: trace if frame.f_code.co_name in ("take", "_create", "create", "give_back") else None

    for line in range(100):
        before = sys.gettrace()
        with contextlib.suppress(KeyboardInterrupt), Leases(folder) as leases:
            try:
                sys.settrace(at_line(line))
                leases.take("a")
                leases.give_back("a")
                ended = True
            finally:
                sys.settrace(before)
        assert not folder.exists()
        if ended:
            return
    raise AssertionError("never came to the last line")


def hold(folder: Path) -> None:
    leases = Leases(folder)
    leases.__enter__()
    leases.take("a")
    os._exit(0)


def test_a_lease_of_a_dead_process_of_this_machine_is_free_at_once(tmp_path: Path) -> None:
    process = FORK.Process(target=hold, args=(tmp_path / "leases",))
    process.start()
    process.join()
    assert (tmp_path / "leases" / "a").exists()
    with Leases(tmp_path / "leases") as mine:
        assert mine.take("a")


@pytest.mark.parametrize(
    "content", [json.dumps({"host": "elsewhere", "pid": 1, "started": "2"}), "", "[]", "null", "{"]
)
def test_a_lease_of_another_machine_is_free_when_it_stays_silent(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "leases"
    with Leases(folder, patience=0.2) as mine:
        (folder / "a").write_text(content)
        for _ in range(4):
            assert not mine.take("a")
            time.sleep(0.1)
            os.utime(folder / "a")  # a sign of life
        assert not mine.take("a")
        time.sleep(0.3)
        assert mine.take("a")


def test_a_holder_gives_signs_of_life(tmp_path: Path) -> None:
    with Leases(tmp_path / "leases", patience=0.2) as mine:
        mine.take("a")
        first = (tmp_path / "leases" / "a").stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / "leases" / "a").stat().st_mtime_ns > first


def test_what_is_free_is_neither_done_nor_in_the_hands_of_others(tmp_path: Path) -> None:
    done = {"a"}
    with Leases(tmp_path / "leases") as mine, Leases(tmp_path / "leases") as other:
        other.take("B")
        free = mine.free("abcd", str.upper, done.__contains__)
        assert next(free) == "c" and not other.take("C")
        done.add("d")
        assert list(free) == []
        assert other.take("D")


def test_it_is_not_asked_for_ever_for_what_others_hold(tmp_path: Path) -> None:
    asked = []
    with Leases(tmp_path / "leases") as mine:
        assert list(mine.free(range(1000), str, lambda item: asked.append(item) or True)) == []
    assert len(asked) < 20


def write_alone(folder: Path, ready: Any) -> None:
    with sole_writer(folder):
        ready.set()
        time.sleep(600)


def test_a_folder_has_one_writer_and_the_second_learns_who_it_is(tmp_path: Path) -> None:
    ready = FORK.Event()
    process = FORK.Process(target=write_alone, args=(tmp_path, ready))
    process.start()
    assert ready.wait(300)
    with (
        pytest.raises(
            UserError, match=f"^{tmp_path}: is being written by process {process.pid} on {socket.gethostname()}; "
        ),
        sole_writer(tmp_path),
    ):
        pass
    process.kill()
    process.join()
    with sole_writer(tmp_path) as check:  # at once: its holder is dead
        check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"host": "elsewhere", "pid": 7, "started": "2", "space": "x"})])  # fmt: skip
def test_a_writer_on_another_machine_is_followed_once_it_is_silent(tmp_path: Path, content: str) -> None:
    lease = tmp_path / WRITER / "writer"
    lease.parent.mkdir()
    lease.write_text(content)
    with sole_writer(tmp_path, patience=0.3) as check:
        assert json.loads(lease.read_text())["pid"] == os.getpid()
        check()
    assert not lease.parent.exists()


def test_a_writer_on_another_machine_that_lives_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lease = tmp_path / WRITER / "writer"
    lease.parent.mkdir()
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "2", "space": "x", "holder": "h"}))
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.1):
            os.utime(lease)

    beat = threading.Thread(target=live)
    beat.start()
    with pytest.raises(UserError, match="is being written by process 7 on elsewhere; wait"), sole_writer(tmp_path, 90):
        pass
    ended.set()
    beat.join()
    assert "process 7 on elsewhere; looking for 90 s whether it lives" in capsys.readouterr().err
    assert lease.exists(), "the other goes on"


def test_the_same_numbers_in_another_container_are_another_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lease = tmp_path / WRITER / "writer"
    lease.parent.mkdir()
    lease.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "0", "space": "other"}))
    with sole_writer(tmp_path, patience=0.3):
        assert "looking for" in capsys.readouterr().err, "it cannot be looked up here"


def test_a_writer_learns_that_its_folder_is_gone_or_not_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="folder: is gone, removed or unmounted"), sole_writer(folder) as check:
        shutil.rmtree(folder)
        check()
    assert not folder.exists()
    folder.mkdir()
    lease = folder / WRITER / "writer"
    with pytest.raises(UserError, match="folder: process 7 on far has taken this folder over"), sole_writer(folder) as check:  # fmt: skip
        lease.write_text(json.dumps({"host": "far", "pid": 7, "holder": "h"}))
        check()
    assert json.loads(lease.read_text())["pid"] == 7, "the lease of the other is not given back"


def test_a_lease_taken_anew_meanwhile_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "leases"
    process = FORK.Process(target=hold, args=(folder,))
    process.start()
    process.join()
    real = os.rename
    with Leases(folder) as faster, Leases(folder) as slower:

        def late(source: Path, target: Path) -> None:
            monkeypatch.setattr(os, "rename", real)
            assert faster.take("a")  # between the other's judgement and its hand
            real(source, target)

        monkeypatch.setattr(os, "rename", late)
        assert not slower.take("a")
        assert faster.holds("a") and not slower.holds("a")


def test_a_folder_whose_work_is_shared_is_in_use_while_one_lives(tmp_path: Path) -> None:
    check_unused(tmp_path)
    with Leases(tmp_path / SHARED) as leases:
        leases.take("shard")
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on"):
            check_unused(tmp_path)
    check_unused(tmp_path)
