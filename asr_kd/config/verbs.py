"""The verbs of `asr-kd` and of the stages of pipelines, in one table: a new verb is a new line."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import Any

from asr_kd.config.base import Settings


@dataclass(frozen=True)
class Verb:
    """A verb. Its function is named, not imported: torch is loaded only when a verb needs it.

    Attributes:
        settings: module and name of its settings class, within the package; empty for a verb without settings.
        function: module and name of its function, which is called with the settings.
        stage: whether it can be a stage of a pipeline.
        claims: whether its output folder has a job.json with the settings.
        main: the setting that most commands begin with, its main input; for messages.
    """

    name: str
    help: str
    settings: str = ""
    function: str = ""
    stage: bool = False
    claims: bool = False
    main: str = ""

    def kind(self) -> type[Settings]:
        """The class of its settings."""
        return pkgutil.resolve_name(f"asr_kd.{self.settings}")

    def do(self, settings: Settings) -> Any:
        """Run it."""
        return pkgutil.resolve_name(f"asr_kd.{self.function}")(settings)


_TABLE = (
    Verb("script", "", "pipeline:ScriptSettings", stage=True),
    Verb("prepare", "a manifest of audio → audio shards", "shards.settings:PrepareSettings", "decoding.prepare:prepare", stage=True, claims=True, main="manifest"),
    Verb("index", "WebDataset tars of others, or several sets → an index; they stay where they are", "shards.settings:IndexSettings", "shards.indexing:index", stage=True, claims=True, main="audio"),
    Verb("units", "labelled text → output units; or those of a teacher", "shards.settings:UnitsSettings", "models.units:make_units", stage=True, claims=True, main="source"),
    Verb("lm", "labelled text → its words and an n-gram model of them, for a beam search", "decoding.settings:LmSettings", "decoding.estimate:estimate", stage=True, claims=True, main="source"),
    Verb("train", "train a teacher or a student", "training.settings:TrainSettings", "training.trainer:train", stage=True, claims=True),
    Verb("quantise", "a checkpoint with its weights rounded to few bits", "training.quantise_settings:QuantiseSettings", "training.quantise:quantise", stage=True, claims=True, main="checkpoint"),
    Verb("export", "a checkpoint → an ONNX graph that other programs run, checked against it; status 1 when it says something else", "export.settings:ExportSettings", "export.job:export", stage=True, main="checkpoint"),
    Verb("label", "run a teacher over audio shards → soft-target shards", "labeling.settings:LabelSettings", "labeling.job:label", stage=True, claims=True, main="audio"),
    Verb("moments", "audio that a teacher knows → moments of its features, for students that will have none", "labeling.settings:MomentsSettings", "labeling.moments:moments", stage=True, main="audio"),
    Verb("select", "which utterances of unlabelled audio to learn from: a list, with reasons", "selection.settings:SelectionSettings", "selection.job:select", stage=True, main="audio"),
    Verb("pair", "two recordings of the same moments → which belong together, and how far one is behind", "selection.settings:PairSettings", "selection.pair:pair", stage=True, main="audio"),
    Verb("plan", "what a large job will take: bytes, hours, cost", "plan.settings:PlanSettings", "plan.job:plan", main="audio"),
    Verb("verify", "soft targets against their audio and their teacher; status 1 when they do not hold", "labeling.settings:VerifySettings", "labeling.verify:verify", main="targets"),
    Verb("inspect", "a soft-target shard or an utterance of it, as a table and a picture", "targets.settings:InspectSettings", "targets.inspect:inspect", main="targets"),
    Verb("eval", "checkpoints over test shards → WER report; or earlier reports side by side", "evaluation.settings:EvalSettings", "evaluation.job:evaluate", stage=True, claims=True, main="systems.NAME"),
    Verb("transcribe", "audio files (or shards) → text, with any checkpoint", "decoding.settings:TranscribeSettings", "decoding.transcribe:transcribe_shards", stage=True),
    Verb("doctor", "whether jobs can run here: versions, devices, space, a self-test; status 1 when something is wrong", "doctor.settings:DoctorSettings", "doctor.job:doctor", main="folder"),
    Verb("run", "the stages of a pipeline, each where its inputs or settings changed"),
)  # fmt: skip
VERBS = {verb.name: verb for verb in _TABLE}
#: verbs of pipelines; eval last
STAGES = tuple(sorted((verb.name for verb in _TABLE if verb.stage), key=lambda name: name == "eval"))


def name_of(kind: type[Settings]) -> str:
    """The verb with these settings, or the name of the class if there is none."""
    here = f"{kind.__module__.removeprefix('asr_kd.')}:{kind.__name__}"
    return next((verb.name for verb in _TABLE if verb.settings == here), kind.__name__)
