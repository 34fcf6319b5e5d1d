from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from asr_kd.errors import UserError
from asr_kd.progress import Progress
from asr_kd.shards.pool import LOST, Crew, Pool, Processes, Work


class Imagined(Crew):
    """Workers that are ready, and done, at once; each dies over the items in `deadly`, so many times."""

    def __init__(self, deadly: dict[int, int] | None = None, unable: int = 0) -> None:
        self.deadly, self.unable = dict(deadly or {}), unable
        self.alive: set[int] = set()
        self.given: list[tuple[int, int]] = []
        self._numbers = itertools.count()

    def start(self) -> tuple[Any, Any]:
        number = next(self._numbers)
        self.alive.add(number)
        return number, (number, None)

    def give(self, worker: Any, item: Any) -> Any:
        self.given.append((worker, item))
        return worker, item

    def over(self, calls: Sequence[Any], seconds: float) -> Iterator[tuple[Any, Any]]:
        dead = set()
        for call in calls:
            worker, item = call
            if item is None and self.unable:
                self.unable -= 1
                yield call, LOST
            elif worker in dead or self.deadly.get(item, 0):
                self.deadly[item] = self.deadly.get(item, 0) - (worker not in dead)
                dead.add(worker)
                yield call, LOST
            else:
                yield call, "here" if item is None else -item

    def end(self, worker: Any) -> None:
        self.alive.discard(worker)


def pool_of(crew: Crew, least: int = 2, most: int | None = 2, in_flight: int = 2, folder: Path = Path()) -> Pool[int]:
    work: Work[int] = Work(
        "test", lambda item: f"item-{item}", (folder,), "{} killed {}".format, "{} could not start".format
    )
    return Pool(crew, work, Progress("test", None, "", show=False), least, most, in_flight)


def test_every_item_is_done_once_and_all_workers_end() -> None:
    crew = Imagined()
    pool = pool_of(crew)
    assert sorted(pool.run(iter(range(20)))) == [(item, -item) for item in range(20)]
    assert sorted(item for _, item in crew.given) == list(range(20)) and pool.loaded == {"here"}
    assert list(pool.run(iter([]))) == [] and sorted(pool.run(iter([0]))) == [(0, 0)]
    pool.close()
    assert not crew.alive and pool.worked > 0


def test_what_a_dead_worker_had_is_done_by_others_each_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (".item-3.x.tmp", ".item-4.x.tmp"):
        (tmp_path / name).touch()
    crew = Imagined({3: 2})
    pool = pool_of(crew, folder=tmp_path)
    assert sorted(pool.run(iter(range(9)))) == [(item, -item) for item in range(9)]
    assert [item for _, item in crew.given].count(3) == 3
    assert not (tmp_path / ".item-3.x.tmp").exists()
    assert "test: a worker was lost; its shards are given out again" in capsys.readouterr().err


def test_what_kills_its_workers_is_named() -> None:
    with pytest.raises(UserError, match="5 killed 3"):
        list(pool_of(Imagined({5: 9})).run(iter(range(9))))
    with pytest.raises(UserError, match="3 could not start"):
        list(pool_of(Imagined(unable=9)).run(iter(range(9))))
    assert len(list(pool_of(Imagined(unable=2)).run(iter(range(9))))) == 9


def test_the_pool_grows_while_items_wait_and_shrinks_when_none_do() -> None:
    crew = Imagined()
    pool = pool_of(crew, least=2, most=7)
    sizes = []
    for _ in range(4):
        pool.resize(queued=True)
        pool.resize(queued=True)  # no more while those asked for are not ready
        sizes.append(len(pool.members))
        for member in pool.members:
            member.since = 0.0
    assert sizes == [2, 4, 7, 7]
    for member in pool.members[:3]:
        member.items[object()] = 0
    pool.resize(queued=False)
    assert len(pool.members) == 3 == len(crew.alive)  # the busy ones stay
    for member in pool.members:
        member.items.clear()
    pool.resize(queued=False)
    assert len(pool.members) == 2


class Child:
    """A worker in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> int:
        return os.getppid()

    def do(self, item: int) -> int:
        try:
            (self._folder / f"died-{item}").open("x").close()
        except FileExistsError:
            return -item
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 100:
            raise UserError("100 is too much")
        if item == 101:
            raise ZeroDivisionError
        if item == 102:
            time.sleep(1000)
        return -item


def test_processes_that_are_killed_are_replaced(tmp_path: Path) -> None:
    pool = pool_of(Processes(functools.partial(Child, tmp_path)))
    assert sorted(pool.run(iter(range(6)))) == [(item, -item) for item in range(6)]
    assert pool.loaded == {os.getpid()}
    with pytest.raises(UserError, match="100 is too much"):
        list(pool.run(iter([100])))
    pool.close()
    assert all(not member.worker[0].is_alive() for member in pool.members)


def test_a_defect_is_told_with_its_place_and_a_busy_process_ends_at_once(tmp_path: Path) -> None:
    pool = pool_of(Processes(functools.partial(Child, tmp_path)), least=1, most=1)
    with pytest.raises(RuntimeError, match=r"line \d+, in do"):
        list(pool.run(iter([101])))
    pool.close()
    pool = pool_of(Processes(functools.partial(Child, tmp_path)), least=1, most=1)
    busy = pool.run(iter([0, 102]))
    assert next(busy) == (0, 0)
    while not (tmp_path / "died-102").exists():
        time.sleep(0.01)
    pool.close()


DRIVER = """
import functools, sys
from pathlib import Path
from asr_kd.shards.pool import Processes
from tests.shards.test_pool import Child, pool_of
if __name__ == "__main__":
    list(pool_of(Processes(functools.partial(Child, Path(sys.argv[1])))).run(iter([0, 102])))
"""


def test_processes_end_with_their_driver(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "driver.py").write_text(DRIVER)
    found = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, tmp_path / "driver.py", tmp_path], env=found) as driver:
        while not (tmp_path / "died-102").exists():
            assert driver.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
        driver.kill()
    assert len(children) >= 2
    for child in children:
        while (
            Path(f"/proc/{child}").exists()
            and Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        ):
            time.sleep(0.01)
