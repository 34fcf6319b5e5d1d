"""Settings of features, and of the augmentation of the learner's audio and input."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from asr_kd.config.base import Count, Location, Natural, NotNegative, Settings, Share, check_given_once, check_owners

SampleRate = Annotated[int, Field(ge=4000, le=48000)]
_Snr = Annotated[float, Field(ge=-30, le=60)]
_Direct = Annotated[float, Field(ge=-30, le=30)]
_Change = Annotated[float, Field(ge=0, lt=0.5)]


#: where the mel filters begin, in Hz; and where Kaldi's end, in Hz below half the rate
LOW_HERTZ, KALDI_BELOW = 20.0, 400.0


class FeatureSettings(Settings):
    """Waveform → log mel filterbank energies, stacked to a lower frame rate."""

    kind: Literal["own", "kaldi"] = Field(
        "own",
        exclude_if=lambda value: value == "own",
        description="kaldi: energies as Kaldi's clients (sherpa-onnx) compute them, windows of 25 ms every 10 ms",
    )
    sample_rate: SampleRate = Field(16000, description="rate in Hz the audio is converted to")
    mels: Annotated[int, Field(ge=8, le=256)] = Field(64, description="mel filters")
    window_ms: Annotated[int, Field(ge=5, le=100)] = Field(25, description="analysis window in milliseconds")
    hop_ms: Annotated[int, Field(ge=1, le=50)] = Field(10, description="hop in milliseconds")
    stack: Annotated[int, Field(ge=1, le=8)] = Field(3, description="neighbouring frames joined into one network input")
    mean_frames: Count = Field(300, description="time constant of the causal mean, in hops")

    @model_validator(mode="after")
    def _fits(self) -> FeatureSettings:
        check_owners(self, "kind", {"window_ms": ("own",), "hop_ms": ("own",)})
        if self.kind == "kaldi" and not _all_hear(self.mels, self.sample_rate):
            most = next(mels for mels in range(self.mels, 0, -1) if _all_hear(mels, self.sample_rate))
            raise ValueError(
                f"mels {self.mels} is too many for kind kaldi at {self.sample_rate} Hz: a filter would hear nothing; set at most {most}"
            )
        return self

    @property
    def frame_ms(self) -> int:
        """Period of one network frame in milliseconds."""
        return self.hop_ms * self.stack

    @property
    def dimension(self) -> int:
        """Numbers in one network frame."""
        return self.mels * self.stack

    @property
    def offset_ms(self) -> int:
        """Start of the first frame in the audio, in milliseconds."""
        return 0

    @property
    def rows_per_frame(self) -> int:
        """Rows of the input in the period of an output frame."""
        return 1

    @property
    def heard(self) -> Literal["float16"]:
        """In what form the network gets its input."""
        return "float16"

    @property
    def shown(self) -> FeatureSettings:
        """What a picture of the sound is made with."""
        return self


def _all_hear(mels: int, rate: int) -> bool:
    """Whether each of so many of Kaldi's mel filters has a bin of the spectrum in it; with others Kaldi gives no features."""
    mel = lambda hertz: math.log1p(hertz / 700)  # noqa: E731
    low, high = mel(LOW_HERTZ), mel(rate / 2 - KALDI_BELOW)
    bin_hertz = rate / (1 << (rate * 25 // 1000 - 1).bit_length())
    corners = [700 * math.expm1(low + (high - low) * at / (mels + 1)) / bin_hertz for at in range(mels + 2)]
    return all(math.floor(left) + 1 < right for left, right in zip(corners, corners[2:], strict=False))


class SoundSettings(Settings):
    """The sound itself as network input, for a network with a front end of its own."""

    sample_rate: SampleRate = Field(description="rate in Hz the audio is converted to")
    frame_ms: Annotated[int, Field(ge=1, le=10_000)] = Field(description="period of one output frame in milliseconds")
    offset_ms: int = Field(
        0,
        description="start of the first frame in the audio, counted as of `FeatureSettings`, whose first window begins at 0 whatever its length",
    )
    least: Count = Field(1, description="samples that the network needs at least")

    @property
    def dimension(self) -> int:
        """Numbers in one row of the input."""
        return 1

    @property
    def rows_per_frame(self) -> int:
        """Rows of the input, samples, in the period of an output frame."""
        return self.sample_rate * self.frame_ms // 1000

    @property
    def heard(self) -> Literal["sound"]:
        """In what form the network gets its input."""
        return "sound"

    @property
    def shown(self) -> FeatureSettings:
        """What a picture of the sound is made with."""
        return FeatureSettings(sample_rate=self.sample_rate)


#: what a network hears
InputSettings = FeatureSettings | SoundSettings


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


class SpeechSettings(Settings):
    """Where a long recording is cut into utterances: at its pauses, as a voice-activity detector hears them."""

    detector: Literal["silero", "energy"] = Field(
        "silero",
        description="silero: a small network, for any noise (pip install 'asr-kd[vad]'); energy: what stands out of the noise floor, "
        "for quiet rooms",
    )
    max_seconds: Annotated[float, Field(ge=1)] = Field(
        30.0, description="no utterance is longer; speech without a pause is cut where it is quietest"
    )
    min_pause: NotNegative = Field(0.5, description="seconds without speech that part two utterances")
    padding: NotNegative = Field(
        0.2, description="seconds kept on both sides of speech, or half of the pause where that is less"
    )
    min_speech: NotNegative = Field(0.2, description="seconds; less speech between two pauses is left out")
    threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5,
        description="score from which a frame is speech; silero: its probability; energy: 0 is the noise floor and 1 is 16 dB above it",
    )

    @model_validator(mode="after")
    def _cuts(self) -> SpeechSettings:
        for name in ("padding", "min_speech"):
            if getattr(self, name) > self.max_seconds / 4:
                raise ValueError(f"{name} must be at most a quarter of max_seconds")
        return self
