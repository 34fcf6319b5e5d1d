from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from asr_kd.audio.blas import one_thread
from asr_kd.errors import UserError
from asr_kd.targets.quantiser import FILE, Quantiser, fit, read_quantiser, write_bytes


def rows(count: int = 1500, width: int = 6) -> np.ndarray:
    """Clusters of clusters, with some noise."""
    rng = np.random.default_rng(0)
    places = (
        rng.normal(0, 3, (9, width))[rng.integers(0, 9, count)]
        + rng.normal(0, 1, (40, width))[rng.integers(0, 40, count)]
    )
    return (places + rng.normal(0, 0.1, (count, width))).astype(np.float32)


def lost(quantiser: Quantiser, data: np.ndarray) -> float:
    got = quantiser.decode("a", quantiser.encode("a", torch.from_numpy(data)).numpy())
    return float(np.square(got - data).sum() / np.square(data - data.mean(0)).sum())


def test_more_codebooks_lose_less_and_new_rows_are_coded_nearly_as_well() -> None:
    data = rows()
    tables = fit(data[:1000], 4)
    found = [lost(Quantiser({"a": tables[:count]}), data[:1000]) for count in (1, 2, 3, 4)]
    assert all(after < 0.9 * before for before, after in itertools.pairwise(found))
    assert found[0] < 0.05 and lost(Quantiser({"a": tables}), data[1000:]) < 0.02


def test_each_code_is_the_nearest_centre_to_what_is_left() -> None:
    data, tables = rows(50), fit(rows(600), 3)
    codes = Quantiser({"a": tables}).encode("a", torch.from_numpy(data)).numpy()
    left = data.astype(np.float64)
    for number in range(3):
        distance = np.square(left[:, None] - tables[number].astype(np.float64)).sum(2)
        np.testing.assert_array_equal(codes[:, number], distance.argmin(1))
        left -= tables[number][codes[:, number]]


def test_one_codebook_is_coded_to_itself() -> None:
    quantiser = Quantiser({"a": fit(rows(), 1)})
    codes = np.arange(256, dtype=np.uint8)[:, None]
    again = quantiser.encode("a", torch.from_numpy(quantiser.decode("a", codes))).numpy()
    np.testing.assert_array_equal(quantiser.decode("a", again), quantiser.decode("a", codes))


def test_the_same_rows_give_the_same_bits_and_codes_whatever_the_threads() -> None:
    with one_thread():
        tables = fit(rows(), 2)
        np.testing.assert_array_equal(fit(rows(), 2), tables)
    quantiser, before = Quantiser({"a": tables}), torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(quantiser.encode("a", torch.from_numpy(rows())))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_fewer_rows_than_centres_and_equal_rows() -> None:
    few = rows(20)
    assert lost(Quantiser({"a": fit(few, 2)}), few) < 1e-6
    assert np.isfinite(fit(np.ones((300, 2), np.float32), 2)).all()


def test_the_file(tmp_path: Path) -> None:
    quantiser = Quantiser({"b": fit(rows(), 2), "a": fit(rows(300, 3), 2)})
    (tmp_path / FILE).write_bytes(write_bytes(quantiser))
    found = read_quantiser(tmp_path, quantiser.fingerprint)
    assert found.fingerprint == quantiser.fingerprint and write_bytes(found) == write_bytes(quantiser)
    for tap, table in quantiser.tables.items():
        np.testing.assert_array_equal(found.tables[tap], table)
    with pytest.raises(UserError, match=rf"is quantiser {quantiser.fingerprint}, the codes are of 123; copy the one"):
        read_quantiser(tmp_path, "123")
    changed: dict[str, Any] = {**quantiser.tables, "a": quantiser.tables["a"] + np.float32(1e-6)}
    assert Quantiser(changed).fingerprint != quantiser.fingerprint


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "quantiser of the codes"),
        (b"nothing", "damaged"),
        (safetensors.numpy.save({"a": np.zeros((2, 255, 3), np.float32)}), "holds no codebooks of 256 centres"),
        (safetensors.numpy.save({"a": np.zeros((2, 256), np.float32)}), "holds no codebooks of 256 centres"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / FILE).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_quantiser(tmp_path)
