"""report.json, version 3: these models are what is written, and their descriptions are the documentation of its keys.

Rates, shares and changes are fractions (0.12 is 12 %); an interval is its low and its high end. `null` is *not defined*
(the description says when), never 0. Version 2 had the peak memory of each system too; version 1 lacked much of it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from asr_kd.audio.settings import InputSettings
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.wer import Edit
from asr_kd.models.settings import ModelSettings, OutsideSettings

FORMAT, VERSION = "asr_kd-report", 3

Interval = tuple[float, float]


class Figures(BaseModel):
    """A group of keys of report.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Counts(Figures):
    """Word errors. An utterance without reference words counts its insertions and no word."""

    words: int = Field(description="words of the references")
    errors: int = Field(description="substitutions, deletions and insertions")
    substitutions: int = Field(description="words taken for another")
    deletions: int = Field(description="words that were not recognised")
    insertions: int = Field(description="words that were not said")


class SpeakerErrors(Counts):
    """Errors on one speaker's utterances."""

    wer: float | None = Field(description="word error rate; null without reference words")


class SetErrors(SpeakerErrors):
    """Errors on one test set."""

    interval: Interval | None = Field(description="95 % interval of `wer`")
    change_to_baseline: float | None = Field(
        None,
        description="wer − wer of the baseline on this set; of a network that went on learning elsewhere, its backward transfer; null "
        "without a baseline, for itself, and without reference words",
    )
    change_to_baseline_interval: Interval | None = Field(None, description="95 % interval of the change, paired")


class Data(Figures):
    """What was scored."""

    audio: str = Field(description="folder of the shards; of all sets the folders, joined by commas")
    hash: str = Field(description="of the shards' SHA-256")
    shards: int = Field(description="how many")
    utterances: int = Field(description="utterances that were scored")
    quarantined: int = Field(description="utterances that could not be read, left out for every system")
    words: int = Field(description="words of the references")
    seconds: float = Field(description="seconds of audio that were scored")
    speakers: int | None = Field(description="how many; null where an utterance names none")


class Drawn(Figures):
    """What the resamples of an interval are drawn of."""

    blocks: Literal["speakers", "utterances"] = Field(description="what is drawn")
    number: int = Field(description="of how many")


class Bootstrap(Drawn):
    """How the intervals over all sets came about."""

    resamples: int = Field(description="resampled test sets; 0: no intervals")
    confidence: float = Field(description="share of the resamples within an interval")


class Bin(Figures):
    """Words of like confidence."""

    low: float = Field(description="from this confidence on")
    high: float = Field(description="below this one")
    words: int = Field(description="words with such a confidence")
    confidence: float | None = Field(description="their mean confidence; null without words")
    accuracy: float | None = Field(description="share of them that is right; null without words")


class Calibrated(Figures):
    """How word confidences compare with what was right."""

    words: int = Field(description="words with a confidence")
    bins: list[Bin] = Field(description="ten, of equal width")
    expected_error: float = Field(description="mean distance of confidence and accuracy over words, by bins")
    normalised_cross_entropy: float | None = Field(
        description="as NIST defines it: 1 knows every error, 0 is as good as one confidence for all words; confidences count as "
        "at least 0.0001 from 0 and 1; null where no word or every word is right"
    )


class Delay(Figures):
    """Milliseconds that words end behind the teacher's, on the reference words that both have right.

    CTC emits a word somewhere in its sound, so this compares spikes.
    """

    median: int = Field(description="half of the words are no later")
    p90: int = Field(description="nine in ten words are no later")
    words: int = Field(description="words that were compared")


class Start(Figures):
    """What a training run says of the checkpoint that it started from."""

    folder: str = Field(description="the checkpoint")
    wer: float = Field(description="its word error rate on the development set")
    loss: float = Field(description="its loss there")
    won: bool = Field(description="whether the run won anything over it")


class Confusions(Figures):
    """The most frequent errors, with how often they came."""

    substitutions: list[tuple[str, str, int]] = Field(description="said, recognised, times")
    deletions: list[tuple[str, int]] = Field(description="word, times")
    insertions: list[tuple[str, int]] = Field(description="word, times")


