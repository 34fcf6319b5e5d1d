"""Keys that two utterances of a set have. Shards and soft targets tell such apart; lists that go by the key alone do not."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterable
from typing import NamedTuple

from asr_kd.config.base import folders_of
from asr_kd.errors import UserError
from asr_kd.objects import ObjectPath
from asr_kd.progress import Progress
from asr_kd.shards.index import ShardInfo, ShardList
from asr_kd.shards.manifest import database, spilling
from asr_kd.shards.stream import map_ordered
from asr_kd.shards.tarset import read_keys


class Shared(NamedTuple):
    """A key that two utterances have, and the numbers of the shards that hold them."""

    key: str
    first: int
    second: int

    def told(self, audio: str | list[str], shards: ShardList) -> str:
        """In words; `audio` is the set with these shards."""
        first, second = (shards[number].at(audio) for number in self[1:])
        return f"{self.key} is the key of two utterances, in {first} and in {second}"


class Seen:
    """Keys of utterances and the numbers of their shards, in a temporary database that spills to the disk."""

    def __init__(self) -> None:
        self._keys = database("keys (key TEXT PRIMARY KEY, shard INTEGER)").cursor()

    def find(self, key: str) -> int | None:
        """The number of the shard that a key is in, if it was seen."""
        found = self._keys.execute("SELECT shard FROM keys WHERE key = ?", (key,)).fetchone()
        return found and int(found[0])

    def add(self, keys: Iterable[str], number: int) -> Shared | None:
        """Add the keys of a shard, up to the first that was there before."""
        with spilling():
            for key in keys:
                try:
                    self._keys.execute("INSERT INTO keys VALUES (?, ?)", (key, number))
                except sqlite3.IntegrityError:
                    return Shared(key, self.find(key) or 0, number)
        return None


def every(_: str) -> bool:
    """Each key matters."""
    return True


def check_keys(
    audio: str | list[str], shards: ShardList, what: str, wanted: Callable[[str], bool] = every, show: bool = True
) -> None:
    """Refuse a list that goes by the key alone for a set in which two utterances have the same one.

    Nothing is read where the index knows that keys differ. Else the headers of all tars are; of tars in a store, which would have to be
    fetched whole, the index must know it.

    Args:
        audio: folder of the set, or several.
        shards: what its index says.
        what: the list, as a message names it.
        wanted: whether it matters that two have this key.
        show: whether progress is shown.

    Raises:
        UserError: when two utterances that matter have the same key, or nobody can tell without fetching the set.
    """
    if shards.keys_differ:
        return
    if any(isinstance(info.at(audio), ObjectPath) for info in shards):
        raise UserError(
            f"{what}: goes by the keys of utterances, and two of {audio} may have the same; look at them once, by `asr-kd index "
            f"audio=[{','.join(folders_of(audio))}] output=… keys=true`, and give that index as audio"
        )
    if shared := shared_key(audio, shards, wanted, show=show):
        raise UserError(
            f"{what}: {shared.told(audio, shards)}, and texts go by the key alone; take each set by itself, with its own texts, or make one of them "
            "again with other keys"
        )


def shared_key(
    audio: str | list[str],
    shards: ShardList,
    wanted: Callable[[str], bool] = every,
    workers: int = 0,
    show: bool = True,
) -> Shared | None:
    """The first key of a set that two utterances have, if there is one; the headers of its tars are read up to there.

    Args:
        audio: as of `check_keys`, as `shards`, `wanted` and `show` are.
        workers: processes that read; 0: this one does.
    """
    seen = Seen()
    with Progress("keys", shards.samples, "utterances", show) as progress:
        for number, keys in enumerate(map_ordered(functools.partial(_keys, audio), shards, workers)):
            if shared := seen.add(filter(wanted, keys), number):
                return shared
            progress.advance(len(keys))
    return None


def _keys(audio: str | list[str], info: ShardInfo) -> list[str]:
    return list(read_keys(audio, info))
