"""Quantising a network after its training."""

from __future__ import annotations

from dataclasses import asdict

import torch

from asr_kd.audio.blas import one_thread
from asr_kd.errors import UserError
from asr_kd.files import claim_folder
from asr_kd.models.acoustic import (
    Checkpoint,
    blank_held_back,
    build_model,
    load_checkpoint,
    save_checkpoint,
    stored_weights,
)
from asr_kd.shards.leases import sole_writer
from asr_kd.shards.tarset import read_index
from asr_kd.summary import tell_summary
from asr_kd.training.development import score_development
from asr_kd.training.quantise_settings import QuantiseSettings


@one_thread()
def quantise(settings: QuantiseSettings) -> None:
    """Write a checkpoint with its weights rounded, which `label`, `eval`, `transcribe` and `train` take like any other.

    Raises:
        UserError: when there is no checkpoint, it is quantised already, or the output belongs to something else.
    """
    torch.set_num_threads(settings.threads)
    full = load_checkpoint(settings.checkpoint)
    if full.settings.bits:
        raise UserError(
            f"checkpoint: {settings.checkpoint} is quantised to {full.settings.bits} bits already; give the one it was made from"
        )
    shape = full.settings.model_copy(update={"bits": settings.bits})
    data = settings.development and read_index(settings.development).hash
    claim_folder(settings.output, "quantise", {**settings.model_dump(), "fingerprint": full.fingerprint, "data": data})
    model = build_model(shape, full.features.dimension, full.units.size).eval()
    model.load_state_dict(full.model.state_dict())
    # scores of the float network are not those of this one
    training = {name: value for name, value in full.training.items() if not name.startswith("development_")}
    training["quantised_from"] = {"folder": settings.checkpoint, "fingerprint": full.fingerprint}
    offset, said = 0.0, ""
    with sole_writer(settings.output):
        if settings.development:
            scores = score_development(settings, Checkpoint(model, full.units, full.features, shape, ""))
            offset, said = scores.blank_offset, f", development WER {scores.wer:.2%}"
            training |= {f"development_{name}": value for name, value in asdict(scores).items() if "blank" not in name}
            before = training.get("blank_offset")  # for people, so it may be anything
            training["blank_offset"] = (before if isinstance(before, int | float) else 0.0) + offset
        with blank_held_back(model, offset):
            save_checkpoint(settings.output, model, full.units, full.features, shape, training)
    before, after = (
        sum(one.nbytes for one in stored_weights(model, one).values()) / 1000 for one in (full.settings, shape)
    )
    figures = {"bits": settings.bits, "kilobytes": after, "kilobytes_before": before}
    if settings.development:
        figures["development_wer"] = training["development_wer"]
    tell_summary(settings.output, figures=figures)
    print(f"{settings.output}: weights of {settings.bits} bits, {after:,.1f} kB in place of {before:,.1f} kB{said}")
