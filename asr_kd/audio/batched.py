"""The features of `audio.features` for a batch of utterances at a time, by torch on any device, and the augmentation of them there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from asr_kd.audio.augment import Between, Masks, Stretch
from asr_kd.audio.features import LOG_SCALE, MEAN_BLOCK, Deferred, Frontend, cumulative, exponential_weights
from asr_kd.audio.settings import FeatureSettings
from asr_kd.audio.spectrum import HOP_BLOCK

#: hops whose spectra are there at once, on a CPU, whose cache they should fit, and on another device
AT_ONCE, AT_ONCE_ELSEWHERE = 8 * HOP_BLOCK, 512 * HOP_BLOCK


class BatchedFrontend(nn.Module):
    """A front end with these settings, which makes the features of its `Frontend` but for how sums are rounded.

    What else is in the batch changes no feature: filters are applied to blocks of one shape, each of one utterance (on a CPU not by a bit).
    """

    taper: Tensor
    filters: Tensor
    weights: Tensor
    decay: Tensor

    def __init__(self, settings: FeatureSettings) -> None:
        super().__init__()
        self.frontend = Frontend(settings)
        weights, decay = exponential_weights(settings.mean_frames)
        spectrum = self.frontend.spectrum
        fixed = {"taper": spectrum.taper, "filters": spectrum.filters, "weights": weights, "decay": decay}
        for name, values in fixed.items():
            self.register_buffer(name, torch.from_numpy(values.copy()), persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Features of whole utterances of at least one frame each.

        Args:
            waveforms: float32 [batch, samples], full scale 1, padded with anything.
            lengths: int64 [batch], samples of each; in host memory.

        Returns:
            float32 [batch, frames, mels * stack], rounded to float16, 0 behind an utterance's last frame.
        """
        settings, spectrum = self.frontend.settings, self.frontend.spectrum
        frames = torch.tensor([self.frontend.frames(samples) for samples in lengths.tolist()])
        most = int(frames.max())
        # full precision, whatever the network around has
        with torch.autocast(waveforms.device.type, enabled=False):
            hops = -(-most * settings.stack // HOP_BLOCK) * HOP_BLOCK
            samples = self._extended(waveforms, lengths, (hops - 1) * spectrum.hop + spectrum.window)
            logs = self._log_energies(samples.unfold(1, spectrum.window, spectrum.hop))[:, : most * settings.stack]
            features = ((logs - self._mean(logs)) / LOG_SCALE).half().float()
        features = features.reshape(len(features), most, -1)
        inside = torch.arange(most) < frames[:, None]
        return features * inside[..., None].to(features.device)

    def _extended(self, waveforms: Tensor, lengths: Tensor, samples: int) -> Tensor:
        """So many samples of each, from the first window's on, with the mirror images of its ends or with zeros behind it."""
        spectrum, device = self.frontend.spectrum, waveforms.device
        if not spectrum.mirrored:
            padded = nn.functional.pad(waveforms, (0, max(0, samples - waveforms.shape[1])))[:, :samples]
            return padded * (torch.arange(samples) < lengths[:, None]).to(device)
        count = lengths[:, None].to(device)
        place = (torch.arange(samples, device=device) - spectrum.before).remainder(2 * count)
        return waveforms.gather(1, torch.where(place < count, place, 2 * count - 1 - place))

    def _log_energies(self, windows: Tensor) -> Tensor:
        """Float32 [batch, hops, mels] of windows float32 [batch, hops, window], hops a multiple of HOP_BLOCK."""
        at_once = AT_ONCE if windows.device.type == "cpu" else AT_ONCE_ELSEWHERE
        found = [self._of_some(some) for some in windows.flatten(0, 1).split(at_once)]
        return torch.cat(found).unflatten(0, windows.shape[:2])

    def _of_some(self, windows: Tensor) -> Tensor:
        spectrum = self.frontend.spectrum
        if spectrum.scale != 1:
            windows = windows * spectrum.scale
        if spectrum.centring:
            windows = windows - windows.mean(1, keepdim=True)
        if spectrum.preemphasis:
            windows = windows - spectrum.preemphasis * torch.cat([windows[:, :1], windows[:, :-1]], 1)
        transformed = torch.fft.rfft(windows * self.taper, spectrum.fft)
        power = transformed.real.square() + transformed.imag.square()
        blocks = power.unflatten(0, (-1, HOP_BLOCK))
        energy = torch.bmm(blocks, self.filters.expand(len(blocks), -1, -1)).flatten(0, 1)
        return (energy + spectrum.floor if spectrum.floor_added else energy.clamp_min(spectrum.floor)).log()

    def _mean(self, logs: Tensor) -> Tensor:
        """The causal mean at each hop, as of `CausalMean`: float32 [batch, hops, mels] as `logs`."""
        count, head = cumulative(self.frontend.settings.mean_frames)
        rows = logs.double()
        first = rows[:, :head]
        counts = torch.arange(count + 1, count + 1 + first.shape[1], device=logs.device)
        means = [(self.frontend.prior_mean * count + first.cumsum(1)) / counts[:, None]]
        rest = rows[:, head:]
        if rest.shape[1]:
            blocks = -(-rest.shape[1] // MEAN_BLOCK)
            padded = nn.functional.pad(rest, (0, 0, 0, blocks * MEAN_BLOCK - rest.shape[1]))
            before = means[0][:, -1:]
            for block in padded.split(MEAN_BLOCK, 1):
                means.append(self.weights.expand(len(block), -1, -1).bmm(block) + self.decay[:, None] * before)
                before = means[-1][:, -1:]
        return torch.cat(means, 1)[:, : logs.shape[1]].float()


@functools.lru_cache(maxsize=8)
def frontend_on(settings: FeatureSettings, device: torch.device) -> BatchedFrontend:
    """The front end with these settings on a device."""
    return BatchedFrontend(settings).to(device)


@dataclass
class Sounds:
    """The sound of a batch.

    Attributes:
        values: int16 or float32 [samples of all], utterance after utterance, as of `Deferred`.
        lengths: int64 [batch], in host memory.
    """

    values: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, utterances: Sequence[Deferred]) -> Sounds:
        """Those of these utterances."""
        sounds = [one.sound for one in utterances]
        if len({sound.dtype for sound in sounds}) > 1:
            sounds = [_waveform(sound) for sound in sounds]
        return cls(torch.from_numpy(np.concatenate(sounds)), torch.tensor([len(one) for one in sounds]))

    def features(self, settings: FeatureSettings, device: torch.device) -> Tensor:
        """Their features, made on a device, as of `BatchedFrontend`."""
        values = self.values.to(device, non_blocking=True)
        if values.dtype == torch.int16:
            values = values.float() / (1 << 15)
        padded = values.new_zeros(len(self.lengths), int(self.lengths.max()))
        inside = torch.arange(padded.shape[1]) < self.lengths[:, None]
        padded.masked_scatter_(inside.to(device, non_blocking=True), values)
        features: Tensor = frontend_on(settings, device)(padded, self.lengths)
        return features


def _waveform(sound: np.ndarray) -> np.ndarray:
    return sound if sound.dtype == np.float32 else sound.astype(np.float32) / np.float32(1 << 15)


@dataclass
class Input:
    """A batch's input before its features are made, with what was drawn for their augmentation.

    Attributes:
        settings: of the front end.
        sounds: what is heard.
        stretches: of each utterance.
        masks: of each utterance, and of each again for every further copy of the batch.
        with_clean: whether features without noise, masks and another vocal tract are made too.
        clean: the sound without noise; None: `sounds` have none.
    """

    settings: FeatureSettings
    sounds: Sounds
    stretches: list[Stretch]
    masks: list[Masks]
    with_clean: bool = False
    clean: Sounds | None = None

    def made(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Features float32 [batch * copies, frames, dimension], and the clean ones if they are wanted, as `audio.augment` makes them."""
        rows = self._in_time(self.sounds.features(self.settings, device))
        clean = None
        if self.with_clean:
            clean = rows if self.clean is None else self._in_time(self.clean.features(self.settings, device))
        copies = len(self.masks) // len(self.stretches)
        masked = self._masked(self._warped(rows).repeat(copies, 1, 1))
        return masked, None if clean is None else clean.repeat(copies, 1, 1)

    def _in_time(self, rows: Tensor) -> Tensor:
        if all(one.frames == one.before for one in self.stretches):
            return rows
        stack = self.settings.stack
        found = _resampled(rows.unflatten(2, (stack, -1)).flatten(1, 2), [one.hops(stack) for one in self.stretches])
        return found.unflatten(1, (-1, stack)).flatten(2)

    def _warped(self, rows: Tensor) -> Tensor:
        if all(one.scale == 1 for one in self.stretches):
            return rows
        bands = rows.unflatten(2, (self.settings.stack, -1)).permute(0, 3, 1, 2)  # [batch, mels, frames, stack]
        found = _resampled(bands.flatten(2), [one.bands(self.settings.mels) for one in self.stretches])
        return found.unflatten(2, bands.shape[2:]).permute(0, 2, 3, 1).flatten(2)

    def _masked(self, rows: Tensor) -> Tensor:
        times = np.zeros((len(rows), rows.shape[1], 1, 1), bool)
        bands = np.zeros((len(rows), 1, 1, self.settings.mels), bool)
        for at, masks in enumerate(self.masks):
            for start, width in masks.times:
                times[at, start : start + width] = True
            for start, width in masks.bands:
                bands[at, ..., start : start + width] = True
        if not (times.any() or bands.any()):
            return rows
        hidden = torch.from_numpy(times).to(rows.device) | torch.from_numpy(bands).to(rows.device)
        return rows.unflatten(2, (self.settings.stack, -1)).masked_fill(hidden, 0.0).flatten(2)


def _resampled(rows: Tensor, places: Sequence[Between]) -> Tensor:
    """Rows float32 [batch, rows, columns] at the places of each utterance's new rows, interpolated linearly; 0 behind them."""
    low, high, share = (
        pad_sequence([torch.from_numpy(column) for column in columns], batch_first=True).to(rows.device)
        for columns in zip(*places, strict=True)
    )
    inside = torch.arange(low.shape[1]) < torch.tensor([len(one[0]) for one in places])[:, None]
    wide = (-1, -1, rows.shape[2])
    first, second = (rows.gather(1, index[..., None].expand(wide)) for index in (low, high))
    return (first * (1 - share[..., None]) + second * share[..., None]) * inside[..., None].to(rows.device)
