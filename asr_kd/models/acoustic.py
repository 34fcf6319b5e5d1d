"""Acoustic models: building one from settings, its checkpoint, and running it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from asr_kd.audio.batched import Sounds
from asr_kd.audio.features import Deferred, Features, frontend_of, version_of, versioned
from asr_kd.audio.settings import FeatureSettings, InputSettings
from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.files import Place, hash_json, place, read_json, write_json, write_whole
from asr_kd.models.chunked_conformer import ChunkedConformerModel
from asr_kd.models.conformer import ConformerModel
from asr_kd.models.conv import ConvModel
from asr_kd.models.emformer import EmformerModel
from asr_kd.models.lstm import LstmModel
from asr_kd.models.network import AcousticModel
from asr_kd.models.rounded import packed, quantised, shaped, unpacked
from asr_kd.models.separable import SeparableModel
from asr_kd.models.settings import ModelSettings, OutsideSettings
from asr_kd.shards.index_file import INDEX
from asr_kd.shards.stream import batches_by_length
from asr_kd.units import MODEL_FILE, Units, load_units
from asr_kd.version import version

FORMAT, VERSION = "asr_kd-checkpoint", 1


#: for each kind, what makes a network from settings, number of inputs and number of units
NETWORKS: dict[str, Callable[[ModelSettings, int, int], AcousticModel]] = {
    "lstm": LstmModel, "separable": SeparableModel, "chunked_conformer": ChunkedConformerModel, "emformer": EmformerModel,
    "blstm": LstmModel, "conv": ConvModel, "conformer": ConformerModel,
}  # fmt: skip


def build_model(settings: ModelSettings, inputs: int, num_units: int) -> AcousticModel:
    """A network with new random weights, from `inputs` features to `num_units` logits a frame; with `bits` it runs on rounded ones."""
    network = NETWORKS[settings.kind](settings, inputs, num_units)
    return quantised(network, settings.bits) if settings.bits else network


def parameters(model: nn.Module) -> int:
    """Number of weights."""
    return sum(weight.numel() for weight in model.parameters())


def pick_device(wanted: str) -> torch.device:
    """The device of this name; `auto` is CUDA if there is one, else the CPU.

    Raises:
        UserError: when the device is unknown or missing.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", wanted):
        raise UserError(f"device: {wanted} is not supported; use auto, cpu, cuda or cuda:N")
    device = torch.device(wanted)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UserError(f"device: {wanted} is not on this machine; use auto or cpu")
    return device


@contextmanager
def blank_held_back(model: AcousticModel, offset: float) -> Iterator[None]:
    """Within this context `offset` nat are subtracted from the blank's output bias; afterwards it is restored bit for bit."""
    held = [model.output.bias] if model.condition is None else [model.output.bias, model.condition.held_back]
    before = [one.detach().clone() for one in held]
    with torch.no_grad():
        model.output.bias[Units.blank] -= offset
        if model.condition is not None:
            model.condition.held_back += offset
        try:
            yield
        finally:
            for one, value in zip(held, before, strict=True):
                one.copy_(value)


@dataclass
class Checkpoint:
    """A model with everything needed to rebuild it and its input.

    Attributes:
        features: its front end, or for a network from outside what sound it is given.
        fingerprint: hash of the weights and of every setting that changes the output.
        training: how it was made (steps, scores, settings), for people; never needed to run the model.
        vocabulary: of a teacher from outside: the token of each of its outputs, and the unit that it stands for.
        model: of a quantised network, one of float32 that holds the rounded weights.
    """

    model: AcousticModel
    units: Units
    features: InputSettings
    settings: ModelSettings | OutsideSettings
    fingerprint: str
    training: dict[str, Any] = field(default_factory=dict)
    vocabulary: list[dict[str, Any]] = field(default_factory=list)

    @property
    def frame_ms(self) -> int:
        """Period of one output frame in milliseconds."""
        return self.features.frame_ms

    @property
    def offset_ms(self) -> int:
        """Start of the first output frame in the audio, in milliseconds."""
        return self.features.offset_ms

    @property
    def lookahead_ms(self) -> int | None:
        """How much audio after the end of a frame its output depends on, in milliseconds; None: all of it."""
        frames = self.model.lookahead_frames
        return None if frames is None else frames * self.frame_ms + frontend_of(self.features).overhang_ms

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


@dataclass
class OwnCheckpoint(Checkpoint):
    """A checkpoint that asr_kd has trained."""

    features: FeatureSettings
    settings: ModelSettings


def stored_weights(model: nn.Module, settings: ModelSettings | OutsideSettings) -> dict[str, Tensor]:
    """What a checkpoint's file of weights holds."""
    if settings.bits:
        return packed(model, settings.bits)
    return {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}


