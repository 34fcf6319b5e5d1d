from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import asr_kd
from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import UserError
from asr_kd.files import hash_json
from asr_kd.models import acoustic
from asr_kd.models.acoustic import (
    Checkpoint,
    blank_held_back,
    build_model,
    collate,
    infer,
    load_checkpoint,
    parameters,
    pick_device,
    save_checkpoint,
)  # fmt: skip
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units

FEATURES = FeatureSettings(sample_rate=8000, mels=8)
STREAMING_KINDS = {
    "separable": ModelSettings(kind="separable", layers=2, size=12, kernel=3, delay_frames=2),
    "separable-conditioned": ModelSettings(kind="separable", layers=2, size=12, kernel=4, conditioned=[1]),
    "chunked": ModelSettings(
        kind="chunked_conformer", layers=2, size=12, kernel=4, heads=2, chunk_frames=4, left_frames=5
    ),
    "chunked-conditioned": ModelSettings(
        kind="chunked_conformer", layers=2, size=12, kernel=1, heads=3, chunk_frames=3, left_frames=0, conditioned=[1]
    ),
    "chunk-of-one": ModelSettings(kind="chunked_conformer", layers=2, size=12, heads=2, chunk_frames=1, left_frames=40),
    "emformer": ModelSettings(
        kind="emformer", layers=2, size=12, heads=2, chunk_frames=4, left_frames=3, right_frames=2, memory=2
    ),
    "emformer-plain": ModelSettings(kind="emformer", layers=2, size=12, heads=2, chunk_frames=3, left_frames=7),
    "emformer-conditioned": ModelSettings(
        kind="emformer",
        layers=3,
        size=12,
        heads=2,
        chunk_frames=2,
        left_frames=0,
        right_frames=3,
        memory=50,
        conditioned=[1, 2],
    ),
}
KINDS = {
    "lstm": ModelSettings(kind="lstm", layers=2, size=12, delay_frames=3),
    "lstm-no-delay": ModelSettings(kind="lstm", layers=1, size=12),
    "blstm": ModelSettings(kind="blstm", layers=2, size=12),
    "conv": ModelSettings(kind="conv", layers=3, size=12, kernel=5),
    "conformer": ModelSettings(kind="conformer", layers=2, size=12, kernel=5, heads=2),
    "lstm-conditioned": ModelSettings(kind="lstm", layers=3, size=12, delay_frames=3, conditioned=[1, 2]),
    "blstm-conditioned": ModelSettings(kind="blstm", layers=2, size=12, conditioned=[1]),
    "conformer-conditioned": ModelSettings(kind="conformer", layers=2, size=12, kernel=5, heads=2, conditioned=[1]),
    **STREAMING_KINDS,
    "lstm-projected": ModelSettings(kind="lstm", layers=3, size=12, delay_frames=3, projection=5, conditioned=[1]),
    "blstm-projected": ModelSettings(kind="blstm", layers=2, size=12, projection=5),
    "lstm-low-rank": ModelSettings(kind="lstm", layers=2, size=12, delay_frames=3, rank=4),
    "blstm-low-rank": ModelSettings(kind="blstm", layers=2, size=12, rank=4),
    "lstm-2-bits": ModelSettings(kind="lstm", layers=3, size=12, delay_frames=3, conditioned=[1], bits=2),
    "blstm-4-bits": ModelSettings(kind="blstm", layers=2, size=12, projection=5, bits=4),
    "lstm-low-rank-8-bits": ModelSettings(kind="lstm", layers=2, size=12, delay_frames=3, rank=4, bits=8),
    "conv-4-bits": ModelSettings(kind="conv", layers=3, size=12, kernel=5, bits=4),
    "conformer-2-bits": ModelSettings(kind="conformer", layers=2, size=12, kernel=5, heads=2, bits=2),
    "separable-2-bits": ModelSettings(kind="separable", layers=2, size=12, kernel=3, delay_frames=3, bits=2),
    "chunked-4-bits": ModelSettings(
        kind="chunked_conformer", layers=2, size=12, heads=2, chunk_frames=4, left_frames=5, bits=4
    ),
    "emformer-8-bits": ModelSettings(
        kind="emformer", layers=2, size=12, heads=2, chunk_frames=4, left_frames=5, memory=1, bits=8
    ),
}


def lively(settings: ModelSettings, units: Units, seed: int = 0) -> torch.nn.Module:
    """A network whose outputs vary; a Conformer's batch statistics are moved off their start."""
    torch.manual_seed(seed)
    model = build_model(settings, FEATURES.dimension, units.size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
        if model.condition is not None:
            model.condition.project.weight.normal_()  # it starts at 0
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return model.eval()


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(frames, FEATURES.dimension)).astype(np.float32)


