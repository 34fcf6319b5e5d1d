"""What may be wrong with a folder of another program: one sentence each, that names it and says what to do."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import safetensors.torch
import torch
import transformers

from asr_kd.audio.features import frontend_of
from asr_kd.errors import AudioError, UserError
from asr_kd.models.acoustic import infer
from asr_kd.models.outside import hub
from asr_kd.models.teachers import load_teacher
from tests import outside


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outside.write_wave(tmp_path_factory.mktemp("good"))


def change(folder: Path, file: str, **values: Any) -> None:
    said = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))


def weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    held = safetensors.torch.load_file(folder / "model.safetensors")
    edit(held)
    safetensors.torch.save_file(held, folder / "model.safetensors", {"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def byte_level(folder: Path) -> None:
    (folder / "vocab.json").unlink()
    vocabulary = {"model": {"type": "BPE", "vocab": {"Ġa": 0, "b": 1}}, "decoder": {"type": "ByteLevel"}}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("pickle", pickled, r"holds no \*\.safetensors, and other weights may run code .*save_pretrained"),
    ("no head", lambda at: weights(at, lambda held: held.pop("lm_head.weight")), r"missing keys of weights \(lm_head\.weight .*with its head"),
    ("a layer more", lambda at: weights(at, lambda held: held.update({"wav2vec2.encoder.layers.2.layer_norm.bias": torch.zeros(16)})), "unexpected keys"),
    ("another size", lambda at: change(at, "config.json", vocab_size=40), "mismatch"),
    ("NaN", lambda at: weights(at, lambda held: held["lm_head.bias"].fill_(float("nan"))), "not numbers"),
    ("torn", lambda at: (at / "model.safetensors").write_bytes((at / "model.safetensors").read_bytes()[:-100]), "cannot be loaded .*copy the model again"),
    ("code", lambda at: change(at, "config.json", model_type="mine", auto_map={"AutoModelForCTC": "mine.Mine"}), "code of its own .*never run"),
    ("unknown", lambda at: change(at, "config.json", model_type="mine"), "is a mine, which has no CTC posteriors; .*wav2vec2"),
    ("BERT", lambda at: change(at, "config.json", model_type="bert"), "is a bert, which has no CTC posteriors"),
    ("Whisper", lambda at: change(at, "config.json", model_type="whisper"), "is a whisper, which writes text .*asr-kd transcribe.*transcripts="),
    ("no kind", lambda at: change(at, "config.json", model_type=...), "names no model_type"),
    ("CTranslate2", lambda at: (change(at, "config.json", model_type=...), (at / "model.bin").touch()), "CTranslate2, .*asr-kd transcribe"),
    ("no JSON", lambda at: (at / "config.json").write_text("{"), "not JSON"),
    ("no front end", lambda at: (at / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
    ("no vocabulary", lambda at: (at / "vocab.json").unlink(), "has no vocabulary"),
    ("bytes", byte_level, "byte-level BPE"),
    ("too many tokens", lambda at: outside.write_tokens(at, [*outside.TOKENS, "Ä"]), r"a token 32 \('Ä'\), the network 32 outputs"),
    ("no blank", lambda at: change(at, "config.json", pad_token_id=None), "its blank is output -1 of 32"),
    ("one letter twice", lambda at: outside.write_tokens(at, [*outside.TOKENS[:-1], " "]), r"outputs 4 and 31 \('\|', ' '\) are both '▁'"),
    ("languages", lambda at: (at / "vocab.json").write_text('{"eng": {"a": 0}, "deu": {"a": 0}}'), "several languages .*target_lang"),
    ("no table", lambda at: (at / "vocab.json").write_text('["a"]'), "no table of tokens"),
    ("only special", lambda at: outside.write_tokens(at, ["<pad>", "<s>", "</s>", "<unk>"]), "none of its outputs stands for text"),
    ("half a character", lambda at: outside.write_tokens(at, [*outside.TOKENS[:-1], "\ud800"]), r"a token 31 \('\\ud800'\) that is no text"),
    ("a list for a front end", lambda at: (at / "preprocessor_config.json").write_text("[]"), "cannot be loaded|must hold settings"),
    ("a rate in words", lambda at: change(at, "preprocessor_config.json", sampling_rate="16000"), "sampling_rate of '16000', which is no rate"),
    ("no rate", lambda at: change(at, "preprocessor_config.json", sampling_rate=0), "sampling_rate of 0, which is no rate"),
    ("the front end of Whisper", lambda at: change(at, "preprocessor_config.json", feature_extractor_type="WhisperFeatureExtractor"), "gives input_features, and the network hears input_values"),
    ("half frames", lambda at: change(at, "preprocessor_config.json", sampling_rate=22050), "no whole milliseconds"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), [one[1:] for one in BAD], ids=[one[0] for one in BAD])
def test_a_bad_folder_gives_a_sentence(good: Path, tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    spoil(folder)
    with pytest.raises(UserError, match=said) as refused:
        load_teacher(str(folder))
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "values"),
    [("ParakeetCTC", {"hop_length": "x"}), ("LasrCTC", {"win_length": None}), ("ParakeetCTC", {"feature_size": 7})],
)
def test_a_front_end_that_a_network_cannot_hear(tmp_path: Path, kind: str, values: dict[str, Any]) -> None:
    folder = outside.write_other(tmp_path, kind)
    file = next(path.name for path in folder.glob("*processor_config.json"))
    change(folder, file, **values)
    with pytest.raises(
        UserError, match=f"^{folder}: cannot hear what its feature extractor gives .*copy the model again"
    ) as refused:
        load_teacher(str(folder))
    assert "\n" not in str(refused.value)


def test_the_good_one_is_good(good: Path) -> None:
    assert load_teacher(str(good)).units.size == 30


def test_weights_that_only_training_uses_may_be_missing(good: Path, tmp_path: Path) -> None:
    """As in facebook/wav2vec2-base-960h; what stands in their place is random, and must not be in the fingerprint."""
    folder = tmp_path / "published"
    shutil.copytree(good, folder)
    weights(folder, lambda held: held.pop("wav2vec2.masked_spec_embed"))
    assert load_teacher(str(folder)).fingerprint == load_teacher(str(folder)).fingerprint


def test_the_fingerprint_is_of_all_that_changes_the_output(good: Path, tmp_path: Path) -> None:
    marks = {load_teacher(str(good)).fingerprint}
    for name, spoil in {
        "weights": lambda at: weights(at, lambda held: held["lm_head.bias"].add_(0.1)),
        "tokens": lambda at: outside.write_tokens(at, [*outside.TOKENS[:-2], "'", "Z"]),
        "front end": lambda at: change(at, "preprocessor_config.json", do_normalize=False),
        "network": lambda at: change(at, "config.json", layer_norm_eps=0.1),
    }.items():
        shutil.copytree(good, tmp_path / name)
        spoil(tmp_path / name)
        marks.add(load_teacher(str(tmp_path / name)).fingerprint)
    assert len(marks) == 5
    shutil.copytree(good, tmp_path / "moved")
    change(tmp_path / "moved", "config.json", transformers_version="4.0", _name_or_path="elsewhere")
    assert load_teacher(str(tmp_path / "moved")).fingerprint in marks


def test_without_transformers(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers is not installed; run `pip install 'asr-kd\[hf\]'`"):
        load_teacher(str(good))


@pytest.mark.parametrize("name", ["hf:", "hf:model", "hf:a/b/c", "hf:a/b@", "hf://a/b"])
def test_a_misspelt_model_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="write hf:owner/name"):
        load_teacher(name)


def test_a_model_of_the_hub_is_taken_from_the_cache(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"hf:some/model@v1: is not in the cache of this machine, and the hub cannot be reached"
    ):
        load_teacher("hf:some/model@v1")
    there = tmp_path / "models--some--model"
    (there / "refs").mkdir(parents=True)
    (there / "refs" / "v1").write_text("0" * 40)
    shutil.copytree(good, there / "snapshots" / ("0" * 40))
    assert hub.fetched("hf:some/model@v1").is_dir()
    assert load_teacher("hf:some/model@v1").fingerprint == load_teacher(str(good)).fingerprint


def test_a_folder_of_neither_is_told_as_before(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no checkpoint\.json"):
        load_teacher(str(tmp_path))


def test_sound_that_is_too_short(good: Path) -> None:
    teacher = load_teacher(str(good))
    front = frontend_of(teacher.features)
    with pytest.raises(AudioError, match="too short: 399 samples, the network needs 400 for one frame of 20 ms"):
        front.compute(np.zeros(399, np.float32))
    assert len(infer(teacher, [front.compute(np.zeros(400, np.float32))])[0]) == 1


def test_silence_is_no_accident(good: Path) -> None:
    assert np.isfinite(infer(load_teacher(str(good)), [np.zeros((16000, 1), np.float32)])[0]).all()


def test_float16_weights_are_run_in_float32(good: Path, tmp_path: Path) -> None:
    transformers.AutoModelForCTC.from_pretrained(good).half().save_pretrained(tmp_path)
    for file in ("vocab.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(good / file, tmp_path / file)
    teacher = load_teacher(str(tmp_path))
    assert {one.dtype for one in teacher.model.parameters()} == {torch.float32}


def write_languages(folder: Path) -> dict[str, torch.Tensor]:
    """MMS: a network of all languages, with adapters and a head for each of them in files of their own; the head of German."""
    outside.write_wave(folder, by_layer=True, adapter_attn_dim=4)
    tokens = {token: number for number, token in enumerate(outside.TOKENS)}
    (folder / "vocab.json").write_text(json.dumps({"eng": tokens, "deu": tokens | {"Ä": 32, "Ö": 33}}))
    change(folder, "tokenizer_config.json", target_lang="deu")
    held = safetensors.torch.load_file(folder / "model.safetensors")
    adapter = {key: torch.full_like(one, 0.5) for key, one in held.items() if "adapter_layer" in key}
    head = {"lm_head.weight": torch.randn(34, 16), "lm_head.bias": torch.zeros(34)}
    safetensors.torch.save_file(adapter | head, folder / "adapter.deu.safetensors")
    return head


def test_a_language_brings_its_own_weights(tmp_path: Path) -> None:
    head = write_languages(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert teacher.units.decode(teacher.units.encode("äö")) == "äö"
    assert torch.equal(teacher.model.network.lm_head.weight, head["lm_head.weight"])
    (tmp_path / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(outside.TOKENS)}))
    assert load_teacher(str(tmp_path)).fingerprint != teacher.fingerprint
    write_languages(tmp_path)
    (tmp_path / "adapter.deu.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded by transformers .*adapter\.deu\.safetensors"):
        load_teacher(str(tmp_path))


def test_of_a_thousand_languages_of_the_hub_one_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    there, cached = tmp_path / "hub", tmp_path / "snapshots" / ("a" * 40)
    write_languages(there)
    for language in ("eng", "fra", "deu-script_x"):
        shutil.copy(there / "adapter.deu.safetensors", there / f"adapter.{language}.safetensors")
    (there / "adapter.deu.bin").write_bytes(b"a pickle")
    asked: list[tuple[str, str | None]] = []

    def snapshot(
        model: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        asked.append((model, revision))
        names = (path.name for path in there.iterdir())
        wanted = huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        cached.mkdir(parents=True, exist_ok=True)
        for file in wanted:
            shutil.copy(there / file, cached / file)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_teacher("hf:some/mms@main").fingerprint == load_teacher(str(there)).fingerprint
    assert [path.name for path in cached.glob("adapter.*")] == ["adapter.deu.safetensors"]
    assert asked == [("some/mms", "main"), ("some/mms", "a" * 40)]  # the commit that the first files are of
