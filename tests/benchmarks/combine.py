"""Speed and fidelity of several teachers as one: python tests/benchmarks/combine.py POSTERIORS.npz [--json]

POSTERIORS.npz holds log_probs [frames, units] and lengths [utterances]; the second teacher is the first with noise on its
log-probabilities. Divergence (nat, mean of all frames) is counted from the combination of the full distributions to that of
the stored ones, the tail spread evenly; `decode` reads one teacher, whose divergence is its own. Speeds: the best of several
passes over the utterances, one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tables import print_rows

from asr_kd.targets.codec import decode, encode
from asr_kd.targets.combine import combine, resample
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.reduced import divergence, reduced

PASSES = 7
#: name of a row, k, mass, floor
KEPT: tuple[tuple[str, int, float, float], ...] = (
    ("mass 0.999, k 20", 20, 0.999, 0.0),
    ("floor 0.0001", 255, 1.0, 1e-4),
)


def normalised(log_probs: np.ndarray) -> np.ndarray:
    largest = log_probs.max(1, keepdims=True)
    return log_probs - largest - np.log(np.exp(log_probs - largest).sum(1, keepdims=True))


def full(teachers: list[np.ndarray], mode: str) -> np.ndarray:
    """Log-probabilities of the combination of full distributions."""
    if mode == "log_mean":
        return normalised(np.mean(teachers, axis=0))
    probs = np.exp(teachers)
    weights = np.ones((len(teachers), len(probs[0])))
    if mode == "confidence":
        weights = np.exp((probs * teachers).sum(2))
    return np.log((probs * (weights / weights.sum(0))[:, :, None]).sum(0))


def measure(mode: str, kept: str, run: Callable[[], list[SparsePosteriors]], dense: list[np.ndarray] | None) -> Any:
    seconds, found = float("inf"), []
    for _ in range(PASSES):
        start = time.perf_counter()
        found = run()
        seconds = min(seconds, time.perf_counter() - start)
    frames = sum(one.frames for one in found)
    kl = None
    if dense is not None:
        pairs = zip(found, dense, strict=True)
        kl = round(float(np.concatenate([divergence(reduced(one, row), one) for one, row in pairs]).mean()), 5)
    return {
        "mode": mode,
        "kept": kept,
        "entries_per_frame": round(sum(len(one.units) for one in found) / frames, 1),
        "kl": kl,
        "frames_per_second": round(frames / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("posteriors")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with np.load(arguments.posteriors, allow_pickle=False) as file:
        log_probs, lengths = file["log_probs"].astype(np.float64), file["lengths"]
    noise = np.random.default_rng(0).normal(0, 0.5, log_probs.shape)
    splits = np.cumsum(lengths)[:-1]
    dense = [np.split(normalised(values), splits) for values in (log_probs, log_probs + noise)]
    rows = []
    for name, *selection in KEPT:
        data = [[encode(SparsePosteriors.from_dense(one, *selection)) for one in teacher] for teacher in dense]
        first, second = ([decode(one) for one in teacher] for teacher in data)
        rows.append(measure("decode", name, lambda data=data: [decode(one) for one in data[0]], dense[0]))  # type: ignore[misc]
        for mode in ("mean", "log_mean", "confidence"):
            run = lambda a=first, b=second, mode=mode: [combine([*pair], mode) for pair in zip(a, b, strict=True)]  # noqa: E731
            expected = [full([*pair], mode) for pair in zip(*dense, strict=True)]
            rows.append(measure(mode, name, run, expected))
        run = lambda a=first: [resample(one, 40, 0, one.frames * 4 // 3, 30) for one in a]  # noqa: E731
        rows.append(measure("resample 40 to 30 ms", name, run, None))
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