def make_checkpoint(settings: ModelSettings, units: Units) -> Checkpoint:
    return Checkpoint(lively(settings, units), units, FEATURES, settings, "")


@pytest.fixture
def saved(tmp_path: Path, units: Units) -> Path:
    folder = tmp_path / "saved"
    save_checkpoint(folder, lively(KINDS["lstm"], units), units, FEATURES, KINDS["lstm"], {"step": 7})
    return folder


def test_a_checkpoint_names_the_program_that_wrote_it_and_nothing_hangs_on_that(
    tmp_path: Path, units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, model = KINDS["lstm"], lively(KINDS["lstm"], units)
    marks = [save_checkpoint(tmp_path / "now", model, units, FEATURES, kind)]
    monkeypatch.setattr(acoustic, "version", lambda: "9.9")
    marks.append(save_checkpoint(tmp_path / "later", model, units, FEATURES, kind))
    said = [json.loads((tmp_path / folder / "checkpoint.json").read_text()) for folder in ("now", "later")]
    assert said[0].pop("asr_kd") == asr_kd.__version__ and said[1].pop("asr_kd") == "9.9"
    assert said[0] == said[1] and marks[0] == marks[1] == load_checkpoint(tmp_path / "later").fingerprint
    for value, words in (
        ({"version": 2, "asr_kd": "9.9"}, "use asr_kd 9.9, which wrote it"),
        ({"version": 2}, "use the asr_kd that"),
    ):
        (tmp_path / "now" / "checkpoint.json").write_text(json.dumps(said[0] | value))
        with pytest.raises(UserError, match=words):
            load_checkpoint(tmp_path / "now")


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, units: Units) -> None:
    model = lively(KINDS[kind], units)
    features, lengths = collate([noise(9), noise(4), noise(1)])
    logits, same, _ = model(features, lengths)
    assert logits.shape == (3, 9, units.size) and logits.dtype == torch.float32
    assert same.tolist() == [9, 4, 1]
    assert torch.isfinite(logits).all()
    assert logits[0].std(0).max() > 1e-3  # frames differ
    assert parameters(model) == sum(weight.numel() for weight in model.state_dict().values()) - sum(
        buffer.numel() for buffer in model.buffers()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_output_does_not_depend_on_the_batch(kind: str, units: Units) -> None:
    checkpoint = make_checkpoint(KINDS[kind], units)
    utterances = [noise(frames, seed) for seed, frames in enumerate([7, 1, 30, 18, 2])]
    together = infer(checkpoint, utterances)
    backwards = infer(checkpoint, utterances[::-1])[::-1]
    for utterance, one, other in zip(utterances, together, backwards, strict=True):
        (alone,) = infer(checkpoint, [utterance])
        assert alone.shape == (len(utterance), units.size) and alone.dtype == np.float32
        np.testing.assert_allclose(np.exp(alone).sum(1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(one, alone, rtol=0, atol=2e-5)
        np.testing.assert_allclose(other, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_off_the_blank_goes_into_the_weights_and_comes_back(kind: str, units: Units) -> None:
    checkpoint, features = make_checkpoint(KINDS[kind], units), [noise(12)]
    before = {name: weight.clone() for name, weight in checkpoint.model.state_dict().items()}
    (plain,) = infer(checkpoint, features)
    with blank_held_back(checkpoint.model, 1.25):
        (shifted,) = infer(checkpoint, features)
    expected = torch.from_numpy(plain.copy())
    expected[:, units.blank] -= 1.25
    np.testing.assert_allclose(shifted, expected.log_softmax(-1).numpy(), rtol=0, atol=2e-5)
    assert abs(shifted - plain).max() > 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in checkpoint.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_hold_anything(kind: str, units: Units) -> None:
    model = lively(KINDS[kind], units)
    features, lengths = collate([noise(12), noise(5)])
    expected = model(features, lengths).logits
    features[1, 5:] = 1e3
    logits = model(features, lengths).logits
    torch.testing.assert_close(logits[1, :5], expected[1, :5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].conditioned and not KINDS[kind].bits])
def test_a_conditioned_layer_hears_what_the_output_layer_says(kind: str, units: Units) -> None:
    model, settings = lively(KINDS[kind], units), KINDS[kind]
    features, lengths = collate([noise(9), noise(4)])
    taps = [f"layer.{layer}" for layer in settings.conditioned]
    logits, _, hidden = model(features, lengths, taps)
    assert model.condition is not None
    for layer in settings.conditioned:
        torch.testing.assert_close(hidden[f"logits.{layer}"], model.output(hidden[f"layer.{layer}"]))
    plain = build_model(settings.model_copy(update={"conditioned": []}), FEATURES.dimension, units.size).eval()
    left = plain.load_state_dict(model.state_dict(), strict=False)
    assert (left.missing_keys, left.unexpected_keys) == ([], ["condition.held_back", "condition.project.weight"])
    without = plain(features, lengths).logits
    assert (without - logits)[0].abs().max() > 1e-3
    model.condition.project.weight.data.zero_()  # as at the start
    torch.testing.assert_close(model(features, lengths).logits, without)
    assert parameters(model) - parameters(plain) == model.condition.project.weight.numel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditioned": [2]}, "a layer must follow"),
        ({"conditioned": [1, 1], "layers": 3}, "names a layer twice"),
        ({"kind": "conv", "conditioned": [1]}, "conditioned does not go with kind conv"),
    ],
)
def test_layers_that_cannot_be_conditioned(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSettings.model_validate(settings)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_have_the_widths_that_are_promised(kind: str, units: Units) -> None:
    model = lively(KINDS[kind], units)
    features, lengths = collate([noise(9), noise(4)])
    outputs = model(features, lengths, list(model.taps))
    for tap, width in KINDS[kind].taps.items():
        assert outputs.hidden[tap].shape == (2, 9, width)
    torch.testing.assert_close(outputs.logits, model(features, lengths).logits, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_queries_keys_and_values_are_those_of_the_attention(units: Units, training: bool) -> None:
    model = lively(KINDS["conformer"], units).train(training)
    features, lengths = collate([noise(9), noise(4)])
    inside = torch.arange(9) < lengths[:, None]
    said: list[torch.Tensor] = []
    layer = model.encoder.conformer_layers[1].self_attn
    layer.dropout = 0.0  # of its weights; that before it stays
    layer.register_forward_hook(lambda module, inputs, output: said.append(output[0].transpose(0, 1)))
    asked = model(features, lengths, ["attention.2"]).hidden["attention.2"]
    query, key, value = asked.unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4)  # [batch, heads, frames, width of a head]
    scores = (query @ key.mT / 6**0.5).masked_fill(~inside[:, None, None], -torch.inf)
    heads = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.out_proj(heads)[inside], said[0][inside], rtol=1e-4, atol=1e-5)


def test_a_step_that_looks_at_attention_draws_what_it_would_draw_without(units: Units) -> None:
    model = lively(KINDS["conformer"], units).train()
    features, lengths = collate([noise(9), noise(4)])
    logits = []
    for taps in ([], ["attention.1", "layer.2"]):
        torch.manual_seed(3)
        logits.append(model(features, lengths, taps).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert not model.encoder.conformer_layers[0].self_attn_layer_norm._forward_hooks


def reach(checkpoint: Checkpoint, frames: int, changed: int) -> list[int]:
    """The frames whose output changes with one frame of input, taken bit by bit."""
    features = noise(frames)
    (before,) = infer(checkpoint, [features])
    features[changed] += 1.0
    (after,) = infer(checkpoint, [features])
    return np.flatnonzero((before != after).any(1)).tolist()


@pytest.mark.parametrize("conditioned", [[], [1]])
@pytest.mark.parametrize("delay", [0, 1, 6])
def test_lstm_hears_no_further_than_its_delay(delay: int, conditioned: list[int], units: Units) -> None:
    settings = ModelSettings(layers=2, size=12, delay_frames=delay, conditioned=conditioned)
    checkpoint = make_checkpoint(settings, units)
    for changed in (0, 8, 19):
        assert min(reach(checkpoint, 20, changed)) == max(0, changed - delay)
    # all the future at once, as a stream would have it
    features = noise(20)
    (whole,) = infer(checkpoint, [features])
    for frame in (0, 5, 12):
        changed = features.copy()
        changed[frame + delay + 1 :] = noise(20, 1)[frame + delay + 1 :]
        (other,) = infer(checkpoint, [changed])
        np.testing.assert_array_equal(other[: frame + 1], whole[: frame + 1])
        (stream,) = infer(checkpoint, [features[: frame + delay + 1]])
        np.testing.assert_allclose(stream[: frame + 1], whole[: frame + 1], atol=1e-5)


def test_context_of_the_other_kinds(units: Units) -> None:
    conv = make_checkpoint(KINDS["conv"], units)
    assert reach(conv, 30, 15) == list(range(15 - 6, 15 + 7))
    assert (
        min(reach(make_checkpoint(KINDS["blstm"], units), 20, 19)) < 12
    )  # far back, until its memory rounds to nothing
    assert min(reach(make_checkpoint(KINDS["conformer"], units), 20, 19)) == 0


def test_lookahead_counts_the_delay_and_the_last_window(units: Units) -> None:
    assert make_checkpoint(KINDS["lstm"], units).lookahead_ms == 3 * 30 + 15
    assert make_checkpoint(KINDS["lstm-no-delay"], units).lookahead_ms == 15
    assert make_checkpoint(KINDS["conv"], units).lookahead_ms == 3 * 2 * 30 + 15
    assert make_checkpoint(KINDS["blstm"], units).lookahead_ms is None
    assert make_checkpoint(KINDS["conformer"], units).lookahead_ms is None
    assert make_checkpoint(KINDS["lstm"], units).frame_ms == 30


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, units: Units, tmp_path: Path) -> None:
    model = lively(KINDS[kind], units)
    mark = save_checkpoint(tmp_path / "run" / "best", model, units, FEATURES, KINDS[kind], {"step": 7})
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):
        loaded = load_checkpoint(folder)
        assert (loaded.fingerprint, loaded.settings, loaded.features) == (mark, KINDS[kind], FEATURES)
        assert loaded.training == {"step": 7} and loaded.units.hash == units.hash
        assert not loaded.model.training and loaded.device == torch.device("cpu")
        np.testing.assert_array_equal(
            infer(loaded, [noise(6)])[0], infer(Checkpoint(model, units, FEATURES, KINDS[kind], mark), [noise(6)])[0]
        )
    again = save_checkpoint(tmp_path / "again", loaded.model, units, FEATURES, KINDS[kind], {"step": 7})
    assert again == mark
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "run" / "best" / path.name).read_bytes()


