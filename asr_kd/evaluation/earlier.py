"""What `--compare` reads of a report of any version: later ones hold more, and earlier ones may lack what has a default."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from asr_kd.errors import UserError
from asr_kd.evaluation.schema import FORMAT, VERSION, Interval
from asr_kd.files import Place, place, read_json


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class EarlierSystem(_Read):
    """A system's figures, as in `schema.SystemFigures`."""

    wer: float
    interval: Interval | None
    errors: int | None = None
    substitutions: int | None = None
    deletions: int | None = None
    insertions: int | None = None
    cer: float | None = None
    ser: float | None = None
    relative_change_to_teacher: float | None = None
    gap_recovered: float | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    real_time_factor: float | None = None
    real_time_factor_to_teacher: float | None = None


class EarlierData(_Read):
    """What was scored."""

    hash: str
    utterances: int
    words: int


class EarlierSettings(_Read):
    """How it was decoded and resampled; until version 2 a decoder could be torchaudio's."""

    decoder: Literal["greedy", "beam", "torchaudio"] = "greedy"
    beam: int = 8
    lm: str | None = None
    lexicon: str | None = None
    lm_weight: float = 0.5
    word_bonus: float = 0.0
    bootstrap: int = 1000
    seed: int = 0


class Earlier(_Read):
    """A report."""

    format: Literal["asr_kd-report"]
    normalizer: str
    alignment: str | None = None
    student: str | None = None
    data: EarlierData
    systems: dict[str, EarlierSystem]
    settings: EarlierSettings = EarlierSettings()


def file_of(path: str) -> Place:
    """The JSON of a report: the file itself, or the one in its folder."""
    return place(path) if path.endswith(".json") else place(path) / "report.json"


def read_report(path: str) -> tuple[Earlier, dict[str, Any]]:
    """The report in a folder, or of a file, and all its figures as they stand there; a UserError where this version reads none."""
    file = file_of(path)
    report = read_json(file, "report")
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise UserError(f"{file}: is no WER report; give folders that `asr-kd eval` wrote")
    if report.get("version") not in range(1, VERSION + 1):
        raise UserError(f"{file}: is of version {report.get('version')}; this asr-kd reads 1 to {VERSION}")
    try:
        return Earlier.model_validate(report), report
    except ValidationError:
        raise UserError(f"{file}: is damaged; make the report again") from None
