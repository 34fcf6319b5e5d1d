"""Size, fidelity and speed of the soft-target codec: python tests/benchmarks/codec.py POSTERIORS.npz [--json]

POSTERIORS.npz holds log_probs [frames, units] and lengths [utterances]. Divergence (nat, mean of all frames) is counted
from the full distribution to the decoded one: `kl` with the leftover mass spread evenly over the units not kept,
`kl_prior` with the leftover mass spread like the prior that a shard's metadata carries (512 bytes and a third for every
384 units, once a shard; not counted in the bytes a frame). Writing starts at the dense log-probabilities of an utterance,
reading at its bytes. Speeds: the best of several passes, one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard
from tables import print_rows

from asr_kd.targets.codec import decode, encode
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.prior import fit_prior, gain, prior_of
from asr_kd.targets.reduced import divergence, reduced

PASSES = 7
#: name of a row, k, mass, floor
MODES: tuple[tuple[str, int, float, float], ...] = (
    ("mass 0.99, k 20", 20, 0.99, 0.0),
    ("mass 0.999, k 20", 20, 0.999, 0.0),
    ("top-20", 20, 1.0, 0.0),
    ("mass 0.999, k 40", 40, 0.999, 0.0),
    ("mass 0.999, k 128", 128, 0.999, 0.0),
    ("floor 0.001", 255, 1.0, 1e-3),
    ("floor 0.0003", 255, 1.0, 3e-4),
    ("floor 0.0002", 255, 1.0, 2e-4),
    ("floor 0.0001", 255, 1.0, 1e-4),
    ("floor 0.00004", 255, 1.0, 4e-5),
    ("top-128", 128, 1.0, 0.0),
)


def half_encode(posteriors: SparsePosteriors, packed: bool) -> bytes:
    """The field's usual layout: counts, uint16 units, float16 log-probabilities."""
    columns = (posteriors.counts, posteriors.units.astype("<u2"), posteriors.log_probs.astype("<f2"))
    raw = b"".join(column.tobytes() for column in columns)
    return zstandard.compress(raw) if packed else raw


def half_decode(data: bytes, packed: bool, frames: int, num_units: int) -> SparsePosteriors:
    raw = zstandard.decompress(data) if packed else data
    counts = np.frombuffer(raw, np.uint8, frames)
    entries = int(counts.sum(dtype=np.int64))
    units = np.frombuffer(raw, "<u2", entries, frames).astype(np.int32)
    log_probs = np.frombuffer(raw, "<f2", entries, frames + 2 * entries).astype(np.float32)
    kept = np.add.reduceat(np.exp(log_probs), np.cumsum(counts, dtype=np.int64) - counts)
    return SparsePosteriors(counts, units, log_probs, np.maximum(1e-6, 1 - kept), num_units)


def measure(
    name: str,
    mode: str,
    utterances: list[np.ndarray],
    write: Callable[[np.ndarray], bytes],
    read: Callable[[bytes, int], SparsePosteriors],
    with_prior: bool = False,
) -> dict[str, Any]:
    frames = sum(map(len, utterances))
    data: list[bytes] = []
    decoded: list[SparsePosteriors] = []
    write_seconds = read_seconds = float("inf")
    for _ in range(PASSES):
        start = time.perf_counter()
        data = [write(item) for item in utterances]
        middle = time.perf_counter()
        decoded = [read(item, len(dense)) for item, dense in zip(data, utterances, strict=True)]
        end = time.perf_counter()
        write_seconds, read_seconds = min(write_seconds, middle - start), min(read_seconds, end - middle)
    pairs = list(zip(decoded, utterances, strict=True))
    full = [reduced(item, dense) for item, dense in pairs]
    kl = np.concatenate([divergence(one, one.kept) for one in full])
    better = None
    if with_prior:
        total = np.sum([one.leftover for one in full], 0)
        better = kl.mean() - gain(total, prior_of(fit_prior(total)), decoded) / frames
    top1 = np.concatenate([item.units[item.starts] == dense.argmax(1) for item, dense in pairs])
    return {
        "name": name,
        "mode": mode,
        "entries_per_frame": round(sum(len(item.units) for item in decoded) / frames, 1),
        "bytes_per_frame": round(sum(map(len, data)) / frames, 2),
        # what was not drawn has no mass at all: a divergence says nothing of draws
        "kl": round(float(kl.mean()), 5) if np.isfinite(kl).all() else None,
        "kl_prior": None if better is None else round(float(better), 5),
        "top1_kept": round(float(top1.mean()), 5),
        "write_frames_per_second": round(frames / write_seconds),
        "read_frames_per_second": round(frames / read_seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("posteriors")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with np.load(arguments.posteriors, allow_pickle=False) as file:
        log_probs, lengths = file["log_probs"].astype(np.float32), file["lengths"]
    log_probs -= np.log(np.exp(log_probs.astype(np.float64)).sum(1, keepdims=True)).astype(np.float32)
    utterances = np.split(log_probs, np.cumsum(lengths)[:-1])
    num_units = log_probs.shape[1]
    rows = []
    for mode, k, mass, floor in MODES:
        write = lambda dense, keep=(k, mass, floor): encode(SparsePosteriors.from_dense(dense, *keep))  # noqa: E731
        rows.append(measure("asr_kd", mode, utterances, write, lambda data, _: decode(data), with_prior=True))
    for draws in (20, 100, 255):
        generator = np.random.default_rng(0)
        write = lambda dense, draws=draws, generator=generator: encode(  # noqa: E731
            SparsePosteriors.sampled(dense, draws, generator), draws=draws
        )
        rows.append(measure("asr_kd", f"sampled, {draws} draws", utterances, write, lambda data, _: decode(data)))
    for k in (20, 128):
        for packed in (False, True):
            write = lambda dense, k=k, packed=packed: half_encode(SparsePosteriors.from_dense(dense, k, 1.0), packed)  # noqa: E731
            read = lambda data, frames, packed=packed: half_decode(data, packed, frames, num_units)  # noqa: E731
            rows.append(measure("fp16+uint16" + (" zstd" if packed else ""), f"top-{k}", utterances, write, read))
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
