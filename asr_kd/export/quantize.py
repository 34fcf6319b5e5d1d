"""int8: matrices rounded by onnxruntime, activations as they come. The front end stays float32: quantised, its energies are lost."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx

from asr_kd.export.frontend import MEL


def quantized(model: Path, by_row: bool) -> onnx.ModelProto:
    """A model with its matrices as int8, each with one step, or each row with its own: those of a network that was trained so stay what they are."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        made, before = Path(folder) / "model.onnx", logging.root.manager.disable
        # it asks for a pass of its own first, which finds nothing to do in these graphs
        logging.disable(logging.WARNING)
        try:
            quantize_dynamic(model, made, weight_type=QuantType.QInt8, nodes_to_exclude=[MEL], per_channel=by_row)
        finally:
            logging.disable(before)
        return onnx.load(made)
