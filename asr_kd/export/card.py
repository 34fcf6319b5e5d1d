"""The model card of an exported folder: README.md, made from what is known, with the rest to fill in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_kd.errors import UserError
from asr_kd.export.running import CARD, QUANTIZED
from asr_kd.export.settings import ExportSettings
from asr_kd.files import claimed_settings, place, read_json, write_whole
from asr_kd.models.acoustic import OwnCheckpoint

STREAM = """import json, numpy as np, onnxruntime, soundfile

about = json.load(open("export.json", encoding="utf-8"))
tokens = [line.rsplit(" ", 1)[0] for line in open("tokens.txt", encoding="utf-8")]
session = onnxruntime.InferenceSession("model.onnx")
sound, rate = soundfile.read("audio.wav", dtype="float32")  # mono, @RATE@ Hz
state, text, last = np.zeros((1, about["state"]), np.float32), "", 0
for at in range(0, len(sound) + rate // 10, rate // 10):  # as it would arrive, 100 ms at once
    end = np.array([at >= len(sound)], np.float32)  # the last call, with or without sound
    log_probs, frames, state = session.run(None, {"samples": sound[None, at : at + rate // 10], "state": state, "end": end})
    for unit in log_probs[0, : frames[0]].argmax(1):
        text, last = text + tokens[unit] * (unit not in (0, last)), unit
print(text.replace("▁", " ").strip())
"""
ONLINE = """import numpy as np, sherpa_onnx, soundfile

recognizer = sherpa_onnx.OnlineRecognizer.@FROM@
sound, rate = soundfile.read("audio.wav", dtype="float32")  # mono, @RATE@ Hz
stream = recognizer.create_stream()
stream.accept_waveform(rate, np.append(sound, np.zeros(rate * @TAIL@ // 1000, np.float32)))  # silence brings out the last word
stream.input_finished()
while recognizer.is_ready(stream):
    recognizer.decode_stream(stream)
print(recognizer.get_result(stream).strip())
"""
FROM_T_ONE = 'from_t_one_ctc(tokens="tokens.txt", model="model.onnx")'
FROM_ZIPFORMER2 = """from_zipformer2_ctc(
    tokens="tokens.txt", model="model.onnx", sample_rate=@RATE@, feature_dim=@MELS@
)"""
OFFLINE = """import itertools, numpy as np, onnxruntime, soundfile

tokens = [line.rsplit(" ", 1)[0] for line in open("tokens.txt", encoding="utf-8")]
session = onnxruntime.InferenceSession("model.onnx")
sound, rate = soundfile.read("audio.wav", dtype="float32")  # mono, @RATE@ Hz
log_probs, frames = session.run(None, {"samples": sound[None], "lengths": np.array([len(sound)])})
units = [unit for unit, _ in itertools.groupby(log_probs[0, : frames[0]].argmax(1))]
print("".join(tokens[unit] for unit in units if unit).replace("▁", " ").strip())
"""
OFFLINE_SHERPA = """import sherpa_onnx, soundfile

recognizer = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(
    model="model.onnx", tokens="tokens.txt", sample_rate=@RATE@, feature_dim=@MELS@
)
sound, rate = soundfile.read("audio.wav", dtype="float32")  # mono; other rates are converted
stream = recognizer.create_stream()
stream.accept_waveform(rate, sound)
recognizer.decode_stream(stream)
print(stream.result.text.strip())
"""
PROGRAMS = {
    "stream": STREAM,
    "t-one": ONLINE.replace("@FROM@", FROM_T_ONE),
    "zipformer2": ONLINE.replace("@FROM@", FROM_ZIPFORMER2),
    "offline": OFFLINE,
}
PACKAGES = {"stream": "onnxruntime", "t-one": "sherpa-onnx", "zipformer2": "sherpa-onnx", "offline": "onnxruntime"}
WHAT = {
    "stream": "It hears sound in pieces of any length and answers frame by frame.",
    "t-one": "It hears sound in pieces of 300 ms through the T-one interface of sherpa-onnx.",
    "zipformer2": "It hears sound as it comes through the zipformer2 interface of sherpa-onnx.",
    "offline": "It hears whole recordings.",
}


def write_card(folder: Path, settings: ExportSettings, checkpoint: OwnCheckpoint, described: dict[str, Any]) -> None:
    """Write README.md.

    Args:
        folder: it is written there.
        settings: of the export.
        checkpoint: that was exported.
        described: what stands in export.json.

    Raises:
        UserError: when the report of the settings is none, or not of this checkpoint.
    """
    features, of_sound = checkpoint.features, described.get("hears") != "features"
    program = (
        OFFLINE_SHERPA if settings.interface == "offline" and not of_sound else PROGRAMS[settings.interface]
    ).replace("@RATE@", str(features.sample_rate))
    program = program.replace("@TAIL@", str(described.get("tail_ms"))).replace("@MELS@", str(features.mels))
    goes_in = "Sound goes in, log-probabilities of text units come out; the front end is part of the graph."
    if not of_sound:
        goes_in = "Features as Kaldi computes them go in (sherpa-onnx makes them of sound), log-probabilities of text units come out."
    ahead = described["lookahead_ms"]
    rows = {
        "network": f"{checkpoint.settings.shape}, {checkpoint.units.size} units",
        "checkpoint": f"`{checkpoint.fingerprint}`", "units": f"`{checkpoint.units.hash}`",
        "interface": settings.interface,
        "sound": f"mono, {checkpoint.features.sample_rate} Hz",
        "frames": f"{checkpoint.frame_ms} ms; looks " + ("at the whole recording" if ahead is None else f"{ahead} ms ahead"),
        **{f"`{name}`": f"{one['bytes'] / 1e6:,.2f} MB" for name, one in described["files"].items() if name.endswith(".onnx")},
    }  # fmt: skip
    lines = [
        "# A speech recogniser", "",
        f"{WHAT[settings.interface]} {goes_in}",
        "", *_table(["", ""], list(rows.items())), "",
        "## Made from", "", *_origin(settings, checkpoint), "",
        "## How well it does", "", *_scores(settings, checkpoint, described["checked"]), "",
        "## Use", "",
        f"`pip install {PACKAGES[settings.interface] if of_sound else 'sherpa-onnx'} soundfile`, then in this folder:", "", "```python", program.rstrip(), "```", "",
        *([f"`{QUANTIZED}` takes the same place, with matrices of 8 bits.", ""] if settings.quantize else []),
        "All that a client has to know beside this stands in `export.json`.", "",
        "## Intended use, and what it was not made for", "", "To be filled in.", "",
        "## Licence", "", "To be filled in: that of the network, and what the data behind it ask for.", "",
    ]  # fmt: skip
    with write_whole(folder / CARD, "w") as file:
        file.write("\n".join(lines))


def _table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    every = [tuple(head), tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(row) + " |" for row in every]


def _origin(settings: ExportSettings, checkpoint: OwnCheckpoint) -> list[str]:
    """What its training run says of data and teachers; folders by their last name."""
    folder = place(settings.checkpoint)
    claimed = claimed_settings(folder) or claimed_settings(folder.parent)
    rows = [
        (what, f"`{str(name).rstrip('/').rpartition('/')[2]}`", f"`{mark}`")
        for key, what in (("data", "audio"), ("texts", "texts"), ("teachers", "teacher"))
        for name, mark in sorted((claimed.get(key) or {}).items() if isinstance(claimed.get(key), dict) else ())
        if mark
    ]
    if isinstance(before := claimed.get("init_fingerprint"), str):
        rows.append(("started from", "", f"`{before}`"))
    hours = checkpoint.training.get("audio_hours")
    said = [f"{hours:,.1f} hours of audio were heard in training."] if isinstance(hours, int | float) else []
    if not rows:
        return [*said, "Its data are not known from the checkpoint; to be filled in."]
    return [*said, *([""] if said else []), *_table(["", "name", "hash"], rows)]


def _scores(settings: ExportSettings, checkpoint: OwnCheckpoint, checked: dict[str, Any] | None) -> list[str]:
    lines = []
    if settings.report is not None:
        lines += [*_reported(settings.report, checkpoint.fingerprint), ""]
    wer = checkpoint.training.get("development_wer")
    if isinstance(wer, float):
        lines += [f"Word error rate on the development set of its training: {wer:.2%}.", ""]
    if checked is None:
        return [*lines, "The graph was not compared with its checkpoint; `asr-kd export check=SHARDS` does that."]
    rows = [
        (
            f"`{name.partition(', ')[0]}`", name.partition(", ")[2], f"{one['same_texts']} of {one['utterances']}",
            f"{one['wer']:.2%}" if "wer" in one else "–", f"{one['checkpoint_wer']:.2%}" if "wer" in one else "–",
            str(one.get("mean_difference", "–")),
        )
        for name, one in checked.items() if isinstance(one, dict)
    ]  # fmt: skip
    head = ["graph", "in", "same texts", "WER", "WER of the checkpoint", "mean difference of log-probabilities"]
    return [*lines, f"Compared with the checkpoint on audio `{checked['data']}`:", "", *_table(head, rows)]


def _reported(report: str, fingerprint: str) -> list[str]:
    """A table of the word errors of a report of `eval`, by test set."""
    path = place(report)
    path = path if str(path).endswith(".json") else path / "report.json"
    found = read_json(path, "report")
    systems = found.get("systems") if isinstance(found, dict) and found.get("format") == "asr_kd-report" else None
    if not isinstance(systems, dict):
        raise UserError(f"report: {path} is not a report of `asr-kd eval`; give its folder")
    of_this = [one for one in systems.values() if isinstance(one, dict) and one.get("fingerprint") == fingerprint]
    if not of_this:
        raise UserError(
            f"report: {path} scores no system with fingerprint {fingerprint}; evaluate this checkpoint, or leave it out"
        )
    try:
        rows = [
            (name, f"{one['words']:,}", f"{one['wer']:.2%}", "–" if one["interval"] is None else "{:.2%} – {:.2%}".format(*one["interval"]))
            for name, one in of_this[0]["sets"].items()
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError):
        raise UserError(f"report: {path} is damaged or of another version; make it again with `asr-kd eval`") from None
    return _table(["test set", "words", "WER", "95 % interval"], rows)