class WorstUtterance(Counts):
    """One of the utterances with the most errors of a system."""

    key: str = Field(description="of the utterance")
    set: str = Field(description="its test set")
    shard: str = Field(description="its shard")
    speaker: str | None = Field(description="its speaker; null where none is named")
    alignment: list[Edit] = Field(description="of its words: kind, reference word, hypothesis word")


class CurvePoint(Figures):
    """A development score of a training run."""

    step: float = Field(description="of the optimiser")
    audio_hours: float = Field(description="audio that was heard until then, passes counted")
    development_wer: float = Field(description="word error rate on the development set")


class SystemFigures(Counts):
    """A system: its errors, its cost, where it comes from."""

    wer: float = Field(description="word error rate, pooled over the sets: all errors by all words")
    interval: Interval | None = Field(description="95 % interval of `wer`; null with bootstrap=0")
    edit_distance: int = Field(description="the fewest word edits, summed over utterances: what jiwer counts")
    sets: dict[str, SetErrors] = Field(description="the same by test set")
    mean_of_sets_wer: float | None = Field(description="the unweighted mean of the sets' rates; null where one is null")
    utterances: int = Field(description="how many were scored")
    sentence_errors: int = Field(description="utterances with an error")
    ser: float = Field(description="their share")
    cer: float | None = Field(description="character error rate; null without reference characters")
    cer_interval: Interval | None = Field(description="95 % interval of `cer`")
    characters: int = Field(description="characters of the references, a space between words being one")
    character_errors: int = Field(description="the fewest character edits, summed over utterances")
    relative_change_to_baseline: float | None = Field(
        description="wer / wer of the baseline − 1; null without a baseline, for itself, and where it makes no errors"
    )
    relative_change_to_baseline_interval: Interval | None = Field(
        description="paired: each resample is scored with both systems; null where a resample leaves it undefined"
    )
    relative_change_to_teacher: float | None = Field(description="the same to the teacher")
    relative_change_to_teacher_interval: Interval | None = Field(description="the same to the teacher")
    gap_recovered: float | None = Field(
        description="(baseline − system) / (baseline − teacher), over 1 where the system passes the teacher; null for these two "
        "and where the teacher is not better than the baseline"
    )
    gap_recovered_interval: Interval | None = Field(description="paired, as of the changes")
    agreement_with_teacher: float | None = Field(description="share of utterances with the teacher's text, as scored")
    word_delay_ms: Delay | None = Field(description="how far words end behind the teacher's; null for the teacher")
    calibration: Calibrated | None = Field(description="of word confidences; null without words that have one")
    parameters: int = Field(description="weights")
    size_bytes: int = Field(description="their bytes")
    frame_ms: int = Field(description="period of the output")
    lookahead_ms: int | None = Field(
        description="audio behind a frame that its output needs; null: the whole utterance"
    )
    real_time_factor: float = Field(
        description="seconds of front end and network for a second of audio, in batches of `batch_frames`, on `device` with "
        "`threads` threads, over the whole set; neither decoding of audio files nor the search are in it"
    )
    real_time_factor_to_teacher: float | None = Field(description="ratio to the teacher's; null without a teacher")
    frontend_real_time_factor: float = Field(description="of the front end alone")
    network_real_time_factor: float = Field(description="of the network alone")
    decoder_real_time_factor: float = Field(description="of the search")
    checkpoint: str = Field(description="its folder")
    fingerprint: str = Field(description="hash of the checkpoint")
    started_from: Start | None = Field(description="what its training started from; null for fresh weights")
    units: int = Field(description="how many, the blank included")
    units_hash: str = Field(description="of the units")
    model: ModelSettings | OutsideSettings = Field(description="settings of the network")
    features: InputSettings = Field(description="settings of the front end")
    speakers: dict[str, SpeakerErrors] = Field(description="errors by speaker")
    confusions: Confusions = Field(description="the most frequent errors")
    worst: list[WorstUtterance] = Field(description="the utterances with the most errors")
    curve: list[CurvePoint] = Field(description="development scores of its training run (metrics.jsonl)")
    unlabelled_hours: float | None = Field(
        description="hours of audio that its training learned from without the texts in its shards (soft targets, or texts from "
        "elsewhere), each set once; null where the run's settings or the shards are gone or have changed"
    )


