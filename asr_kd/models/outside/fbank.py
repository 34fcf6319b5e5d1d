"""Front ends of other toolkits: sound → log mel energies, as the recipes of icefall, WeNet and NeMo compute them without dither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchaudio
from torch import Tensor

from asr_kd.audio.settings import KALDI_BELOW
from asr_kd.audio.spectrum import kaldi

#: hop and window in milliseconds, of all of them
HOP_MS, WINDOW_MS = 10, 25


@dataclass(frozen=True)
class FrontEnd:
    """A front end with hops of HOP_MS.

    Attributes:
        compute: float32 [samples], their rate in Hz and a number of bins → float32 [frames, bins].
        frames: how many it gives, for samples and their rate.
        start_ms: where its first window begins; in front of the sound it hears a mirror image, or zeros.
        channels_first: whether a network of that toolkit takes [bins, frames].
        fewest: frames that it can be computed for.
    """

    compute: Callable[[Tensor, int, int], Tensor]
    frames: Callable[[int, int], int]
    start_ms: float
    channels_first: bool = False
    fewest: int = 1


def _icefall(sound: Tensor, rate: int, bins: int) -> Tensor:
    return torch.from_numpy(kaldi(rate, bins, below=KALDI_BELOW, mirrored=True).of(sound.numpy()))


def _wenet(sound: Tensor, rate: int, bins: int) -> Tensor:
    # samples of 16 bits as they are
    return torch.from_numpy(kaldi(rate, bins, below=0.0, mirrored=False, scale=32768.0).of(sound.numpy()))


def _nemo(sound: Tensor, rate: int, bins: int) -> Tensor:
    window, hop = rate * WINDOW_MS // 1000, rate * HOP_MS // 1000
    size = 1 << (window - 1).bit_length()
    sound = torch.cat([sound[:1], sound[1:] - 0.97 * sound[:-1]])
    spectrum = torch.stft(
        sound, size, hop, window, torch.hann_window(window, periodic=False), pad_mode="constant", return_complex=True
    )[:, : len(sound) // hop]
    filters = torchaudio.functional.melscale_fbanks(size // 2 + 1, 0.0, rate / 2, bins, rate, "slaney", "slaney")
    return (spectrum.abs().square().T @ filters + 2**-24).log()


def _normalised(sound: Tensor, rate: int, bins: int) -> Tensor:
    """By the mean and the deviation of each bin over the utterance."""
    logs = _nemo(sound, rate, bins)
    return (logs - logs.mean(0)) / (logs.std(0) + 1e-5)


def _reflected(samples: int, rate: int) -> int:
    # of less than a window icefall computes none
    return (samples + rate // 200) // (rate // 100) if samples >= rate // 40 else 0


def _centred(samples: int, rate: int) -> int:
    return samples // (rate // 100)


ICEFALL = FrontEnd(_icefall, _reflected, HOP_MS / 2 - WINDOW_MS / 2)
WENET = FrontEnd(_wenet, lambda samples, rate: max(0, (samples - rate // 40) // (rate // 100) + 1), 0.0)
NEMO = FrontEnd(_normalised, _centred, -WINDOW_MS / 2, channels_first=True, fewest=2)  # one frame has no deviation
NEMO_AS_IT_IS = FrontEnd(_nemo, _centred, -WINDOW_MS / 2, channels_first=True)