def _fingerprint(weights: dict[str, Tensor], units: Units, features: dict[str, Any], model: dict[str, Any]) -> str:
    """Hash of the weights and of every setting that changes the output; `features` as `versioned` gives them."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return hash_json({"weights": digest.hexdigest(), "units": units.hash, "features": features, "model": model})


def save_checkpoint(
    folder: Place | str,
    model: nn.Module,
    units: Units,
    features: FeatureSettings,
    settings: ModelSettings,
    training: dict[str, Any] | None = None,
) -> str:
    """Write a checkpoint folder and return its fingerprint.

    `checkpoint.json` is written last and holds the fingerprint, so a folder left incomplete by a crash is noticed.

    Args:
        folder: local or in an object store.
        training: see `Checkpoint`; must be valid JSON.
    """
    folder = place(folder)
    weights = stored_weights(model, settings)
    with write_whole(folder / MODEL_FILE) as file:
        file.write(units.model)
    with write_whole(folder / "model.safetensors") as file:
        file.write(safetensors.torch.save(weights))
    run = shaped(unpacked(weights, settings.bits), model, settings.bits) if settings.bits else weights
    mark = _fingerprint(run, units, versioned(features), settings.model_dump())
    description = {
        "format": FORMAT, "version": VERSION, "fingerprint": mark, "units_hash": units.hash, "num_units": units.size,
        "model": settings.model_dump(), "features": features.model_dump(), "frontend": version_of(features), "parameters": parameters(model),
        "training": training or {}, "asr_kd": version(),  # who wrote it, for people: no fingerprint covers it
    }  # fmt: skip
    write_json(folder / "checkpoint.json", description)
    return mark


def _described(folder: Place) -> tuple[Place, dict[str, Any]]:
    """The file that describes a checkpoint, and what it says."""
    places = (one / "checkpoint.json" for one in (folder, folder / "best"))
    where = next((one for one in places if one.exists()), None)
    if where is None:
        raise UserError(f"{folder}: {_no_checkpoint(folder)}")
    description = read_json(where, "checkpoint")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{where}: not a checkpoint of asr_kd; give the folder of a training run")
    if description.get("version") != VERSION:
        raise UserError(
            f"{where}: checkpoint version {description.get('version')}, this program reads {VERSION}; use {_writer(description)}"
        )
    return where, description


def _no_checkpoint(folder: Place) -> str:
    """What stands in the place of a checkpoint, and what to do."""
    if isinstance(folder, Path):  # a store has no folders, and a web server's list of files looks like a file
        if folder.is_file():
            return "is a file; a checkpoint is the folder that train writes"
        if not folder.exists():
            return "there is no such folder; give that of a training run or of a checkpoint"
    if (folder / INDEX).exists():
        return "is a folder of audio shards, no checkpoint; give the folder that train writes"
    return "holds no checkpoint.json; give the folder of a training run or of a checkpoint"


def _writer(description: dict[str, Any]) -> str:
    """The program that wrote a checkpoint; the first ones do not name it."""
    return f"asr_kd {description['asr_kd']}, which wrote it" if "asr_kd" in description else "the asr_kd that wrote it"


def read_model_settings(folder: Place | str) -> ModelSettings:
    """The shape of a checkpoint's network, without its weights; a UserError as of `load_checkpoint`."""
    where, description = _described(place(folder))
    return build(ModelSettings, description.get("model", {}), str(where))


def read_training(folder: Place | str) -> Any:
    """What a checkpoint says of its training, without its weights; a UserError as of `load_checkpoint`."""
    return _described(place(folder))[1].get("training")


def load_checkpoint(folder: Place | str, device: torch.device | str = "cpu") -> OwnCheckpoint:
    """Load a checkpoint; given the folder of a run, its best one. Nothing in the files is executed.

    Raises:
        UserError: when there is no checkpoint, it is of another format or version, or its files do not fit each other.
    """
    where, description = _described(place(folder))
    folder = where.parent
    inputs, network = description.get("features", {}), description.get("model", {})
    features = build(FeatureSettings, inputs, str(where))
    if (frontend := description.get("frontend", 1)) != version_of(features):  # the first checkpoints do not name it
        raise UserError(
            f"{where}: was trained on features of version {frontend}, this program makes version {version_of(features)}; use "
            f"{_writer(description)}, or train it again"
        )
    settings = build(ModelSettings, network, str(where))
    units = load_units(folder)
    try:
        weights = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/model.safetensors: cannot be read ({error}); copy the checkpoint again") from None
    misfit = UserError(f"{folder}: the weights do not fit the settings in checkpoint.json; copy the checkpoint again")
    try:
        weights = unpacked(weights, settings.bits) if settings.bits else weights
    except ValueError:
        raise misfit from None
    # damaged settings may ask for more memory than there is; torch's meta device would show it, but imports 100 MB
    dimensions = [dimension for weight in weights.values() for dimension in weight.shape]
    asked = max(settings.size, features.dimension, units.size)
    if settings.layers > len(weights) or asked > max(dimensions, default=0):
        raise misfit
    model = build_model(settings.model_copy(update={"bits": None}), features.dimension, units.size)
    try:
        model.load_state_dict(shaped(weights, model, settings.bits) if settings.bits else weights)
    except (RuntimeError, ValueError):
        raise misfit from None
    # a setting that came later is not in the file, and was not hashed when it was written
    known = {name: value for name, value in versioned(features).items() if name in (*inputs, "frontend")}
    mark = _fingerprint(model.state_dict(), units, known, settings.model_dump(include=set(network)))
    if mark != description.get("fingerprint"):
        raise UserError(
            f"{folder}: the files do not belong together (fingerprint {mark}, written {description.get('fingerprint')}); copy it again"
        )
    if not all(bool(weight.isfinite().all()) for weight in model.state_dict().values()):
        raise UserError(
            f"{folder}: has weights that are not numbers (NaN or infinite); use an earlier checkpoint of its run"
        )
    model.to(device).eval()
    training = description.get("training")
    return OwnCheckpoint(model, units, features, settings, mark, training if isinstance(training, dict) else {})


