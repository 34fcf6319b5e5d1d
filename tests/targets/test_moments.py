"""Moments: sums over pieces, noise that has them, and their file."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from asr_kd.errors import UserError
from asr_kd.targets.moments import Moments, Sums, read_moments, write_moments

WIDTH = 5


def speechlike(seed: int, frames: int) -> np.ndarray:
    """Neighbouring bands that move together, and slowly."""
    rng = np.random.default_rng(seed)
    rows = np.cumsum(rng.normal(size=(frames + 20, WIDTH)), axis=0)
    rows = rows[20:] - rows[:-20]
    return np.asarray((rows @ rng.normal(size=(WIDTH, WIDTH)) / 5 + np.arange(WIDTH)).astype(np.float16))


def of(pieces: list[np.ndarray]) -> Moments:
    sums = Sums(WIDTH)
    for piece in pieces:
        sums.add(piece, 0.25 * len(piece))
    return sums.moments("0123")


@pytest.fixture
def moments() -> Moments:
    return of([speechlike(seed, 50) for seed in range(4)])


def test_sums_over_utterances_give_what_the_definitions_say() -> None:
    pieces = [speechlike(seed, 10 + seed) for seed in range(6)]
    found = of(pieces)
    rows = np.concatenate(pieces).astype(np.float64)
    steps = np.concatenate([np.diff(piece.astype(np.float64), axis=0) for piece in pieces])  # none from one to the next
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.axes @ found.axes.T, np.eye(WIDTH), atol=1e-5)
    along = (rows - rows.mean(0)) @ found.axes.T
    np.testing.assert_allclose(along.T @ along / len(rows), np.diag(found.variance), atol=2e-3)
    np.testing.assert_allclose(found.change, ((steps @ found.axes.T) ** 2).mean(0), rtol=1e-3)
    assert found.spoken == 0.25 and found.teacher == "0123"


def test_what_never_moves_has_a_variance_that_can_divide() -> None:
    found = of([np.ones((3, WIDTH), np.float16), np.ones((1, WIDTH), np.float16)])
    assert (found.variance > 0).all() and np.isfinite(found.roughness).all() and not found.change.any()


def test_coloured_noise_has_the_moments(moments: Moments) -> None:
    white = np.random.default_rng(0).standard_normal((60_000, WIDTH), np.float32)
    rows = moments.coloured(white)
    assert rows.dtype == np.float32
    found = of([rows])
    np.testing.assert_allclose(found.mean, moments.mean, atol=0.15)
    covariance = [one.axes.T @ np.diag(one.variance) @ one.axes for one in (found, moments)]
    np.testing.assert_allclose(*covariance, atol=0.06 * covariance[1].max())
    change = (np.diff(rows @ moments.axes.T, axis=0) ** 2).mean(0)
    np.testing.assert_allclose(change, moments.change, rtol=0.05)
    assert moments.roughness.max() < 1.0  # so that white noise would not do


def test_a_file_gives_back_what_was_written_in_the_same_bytes(moments: Moments, tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_moments(tmp_path / name, moments)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    found = read_moments(tmp_path / "one", WIDTH)
    for field in fields(Moments):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(moments, field.name))


def test_other_files_are_refused_in_a_sentence(moments: Moments, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    write_moments(good, moments)
    content = good.read_bytes()
    damaged = [b"", b"{}", content[:40], content[:-1], content.replace(b"asr_kd-moments-1", b"asr_kd-moments-9")]
    damaged += [content.replace(b"spoken", b"token."), safetensors.numpy.save({"mean": moments.mean})]
    for said in damaged:
        bad.write_bytes(said)
        with pytest.raises(UserError, match=r"bad: holds no moments .*; make them again with `asr-kd moments`"):
            read_moments(bad, WIDTH)
    for change in ({"variance": -moments.variance}, {"mean": moments.mean * np.nan}, {"axes": moments.axes[1:]}, {"change": moments.mean[1:]}):  # fmt: skip
        write_moments(bad, replace(moments, **change))
        with pytest.raises(UserError, match="bad: holds no moments"):
            read_moments(bad, WIDTH)
    with pytest.raises(UserError, match="good: holds moments of features of 5 numbers a frame, this run's have 24"):
        read_moments(good, 24)
    with pytest.raises(UserError, match="gone: no such file of moments; make it with `asr-kd moments`"):
        read_moments(tmp_path / "gone", WIDTH)
