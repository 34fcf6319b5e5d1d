"""Graphs made here node by node, as the exports of icefall, WeNet and NeMo look from outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import conv1d

from asr_kd.audio.decode import encode
from asr_kd.audio.features import frontend_of
from asr_kd.errors import AudioError, UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings, VerifySettings
from asr_kd.labeling.verify import verify
from asr_kd.models.acoustic import infer
from asr_kd.models.outside.fbank import ICEFALL, NEMO, NEMO_AS_IT_IS, WENET, FrontEnd
from asr_kd.models.outside.onnx import read_table
from asr_kd.models.teachers import load_teacher
from asr_kd.shards.tarset import Sample, write_index, write_shard
from asr_kd.targets.store import read_target_shard
from asr_kd.units import learn_units

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")

TOKENS = ["<blk>", "<sos/eos>", "<unk>", "▁A", "B", "▁", "C"]
KINDS = {"zipformer2_ctc": ICEFALL, "wenet_ctc": WENET, "EncDecCTCModelBPE": NEMO}
BINS = 12


def test_a_graph_holds_its_arithmetic(tmp_path: Path) -> None:
    folder = save(tmp_path, model_type="zipformer2_ctc")
    with pytest.raises(UserError, match=f"precision: {folder} is an ONNX model, whose graph holds its arithmetic"):
        load_teacher(folder, precision="bfloat16")
    teacher = load_teacher(folder)
    sound = np.random.default_rng(0).normal(0, 0.1, (16000, 1)).astype(np.float32)
    with torch.autocast("cpu", torch.bfloat16):  # as in a step of training: what it hears is exact
        found = infer(teacher, [sound])[0]
    assert np.array_equal(found, infer(teacher, [sound])[0])


def weights(padding: int) -> list[np.ndarray]:
    rng = np.random.default_rng(padding)
    return [rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((8, BINS, 3), (len(TOKENS), 8, 3))]


def save(folder: Path, padding: int = 0, tokens: list[str] = TOKENS, inputs: int = 2, **metadata: str) -> str:
    """Two convolutions with stride 2 over features, from [1, frames, bins] (of NeMo [1, bins, frames]) to logits [1, frames, tokens]."""
    first = metadata.get("model_type", "").startswith("EncDec")
    helper, proto = onnx.helper, onnx.TensorProto
    one, two = weights(padding)
    convolved = {"kernel_shape": [3], "strides": [2], "pads": [padding, padding]}
    nodes = [
        helper.make_node("Transpose", ["x"], ["across"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["x" if first else "across", "one"], ["low"], **convolved),
        helper.make_node("Relu", ["low"], ["bent"]),
        helper.make_node("Conv", ["bent", "two"], ["high"], **convolved),
        helper.make_node("Transpose", ["high"], ["logits"], perm=[0, 2, 1]),
    ]
    shape = [None, BINS, None] if first else [None, None, BINS]
    taken = [
        helper.make_tensor_value_info("x", proto.FLOAT, shape),
        helper.make_tensor_value_info("x_lens", proto.INT64, [None]),
    ]
    taken += [helper.make_tensor_value_info(f"state{number}", proto.FLOAT, [1]) for number in range(inputs - 2)]
    given = [helper.make_tensor_value_info("logits", proto.FLOAT, [None, None, len(TOKENS)])]
    held = [onnx.numpy_helper.from_array(one, "one"), onnx.numpy_helper.from_array(two, "two")]
    graph = helper.make_graph(nodes[int(first) :], "ctc", taken, given, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata)
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    (folder / "tokens.txt").write_text("".join(f"{token} {number}\n" for number, token in enumerate(tokens)))
    return str(folder)


def sound(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def expected(front_end: FrontEnd, waveform: np.ndarray, padding: int) -> torch.Tensor:
    one, two = map(torch.from_numpy, weights(padding))
    hidden = front_end.compute(torch.from_numpy(waveform), 16000, BINS).T[None]
    return conv1d(conv1d(hidden, one, stride=2, padding=padding).relu(), two, stride=2, padding=padding)[0].T


def heard(folder: str, *sounds: np.ndarray) -> list[np.ndarray]:
    teacher = load_teacher(folder)
    return infer(teacher, [frontend_of(teacher.features).compute(one) for one in sounds])


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_says_what_its_graph_says_of_its_own_features(kind: str, padding: int, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", padding, model_type=kind, subsampling_factor="4")
    teacher = load_teacher(folder)
    assert (teacher.frame_ms, teacher.features.sample_rate) == (40, 16000)
    sounds = [sound(length, length) for length in (9000, 16000, 16000, 16123, 20479)]
    for waveform, found in zip(sounds, heard(folder, *sounds), strict=True):
        logits = expected(KINDS[kind], waveform, padding)
        assert len(found) == len(logits) == teacher.model.frames(len(waveform))
        # A, B, space and C have units, and so has the unknown; of the sentence's end the mass goes to the others
        kept = logits[:, [column for column, token in enumerate(TOKENS) if token != "<sos/eos>"]].log_softmax(-1)
        assert np.allclose(np.sort(found, axis=1)[:, -kept.shape[1] :], np.sort(kept.numpy(), axis=1), atol=1e-4)
        assert np.allclose(found[:, 0], kept[:, 0].numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_does_not_depend_on_its_batch(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", model_type=kind)
    sounds = [sound(length, length) for length in (9000, 16000, 16000, 20000)]
    together = heard(folder, *sounds)
    for one, found in zip(sounds, together, strict=True):
        assert np.array_equal(heard(folder, one)[0], found)


@pytest.mark.parametrize(
    ("kind", "padding", "offset_ms"),
    # two convolutions of 3 hear 7 frames: with nothing around the sound 15 ms later than 4 frames would; with padding 15 ms earlier
    [("wenet_ctc", 0, 15), ("wenet_ctc", 1, -15), ("zipformer2_ctc", 0, 8), ("EncDecCTCModel", 1, -28)],
)
def test_where_the_first_frame_lies(kind: str, padding: int, offset_ms: int, tmp_path: Path) -> None:
    assert load_teacher(save(tmp_path / "model", padding, model_type=kind)).features.offset_ms == offset_ms


def test_its_tokens_are_units(tmp_path: Path) -> None:
    units = load_teacher(save(tmp_path / "model", model_type="zipformer2_ctc")).units
    assert units.decode(units.encode("ab cb ab")) == "ab cb ab"
    assert load_teacher(
        save(tmp_path / "model", tokens=[*TOKENS[1:], "<blank>"], model_type="EncDecCTCModel")
    ).units.hash


def test_tokens_of_icefalls_graphs_are_passed_over_and_bytes_refused(tmp_path: Path) -> None:
    plain = load_teacher(save(tmp_path / "plain", model_type="zipformer2_ctc"))
    folder = save(tmp_path / "model", tokens=[*TOKENS, "#0", "#1"], model_type="zipformer2_ctc")
    assert load_teacher(folder).units.hash == plain.units.hash
    (tmp_path / "model" / "bbpe.model").touch()
    with pytest.raises(UserError, match="byte-level BPE"):
        load_teacher(folder)


def test_a_sentencepiece_model_beside_it_is_used(tmp_path: Path) -> None:
    units = learn_units(["ab cab bac"], "bpe", 9)
    pieces = [units.piece(unit) for unit in range(1, units.size)]
    chosen = ["<blk>", "<sos/eos>", "<unk>", *[piece for piece in pieces if piece != "<unk>"]][: len(TOKENS)]
    folder = save(tmp_path / "model", tokens=chosen, model_type="zipformer2_ctc")
    (tmp_path / "model" / "bpe.model").write_bytes(units.model)
    assert load_teacher(folder).units.hash == units.hash


def test_a_fingerprint_is_of_graph_and_tokens(tmp_path: Path) -> None:
    marks = [
        load_teacher(save(tmp_path / str(number), **arguments)).fingerprint
        for number, arguments in enumerate(
            [
                {"model_type": "wenet_ctc"}, {"model_type": "wenet_ctc"}, {"model_type": "zipformer2_ctc"},
                {"padding": 1, "model_type": "wenet_ctc"}, {"tokens": [*TOKENS[:-1], "D"], "model_type": "wenet_ctc"},
            ]
        )
    ]  # fmt: skip
    assert marks[0] == marks[1] and len(set(marks)) == 4


def test_sound_that_gives_no_frame_is_refused(tmp_path: Path) -> None:
    teacher = load_teacher(save(tmp_path / "model", model_type="wenet_ctc"))
    least = teacher.features.least  # type: ignore[union-attr]
    assert least == 400 + 6 * 160
    assert len(heard(str(tmp_path / "model"), sound(least))[0]) == 1
    with pytest.raises(AudioError, match="too short"):
        heard(str(tmp_path / "model"), sound(least - 1))


def test_nemo_without_normalisation(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", 1, model_type="EncDecCTCModel", normalize_type="NA")
    logits = expected(NEMO_AS_IT_IS, sound(16000), 1)
    kept = [column for column, token in enumerate(TOKENS) if token != "<sos/eos>"]
    assert np.allclose(heard(folder, sound(16000))[0][:, 0], logits[:, kept].log_softmax(-1)[:, 0].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "its metadata name no model_type"),
        (
            {"model_type": "dolphin"},
            r"its model_type dolphin is not known here.*zipformer2_ctc, wenet_ctc, EncDecCTCModel",
        ),
        ({"model_type": "EncDecCTCModel", "is_giga_am": "1"}, "GigaAM"),
        ({"model_type": "EncDecCTCModel", "normalize_type": "all_features"}, "normalised by all_features"),
        ({"model_type": "wenet_ctc", "subsampling_factor": "6"}, r"subsampling_factor 6, and it gives a frame for 4"),
        ({"model_type": "wenet_ctc", "inputs": 3}, r"must take features and their length, and takes x .*state0"),
        ({"model_type": "wenet_ctc", "tokens": [*TOKENS, "D"]}, r"tokens.txt has 8 tokens, the network 7 outputs"),
        ({"model_type": "wenet_ctc", "tokens": ["D", *TOKENS[1:]]}, r"names no blank \(<blk>, <blank>, <eps>\)"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(save(tmp_path / "model", **arguments))
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    folder = Path(save(tmp_path / "model", model_type="wenet_ctc"))
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:500])
    with pytest.raises(UserError, match=r"model\.onnx cannot be loaded"):
        load_teacher(str(folder))
    shutil.copy(folder / "tokens.txt", folder / "model.onnx")
    with pytest.raises(UserError, match=r"model\.onnx cannot be loaded"):
        load_teacher(str(folder))


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", model_type="wenet_ctc")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'asr-kd\[onnx\]'"):
        load_teacher(folder)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<blk> 0\na 1\n", ["<blk>", "a"]),
        ("a 1\r\n<blk> 0\r\n\n", ["<blk>", "a"]),
        ("<blk>\t0\n  1\n", ["<blk>", " "]),
        ("<blk> 0\n 1\n", ["<blk>", " "]),
        ("\ufeff<blk> 0\n▁the 1\n", ["<blk>", "▁the"]),
    ],
)
def test_a_table_of_tokens(text: str, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text(text)
    assert read_table(tmp_path / "tokens.txt") == found


@pytest.mark.parametrize("text", ["", "a\n", "a b\n", "a 0\nb 0\n", "a 1\nb 2\n", "a -1\n", "a 0.5\n"])
def test_an_odd_table_of_tokens_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text(text)
    with pytest.raises(UserError, match=r"tokens\.txt"):
        read_table(tmp_path / "tokens.txt")


def test_it_labels_and_is_verified(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", 1, model_type="EncDecCTCModel")
    samples = [
        Sample(f"u{at}", encode(sound(n, n), 16000, "FLAC"), "flac", {"seconds": n / 16000})
        for at, n in enumerate((8000, 9000, 8000))
    ]
    audio, targets = tmp_path / "audio", tmp_path / "targets"
    audio.mkdir()
    write_index(audio, [write_shard(audio / "shard-000000.tar", samples)])
    label(LabelSettings(teacher=folder, audio=str(audio), output=str(targets), mode="top_k", k=3, device="cpu"))
    metadata, pairs = read_target_shard(targets / "shard-000000.tar")
    assert (metadata.frame_ms, metadata.offset_ms, len(dict(pairs))) == (40, -28, 3)
    written = json.loads((targets / "vocabulary.json").read_text())
    assert [one["token"] for one in written] == TOKENS and written[1]["unit"] is None and written[3]["piece"] == "▁a"
    assert verify(VerifySettings(targets=str(targets), audio=str(audio), teacher=folder, device="cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_shortest_sound_has_an_answer(kind: str, tmp_path: Path) -> None:
    """Of one frame of features there is no deviation to divide by."""
    folder = save(tmp_path / "model", 1, model_type=kind)
    least = load_teacher(folder).features.least
    for waveform in (sound(least), np.zeros(least, np.float32)):
        (found,) = heard(folder, waveform)
        assert len(found) and np.isfinite(found).all()


@pytest.mark.parametrize("rate", ["16k", "0", "-8000", "1e4", "22050.0", "11026"])
def test_a_rate_that_is_none(rate: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"sample_rate {rate}, which is no usual rate in Hz"):
        load_teacher(save(tmp_path / "model", model_type="zipformer2_ctc", sample_rate=rate))


def test_weights_in_a_file_of_any_name_are_in_the_fingerprint(tmp_path: Path) -> None:
    folder = Path(save(tmp_path / "model", model_type="zipformer2_ctc"))
    (folder / "README").write_text("ours")
    onnx.save_model(
        onnx.load(folder / "model.onnx"), folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0
    )  # fmt: skip
    before = load_teacher(str(folder)).fingerprint
    (folder / "README").write_text("theirs")
    assert load_teacher(str(folder)).fingerprint == before
    held = bytearray((folder / "weights").read_bytes())
    held[0] ^= 1
    (folder / "weights").write_bytes(held)
    assert load_teacher(str(folder)).fingerprint != before