def collate(features: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pad features [frames, inputs] with zeros into float32 [batch, frames, inputs], with lengths int64 [batch]."""
    lengths = torch.tensor([len(item) for item in features])
    # few calls into torch: each takes the interpreter's lock, which other threads hold
    rows = [torch.from_numpy(np.asarray(item, dtype=np.float32)) for item in features]
    return pad_sequence(rows, batch_first=True), lengths


def _input(checkpoint: Checkpoint, features: Sequence[Features]) -> tuple[Tensor, Tensor]:
    """As `collate`, on the network's device; features that are still sound are made there."""
    deferred = [one for one in features if isinstance(one, Deferred)]
    if not deferred:
        batch, lengths = collate([one for one in features if not isinstance(one, Deferred)])
        return batch.to(checkpoint.device), lengths
    assert len(deferred) == len(features) and isinstance(checkpoint.features, FeatureSettings)
    return Sounds.of(deferred).features(checkpoint.features, checkpoint.device), torch.tensor(list(map(len, deferred)))


def log_posteriors(checkpoint: Checkpoint, features: Sequence[Features]) -> list[Tensor]:
    """Log-probabilities of one batch of utterances, on the network's device: for features [rows, inputs], float16 or
    float32, of each utterance, or the sound that they are made of there, float32 [frames, units], nat."""
    return [row for row, _ in log_posteriors_and_hidden(checkpoint, features)]


@torch.inference_mode()
def log_posteriors_and_hidden(
    checkpoint: Checkpoint, features: Sequence[Features], taps: Sequence[str] = ()
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """As `log_posteriors`, each with the hidden states that `taps` name, float32 [frames, width], on the same device."""
    batch, lengths = _input(checkpoint, features)
    outputs = checkpoint.model(batch, lengths, taps)
    log_probs = outputs.logits.float().log_softmax(-1)
    return [
        (row[:length], {tap: outputs.hidden[tap][index, :length].float() for tap in taps})
        for index, (row, length) in enumerate(zip(log_probs, outputs.lengths.tolist(), strict=True))
    ]


def log_posterior_batches(
    checkpoint: Checkpoint, features: Sequence[Features], batch_frames: int
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """As `log_posteriors` of any number of utterances, in batches of at most `batch_frames` output frames, padding included.

    Yields:
        positions in `features` of a batch, and the log-probabilities of each.
    """
    for batch in batches_by_length([checkpoint.model.frames(len(item)) for item in features], batch_frames):
        yield batch, log_posteriors(checkpoint, [features[index] for index in batch])


def hidden_batches(
    checkpoint: Checkpoint, features: Sequence[Features], batch_frames: int, taps: Sequence[str]
) -> Iterator[tuple[list[int], list[tuple[Tensor, dict[str, Tensor]]]]]:
    """As `log_posterior_batches`, each with the hidden states that are asked for.

    Args:
        checkpoint: that answers.
        features: as of `log_posteriors`.
        batch_frames: at most, padding included.
        taps: names of hidden states; there may be none.
    """
    for batch in batches_by_length([checkpoint.model.frames(len(item)) for item in features], batch_frames):
        yield batch, log_posteriors_and_hidden(checkpoint, [features[index] for index in batch], taps)


def infer(checkpoint: Checkpoint, features: Sequence[Features]) -> list[np.ndarray]:
    """As `log_posteriors`, in host memory."""
    return [row.cpu().numpy() for row in log_posteriors(checkpoint, features)]


def infer_batches(
    checkpoint: Checkpoint, features: Sequence[Features], batch_frames: int
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """As `log_posterior_batches`, in host memory."""
    for batch, rows in log_posterior_batches(checkpoint, features, batch_frames):
        yield batch, [row.cpu().numpy() for row in rows]
