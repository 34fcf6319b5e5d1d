"""Exported graphs in onnxruntime, as clients run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from asr_kd.errors import UserError
from asr_kd.export.streaming import T_ONE_MS, T_ONE_RATE

#: files of an exported folder
MODEL, QUANTIZED, TOKENS = "model.onnx", "model.int8.onnx", "tokens.txt"
DESCRIPTION, CARD = "export.json", "README.md"
#: what sherpa-onnx multiplies a sample by
CLIENT_SCALE = 32767


def session_of(path: Path, threads: int = 1) -> Any:
    """A session of onnxruntime on the CPU; UserError when it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("export: onnxruntime is not installed; run `pip install 'asr-kd[export]'`") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Stream:
    """Recordings heard side by side through the interface `stream`, in pieces of any length."""

    def __init__(self, session: Any, batch: int = 1) -> None:
        self._session = session
        self.state = np.zeros((batch, session.get_inputs()[1].shape[1]), np.float32)

    def push(self, samples: np.ndarray, end: np.ndarray | float = 0.0) -> list[np.ndarray]:
        """Of the next samples float32 [batch, any], the log-probabilities of each, float32 [frames, units]; `end` is 1 of those that end."""
        ends = np.broadcast_to(np.float32(end), len(samples))
        given = {"samples": samples, "state": self.state, "end": ends}
        log_probs, frames, self.state = self._session.run(["log_probs", "frames", "next_state"], given)
        return [rows[:count] for rows, count in zip(log_probs, frames, strict=True)]


class TOne:
    """Recordings heard side by side through sherpa-onnx's T-one interface, as sherpa-onnx does it."""

    samples = T_ONE_RATE * T_ONE_MS // 1000

    def __init__(self, session: Any, batch: int = 1) -> None:
        self._session = session
        self.state = np.zeros((batch, session.get_inputs()[1].shape[1]), np.float16)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Of the next chunk float32 [batch, `samples`], the log-probabilities, float32 [batch, rows, units]."""
        signal = (samples * np.float32(CLIENT_SCALE)).astype(np.int32)[..., None]
        log_probs, self.state = self._session.run(["log_probs", "next_state"], {"signal": signal, "state": self.state})
        return np.asarray(log_probs)
