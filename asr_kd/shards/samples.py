"""Audio shards for anybody's own loop: a `webdataset` pipeline, in an order that a seed alone decides, from any position on."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import UserError
from asr_kd.files import Place, place
from asr_kd.shards.index import ShardInfo, ShardList
from asr_kd.shards.tarset import read_checked, read_index

if TYPE_CHECKING:
    import webdataset


class Position(NamedTuple):
    """A place in a stream: so many passes, shards of the pass and utterances of the shard are behind it."""

    number: int = 0
    shard: int = 0
    item: int = 0


def dataset(
    folder: Place | str | list[str],
    *,
    seed: int | None = None,
    passes: int | None = 1,
    start: tuple[int, int, int] = Position(),
    features: FeatureSettings | None = None,
    sample_rate: int | None = None,
    max_seconds: float = 60.0,
    lane: int = 0,
    lanes: int = 1,
    handler: Callable[[Exception], bool] | None = None,
) -> webdataset.DataPipeline:
    """The utterances of a set of audio shards, as a `webdataset.DataPipeline` of dicts.

    A sample holds `__key__`, `__url__` (of its shard), `text` (None where it is unlabelled), `fields` (all that its JSON says),
    `after` (the position behind it, to start from another time) and its sound: `waveform` float32 and its `sample_rate`, or
    `features` float16 [frames, dimension]. Each shard is compared with the index before anything of it is given out. The
    workers of a torch `DataLoader` share the shards; positions are then of each worker's own, so build a `lane` for each.

    Args:
        folder: a folder or the URL of one, made by `asr-kd prepare` or `index`; or several, which are read as one.
        seed: of the order of the shards, which every pass draws anew; None: as the index lists them.
        passes: how often all is read; None: without end.
        start: `after` of the last sample that was used; with the same folder, seed and lanes, what follows is the same.
        features: front end, for features in place of the waveform.
        sample_rate: that the waveform is converted to; None: the file's own.
        max_seconds: longer utterances are refused before they are decoded.
        lane: the part of the shards that is read, counted from 0.
        lanes: equal parts of the shards, one for each of so many processes.
        handler: what is done about audio that cannot be decoded, as of webdataset (`webdataset.warn_and_continue`, …);
            None: it is raised.

    Raises:
        UserError: when there is no such set, fewer shards than lanes, or `start` is not of this stream; the iterator: when a
            shard is damaged, or an utterance cannot be decoded.
    """
    import webdataset  # here, because it loads torch

    folder, start = folder if isinstance(folder, list) else place(folder), Position(*start)
    if features and sample_rate not in (None, features.sample_rate):
        raise UserError(f"sample_rate: {sample_rate}, but features.sample_rate is {features.sample_rate}; leave it out")
    if not 0 <= lane < lanes:
        raise UserError(f"lane: {lane} is not one of the {lanes} lanes, which count from 0")
    shards = read_index(folder).filled
    if len(shards) < lanes:
        raise UserError(f"{folder}: has {len(shards)} shards that hold utterances, for {lanes} lanes; use fewer lanes")
    order = functools.partial(_order, len(shards), seed, lane, lanes)
    mine = order(max(start.number, 0))
    if min(start) < 0 or start.shard >= len(mine) or start.item > shards[int(mine[start.shard])].samples:
        raise UserError(
            f"start: {tuple(start)} is no position of these shards; take one that the same folder, seed and lanes gave"
        )
    frontend = Frontend(features) if features else None
    decoded = functools.partial(_decoded, frontend, sample_rate, max_seconds)
    return webdataset.DataPipeline(
        functools.partial(_turns, shards, order, passes, start),
        webdataset.split_by_worker,
        functools.partial(_read, folder),
        webdataset.map(decoded, handler=handler or webdataset.reraise_exception),
    )


def _order(shards: int, seed: int | None, lane: int, lanes: int, number: int) -> np.ndarray:
    """Which shards a pass reads, in order."""
    order = np.arange(shards) if seed is None else np.random.default_rng([seed, number]).permutation(shards)
    return order[lane::lanes]


def _turns(
    shards: ShardList, order: Callable[[int], np.ndarray], passes: int | None, start: Position
) -> Iterator[tuple[Position, ShardInfo]]:
    """The shards that are to be read, each from a position on."""
    for number in itertools.count(start.number) if passes is None else range(start.number, passes):
        first = start.shard if number == start.number else 0
        for turn, index in enumerate(order(number)[first:], first):
            done = start.item if (number, turn) == start[:2] else 0
            yield Position(number, turn, done), shards[int(index)]


def _read(folder: Place | list[str], turns: Iterable[tuple[Position, ShardInfo]]) -> Iterator[dict[str, Any]]:
    for at, info in turns:
        for item, sample in enumerate(read_checked(folder, info), 1):
            if item > at.item:
                about = {"__key__": sample.key, "__url__": str(info.at(folder)), "__shard__": info}
                yield {**about, "sample": sample, "after": at._replace(item=item)}


def _decoded(
    frontend: Frontend | None, sample_rate: int | None, max_seconds: float, read: dict[str, Any]
) -> dict[str, Any]:
    sample = read.pop("sample")
    wanted = frontend.settings.sample_rate if frontend else sample_rate
    waveform, rate = decode(sample.audio, sample.key, wanted, max_seconds)
    sound = {"features": frontend.compute(waveform)} if frontend else {"waveform": waveform, "sample_rate": rate}
    return {**read, **sound, "text": sample.fields.get("text"), "fields": sample.fields}
