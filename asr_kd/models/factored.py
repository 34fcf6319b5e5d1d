"""LSTM layers with weights of low rank, and how a trained layer is thinned (Prabhavalkar et al. 2016, arXiv 1603.08042).

*Apart* (`model.rank`): each matrix is a product of two, W = U V, by its own singular value decomposition. Fewer weights to store, the same time.

*Jointly* (`model.projection`): all that hears the state h of a layer (its own recurrence, and what is above it) hears P h, of fewer numbers.
That is the LSTM with projection (Sak et al. 2014, arXiv 1402.1128), fewer weights and less time; the paper's decomposition is how it starts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# it is slower, and `ProjectedLstm` knows where
warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")

State = tuple[Tensor, Tensor]


class Product(nn.Module):
    """A matrix `left` [rows, rank] times `right` [rank, columns]; the rank is no more than rows or columns allow."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        rank = min(rank, rows, columns)
        self.left, self.right = nn.Parameter(torch.empty(rows, rank)), nn.Parameter(torch.empty(rank, columns))
        self._made: tuple[object, Tensor] | None = None

    def initialise(self) -> None:
        """As much in all elements together as Xavier's rule gives a whole matrix."""
        rows, columns, rank = len(self.left), self.right.shape[1], len(self.right)
        nn.init.orthogonal_(self.right)
        nn.init.normal_(self.left, std=math.sqrt(2 * columns / (rank * (rows + columns))))

    def forward(self) -> Tensor:
        """The matrix; where nothing is learned it is kept for the next call, or a stream would make it for each frame.

        A change through `.data` is not noticed; nothing changes weights so once they are made.
        """
        factors = (self.left, self.right)
        if torch.is_grad_enabled() or not all(isinstance(one, nn.Parameter) for one in factors):
            self._made = None
            return self.left @ self.right
        # a change in place is another version, a move to another device another address
        now = [(one.data_ptr(), one._version) for one in factors]
        if self._made is None or self._made[0] != now:
            with torch.autocast(self.left.device.type, enabled=False):
                self._made = (now, self.left @ self.right)
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}


class FactoredLstm(nn.Module):
    """What `nn.LSTM` with one layer and `batch_first` is, with both matrices of low rank."""

    def __init__(self, inputs: int, size: int, rank: int) -> None:
        super().__init__()
        self.size = size
        self.weight_ih, self.weight_hh = Product(4 * size, inputs, rank), Product(4 * size, size, rank)
        self.bias_ih, self.bias_hh = nn.Parameter(torch.zeros(4 * size)), nn.Parameter(torch.zeros(4 * size))

    def initialise(self) -> None:
        """Recurrent gates begin as rotations, of as many dimensions as the rank has; forget gates are open."""
        self.weight_ih.initialise()
        nn.init.orthogonal_(self.weight_hh.right)
        for gate in self.weight_hh.left.data.chunk(4):
            nn.init.orthogonal_(gate)
        self.bias_ih.data.chunk(4)[1].fill_(1.0)

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As `nn.LSTM`."""
        if state is None:
            zeros = inputs.new_zeros(1, len(inputs), self.size)
            state = (zeros, zeros)
        weights = [self.weight_ih(), self.weight_hh(), self.bias_ih, self.bias_hh]
        hidden, *after = torch.lstm(inputs, state, weights, True, 1, 0.0, self.training, False, True)
        return hidden, (after[0], after[1])


class ProjectedLstm(nn.LSTM):
    """An LSTM layer with a projection. On a CPU torch runs those frame by frame: best for a stream, three to ten times slower on whole utterances.

    Those it hears with the recurrence multiplied out, projected afterwards.
    """

    def __init__(self, inputs: int, size: int, outputs: int) -> None:
        super().__init__(inputs, size, batch_first=True, proj_size=outputs)

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As `nn.LSTM`."""
        if state is not None or inputs.is_cuda:
            heard: Any = nn.LSTM.forward(self, inputs, state)
            return heard[0], heard[1]
        zeros = inputs.new_zeros(1, len(inputs), self.hidden_size)
        project: Any = self.weight_hr_l0
        weights: Any = [self.weight_ih_l0, self.weight_hh_l0 @ project, self.bias_ih_l0, self.bias_hh_l0]
        hidden, _, cell = torch.lstm(inputs, (zeros, zeros), weights, True, 1, 0.0, self.training, False, True)
        # a row a frame: torch picks another order of multiplying for [batch, frames, …] when a weight cannot be learned
        outputs = nn.functional.linear(hidden.flatten(0, 1), project).unflatten(0, hidden.shape[:2])
        return outputs, (outputs[:, -1:].transpose(0, 1).contiguous(), cell)


def apart(weights: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Weights of `FactoredLstm` layers from those of `nn.LSTM` layers: of each matrix the nearest of this rank, in squares."""
    found = {}
    for name, weight in weights.items():
        short = name.removesuffix("_l0")
        if short != name and "weight" in name:
            u, values, v = torch.linalg.svd(weight.double(), full_matrices=False)
            root = values[:rank].sqrt()  # the singular values are shared out evenly
            found[f"{short}.left"] = (u[:, : len(root)] * root).float()
            found[f"{short}.right"] = (root[:, None] * v[: len(root)]).float()
        else:
            found[short] = weight
    return found


def jointly(weights: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Weights of layers with a projection to `size` outputs from those without: one for all that hears a layer, the nearest in squares.

    Args:
        weights: of an `LstmModel`; one that has projections stays as it is.
        size: outputs of a layer in each direction.
    """
    if any("weight_hr" in name for name in weights):
        return dict(weights)
    found, directions = dict(weights), [one for one in ("forwards", "backwards") if f"{one}.0.weight_hh_l0" in weights]
    layer = 0
    while f"forwards.{layer}.weight_hh_l0" in weights:
        above = [name for one in directions if (name := f"{one}.{layer + 1}.weight_ih_l0") in weights] or [
            "output.weight"
        ]
        thin: dict[str, list[Tensor]] = {name: [] for name in above}
        for at, direction in enumerate(directions):
            own = f"{direction}.{layer}.weight_hh_l0"
            width = weights[own].shape[1]
            heard = {own: weights[own]} | {name: weights[name][:, at * width : (at + 1) * width] for name in above}
            projection = torch.linalg.svd(torch.cat(list(heard.values())).double(), full_matrices=False).Vh[:size]
            found[f"{direction}.{layer}.weight_hr_l0"] = projection.float()
            made = {name: (weight.double() @ projection.T).float() for name, weight in heard.items()}
            found[own] = made.pop(own)
            for name, weight in made.items():
                thin[name].append(weight)
        found |= {name: torch.cat(parts, 1) for name, parts in thin.items()}
        layer += 1
    return found
