"""Networks whose weight matrices are whole multiples of a step, one for each output row: 8, 4 or 2 bits a weight.

    w_q = Δ · clamp(round(w / Δ), -n, n)      n = 2^(bits - 1) - 1      Δ = the row's largest |w| / n

In training the weights stay float. Every forward pass runs on w_q, and the gradient passes the rounding as if it were not there
(straight-through; Bengio et al. 2013, arXiv 1308.3432; with distillation Polino et al. 2018, arXiv 1802.05668). So optimiser, processes, averages
and the training state know nothing of it. Biases, norms and statistics stay float.

Δ is rounded up to 16 binary digits: every multiple is then exact in float32, and what was rounded once is not changed by being rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from asr_kd.models.network import AcousticModel

#: in a checkpoint, behind the name of a matrix: its whole numbers, uint8 [rows, bytes], and its steps, float32 [rows]
CODES, STEPS = ".codes", ".steps"
#: binary digits of a step
DIGITS = 16


def steps_of(weight: Tensor, bits: int) -> Tensor:
    """Δ of each row of a weight [rows, …], shaped to multiply it; 1 for rows of zeros."""
    largest = weight.detach().flatten(1).abs().amax(1) / _most(bits)
    mantissa, exponent = torch.frexp(largest)
    rounded = torch.ldexp((mantissa * 2**DIGITS).ceil() / 2**DIGITS, exponent)
    steps = torch.where(largest < torch.finfo(weight.dtype).tiny, torch.ones_like(rounded), rounded)
    return steps.view(-1, *[1] * (weight.dim() - 1))


class _Rounding(torch.autograd.Function):
    """Whole multiples of `steps`, at most `most` of them; its gradient is 1 where nothing is cut off, else 0."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, steps: Tensor, most: int) -> Tensor:
        codes = (weight / steps).round()
        ctx.save_for_backward(codes.abs() <= most)
        return codes.clamp(-most, most) * steps + 0.0  # no zeros with a sign: a whole number has none

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return slopes[0] * ctx.saved_tensors[0], None, None


def rounded(weight: Tensor, bits: int) -> Tensor:
    """w_q of a weight [rows, …]."""
    result: Tensor = _Rounding.apply(weight, steps_of(weight, bits), _most(bits))
    return result


def quantised(network: AcousticModel, bits: int) -> AcousticModel:
    """The network itself, changed so that it runs on w_q; its weights and their names are what they were."""
    kind: Any = type(network)

    def forward(self: AcousticModel, features: Tensor, lengths: Tensor, taps: Any = ()) -> Any:
        return _run(self, kind.forward, bits, features, lengths, taps)

    def stream(self: AcousticModel, features: Tensor, state: Any) -> Any:
        return _run(self, kind.stream, bits, features, state)

    network.__class__ = type(f"Quantised{kind.__name__}", (kind,), {"forward": forward, "stream": stream})
    return network


class _Call(nn.Module):
    """A method of a network, as a module."""

    def __init__(self, network: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, *arguments: Any) -> Any:
        return self.method(self.network, *arguments)


def _run(network: nn.Module, method: Callable[..., Any], bits: int, *arguments: Any) -> Any:
    # not a parametrisation of each weight: an LSTM keeps a list of its weights, and would run on those
    weights = {f"network.{name}": rounded(one, bits) for name, one in _matrices(network).items()}
    return functional_call(_Call(network, method), weights, arguments)


def packed(model: nn.Module, bits: int) -> dict[str, Tensor]:
    """A network's weights as they are stored, on the CPU: of each matrix whole numbers, 8 // bits to a byte, and steps."""
    matrices = _matrices(model).keys()
    stored = {}
    for name, weight in model.state_dict().items():
        weight = weight.detach().cpu().contiguous()
        if name not in matrices:
            stored[name] = weight
            continue
        steps, most = steps_of(weight, bits), _most(bits)
        # what is not a number shows in the steps
        codes = (weight / steps).nan_to_num(0.0).round().clamp(-most, most).flatten(1).to(torch.int16)
        stored[name + CODES], stored[name + STEPS] = _in_bytes(codes, bits), steps.flatten().float()
    return stored


def unpacked(stored: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The reverse of `packed`, but each matrix is float32 [rows, columns], with columns of 0 that fill its last byte.

    Raises:
        ValueError: when codes and steps do not fit each other.
    """
    weights = {}
    for name, value in stored.items():
        if name.endswith(CODES):
            steps = stored.get(name.removesuffix(CODES) + STEPS)
            if (
                steps is None
                or value.dtype != torch.uint8
                or value.dim() != 2
                or steps.dtype != torch.float32
                or steps.dim() != 1
            ):
                raise ValueError(f"{name} has no steps, or is not of bytes")
            if steps.shape != value.shape[:1]:
                raise ValueError(f"{name} has {len(value)} rows and {len(steps)} steps")
            weights[name.removesuffix(CODES)] = _from_bytes(value, bits).float() * steps[:, None]
        elif not name.endswith(STEPS) or name.removesuffix(STEPS) + CODES not in stored:
            weights[name] = value
    return weights


def shaped(weights: Mapping[str, Tensor], model: nn.Module, bits: int) -> dict[str, Tensor]:
    """Weights as `unpacked` gives them in the shapes of a network.

    Raises:
        ValueError: when one does not fit.
    """
    shapes, found = {name: weight.shape for name, weight in _matrices(model).items()}, {}
    for name, weight in weights.items():
        shape = shapes.get(name)
        if shape is not None:
            columns = shape[1:].numel()
            width = -(-columns * bits // 8) * 8 // bits
            if weight.shape != (shape[0], width) or weight[:, columns:].nan_to_num(0.0).any():
                raise ValueError(f"{name} is not of {shape[0]} rows of {columns}")
            weight = weight[:, :columns].reshape(shape).contiguous()
        found[name] = weight
    return found


def _matrices(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are rounded. A bias of attention has two dimensions, and is none of them."""
    named = network.named_parameters()
    return {name: weight for name, weight in named if weight.dim() > 1 and not name.endswith("bias")}


def _most(bits: int) -> int:
    return int(2 ** (bits - 1)) - 1


def _in_bytes(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers int16 [rows, columns] of so many bits in uint8 [rows, bytes], the first in the lowest bits."""
    places = torch.arange(0, 8, bits, dtype=torch.int16)
    padded = nn.functional.pad(codes, (0, -codes.shape[1] % len(places))) & (2**bits - 1)
    return (padded.unflatten(1, (-1, len(places))) << places).sum(-1).to(torch.uint8)


def _from_bytes(data: Tensor, bits: int) -> Tensor:
    """The reverse of `_in_bytes`, with columns of 0 that fill the last byte."""
    places = torch.arange(0, 8, bits, dtype=torch.int16)
    values = (data.to(torch.int16)[..., None] >> places) & (2**bits - 1)
    return (values - ((values >> (bits - 1)) << bits)).flatten(1)
