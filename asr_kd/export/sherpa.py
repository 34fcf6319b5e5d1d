"""sherpa-onnx, where it is installed: a real client of the interfaces that it defines."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from asr_kd.audio.settings import FeatureSettings
from asr_kd.export.settings import Interface

Hear = Callable[[np.ndarray], str]


def has_sherpa() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("sherpa_onnx") is not None


def sherpa_runs(interface: Interface, features: FeatureSettings) -> bool:
    """Whether a graph is one of sherpa-onnx's interfaces: T-one, or one for whole recordings on the features that it computes itself."""
    return interface in ("t-one", "zipformer2") or (interface == "offline" and features.kind == "kaldi")


def recogniser_of(
    interface: Interface,
    model: Path,
    tokens: Path,
    features: FeatureSettings,
    described: dict[str, Any],
    piece_ms: int,
    threads: int,
) -> Hear:
    """What hears a waveform float32 [samples] through a graph, and gives the text.

    Args:
        interface: of the graph; one that sherpa-onnx runs.
        model: the graph.
        tokens: its tokens.txt.
        features: that its network hears.
        described: what export.json says of the interface.
        piece_ms: sound that a stream hears at once.
        threads: of the network.
    """
    if interface == "offline":
        return offline_recogniser(model, tokens, features, threads)
    found, rate = online_recogniser(interface, model, tokens, features, threads), features.sample_rate
    piece, silence = max(1, rate * piece_ms // 1000), np.zeros(rate * described["tail_ms"] // 1000, np.float32)

    def hear(sound: np.ndarray) -> str:
        stream, sound = found.create_stream(), np.concatenate([sound, silence])
        for at in range(0, len(sound), piece):
            stream.accept_waveform(rate, sound[at : at + piece])
            while found.is_ready(stream):
                found.decode_stream(stream)
        stream.input_finished()
        while found.is_ready(stream):
            found.decode_stream(stream)
        return str(found.get_result(stream)).strip()

    return hear


def online_recogniser(
    interface: Interface, model: Path, tokens: Path, features: FeatureSettings, threads: int = 1
) -> Any:
    """sherpa-onnx's own recogniser of streams.

    Args:
        interface: t-one or zipformer2.
        model: the graph.
        tokens: its tokens.txt.
        features: that its network hears.
        threads: of the network.
    """
    import sherpa_onnx

    given: dict[str, Any] = {"tokens": str(tokens), "model": str(model), "num_threads": threads}
    if interface == "t-one":
        return sherpa_onnx.OnlineRecognizer.from_t_one_ctc(**given)
    return sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(
        **given, sample_rate=features.sample_rate, feature_dim=features.mels
    )


def offline_recogniser(model: Path, tokens: Path, features: FeatureSettings, threads: int = 1) -> Hear:
    """What hears a whole waveform float32 [samples] through the interface zipformer, and gives the text.

    Args:
        model: the graph.
        tokens: its tokens.txt.
        features: of kind kaldi, which sherpa-onnx computes.
        threads: of the network.
    """
    import sherpa_onnx

    found = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(
        model=str(model), tokens=str(tokens), num_threads=threads, sample_rate=features.sample_rate, feature_dim=features.mels
    )  # fmt: skip

    def hear(sound: np.ndarray) -> str:
        stream = found.create_stream()
        stream.accept_waveform(features.sample_rate, sound)
        found.decode_stream(stream)
        return str(stream.result.text).strip()

    return hear