def test_fingerprint_follows_weights_and_settings(units: Units, tmp_path: Path) -> None:
    def mark(model: torch.nn.Module, features: FeatureSettings, settings: ModelSettings, training: int = 0) -> str:
        return save_checkpoint(tmp_path / "x", model, units, features, settings, {"step": training})

    model, settings = lively(KINDS["conv"], units), KINDS["conv"]
    first = mark(model, FEATURES, settings)
    assert mark(model, FEATURES, settings, training=5) == first
    assert mark(model, FEATURES.model_copy(update={"mean_frames": 299}), settings) != first
    assert mark(model, FEATURES, settings.model_copy(update={"dropout": 0.2})) != first
    with torch.no_grad():
        weight = list(model.parameters())[-1].view(-1)[0]
        weight.copy_(torch.nextafter(weight, weight + 1))
    assert mark(model, FEATURES, settings) != first


def edit(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "checkpoint.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return change


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))


def other_type(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({k: v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("unpickled",)


DAMAGE = {
    "no json": (lambda folder: (folder / "checkpoint.json").unlink(), "holds no checkpoint.json"),
    "not json": (write("checkpoint.json", b"{"), "not JSON"),
    "not utf-8": (write("checkpoint.json", b"\xff"), "not UTF-8"),
    "a list": (write("checkpoint.json", b"[]"), "not a checkpoint of asr_kd"),
    "other format": (edit("format", "nemo"), "not a checkpoint of asr_kd"),
    "newer": (edit("version", 2), "version 2, this program reads 1"),
    "unknown kind": (edit("model", {"kind": "mamba"}), "model|kind"),
    "other size": (edit("model", {"kind": "lstm", "layers": 2, "size": 13, "delay_frames": 3}), "do not fit the settings"),
    "other layers": (edit("model", {"kind": "lstm", "layers": 1, "size": 12, "delay_frames": 3}), "do not fit the settings"),
    "other delay": (edit("model", {"kind": "lstm", "layers": 2, "size": 12, "delay_frames": 2}), "do not belong together"),
    "more than any memory": (edit("model", {"kind": "lstm", "layers": 1000, "size": 100_000}), "do not fit the settings"),
    "no such size": (edit("model", {"kind": "lstm", "layers": 10**12}), "model.layers|less than or equal to 1000"),
    "features no mapping": (edit("features", 3), "checkpoint.json"),
    "settings null": (edit("model", None), "checkpoint.json"),
    "no units": (lambda folder: (folder / "units.model").unlink(), "holds no units.model"),
    "units damaged": (cut("units.model", 0.5), "not a sentencepiece model|do not"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
    "weights cut": (cut("model.safetensors", 0.7), "cannot be read"),
    "weights empty": (cut("model.safetensors", 0), "cannot be read"),
    "a bit flipped": (flip, "do not belong together"),
    "another number type": (other_type, "do not belong together"),
    "a pickle": (write("model.safetensors", pickle.dumps(Bomb())), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_sentence(damage: str, saved: Path) -> None:
    change, message = DAMAGE[damage]
    change(saved)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "there is no such folder; give that of a training run or of a checkpoint"),
        ("x.pt", "is a file; a checkpoint is the folder that train writes"),
        ("shards", "is a folder of audio shards, no checkpoint; give the folder that train writes"),
        ("empty", "holds no checkpoint.json; give the folder of a training run or of a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_told_for_what_it_is(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "x.pt").touch()
    for folder in ("shards", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "shards" / "index.json").touch()
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: {said}"


def test_a_checkpoint_torn_between_two_saves_is_noticed(
    saved: Path, units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asr_kd.models.acoustic as module

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, lively(KINDS["lstm"], units, seed=1), units, FEATURES, KINDS["lstm"])
    with pytest.raises(UserError, match="do not belong together"):
        load_checkpoint(saved)


def test_nothing_in_a_checkpoint_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load"))
    load_checkpoint(saved)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "mps:0", ""])
def test_unusable_devices_are_refused(device: str) -> None:
    with pytest.raises(UserError, match="device: "):
        pick_device(device)
    assert pick_device("cpu") == torch.device("cpu")


def test_collate_pads_with_zeros() -> None:
    features, lengths = collate([noise(2).astype(np.float16), noise(3)])
    assert features.shape == (2, 3, FEATURES.dimension) and features.dtype == torch.float32
    assert lengths.tolist() == [2, 3] and lengths.dtype == torch.int64
    assert (features[0, 2] == 0).all() and torch.equal(features[1], torch.from_numpy(noise(3)))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_numbers_are_refused(units: Units, tmp_path: Path, value: float) -> None:
    settings = KINDS["lstm"]
    model = build_model(settings, FEATURES.dimension, units.size)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = value
    save_checkpoint(tmp_path, model, units, FEATURES, settings)
    with pytest.raises(UserError, match=r"has weights that are not numbers .*; use an earlier checkpoint"):
        load_checkpoint(tmp_path)


def test_the_first_front_end_changes_no_fingerprint_and_another_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(saved)
    description = json.loads((saved / "checkpoint.json").read_text())
    assert description.pop("frontend") == 1
    (saved / "checkpoint.json").write_text(json.dumps(description))  # as they were before there was a version
    assert load_checkpoint(saved).fingerprint == checkpoint.fingerprint
    digest = hashlib.sha256()
    for name, weight in sorted(checkpoint.model.state_dict().items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    assert checkpoint.fingerprint == hash_json({
        "weights": digest.hexdigest(), "units": checkpoint.units.hash, "features": FEATURES.model_dump(),
        "model": KINDS["lstm"].model_dump(),
    })  # fmt: skip
    monkeypatch.setattr("asr_kd.audio.features.FRONTEND_VERSION", 2)
    with pytest.raises(
        UserError,
        match=r"trained on features of version 1, this program makes version 2; use asr_kd \S+, which wrote it",
    ):
        load_checkpoint(saved)
    assert save_checkpoint(saved, checkpoint.model, checkpoint.units, FEATURES, KINDS["lstm"]) != checkpoint.fingerprint
    assert json.loads((saved / "checkpoint.json").read_text())["frontend"] == 2


def test_kaldis_front_end_and_its_version_are_in_the_fingerprint(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = FEATURES.model_copy(update={"kind": "kaldi"})
    model = build_model(KINDS["lstm"], features.dimension, units.size)
    marks = [save_checkpoint(tmp_path / one.kind, model, units, one, KINDS["lstm"]) for one in (FEATURES, features)]
    assert marks[0] != marks[1]
    loaded = load_checkpoint(tmp_path / "kaldi")
    assert (loaded.features, loaded.fingerprint) == (features, marks[1])
    monkeypatch.setattr("asr_kd.audio.features.KALDI_VERSION", 2)
    assert load_checkpoint(tmp_path / "own").fingerprint == marks[0]
    with pytest.raises(UserError, match=r"features of version 1, this program makes version 2"):
        load_checkpoint(tmp_path / "kaldi")
    assert save_checkpoint(tmp_path / "kaldi", model, units, features, KINDS["lstm"]) not in marks
