"""Job 3: checkpoints over labelled shards → WER report. Read it from the top: `evaluate` is the whole job."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator

import torch

from asr_kd.config import EvalSettings
from asr_kd.errors import UserError
from asr_kd.evaluation.parts import TIMED, Shard, is_there, read_costs, read_part, write_part
from asr_kd.evaluation.report import system_table, write_report
from asr_kd.evaluation.score import System, score
from asr_kd.evaluation.summary import Scores, summarise
from asr_kd.files import Place, claim_folder, hash_json, place, write_whole
from asr_kd.models.acoustic import load_checkpoint, pick_device
from asr_kd.progress import Progress
from asr_kd.shards.tarset import read_index

#: settings that decide the scores of a shard, beside its audio and the checkpoints
DECIDING = {"teacher", "decoder", "beam", "normalizer", "batch_frames", "max_seconds", "device", "threads"}


def evaluate(settings: EvalSettings) -> None:
    """Decode the shards with every system and write the WER report.

    Writes into `settings.output`, each file whole: `parts/`, the scores of each shard, and in the end `report.json`,
    `report.html`, `report.md`, `utterances.jsonl`, `quarantine.jsonl`. All systems are scored on the same utterances: one
    that a system's front end cannot read is left out for all.

    Raises:
        UserError: when a name, a checkpoint or the shards are wrong, an utterance has no text, or more than
            `max_bad_share` of the utterances could not be read.
    """
    torch.set_num_threads(settings.threads)
    for role in ("baseline", "teacher", "student"):
        name = getattr(settings, role)
        if name is not None and name not in settings.systems:
            raise UserError(f"{role}: {name} is none of the systems; it must be one of {', '.join(settings.systems)}")
    sets = {name: (folder, read_index(folder)) for name, folder in settings.sets.items()}
    for folder, shards in sets.values():
        if not shards.samples:
            raise UserError(f"{folder}: holds no utterances; prepare labelled audio shards")
    device = pick_device(settings.device)
    systems = [System(name, place(path), load_checkpoint(path, device)) for name, path in settings.systems.items()]
    output = place(settings.output)
    claim_folder(output, "eval", settings.model_dump())

    def every_shard() -> Iterator[Shard]:
        return (Shard(name, folder, info) for name, (folder, shards) in sets.items() for info in shards)

    made_of = functools.partial(_origin, settings, systems)
    missing = (shard for shard in every_shard() if not is_there(shard.part(output), made_of(shard)))
    with Progress("eval", sum(shards.samples for _, shards in sets.values()), "utterances") as progress:
        for shard, part, costs in score(settings, systems, missing):
            write_part(shard.part(output), made_of(shard), part, costs)
            progress.advance(shard.info.samples, shard.info.seconds)
    scores, took = _sum_up(settings, every_shard(), output)
    report = summarise(settings, {system.name: system for system in systems}, sets, scores, took, device)
    write_report(output, report)
    print(system_table(report))
    print(f"\n{report['verdict']}\n{output / 'report.html'}")


def _origin(settings: EvalSettings, systems: list[System], shard: Shard) -> str:
    """Hash of everything that decides a part."""
    decided = settings.model_dump(include=DECIDING)
    return hash_json(
        [decided, [[one.name, one.checkpoint.fingerprint] for one in systems], shard.set, shard.info.sha256]
    )


def _sum_up(
    settings: EvalSettings, shards: Iterable[Shard], output: Place
) -> tuple[Scores, dict[str, dict[str, float]]]:
    """Add up the parts in order and what they took, and write utterances.jsonl and quarantine.jsonl."""
    scores = Scores(settings)
    took = {name: dict.fromkeys(("seconds", *TIMED), 0.0) for name in settings.systems}
    bad: tuple[Shard, str, str] | None = None
    with (
        write_whole(output / "utterances.jsonl") as lines,
        write_whole(output / "quarantine.jsonl", "w") as quarantine,
    ):
        for shard in shards:
            path = shard.part(output)
            part = read_part(path)
            if part.utterances + len(part.quarantined) != shard.info.samples:
                raise UserError(
                    f"{shard}: index.json counts {shard.info.samples} utterances, the shard holds "
                    f"{part.utterances + len(part.quarantined)}; prepare the shards again"
                )
            for key, reason in part.quarantined.items():
                bad = bad or (shard, key, reason)
                entry = {"key": key, "set": shard.set, "shard": shard.info.name, "reason": reason}
                quarantine.write(json.dumps(entry, ensure_ascii=False) + "\n")
            lines.write(part.body)
            scores.add(shard.set, part.lines, part.seconds, len(part.quarantined))
            if costs := read_costs(path):
                for name, one in costs["systems"].items():
                    for key, seconds in {"seconds": costs["seconds"], **one}.items():
                        took[name][key] += seconds
        # raised inside: nothing is published
        total = len(scores.words) + scores.quarantined
        if bad and scores.quarantined > settings.max_bad_share * total:
            shard, key, reason = bad
            raise UserError(
                f"{shard.folder}: {scores.quarantined} of {total} utterances could not be used (first: {shard.info.name}, "
                f"{key}: {reason}); mend them or raise max_bad_share"
            )
        if not sum(scores.words):
            raise UserError(f"{', '.join(settings.sets.values())}: the texts hold no words; a WER needs labelled audio")
    return scores, took
