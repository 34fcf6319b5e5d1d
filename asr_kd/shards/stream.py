"""Shards of audio → utterances with their features, ahead of their use and by several processes; batches of like length."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import multiprocessing.context
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend, frontend_of, versioned
from asr_kd.audio.noise import Corruption, Voice, generator, noise_files, read_noise
from asr_kd.audio.settings import InputSettings, NoiseSettings, SoundSettings
from asr_kd.config.base import Sets, Settings
from asr_kd.ending import stop_if_asked
from asr_kd.errors import AudioError, UserError
from asr_kd.files import hash_json, local, read_json, write_json, write_whole
from asr_kd.shards.index import ShardElsewhere, ShardInfo
from asr_kd.shards.tarset import Sample, read_checked

# What a shard's noises are made of is drawn shard by shard, so that memory does not grow with shards or noise files.
MAX_VOICES, MAX_NOISES = 64, 16
#: of the files of a feature cache
CACHE_VERSION = 2
# Processes that load run ahead; where cores are short the network comes first.
NICE = 10
A = TypeVar("A")
B = TypeVar("B")


@dataclass
class Item:
    """An utterance as network input: features float16 [frames, dimension] (or sound, float32 [samples, 1]; or `Deferred`), what its shard says about it, and its length.

    `clean`: the features without noise, if there is noise and they were asked for. `sound`: float32 [samples], without noise, if it was asked
    for.
    """

    key: str
    features: Any  # np.ndarray or Deferred
    fields: dict[str, Any]
    seconds: float
    clean: Any = None
    sound: np.ndarray | None = None


@dataclass
class LoadedShard:
    """Items of a shard in its order, (key, reason) of what could not be used, and how long the front end took."""

    items: list[Item]
    bad: list[tuple[str, str]]
    frontend_seconds: float = 0.0


class ShardInput(Settings):
    """How shards of audio become features.

    With `noise` the sound is corrupted first, by what `noise_seed` and an utterance's key draw; such features are not cached.
    With `keep_clean` the features of the sound as it was are kept beside them, with `sound` that sound itself, as such a network hears it; such features are
    not cached either. `deferred` leaves the features to the device that the network is on, and caches nothing. With `only` the other utterances are passed over
    (a cache holds them all).
    """

    folder: Sets
    features: InputSettings
    max_seconds: float
    cache: str | None = None
    noise: NoiseSettings | None = None
    noise_seed: tuple[int, ...] = ()
    keep_clean: bool = False
    sound: SoundSettings | None = None
    deferred: bool = False
    only: frozenset[str] | None = None


def load_features(wanted: ShardInput, shard: ShardInfo) -> LoadedShard:
    """Decode a shard's audio and compute its features, or take them from the cache. All jobs read audio by this function.

    A cache changes no bit of what is learned: features are kept as the front end gives them.
    """
    stem = None
    if wanted.cache is not None and wanted.noise is None and wanted.sound is None and not wanted.deferred:
        identity = [shard.sha256, versioned(wanted.features), wanted.max_seconds, CACHE_VERSION]
        if isinstance(shard, ShardElsewhere) and shard.reading is not None:
            identity.append(dataclasses.asdict(shard.reading))  # texts and keys depend on it
        name = hash_json(identity)
        stem = local(wanted.cache, "feature_cache") / name
        if stem.with_suffix(".json").exists():
            return _part(_read_cached(stem), wanted.only)
    frontend = frontend_of(wanted.features)
    compute = frontend.defer if wanted.deferred and isinstance(frontend, Frontend) else frontend.compute
    loaded = LoadedShard([], [])
    samples: Iterable[Sample] = read_checked(wanted.folder, shard)
    corruption = clean = sound = None
    if wanted.noise:
        samples = list(samples)  # what is heard in one is made of the others
        corruption = _corruption(wanted, wanted.noise, shard, samples)
    for sample in samples:
        stop_if_asked()
        if wanted.only is not None and stem is None and sample.key not in wanted.only:
            continue
        try:
            waveform, rate = decode(sample.audio, sample.key, wanted.features.sample_rate, wanted.max_seconds)
            if wanted.sound is not None:
                theirs = wanted.sound.sample_rate
                sound = waveform if theirs == rate else decode(sample.audio, sample.key, theirs, wanted.max_seconds)[0]
                sound = frontend_of(wanted.sound).compute(sound)[:, 0]
            if corruption:
                clean = compute(waveform) if wanted.keep_clean else None
                waveform = corruption.apply(waveform, sample.key, sample.fields.get("speaker"))
            began = time.perf_counter()
            features = compute(waveform)
            loaded.frontend_seconds += time.perf_counter() - began
            loaded.items.append(Item(sample.key, features, sample.fields, len(waveform) / rate, clean, sound))
        except AudioError as error:
            loaded.bad.append((sample.key, str(error)))
    if stem is not None:
        _write_cached(stem, loaded, wanted.features.dimension)
    return _part(loaded, wanted.only)


def _part(loaded: LoadedShard, only: frozenset[str] | None) -> LoadedShard:
    if only is None:
        return loaded
    items, bad = [one for one in loaded.items if one.key in only], [one for one in loaded.bad if one[0] in only]
    return LoadedShard(items, bad, loaded.frontend_seconds)


def _corruption(wanted: ShardInput, noise: NoiseSettings, shard: ShardInfo, samples: Sequence[Sample]) -> Corruption:
    """Decode what the noises of a shard are made of: some of its own utterances, and some files of the noise folder."""
    rate = wanted.features.sample_rate
    corruption = Corruption(noise, rate, wanted.noise_seed)
    if "babble" in noise.kinds and noise.share:
        every = max(1, -(-len(samples) // MAX_VOICES))
        for sample in samples[::every]:
            # what cannot be decoded is reported as an utterance, and is no voice
            with contextlib.suppress(AudioError):
                waveform, _ = decode(sample.audio, sample.key, rate, wanted.max_seconds)
                corruption.voices.append(Voice(sample.key, sample.fields.get("speaker"), waveform))
    if noise.folder and noise.share:
        paths = noise_files(noise.folder)
        order = generator(wanted.noise_seed, shard.name).permutation(len(paths))
        corruption.files += [read_noise(paths[index], rate) for index in order[:MAX_NOISES]]
    return corruption


def _write_cached(stem: Path, loaded: LoadedShard, dimension: int) -> None:
    rows = [item.features for item in loaded.items]
    with write_whole(stem.with_suffix(".npy")) as file:
        np.save(file, np.concatenate(rows) if rows else np.empty((0, dimension), np.float16), allow_pickle=False)
    # the description comes last: without it the features do not count as written
    items = [
        {"key": item.key, "frames": len(item.features), "fields": item.fields, "seconds": item.seconds}
        for item in loaded.items
    ]
    write_json(stem.with_suffix(".json"), {"items": items, "bad": loaded.bad})


def _read_cached(stem: Path) -> LoadedShard:
    description = read_json(stem.with_suffix(".json"))
    try:
        rows = np.load(stem.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        starts = np.cumsum([0] + [item["frames"] for item in description["items"]])
        if starts[-1] != len(rows):
            raise ValueError("lengths do not add up")
        items = [
            Item(item["key"], rows[start : start + item["frames"]], item["fields"], item["seconds"])
            for start, item in zip(starts, description["items"], strict=False)
        ]
        return LoadedShard(items, [(key, reason) for key, reason in description["bad"]])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{stem}.npy: damaged feature cache ({error}); remove the folder {stem.parent}") from None


def map_ordered(
    function: Callable[[A], B], arguments: Iterable[A], workers: int, setting: str = "loader_workers"
) -> Iterator[B]:
    """Apply `function` to every argument, in order, with that many processes and at most `workers + 1` results in hand.

    Each process is sent `function`, with all that it holds, once; they start on the first arguments at once.

    Args:
        setting: the name under which the user has set `workers`.

    Raises:
        UserError: when a process is killed, or there is no shared memory for them.
    """
    if workers == 0:
        return map(function, arguments)
    pool = process_pool(workers, setting, _begin, function)
    pool.submit(int)  # the processes start now, while the first argument is made
    arguments = iter(arguments)
    waiting = collections.deque(pool.submit(_apply, argument) for argument in itertools.islice(arguments, workers))

    def results() -> Iterator[B]:
        try:
            for argument in arguments:
                waiting.append(pool.submit(_apply, argument))
                yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(killed(workers, setting)) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return results()


class _Worker(multiprocessing.context.SpawnProcess):
    """When one of its processes was killed a pool terminates the others and waits for them; they do not listen to SIGTERM (`serve_parent`)."""

    def terminate(self) -> None:
        self.kill()


class _Workers(multiprocessing.context.SpawnContext):
    # spawn, not fork: a fork of a process with torch's threads may hang
    Process = _Worker


def process_pool(workers: int, setting: str, begin: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """A pool of that many processes, each of which calls `begin` first; UserError when there is no shared memory for them."""
    try:
        return ProcessPoolExecutor(workers, _Workers(), begin, arguments)
    except (OSError, ImportError) as error:  # no semaphores
        reason = getattr(error, "strerror", None) or "semaphores do not work on this system"
        raise UserError(
            f"/dev/shm: {reason}; processes that work side by side need some shared memory: set {setting}=0, remove what a crashed job "
            "left in /dev/shm, or give a container more of it (docker run --shm-size=1g)"
        ) from None


def killed(workers: int, setting: str = "loader_workers") -> str:
    """What is said when one of so many processes was killed."""
    remedy = f"set {setting}=0" if workers == 1 else f"use fewer than {setting}={workers}"
    return f"a worker process was killed, most likely for lack of memory; {remedy} and run the command again"


def read_ahead(items: Iterator[A], count: int) -> Generator[A]:
    """The same items; up to `count` of them are made ready by a thread while the caller is busy with the one before."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        waiting: collections.deque[Future[Any]] = collections.deque()
        try:
            while True:
                while len(waiting) < count:
                    waiting.append(pool.submit(next, items, end))
                item = waiting.popleft().result()
                if item is end:
                    return
                yield item
        finally:
            pool.shutdown(cancel_futures=True)
            if isinstance(items, Generator):
                items.close()


_function: Callable[[Any], Any]  # what a worker process applies


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    serve_parent()


def _apply(argument: Any) -> Any:
    return _function(argument)


def serve_parent(niceness: int = NICE) -> None:
    """Leave Ctrl-C and SIGTERM, which terminals and schedulers send to all processes, to the parent; end when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(niceness)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def batches_by_length(lengths: Sequence[int], batch_frames: int) -> list[list[int]]:
    """Positions in `lengths` in batches of like length, at most `batch_frames` frames each, padding included.

    The shortest come first; an item longer than `batch_frames` is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda position: (lengths[position], position)):
        if batches and lengths[index] * (len(batches[-1]) + 1) <= batch_frames:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def bucketed(
    held: list[A], length: Callable[[A], int], batch_frames: int, rng: np.random.Generator
) -> Iterator[list[A]]:
    """All items of a buffer in batches of like length (`batches_by_length`), in random order.

    Args:
        held: the buffer, which is shuffled.
        length: gives the frames of an item.
        batch_frames: frames in a batch at most, padding included.
        rng: decides the order.
    """
    rng.shuffle(held)
    batches = batches_by_length([length(item) for item in held], batch_frames)
    for index in rng.permutation(len(batches)):
        yield [held[position] for position in batches[index]]
