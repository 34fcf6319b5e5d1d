"""torchaudio's bundles: wav2vec 2.0 and HuBERT models with CTC heads, from their published files, of which only weights are read."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn

from asr_kd.audio.settings import SoundSettings
from asr_kd.errors import UserError
from asr_kd.models.acoustic import Checkpoint
from asr_kd.models.outside.network import OutsideModel, finished, strided
from asr_kd.models.outside.vocabulary import Tokens, Vocabulary, vocabulary_of
from asr_kd.models.settings import OutsideSettings

#: how a bundle is named
PREFIX = "torchaudio:"


class BundleModel(OutsideModel):
    """A network of torchaudio.

    Args:
        network: as a bundle makes it.
        vocabulary: of its outputs.
    """

    def __init__(self, network: nn.Module, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary, {}, pads=False)
        self.network: Any = network
        # around a network that hears normalised sound there is one that normalises it: a whole batch as if it were one utterance
        self.alone = hasattr(network, "normalize_waveform")
        inner: Any = getattr(network, "model", network)
        self.layers = [(one.kernel_size, one.stride, 0) for one in inner.feature_extractor.conv_layers]

    def frames(self, rows: int) -> int:
        """See `OutsideModel.frames`."""
        return strided(rows, self.layers)

    def hear(self, sounds: list[Tensor], taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `OutsideModel.hear`."""
        with self.arithmetic(sounds[0].device):
            if self.alone:
                return torch.cat([self.network(sound[None])[0] for sound in sounds]), {}
            return self.network(torch.stack(sounds))[0], {}


def bundles() -> dict[str, Any]:
    """torchaudio's bundles with CTC posteriors, by name."""
    found = {name: getattr(torchaudio.pipelines, name) for name in torchaudio.pipelines.__all__}
    return {name: one for name, one in found.items() if hasattr(one, "get_labels") and not isinstance(one, type)}


def file_of(bundle: Any) -> str:
    """The name of the file with a bundle's weights."""
    return str(bundle._path).rpartition("/")[2]


def bundle_in(folder: Path) -> str | None:
    """The bundle whose file of weights lies in a folder, if any; UserError where there are several."""
    # a model.pt, as of MMS_FA, may be anything
    found = [
        name for name, one in bundles().items() if file_of(one) != "model.pt" and (folder / file_of(one)).is_file()
    ]
    if len(found) > 1:
        raise UserError(f"{folder}: holds the weights of {' and '.join(found)}; keep one file a folder")
    return found[0] if found else None


def load_bundle(bundle: str, name: str, device: torch.device | str, folder: Path | None = None) -> Checkpoint:
    """A bundle of torchaudio.

    Args:
        bundle: its name there.
        name: how the user has named it, for messages.
        device: where its weights go.
        folder: with its file; None: torch's cache, where it is fetched unless it is there.

    Raises:
        UserError: when there is no such bundle, or its file cannot be had or read.
    """
    known = bundles()
    if bundle not in known:
        raise UserError(f"{name}: torchaudio has no such bundle with CTC posteriors; it has {', '.join(known)}")
    made = known[bundle]
    starred = hasattr(made, "get_aligner")  # its last output stands for any text
    labels = [*made.get_labels(**({"star": None} if starred else {}))]
    fetching = {"weights_only": True, "progress": False} | ({"model_dir": str(folder)} if folder else {})
    try:
        network = made.get_model(**({"with_star": False} if starred else {}), dl_kwargs=fetching)
    except (pickle.UnpicklingError, EOFError):
        raise UserError(
            f"{name}: {file_of(made)} holds more than weights, or is damaged, and is not read; fetch it again"
        ) from None
    except (OSError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{name}: cannot be had ({reason}); fetch {file_of(made)} where there is a network, and give the folder that it is in"
        ) from None
    vocabulary = vocabulary_of(Tokens(list(labels), labels.index("-"), None, "|" if "|" in labels else None), name)
    model = BundleModel(network, vocabulary)
    window, hop = 1, 1
    for kernel, stride, _ in model.layers:
        window, hop = window + (kernel - 1) * hop, hop * stride
    rate = int(made.sample_rate)
    features = SoundSettings(sample_rate=rate, frame_ms=1000 * hop // rate, least=window)
    settings = OutsideSettings(family="torchaudio", network=bundle)
    return finished(model.to(device), vocabulary, features, settings, {"bundle": bundle, "alone": model.alone}, name)
