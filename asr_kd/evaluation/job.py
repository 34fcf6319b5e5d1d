"""Job 3: checkpoints over labelled shards → WER report. Read it from the top: `evaluate` is the whole job."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

import torch

from asr_kd.audio.blas import one_thread
from asr_kd.decoding.decoder import make_decoder
from asr_kd.errors import UserError
from asr_kd.evaluation.parts import Shard, read_part
from asr_kd.evaluation.report import system_table, write_report
from asr_kd.evaluation.schema import Report
from asr_kd.evaluation.score import System
from asr_kd.evaluation.scores import Scores
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.sharing import DECIDING, Work, score_all
from asr_kd.evaluation.summary import summarise
from asr_kd.evaluation.texts import check_texts
from asr_kd.files import Place, claim_folder, claimed_settings, place, write_whole
from asr_kd.loggers import Loggers
from asr_kd.models.acoustic import pick_device
from asr_kd.models.teachers import in_precision, load_teacher
from asr_kd.shards.quarantine import Quarantine
from asr_kd.shards.tarset import read_index
from asr_kd.summary import tell_summary

#: figures of a system that the summary repeats, and loggers are told
SUMMED = {"wer", "cer", "words", "errors", "real_time_factor"}


@one_thread()
def evaluate(settings: EvalSettings) -> Report:
    """Decode the shards with every system, write the WER report and return it.

    Writes into `settings.output`, each file whole: `parts/`, the scores of each shard, and in the end `report.json`,
    `report.html`, `report.md`, `utterances.jsonl`, `quarantine.jsonl`. All systems are scored on the same utterances: one
    that a system's front end cannot read is left out for all.

    Raises:
        UserError: when a name, a checkpoint or the shards are wrong, an utterance has no text, or more than
            `max_bad_share` of the utterances could not be read.
    """
    torch.set_num_threads(settings.threads)
    loggers = Loggers(settings.log)
    for role in ("baseline", "teacher", "student"):
        name = getattr(settings, role)
        if name is not None and name not in settings.systems:
            raise UserError(f"{role}: {name} is not a system; it must be one of {', '.join(settings.systems)}")
    sets = {name: (folder, read_index(folder)) for name, folder in settings.sets.items()}
    for folder, infos in sets.values():
        if not infos.samples:
            raise UserError(f"{folder}: holds no utterances; prepare labelled audio shards")
    device = pick_device(settings.device)
    if device == torch.device("cuda"):  # started by torchrun, each process takes the GPU of its place
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    loaded = in_precision(
        {name: load_teacher(path, device) for name, path in settings.systems.items()}, settings.precision
    )
    systems = [System(name, place(path), loaded[name]) for name, path in settings.systems.items()]
    check_texts(settings, systems, sets)
    output = place(settings.output)
    if not claimed_settings(output):  # a language model that does not fit is refused before the folder is its
        for system in systems:
            system.decoder = make_decoder(settings, system.checkpoint)
    shards = [Shard(name, folder, info) for name, (folder, infos) in sets.items() for info in infos]
    # what is made of the scores may change, but not what decides them; a checkpoint or audio that changed is scored again
    claim_folder(output, "eval", settings.model_dump(include={"systems", "audio", *DECIDING}))
    with loggers:
        loggers.start("eval", output, settings.model_dump(mode="json", exclude={"log"}))
        costs = score_all(Work(settings, systems, shards, output))
        scores = _sum_up(settings, shards, output)
        report = summarise(settings, {system.name: system for system in systems}, sets, scores, costs, device)
        write_report(output, report)
        figures = {name: one.model_dump(include=SUMMED, exclude_none=True) for name, one in report.systems.items()}
        loggers.scalars(0, {f"{name}/{key}": value for name, one in figures.items() for key, value in one.items()})
    of_all = report.data
    tell_summary(
        settings.output, utterances=of_all.utterances + of_all.quarantined, done=of_all.utterances, quarantined=of_all.quarantined,
        audio_hours=of_all.seconds / 3600,
        figures={"verdict": report.verdict, "systems": figures},
    )  # fmt: skip
    print(system_table(report))
    print(f"\n{report.verdict}\n{output / 'report.html'}")
    return report


def _sum_up(settings: EvalSettings, shards: Iterable[Shard], output: Place) -> Scores:
    """Add up the parts in order, and write utterances.jsonl and quarantine.jsonl."""
    scores = Scores(settings)
    bad, of_set = Quarantine(0, settings.max_bad_share), {name: Quarantine(0, 1.0) for name in settings.sets}
    with (
        write_whole(output / "utterances.jsonl", make_folder=False) as lines,
        write_whole(output / "quarantine.jsonl", "w", make_folder=False) as quarantine,
    ):
        for shard in shards:
            part = read_part(shard.part(output))
            for key, reason in part.quarantined.items():
                for one in (bad, of_set[shard.set]):
                    one.add(key, reason)
                entry = {"key": key, "set": shard.set, "shard": shard.info.name, "reason": reason}
                quarantine.write(json.dumps(entry, ensure_ascii=False) + "\n")
            lines.write(part.body)
            scores.add(shard.set, part.lines, part.seconds, len(part.quarantined))
        # raised inside: nothing is published
        for name, folder in settings.sets.items():
            of_set[name].total = scores.sets[name].utterances + of_set[name].count
            of_set[name].refuse(str(folder))
        bad.total = len(scores.words) + bad.count
        bad.refuse(", ".join(map(str, settings.sets.values())))
        if not sum(scores.words):
            raise UserError(
                f"{', '.join(map(str, settings.sets.values()))}: the texts hold no words; a WER needs labelled audio"
            )
    return scores
