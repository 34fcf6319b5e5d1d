"""Time and memory of losses against sparse soft targets, forward and backward: python tests/benchmarks/loss.py [--json]

Extra memory is the peak while the loss is computed and differentiated, the gradient of the logits (1.0) included, in
multiples of the logits. Times are the best of several passes, the losses taking turns; ratios count, not milliseconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from tables import print_rows
from torch import Tensor

from asr_kd.distillation.response import MissingMass, soft_cross_entropy

Loss = Callable[[Tensor], Tensor]


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """Memory that `work` needs at its peak, over what is there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def candidates(units: Tensor, probs: Tensor, tail: Tensor, compiled: bool) -> dict[str, Loss]:
    """Name → loss of logits, mean over frames; the rivals as they are commonly written."""

    def sparse(logits: Tensor) -> Tensor:
        return -(probs * logits.log_softmax(-1).gather(1, units)).sum(-1).mean()

    def dense(logits: Tensor) -> Tensor:
        target = torch.zeros_like(logits).scatter_(1, units, probs)
        return F.kl_div(logits.log_softmax(-1), target, reduction="sum") / len(logits)

    prior = torch.rand(1, int(units.max()) + 1, device=units.device)
    losses: dict[str, Loss] = {
        "hard cross-entropy": lambda logits: F.cross_entropy(logits, units[:, 0]),
        "log_softmax and gather": sparse,
        "dense target, kl_div": dense,
    }
    for missing in get_args(MissingMass):

        def ours(logits: Tensor, missing: MissingMass = missing) -> Tensor:
            priors = F.pad(prior, (0, logits.shape[1] - prior.shape[1]), value=1e-3)
            return soft_cross_entropy(logits, units, probs, tail, missing, priors / priors.sum()).mean()

        losses[f"asr_kd {missing}"] = ours
        if compiled:
            losses[f"asr_kd {missing}, torch.compile"] = torch.compile(ours)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=4096)
    parser.add_argument("--units", type=int, default=3183)
    parser.add_argument("-k", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="each of ours also through torch.compile")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    logits = torch.randn(arguments.frames, arguments.units, device=device) * 3
    best, units = (logits + torch.randn_like(logits)).softmax(-1).topk(arguments.k)
    probs, tail = best.contiguous(), 1 - best.sum(-1)
    losses = candidates(units, probs, tail, arguments.compile)

    def once(loss: Loss) -> None:
        logits.grad = None
        loss(logits).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    logits.requires_grad_()
    seconds = dict.fromkeys(losses, float("inf"))
    memory = {}
    for name, loss in losses.items():
        once(loss)
        logits.grad = None
        memory[name] = peak_bytes(device, lambda loss=loss: once(loss))  # type: ignore[misc]
    for _ in range(arguments.passes):
        for name, loss in losses.items():
            start = time.perf_counter()
            once(loss)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "frames": arguments.frames,
            "units": arguments.units,
            "k": arguments.k,
            "milliseconds": round(1000 * seconds[name], 2),
            "ratio_to_hard": round(seconds[name] / seconds["hard cross-entropy"], 2),
            "extra_memory_ratio": round(memory[name] / (logits.numel() * logits.element_size()), 2),
        }
        for name in losses
    ]
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
