"""Scoring: audio shards → features → every system's posteriors → words → lines, shard by shard, in bounded memory."""

from __future__ import annotations

import collections
import functools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from asr_kd.decoding.decoder import Decoder, make_decoder
from asr_kd.decoding.words import Hypothesis
from asr_kd.evaluation.beside import Inputs, Posteriors, find_words, load_shard
from asr_kd.evaluation.parts import Costs, Line, Part, Shard
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.wer import character_errors, count_errors
from asr_kd.files import Place, hash_json
from asr_kd.models.acoustic import Checkpoint, infer, infer_batches
from asr_kd.shards.stream import map_ordered
from asr_kd.text import NORMALIZERS

APART = ("text", "speaker", "seconds")  # fields that a line has under names of its own


@dataclass
class System:
    """A checkpoint under test; its decoder, once it is made."""

    name: str
    folder: Place
    checkpoint: Checkpoint
    warm: bool = False
    decoder: Decoder | None = None

    @property
    def frontend(self) -> str:
        """Name of its feature settings: systems with the same share one computation."""
        return hash_json(self.checkpoint.features.model_dump())


class Pending:
    """A shard under way: what was found in it so far, system by system in its order, and seconds of network and decoder."""

    def __init__(self, loaded: Inputs, systems: int) -> None:
        self.loaded = loaded
        self.found: list[dict[int, Hypothesis]] = [{} for _ in range(systems)]
        self.network_seconds, self.decoder_seconds = [0.0] * systems, [0.0] * systems


def score(
    settings: EvalSettings, systems: Sequence[System], shards: Iterable[Shard]
) -> Iterator[tuple[Shard, Part, dict[str, Costs]]]:
    """Score shards with every system, in order: a shard, its part, and what it took by system.

    `shards` is read no faster than they are worked on.

    Raises:
        UserError: when a shard is damaged or an utterance has no text.
    """
    frontends = {system.frontend: system.checkpoint.features for system in systems}
    load = functools.partial(load_shard, frontends, settings.max_seconds)
    find = functools.partial(find_words, [one.decoder or make_decoder(settings, one.checkpoint) for one in systems])
    held: collections.deque[Pending] = collections.deque()

    def posteriors() -> Iterator[Posteriors | None]:
        for loaded in map_ordered(load, shards, settings.workers, "workers"):
            held.append(Pending(loaded, len(systems)))
            for number, system in enumerate(systems):
                yield from _run(settings, number, system, held[-1])
            yield None  # that was the shard

    # the best unit of each frame is found sooner than its posteriors are sent to another process
    decoding = 0 if settings.decoder == "greedy" else settings.workers
    for answers in map_ordered(find, posteriors(), decoding, "workers"):
        if answers is None:
            pending = held.popleft()
            part, of_frontend = _part(settings, systems, pending), pending.loaded.frontend_seconds
            took = zip(systems, pending.network_seconds, pending.decoder_seconds, strict=True)
            costs = {
                system.name: Costs(part.seconds, of_frontend[system.frontend], network, decoder)
                for system, network, decoder in took
            }
            yield pending.loaded.shard, part, costs
        else:
            number, found, seconds = answers
            held[0].decoder_seconds[number] += seconds
            held[0].found[number].update(found)


def _run(settings: EvalSettings, number: int, system: System, pending: Pending) -> Iterator[Posteriors]:
    """The network's answers to a shard, timed."""
    features = [utterance.features[system.frontend] for utterance in pending.loaded.utterances]
    if features and not system.warm:
        infer(system.checkpoint, features[:1])  # first-use costs stay out of the figures
        system.warm = True
    began = time.perf_counter()
    for indices, log_probs in infer_batches(system.checkpoint, features, settings.batch_frames):
        pending.network_seconds[number] += time.perf_counter() - began
        yield Posteriors(number, indices, log_probs)
        began = time.perf_counter()


def _part(settings: EvalSettings, systems: Sequence[System], pending: Pending) -> Part:
    normalize = NORMALIZERS[settings.normalizer].apply
    utterances = pending.loaded.utterances
    references = [normalize(utterance.text) for utterance in utterances]
    scored = [[normalize(found[index].text) for index in range(len(utterances))] for found in pending.found]
    teacher = [system.name for system in systems].index(settings.teacher) if settings.teacher else None
    lines = []
    for number, system in enumerate(systems):
        for index, (utterance, reference) in enumerate(zip(utterances, references, strict=True)):
            found, hypothesis = pending.found[number][index], scored[number][index]
            counts = count_errors(reference, hypothesis)
            fields, speaker = utterance.fields, utterance.fields.get("speaker")
            line: Line = {
                "system": system.name, "set": pending.loaded.shard.set, "shard": pending.loaded.shard.info.name,
                "key": utterance.key, "speaker": None if speaker is None else str(speaker), "seconds": utterance.seconds,
                "fields": {name: value for name, value in fields.items() if name not in APART and _scalar(value)},
                "reference": utterance.text, "hypothesis": found.text,
                "reference_scored": reference, "hypothesis_scored": hypothesis,
                "words": counts.words, "substitutions": counts.substitutions, "deletions": counts.deletions,
                "insertions": counts.insertions, "errors": counts.errors,
                "characters": len(reference), "character_errors": character_errors(reference, hypothesis)[1],
                "times": [[word.text, *(round(value, 4) for value in (word.start, word.end, word.confidence))] for word in found.words],
                "tokens": [[token.piece, round(token.start, 4), round(token.end, 4)] for word in found.words for token in word.tokens],
                "same_as_teacher": None if teacher is None else hypothesis == scored[teacher][index],
            }  # fmt: skip
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    seconds = sum(utterance.seconds for utterance in utterances)
    return Part(len(utterances), seconds, pending.loaded.quarantined, "".join(lines).encode())


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