class MatchedPairsTest(Figures):
    """MAPSSWE, the matched-pairs sentence-segment word error test."""

    segments: int = Field(description="stretches in which either system errs")
    mean: float = Field(description="difference in errors of a segment, a less b")
    z: float = Field(description="0 where all segments differ by the same, as in sc_stats")
    p: float = Field(description="two-sided")


class Pair(Figures):
    """Two systems, and whether they differ by more than chance."""

    a: str = Field(description="the first")
    b: str = Field(description="the second")
    difference: float = Field(description="wer of a − wer of b")
    interval: Interval | None = Field(description="95 % interval of the difference, paired")
    p_bootstrap: float | None = Field(description="of the paired bootstrap, two-sided; null with bootstrap=0")
    mapsswe: MatchedPairsTest = Field(description="the other test")


class SliceErrors(Figures):
    """A system's errors in a slice."""

    wer: float | None = Field(description="word error rate; null without words")
    interval: Interval | None = Field(description="its 95 % interval")
    errors: int = Field(description="how many")


class Slice(Drawn):
    """Utterances that share the value of a field."""

    value: str | None = Field(description="of the field; null where it is absent")
    utterances: int = Field(description="how many")
    words: int = Field(description="words of their references")


class SliceFigures(Slice):
    """A slice with the errors of all systems."""

    systems: dict[str, SliceErrors] = Field(description="by name")


class Slices(Figures):
    """The slices of one field."""

    field: str = Field(description="its name")
    bands: bool = Field(description="whether its values are bands of numbers")
    values: list[SliceFigures] = Field(description="a slice each")


class NamedSlice(Slice):
    """A slice by its field and value, and a system's errors in it."""

    field: str = Field(description="name of the field")
    system: str = Field(description="whose errors these are")
    wer: float = Field(description="its word error rate there")


class WorstSlice(NamedSlice):
    """A slice in which a system is worse than over all."""

    interval: Interval | None = Field(description="95 % interval of `wer`")
    errors: int = Field(description="how many")


class ChangedSlice(NamedSlice):
    """A slice in which two systems differ."""

    other: str = Field(description="the other system")
    other_wer: float = Field(description="its word error rate there")
    difference: float = Field(description="wer − other_wer")
    interval: Interval | None = Field(description="95 % interval of the difference, paired")


class Sample(Figures):
    """An utterance to listen to."""

    key: str = Field(description="of the utterance")
    set: str = Field(description="its test set")
    shard: str = Field(description="its shard")
    why: str = Field(description="what is told of it")

    @property
    def identity(self) -> tuple[str, str, str]:
        """Which it is: a set of several joined ones may have its key in two shards."""
        return self.set, self.key, self.shard


class Report(Figures):
    """All of report.json."""

    format: Literal["asr_kd-report"] = Field("asr_kd-report", description="what this is")
    version: Literal[3] = Field(3, description="of the format")
    verdict: str = Field(description="the sentence on top of the page: the student's word errors against the others'")
    baseline: str | None = Field(description="system that changes are counted from")
    teacher: str | None = Field(description="system that sets the gap")
    student: str | None = Field(description="system that the verdict is about, where the settings name one")
    normalizer: str = Field(description="name and version of the normaliser that both texts went through")
    alignment: str = Field(description="how words were aligned; version 1 took jiwer's, of fewest edits")
    data: Data = Field(description="all sets together")
    sets: dict[str, Data] = Field(description="each test set by name")
    bootstrap: Bootstrap = Field(description="what the intervals rest on")
    systems: dict[str, SystemFigures] = Field(description="by name, in the order of the settings")
    pairs: list[Pair] = Field(description="every two systems")
    slices: list[Slices] = Field(description="by field")
    slices_left_out: dict[str, str] = Field(description="fields that make no slices, and why; not those of one value")
    slices_worst: list[WorstSlice] = Field(
        description="at most five slices of 50 words or more where the student is worse than over all, first those whose "
        "interval's lower end is highest, those drawn from two or three speakers last, of slices with the same utterances one"
    )
    slices_changed: list[ChangedSlice] = Field(
        description="for baseline and teacher each, at most five slices where the student differs most, surest first and those "
        "drawn from two or three speakers last"
    )
    samples: list[Sample] = Field(description="at most twelve utterances to listen to")
    settings: EvalSettings = Field(description="of the evaluation")
    versions: dict[str, str] = Field(description="of Python and the packages that made the report")
    device: str = Field(description="that the networks ran on")
