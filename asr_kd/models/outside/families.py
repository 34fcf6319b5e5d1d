"""Families of Hugging Face's CTC networks: how long a frame is, where it lies in the sound, how many there are, and what may run together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asr_kd.errors import UserError
from asr_kd.models.outside.network import strided

#: networks whose outputs do not depend on padding, if it is masked, when they are normalised by layer
MASKED_BY_LAYER = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")


@dataclass(frozen=True)
class Family:
    """How a network is run.

    Attributes:
        samples: in the period of an output frame.
        frames: output frames of so many samples.
        least: samples that it needs.
        middle: of what the first frame hears, in samples of the sound; what lies around it alike on both sides does not count.
        overlap: samples by which the windows of its front end are longer than their hop.
        pads: whether utterances of different lengths may run together, masked (measured; `tests/models/outside` holds each to it).
        layers: of hidden states at the rate of the output; 0: they have another rate.
    """

    samples: int
    frames: Callable[[int], int]
    least: int
    middle: float
    overlap: int
    pads: bool
    layers: int

    def offset_ms(self, rate: int) -> int:
        """As of `SoundSettings`: our own frames of P ms, of windows that overlap by v, have their middle at (P + v) / 2."""
        return round((self.middle - (self.samples + self.overlap) / 2) * 1000 / rate)


def family_of(network: Any, extractor: Any, name: str) -> Family:
    """The family of a network.

    Args:
        network: of transformers.
        extractor: its feature extractor.
        name: of the teacher, for messages.

    Raises:
        UserError: when it is of a family that is not known here.
    """
    config = network.config
    encoder = encoder_of(config)
    if hasattr(encoder, "conv_kernel"):
        return _of_sound(config, encoder)
    makers = {"wav2vec2-bert": _bert, "parakeet_ctc": _parakeet, "lasr_ctc": _lasr, "granite_speech5_ctc": _granite}
    if config.model_type not in makers:
        raise UserError(
            f"{name}: is a {config.model_type}, whose frames this asr_kd does not know; it knows {', '.join(makers)}, and networks that hear the "
            "sound itself"
        )
    return makers[config.model_type](config, encoder, extractor)


def encoder_of(config: Any) -> Any:
    """The settings of the encoder, within those of the whole or the whole itself."""
    inner = (getattr(config, name, None) for name in ("encoder_config", "audio_config"))
    return next((one for one in inner if one is not None), config)


def _adapters(config: Any) -> list[tuple[int, int, int]]:
    """The convolutions of an adapter behind the encoder, if there is one; they are centred."""
    if not getattr(config, "add_adapter", False):
        return []
    padding = 2 * (config.adapter_kernel_size // 2) if config.model_type == "wav2vec2-bert" else 2
    return [(config.adapter_kernel_size, config.adapter_stride, padding)] * config.num_adapter_layers


def _slower(config: Any) -> int:
    return int(config.adapter_stride**config.num_adapter_layers) if getattr(config, "add_adapter", False) else 1


def _of_sound(config: Any, encoder: Any) -> Family:
    """wav2vec 2.0 and its kin: convolutions over the sound itself."""
    layers = [(kernel, stride, 0) for kernel, stride in zip(encoder.conv_kernel, encoder.conv_stride, strict=True)]
    window, hop = 1, 1
    for kernel, stride, _ in layers:
        window, hop = window + (kernel - 1) * hop, hop * stride
    squeezed, slower = getattr(config, "squeeze_factor", 1), _slower(config)
    by_layer = config.model_type in MASKED_BY_LAYER and config.feat_extract_norm == "layer"
    return Family(
        samples=hop * slower, frames=lambda samples: strided(samples, layers + _adapters(config)), least=window + hop * (squeezed - 1),
        middle=window / 2, overlap=window - hop, pads=(by_layer and slower == 1) or config.model_type == "omniasr_ctc",
        layers=encoder.num_hidden_layers if squeezed == slower == 1 else 0,
    )  # fmt: skip


def _bert(config: Any, encoder: Any, extractor: Any) -> Family:
    """Filterbanks, windows of 400 samples every 160, two of them joined."""
    joined, slower = extractor.stride, _slower(config)
    frames = lambda samples: strided(strided(samples, [(400, 160, 0)]) // joined, _adapters(config))  # noqa: E731
    least, middle = 400 + 160 * (joined - 1), (400 + 160 * (joined - 1)) / 2
    layers = encoder.num_hidden_layers if slower == 1 else 0
    return Family(160 * joined * slower, frames, least, middle, 240, slower == 1, layers)


def _parakeet(config: Any, encoder: Any, extractor: Any) -> Family:
    """Windows around each hop, then centred convolutions."""
    hop, factor, kernel = extractor.hop_length, encoder.subsampling_factor, encoder.subsampling_conv_kernel_size
    stride = encoder.subsampling_conv_stride
    layers = [(kernel, stride, 2 * ((kernel - 1) // 2))] * (factor.bit_length() - 1)
    frames = lambda samples: strided(samples // hop, layers)  # noqa: E731
    # its normalisation takes the variance of two frames at least
    return Family(hop * factor, frames, 2 * hop, 0.0, extractor.win_length - hop, True, encoder.num_hidden_layers)


def _lasr(config: Any, encoder: Any, extractor: Any) -> Family:
    """Windows from the start, then two convolutions without padding."""
    window, hop = extractor.win_length, extractor.hop_length
    kernel, stride = encoder.subsampling_conv_kernel_size, encoder.subsampling_conv_stride
    frames = lambda samples: strided(samples, [(window, hop, 0), (kernel, stride, 0), (kernel, stride, 0)])  # noqa: E731
    reach = (kernel - 1) * (1 + stride)  # hops behind the first window that the first frame hears
    return Family(
        hop * stride**2,
        frames,
        window + reach * hop,
        (window + reach * hop) / 2,
        window - hop,
        True,
        encoder.num_hidden_layers,
    )


def _granite(config: Any, encoder: Any, extractor: Any) -> Family:
    """Windows around each hop, two of them joined, then blocks of which some pass on every second frame, in the mean."""
    hop, joined, halved = extractor.hop_length, extractor.frame_stacking, 2 ** len(encoder.subsample_layers)
    frames = lambda samples: -(-(samples // hop) // joined) // halved  # noqa: E731
    return Family(
        hop * joined * halved,
        frames,
        hop * (joined * halved - joined + 1),
        hop * (joined * halved - 1) / 2,
        extractor.win_length - hop,
        False,
        0,
    )
