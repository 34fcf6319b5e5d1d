"""Whoever answers: a checkpoint of ours, or a teacher from outside, behind one contract."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from asr_kd.config.knobs import Precision
from asr_kd.errors import UserError
from asr_kd.files import hash_json, place
from asr_kd.models.acoustic import Checkpoint, load_checkpoint
from asr_kd.models.outside.bundles import PREFIX, bundle_in, load_bundle
from asr_kd.models.outside.hub import HUB, fetched
from asr_kd.models.outside.huggingface import load_huggingface
from asr_kd.models.outside.network import OutsideModel
from asr_kd.models.outside.onnx import MODEL, OnnxModel, load_onnx
from asr_kd.models.settings import OutsideSettings


def is_name(teacher: str) -> bool:
    """Whether a teacher is named, as `hf:owner/name`, and is no path."""
    return teacher.startswith((HUB, PREFIX))


def is_foreign(name: str) -> bool:
    """Whether a teacher is from outside, by its name or by what its local folder holds; nothing is fetched."""
    folder = None if is_name(name) else place(name)
    return is_name(name) or (isinstance(folder, Path) and _held(folder) is not None)


def load_teacher(name: str, device: torch.device | str = "cpu", precision: Precision = "float32") -> Checkpoint:
    """Load a checkpoint as `load_checkpoint`, or a teacher from outside. Nothing in the files is executed.

    Args:
        name: folder or URL of a checkpoint of ours; local folder of a Hugging Face CTC model, of an ONNX CTC model, or of a bundle's
            weights; `hf:owner/name@revision`; `torchaudio:BUNDLE`.
        device: where its weights go.
        precision: as of `in_precision`.

    Raises:
        UserError: when there is none, or it cannot be run here, or not so.
    """
    return in_precision({name: _loaded(name, device)}, precision)[name]


def in_precision(checkpoints: dict[str, Checkpoint], precision: Precision) -> dict[str, Checkpoint]:
    """Checkpoints by name, of which those from outside run in an arithmetic; ours run in float32, as they were scored.

    Raises:
        UserError: when bfloat16 is asked for, and one cannot run in it, or all are ours.
    """
    if precision == "float32":
        return checkpoints
    foreign = {name: one for name, one in checkpoints.items() if isinstance(one.settings, OutsideSettings)}
    if not foreign:
        raise UserError(
            f"precision: {' and '.join(checkpoints)} is a checkpoint of asr_kd, which answers in float32; leave it out"
        )
    if graph := next((name for name, one in foreign.items() if isinstance(one.model, OnnxModel)), None):
        raise UserError(f"precision: {graph} is an ONNX model, whose graph holds its arithmetic; leave it out")
    return checkpoints | {name: _in_bfloat16(one) for name, one in foreign.items()}


def _in_bfloat16(teacher: Checkpoint) -> Checkpoint:
    assert isinstance(teacher.model, OutsideModel)
    teacher.model.precision = "bfloat16"
    settings = teacher.settings.model_copy(update={"precision": "bfloat16"})
    return replace(teacher, settings=settings, fingerprint=hash_json([teacher.fingerprint, "bfloat16"]))


def _loaded(name: str, device: torch.device | str) -> Checkpoint:
    if name.startswith(HUB):
        return load_huggingface(fetched(name), name, device)
    if name.startswith(PREFIX):
        return load_bundle(name.removeprefix(PREFIX), name, device)
    folder = place(name)
    if isinstance(folder, Path):
        match _held(folder):
            case "onnx":
                return load_onnx(folder, name, device)
            case "huggingface":
                return load_huggingface(folder, name, device)
            case "torchaudio":
                return load_bundle(str(bundle_in(folder)), name, device, folder)
    return load_checkpoint(folder, device)


def _held(folder: Path) -> str | None:
    """The family of the model from outside that a local folder holds; None where it holds a checkpoint of ours, or neither."""
    if (folder / "checkpoint.json").exists():
        return None
    if (folder / MODEL).is_file() and not any(folder.glob("*.safetensors")):
        return "onnx"
    if (folder / "config.json").is_file():
        return "huggingface"
    return "torchaudio" if bundle_in(folder) else None
