"""Audio that a teacher knows → the moments of its features, for students that will have no audio to learn from it."""

from __future__ import annotations

import torch

from asr_kd.audio.blas import one_thread
from asr_kd.errors import UserError
from asr_kd.labeling.settings import MomentsSettings
from asr_kd.models.acoustic import infer_batches, pick_device
from asr_kd.models.teachers import load_teacher
from asr_kd.progress import Progress
from asr_kd.shards.quarantine import Quarantine
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import read_index
from asr_kd.summary import tell_summary
from asr_kd.targets.moments import Sums, write_moments
from asr_kd.units import Units


@one_thread()
def moments(settings: MomentsSettings) -> None:
    """Write the moments of a set of audio as the teacher hears it, whole or not at all; the same input gives the same bytes.

    Raises:
        UserError: when teacher or audio cannot be used, or too much of it.
    """
    torch.set_num_threads(settings.threads)
    teacher, infos = load_teacher(settings.teacher, pick_device(settings.device)), read_index(settings.audio)
    if teacher.model.hears_sound:
        raise UserError(
            f"teacher: {settings.teacher} hears sound, and moments are those of features that stand for audio; train a student on its targets "
            "(asr-kd label, asr-kd train), and let that one be the teacher here and in generated"
        )
    if not infos.samples:
        raise UserError(f"{settings.audio}: holds no utterances; prepare the audio shards again")
    wanted = ShardInput(folder=settings.audio, features=teacher.features, max_seconds=settings.max_seconds)
    sums, bad = Sums(teacher.features.dimension), Quarantine(infos.samples, settings.max_bad_share, "heard")
    seconds = 0.0
    with Progress("moments", infos.samples, "utterances") as progress:
        for info in infos.filled:
            loaded = load_features(wanted, info)
            for key, reason in loaded.bad:
                bad.add(key, reason)
            features = [item.features for item in loaded.items]
            answers = {
                index: said
                for batch, rows in infer_batches(teacher, features, settings.batch_frames)
                for index, said in zip(batch, rows, strict=True)
            }
            for index, one in enumerate(features):
                sums.add(one, float((1.0 - torch.from_numpy(answers[index]).double()[:, Units.blank].exp()).sum()))
            heard = sum(item.seconds for item in loaded.items)
            seconds += heard
            progress.advance(info.samples, heard)
    bad.refuse(str(settings.audio))
    write_moments(settings.output, sums.moments(teacher.fingerprint))
    tell_summary(
        settings.output, utterances=bad.total, done=bad.total - bad.count, quarantined=bad.count, audio_hours=seconds / 3600,
        figures={"frames": sums.frames},
    )  # fmt: skip
    left_out = f"; {bad.count:,} of {bad.total:,} utterances cannot be {bad.done} {bad.example}" if bad.count else ""
    speaks = f"in {sums.spoken / sums.frames:.1%} of which {settings.teacher} speaks"
    print(f"{settings.output}: moments of {sums.frames:,} frames, {speaks}{left_out}")
