from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from asr_kd.shards.leases import Leases

FORK = multiprocessing.get_context("fork")


def test_a_lease_has_one_holder_until_it_is_given_back(tmp_path: Path) -> None:
    with Leases(tmp_path / "leases") as one, Leases(tmp_path / "leases") as other:
        assert one.take("a") and not other.take("a") and other.take("b")
        one.give_back("a")
        assert other.take("a")
    assert not (tmp_path / "leases").exists()


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
