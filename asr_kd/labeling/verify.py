"""Are soft targets what their teacher says? Check the set, and run the teacher again on a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from asr_kd.audio.blas import one_thread
from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.files import claimed_settings, names_in, place, sha256_file, write_json
from asr_kd.labeling.hidden import hidden_rows, lost_of, lost_share
from asr_kd.labeling.load import Loaded
from asr_kd.labeling.settings import OF_TEXT, SELECTION, LabelSettings, VerifySettings
from asr_kd.labeling.shard import ahead, answer_batch, load_shard, selection_of
from asr_kd.models.acoustic import Checkpoint, hidden_batches, pick_device
from asr_kd.models.teachers import load_teacher
from asr_kd.progress import Progress
from asr_kd.shards.keys import check_keys
from asr_kd.shards.manifest import read_transcripts
from asr_kd.shards.tarset import ShardInfo, read_index
from asr_kd.summary import tell_summary
from asr_kd.targets import codec
from asr_kd.targets.hidden import HiddenDescription, HiddenStates, decode_hidden
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.quantiser import read_quantiser
from asr_kd.targets.store import TargetMetadata, check_answers, read_labelled_shard

#: number of findings that are printed; the report has all
SHOWN = 20
#: hidden states on another machine may be off by so much more than the shard says
LOST_MORE, LOST_BESIDE = 1.1, 1e-6
ROUNDED_LATER = (
    "the teacher of {} of these {} shards heard unrounded features (float32, as asr_kd labelled before version 3 of soft targets); it "
    "hears them rounded to float16 here, as it was trained, which small differences come from"
)


@dataclass
class Findings:
    """The findings of a verification.

    Attributes:
        shards: labelled again.
        utterances: compared with the teacher, and so are frames.
        difference: largest difference between a stored and a new probability.
        top1: frames whose best unit differs.
        rounded_later: shards whose teacher was given float32 features, as before version 3.
        hidden: of each tap the largest squared error of a shard's hidden states, as a share of their variance.
        events: stored.
        moved: those of utterances whose spikes the teacher has elsewhere now.
    """

    shards: int = 0
    utterances: int = 0
    frames: int = 0
    difference: float = 0.0
    top1: int = 0
    rounded_later: int = 0
    hidden: dict[str, float] = field(default_factory=dict)
    events: int = 0
    moved: int = 0
    problems: list[str] = field(default_factory=list)


@one_thread()
def verify(settings: VerifySettings) -> bool:
    """Compare a set of soft targets with its audio and its teacher, print what differs, and return whether everything holds.

    All shards must exist; `shards` of them, drawn at random, are read completely, with checksums, and labelled again. Stored
    and new targets are compared as a student would read them.

    Raises:
        UserError: when the audio or the teacher cannot be read, or when the targets were made with another `max_seconds` or
            other `transcripts`.
    """
    device, where = pick_device(settings.device), settings.targets
    torch.set_num_threads(settings.threads)
    infos = read_index(settings.audio)
    if not place(where).is_dir():
        raise UserError(f"{where}: no such folder of soft targets; check the path")
    _check_claim(settings)
    teacher = load_teacher(settings.teacher, device, settings.precision)
    transcripts = read_transcripts(settings.transcripts) if settings.transcripts else None
    if transcripts is not None:
        check_keys(settings.audio, infos, f"transcripts {settings.transcripts}", transcripts.__contains__)
    found = Findings()
    problems = found.problems
    there = {name for name in names_in(place(where)) if name.endswith(".tar")}
    known = set(infos.names)
    without = "this audio shard has no soft targets; run `asr-kd label`"
    problems += [f"{name}: {without}" for name in sorted(known - there)]
    problems += [f"{name}: answers no audio shard; remove it" for name in sorted(there - known)]
    present = infos.take(np.array([name in there for name in infos.names], bool))
    if settings.shards is not None and settings.shards < len(present):
        drawn = np.random.default_rng(settings.seed).choice(len(present), settings.shards, replace=False)
        present = present.take(np.sort(drawn))
    with Progress("verify", present.samples, "utterances") as progress:
        for info in present:
            if _verify_shard(settings, teacher, transcripts, info, found):
                progress.advance(info.samples, info.seconds)
    if found.difference > (most := settings.max_difference):
        off = f"{found.difference:.4f} from the teacher's, more than max_difference {most}"
        problems.append(f"{where}: a probability differs by {off}")
    if found.top1 > settings.max_top1_share * found.frames:
        off = f"the best unit is not the teacher's, more than max_top1_share {settings.max_top1_share}"
        problems.append(f"{where}: in {found.top1} of {found.frames} frames {off}")
    if found.moved > settings.max_top1_share * found.events:
        problems.append(
            f"{where}: {found.moved} of {found.events} events are of utterances whose spikes the teacher has elsewhere"
        )
    if not found.utterances and not problems:
        none = "no utterance could be labelled again, so nothing was verified"
        raise UserError(f"{where}: {none}; see their quarantine.jsonl")
    for problem in problems[:SHOWN]:
        print(problem)
    if len(problems) > SHOWN:
        print(f"… and {len(problems) - SHOWN} more")
    if found.rounded_later:
        print(f"{where}: {ROUNDED_LATER.format(found.rounded_later, found.shards)}")
    print(
        f"{where}: {'does not hold' if problems else 'holds'}; {found.shards} of {len(infos)} shards, "
        f"{found.utterances:,} utterances and {found.frames:,} frames labelled again: largest difference "
        f"{found.difference:.5f}, {found.top1} best units differ"
    )
    for tap, share in found.hidden.items():
        print(f"{where}: hidden states of {tap} are within {share:.3g} of their variance of the teacher's")
    tell_summary(utterances=present.samples, done=found.utterances, figures={"holds": not problems, **vars(found)})
    if settings.report:
        write_json(settings.report, {"holds": not problems, **vars(found)})
    return not problems


def _check_claim(settings: VerifySettings) -> None:
    """Refuse settings that select other utterances or other texts than the label job did: everything would differ."""
    claim = claimed_settings(settings.targets)
    advice = []
    if (limit := claim.get("max_seconds", settings.max_seconds)) != settings.max_seconds:
        advice.append(f"max_seconds={limit} (not {settings.max_seconds})")
    if claim and (precision := claim.get("precision", "float32")) != settings.precision:
        advice.append(f"precision={precision} (not {settings.precision})")
    if claim.get("mode") in OF_TEXT:
        texts = claim.get("transcripts")
        if not texts and settings.transcripts:
            advice.append("no transcripts (the texts in the audio shards were used)")
        elif texts and (not settings.transcripts or sha256_file(settings.transcripts) != texts):
            differs = f"; {settings.transcripts} differs" if settings.transcripts else ""
            advice.append(f"transcripts=FILE, the one that was used (SHA-256 {texts[:16]}…{differs})")
    if advice:
        raise UserError(f"{settings.targets}: was labelled with other settings; give {' and '.join(advice)}")


def _verify_shard(
    settings: VerifySettings, teacher: Checkpoint, transcripts: dict[str, str] | None, info: ShardInfo, found: Findings
) -> bool:
    """Verify a shard and add to `found`; returns whether it was labelled again."""
    path = place(settings.targets) / info.name
    stored: dict[str, SparsePosteriors] = {}
    states: dict[str, HiddenStates] = {}
    try:
        metadata, utterances = read_labelled_shard(path, teacher.units.hash, teacher.units.size, teacher.frame_ms)
        check_answers(path, metadata, info.at(settings.audio), info.sha256)
        if (maker := metadata.teacher) != teacher.fingerprint:
            raise UserError(f"{path}: was made by teacher {maker}, {settings.teacher} is {teacher.fingerprint}")
        held = metadata.hidden
        quantiser = read_quantiser(settings.targets, held.quantiser) if held and held.quantiser else None
    except UserError as error:
        found.problems.append(str(error))
        return False
    try:
        for key, target, data in utterances:  # what comes before a damaged one stays
            stored[key] = target
            if held is not None and data is not None:
                states[key] = decode_hidden(data, held, f"{path}: {key}", quantiser)
    except UserError as error:
        found.problems.append(str(error))
    found.shards += 1
    found.rounded_later += metadata.heard is None
    labelling = _labelling(settings, metadata)
    loaded = load_shard(labelling, teacher, transcripts, info)
    wrong: dict[str, str] = {}
    hidden = _Hidden(held, str(path)) if held is not None else None
    for key, target, said in _targets(labelling, teacher, loaded, list(held.taps) if held else []):
        if key not in stored:
            what = f"quarantined ({metadata.quarantined[key]})" if key in metadata.quarantined else "missing"
            wrong[key] = f"is {what}, though the teacher can label it"
        elif stored[key].frames != target.frames:
            wrong[key] = f"has {stored[key].frames} frames, the teacher gives {target.frames}"
        else:
            _compare(stored[key], target, found)
            if hidden is not None and key in states:
                hidden.compare(states[key], said, target, found)
    if hidden is not None:
        hidden.judge(found)
    for key in stored.keys() - {item.key for item in loaded.items}:
        wrong[key] = f"has a soft target, but {loaded.quarantined.get(key, 'it is not in the audio shard')}"
    for key in loaded.quarantined.keys() - stored.keys() - metadata.quarantined.keys():
        wrong[key] = "is neither labelled nor quarantined"
    found.problems += [f"{path}: {key} {wrong[key]}" for key in sorted(wrong)]
    return True


def _labelling(settings: VerifySettings, metadata: TargetMetadata) -> LabelSettings:
    """The settings that made a shard."""
    selection, modes = metadata.selection, SELECTION | {"mode": (metadata.selection.mode,)}
    kept = {name: value for name, value in selection if value is not None and selection.mode in modes[name]}
    values = {"teacher": settings.teacher, "audio": settings.audio, "output": settings.targets, **kept}
    values |= {"max_seconds": settings.max_seconds, "batch_frames": settings.batch_frames}
    values |= settings.model_dump(include={"precision"})
    return build(LabelSettings, values, "metadata.json")


def _targets(
    labelling: LabelSettings, teacher: Checkpoint, loaded: Loaded, taps: list[str]
) -> Iterator[tuple[str, SparsePosteriors, dict[str, Tensor]]]:
    """Key, new soft target, encoded and decoded, and hidden states of every utterance."""
    outputs = hidden_batches(teacher, loaded.features, labelling.batch_frames, taps)
    draws = selection_of(labelling).draws
    for (batch, said), answers in ahead(lambda pair: (pair, answer_batch(labelling, loaded, *pair)), outputs):
        for index, (_, states), answer in zip(batch, said, answers, strict=True):
            yield loaded.items[index].key, codec.decode(codec.encode(answer.kept, draws=draws)), states


class _Hidden:
    """The hidden states of a shard against the teacher's: what is stored may be off by no more than the shard says."""

    def __init__(self, held: HiddenDescription, where: str) -> None:
        self.held, self.where, self.rows = held, where, 0
        self.sums = {tap: np.zeros(2 + width) for tap, width in held.taps.items()}

    def compare(self, stored: HiddenStates, said: dict[str, Tensor], target: SparsePosteriors, found: Findings) -> None:
        """Count an utterance in, whose hidden states `said` the teacher has now, beside its new soft target."""
        rows_of, edges = hidden_rows(self.held.keep, said, target)
        if stored.edges is not None and edges is not None:
            found.events += stored.edges.shape[1]
            if not np.array_equal(stored.edges, edges):  # a probability beside the least of a spike
                found.moved += stored.edges.shape[1]
                return
        for tap, rows in rows_of.items():
            got = stored.taps[tap] if stored.edges is not None else stored.of_frames(tap)
            self.sums[tap] += lost_of(rows, torch.from_numpy(got.astype(np.float32)).to(rows.device))
        self.rows += len(rows)

    def judge(self, found: Findings) -> None:
        """Note what was lost, and whether that is more than the shard says."""
        for tap, sums in self.sums.items():
            share, stated = lost_share(sums, self.rows), self.held.lost[tap]
            found.hidden[tap] = max(found.hidden.get(tap, 0.0), share)
            if share > stated * LOST_MORE + LOST_BESIDE:
                off = f"{share:.3g} of their variance from the teacher's, more than the {stated:.3g} that were lost"
                found.problems.append(f"{self.where}: hidden states of {tap} are {off}")


def _compare(stored: SparsePosteriors, anew: SparsePosteriors, found: Findings) -> None:
    rows = [one.rows * one.num_units + one.units for one in (stored, anew)]
    probs = [np.exp(one.log_probs, dtype=np.float64) for one in (stored, anew)]
    entries, inverse = np.unique(np.concatenate(rows), return_inverse=True)
    difference = np.bincount(inverse, np.concatenate([probs[0], -probs[1]]), len(entries))
    # a unit that only one side kept counts in full: such probabilities are small
    found.difference = max(found.difference, float(np.abs(difference).max()))
    found.top1 += int((stored.units[stored.starts] != anew.units[anew.starts]).sum())
    found.frames += stored.frames
    found.utterances += 1
