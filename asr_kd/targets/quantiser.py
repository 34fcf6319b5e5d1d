"""A residual quantiser of hidden states: each codebook codes what the ones before it have left over, a byte each.

Codes as targets in place of hidden states are from Guo et al. 2022 (arXiv 2211.00508), who refine the codes of all codebooks together;
here each codebook is k-means on the residual of those before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from asr_kd.errors import UserError
from asr_kd.files import Place, place, readable

if TYPE_CHECKING:
    from torch import Tensor

#: in the folder of targets
FILE = "quantiser.safetensors"
#: centres of a codebook
CENTRES = 256
#: passes of k-means over the rows, and rows that are compared with all centres at a time
PASSES, BLOCK = 10, 4096


@dataclass(frozen=True)
class Quantiser:
    """The codebooks of each tap: float32 [codebooks, 256, width]."""

    tables: dict[str, np.ndarray]

    @property
    def fingerprint(self) -> str:
        """Hash of all centres."""
        digest = hashlib.sha256()
        for tap, table in sorted(self.tables.items()):
            digest.update(f"{tap} {table.shape}\n".encode())
            digest.update(table.astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def encode(self, tap: str, rows: Tensor) -> Tensor:
        """Codes uint8 [rows, codebooks] of float32 [rows, width], on their device: in turn the centre nearest to what is left."""
        import torch  # not at the top: reading does not need it

        left, codes = rows.float(), []
        for table in torch.from_numpy(self.tables[tap]).to(rows.device):
            code = (table.square().sum(1) - 2 * left @ table.T).argmin(1)
            codes.append(code.to(torch.uint8))
            left = left - table[code]
        return torch.stack(codes, 1)

    def decode(self, tap: str, codes: np.ndarray) -> np.ndarray:
        """float32 [rows, width] of uint8 [rows, codebooks]: the sum of the centres."""
        rows = np.zeros((len(codes), self.tables[tap].shape[2]), np.float32)
        for table, code in zip(self.tables[tap], codes.T, strict=True):
            rows += table[code]
        return rows


def fit(rows: np.ndarray, codebooks: int) -> np.ndarray:
    """Codebooks float32 [codebooks, 256, width] for rows float32 [rows, width]; the same rows give the same bits in one thread."""
    left, tables = rows.astype(np.float32), []
    for number in range(codebooks):
        centres, codes = _k_means(left, np.random.default_rng(number))
        left = left - centres[codes]
        tables.append(centres)
    return np.stack(tables)


def _k_means(rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centres float32 [256, width] and the nearest one of each row, int64 [rows]; a centre without rows takes the row farthest from its own."""
    centres = rows[rng.choice(len(rows), CENTRES, replace=len(rows) < CENTRES)]
    for _ in range(PASSES):
        codes, distance = _nearest(rows, centres)
        order, counts = np.argsort(codes, kind="stable"), np.bincount(codes, minlength=CENTRES)
        used = np.flatnonzero(counts)
        sums = np.add.reduceat(rows[order], np.cumsum(counts[used]) - counts[used], dtype=np.float64)
        centres[used] = sums / counts[used, None]
        unused = np.flatnonzero(counts == 0)[: len(rows)]
        centres[unused] = rows[np.argsort(-distance, kind="stable")[: len(unused)]]
    return centres, _nearest(rows, centres)[0]


def _nearest(rows: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each row, int64 [rows], and its squared distance."""
    norms, found = np.square(centres).sum(1), []
    for first in range(0, len(rows), BLOCK):
        some = rows[first : first + BLOCK]
        distances = norms - 2 * some @ centres.T
        nearest = distances.argmin(1)
        found.append((nearest, distances[np.arange(len(some)), nearest] + np.square(some).sum(1)))
    codes, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    return codes, distance


def write_bytes(quantiser: Quantiser) -> bytes:
    """The content of the file of a quantiser."""
    return safetensors.numpy.save({tap: np.ascontiguousarray(table) for tap, table in quantiser.tables.items()})


def read_quantiser(folder: Place | str, fingerprint: str | None = None) -> Quantiser:
    """The quantiser in a folder of targets.

    Args:
        folder: of the targets.
        fingerprint: that it must have; None: any.

    Raises:
        UserError: when it is missing or damaged, or another one made the codes.
    """
    path = place(folder) / FILE
    with readable(path, "quantiser of the codes", "copy it with its shards, or label the audio again"):
        data = path.read_bytes()
    try:
        quantiser = Quantiser(safetensors.numpy.load(data))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); copy it again") from None
    shapes = [(table.ndim, table.dtype, *table.shape[1:2]) for table in quantiser.tables.values()]
    if any(shape != (3, np.dtype(np.float32), CENTRES) for shape in shapes):
        raise UserError(f"{path}: holds no codebooks of {CENTRES} centres; copy it again")
    if fingerprint is not None and quantiser.fingerprint != fingerprint:
        raise UserError(
            f"{path}: is quantiser {quantiser.fingerprint}, the codes are of {fingerprint}; copy the one that was written with them"
        )
    return quantiser
