"""Settings of features, and of the augmentation of the learner's audio and input."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from asr_kd.config.base import Count, Location, Natural, NotNegative, Settings, Share, check_given_once

SampleRate = Annotated[int, Field(ge=4000, le=48000)]
_Snr = Annotated[float, Field(ge=-30, le=60)]
_Direct = Annotated[float, Field(ge=-30, le=30)]
_Change = Annotated[float, Field(ge=0, lt=0.5)]


class FeatureSettings(Settings):
    """Waveform → log mel filterbank energies, stacked to a lower frame rate."""

    sample_rate: SampleRate = Field(16000, description="rate in Hz the audio is converted to")
    mels: Annotated[int, Field(ge=8, le=256)] = Field(64, description="mel filters")
    window_ms: Annotated[int, Field(ge=5, le=100)] = Field(25, description="analysis window in milliseconds")
    hop_ms: Annotated[int, Field(ge=1, le=50)] = Field(10, description="hop in milliseconds")
    stack: Annotated[int, Field(ge=1, le=8)] = Field(3, description="neighbouring frames joined into one network input")
    mean_frames: Count = Field(300, description="time constant of the causal mean, in hops")

    @property
    def frame_ms(self) -> int:
        """Period of one network frame in milliseconds."""
        return self.hop_ms * self.stack

    @property
    def dimension(self) -> int:
        """Numbers in one network frame."""
        return self.mels * self.stack


class NoiseSettings(Settings):
    """What is done to the sound that the learner hears, before its features; length and timing stay, and so do the targets."""

    share: Share = Field(0.7, description="share of the utterances that noise is added to")
    kinds: list[Literal["white", "pink", "brown", "babble", "files"]] = Field(
        ["white", "pink", "brown", "babble"],
        min_length=1,
        description="noises to draw from, evenly; name one twice to hear it twice as often. babble: other utterances of the "
        "shard, of other speakers where they are known; files: those in `folder`",
    )
    snr_min: _Snr = Field(
        0.0, description="lowest signal-to-noise ratio in dB; the speech is measured without its pauses"
    )
    snr_max: _Snr = Field(20.0, description="highest signal-to-noise ratio in dB")
    talkers_min: Count = Field(3, description="babble: voices at least")
    talkers_max: Count = Field(7, description="babble: voices at most")
    folder: Location | None = Field(
        None, description="files: a folder with noises (WAV, FLAC, MP3, Ogg, Opus; any rate; ten minutes each at most)"
    )
    reverb: Share = Field(0.3, description="share of the utterances that are put into a room")
    rt60_min: Annotated[float, Field(ge=0.02, le=5)] = Field(0.1, description="shortest reverberation time in seconds")
    rt60_max: Annotated[float, Field(ge=0.02, le=5)] = Field(0.7, description="longest reverberation time in seconds")
    direct_min: _Direct = Field(-3.0, description="lowest ratio of the direct sound to the reverberation in dB")
    direct_max: _Direct = Field(10.0, description="highest such ratio in dB")

    @model_validator(mode="after")
    def _fits(self) -> NoiseSettings:
        for name in ("snr", "talkers", "rt60", "direct"):
            if getattr(self, f"{name}_min") > getattr(self, f"{name}_max"):
                raise ValueError(f"{name}_min must not be above {name}_max")
        if not self.share and not self.reverb:
            raise ValueError("set share or reverb above 0, or leave noise out")
        if bool(self.folder) != ("files" in self.kinds):
            raise ValueError("folder and the kind files go together; set both or neither")
        return self


class AugmentSettings(Settings):
    """What is done to the learner's input only; time is stretched together with the targets, or not at all."""

    stretch: _Change = Field(0.0, description="length is changed by up to this share, targets with it")
    mel_warp: _Change = Field(0.0, description="the mel axis is scaled by up to this share")
    time_masks: Natural = Field(0, description="time masks an utterance")
    time_frames: Natural = Field(8, description="longest time mask, in network frames")
    time_ms: NotNegative | None = Field(None, description="the same in milliseconds, whatever the frame period")
    mel_masks: Natural = Field(0, description="masks over mel bands an utterance")
    mel_bands: Natural = Field(12, description="widest mel mask")
    noise: NoiseSettings | None = Field(
        None, description="noise and reverberation on the sound itself; null: the clean sound"
    )

    @model_validator(mode="after")
    def _fits(self) -> AugmentSettings:
        check_given_once(self, "time_frames", "time_ms")
        return self

    def mask_frames(self, frame_ms: int) -> int:
        """Network frames of the longest time mask."""
        return self.time_frames if self.time_ms is None else round(self.time_ms / frame_ms)
