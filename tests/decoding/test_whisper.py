"""Tiny random Whisper and Moonshine models, made here, through the libraries that run real ones."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asr_kd.decoding import whisper
from asr_kd.decoding.whisper import RATE, Heard, Recogniser, family, load_recogniser
from asr_kd.decoding.whisper_settings import WhisperSettings
from asr_kd.errors import UserError

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
tokenizers = pytest.importorskip("tokenizers")

from tests.outside import save_whisper  # noqa: E402

CPU = torch.device("cpu")


def save_moonshine(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({one: at for at, one in enumerate(["<unk>", "<s>", "</s>", *"abc123▁"])}, [])
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.MoonshineConfig(
        vocab_size=10, hidden_size=16, intermediate_size=16, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, initializer_range=1.0,
    )  # fmt: skip
    model = transformers.MoonshineForConditionalGeneration(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = 0.0  # else it ends before the first word
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family that can be run here."""
    root = tmp_path_factory.mktemp("models")
    found = {name: root / name for name in ("whisper", "moonshine")}
    save_whisper(found["whisper"])
    save_moonshine(found["moonshine"])
    try:
        import faster_whisper  # noqa: F401
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        return found
    save_whisper(root / "long", 448)  # faster-whisper asks for as many positions as real ones have
    TransformersConverter(str(root / "long"), copy_files=["tokenizer.json"]).convert(str(root / "ctranslate2"))
    return {**found, "ctranslate2": root / "ctranslate2"}


@pytest.fixture(params=["whisper", "moonshine", "ctranslate2"])
def folder(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[Path]:
    if request.param not in models:
        pytest.skip("the extra whisper is not installed")
    yield models[request.param]


def load(folder: Path, **settings: Any) -> Recogniser:
    return load_recogniser(folder, WhisperSettings(**settings), CPU, 1)


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(RATE * seconds)).astype(np.float32)


def test_a_folder_says_what_it_holds(models: dict[str, Path], tmp_path: Path) -> None:
    assert {name: family(folder) for name, folder in models.items()} == {name: name for name in models}
    assert family(tmp_path) is None and family(tmp_path / "missing") is None
    for text in ("{", "[]", '{"model_type": "wav2vec2"}', '{"model_type": 3}'):
        (tmp_path / "config.json").write_text(text)
        assert family(tmp_path) is None


def test_the_same_sound_gives_the_same_text_whatever_came_before(folder: Path) -> None:
    heard = load(folder)
    first = heard(sound(1.0))
    heard(sound(2.0, 1))
    assert heard(sound(1.0)) == first == load(folder)(sound(1.0))
    assert first.avg_logprob is not None and -20 < first.avg_logprob < 0
    assert any(heard(sound(2.0, seed)).text for seed in range(1, 4))
    if family(folder) == "moonshine":
        assert first.language is None and first.no_speech_prob is None
    else:
        assert first.language in ("en", "de") and 0 <= (first.no_speech_prob or 0.0) <= 1


def test_without_numerals_none_is_written(folder: Path) -> None:
    texts = [
        load(folder, numerals=numerals)(sound(2.0, seed)).text for numerals in (True, False) for seed in range(1, 4)
    ]
    assert any(set("0123456789") & set(text) for text in texts[:3]) or family(folder) != "moonshine"
    assert not any(set("0123456789%$£") & set(text) for text in texts[3:])


def test_a_language_is_asked_for(folder: Path) -> None:
    if family(folder) == "moonshine":
        with pytest.raises(UserError, match=r"language: .* is a Moonshine model, of one language"):
            load(folder, language="en")
        return
    own = (
        "en" if family(folder) == "ctranslate2" else "de"
    )  # CTranslate2 takes a small vocabulary for that of an English model
    assert load(folder, language=own)(sound(1.0)).language == own
    with pytest.raises(UserError, match=r"whisper.language: xx is not spoken by .*, which knows .*en"):
        load(folder, language="xx")


def test_the_figures_of_whisper_are_those_of_its_definition(models: dict[str, Path]) -> None:
    """Greedy: the mean over the tokens and their end of the log-probabilities among what may be said, step by step."""
    heard = load(models["whisper"], beam=1, language="en")
    found = heard(sound(1.0))
    model, tokenizer = heard.model, heard._tokenizer  # type: ignore[attr-defined]
    features = heard._extract(sound(1.0), sampling_rate=RATE, return_tensors="pt").input_features  # type: ignore[attr-defined]
    tokens = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"])
    scores: list[float] = []
    with torch.inference_mode():
        while len(tokens) < 24 and tokens[-1] != tokenizer.eos_token_id:
            logits = model(input_features=features, decoder_input_ids=torch.tensor([tokens])).logits[0]
            logits[-1, model.generation_config.suppress_tokens] = -math.inf
            said = logits[-1].log_softmax(-1)
            if not scores:
                said[tokenizer.eos_token_id] = -math.inf
            tokens.append(int(said.argmax()))
            scores.append(float(said[tokens[-1]]))
        silence = logits[0].softmax(-1)[tokenizer.convert_tokens_to_ids("<|nospeech|>")]
    assert found.text == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert found.avg_logprob == pytest.approx(np.mean(scores), abs=1e-4)
    assert found.no_speech_prob == pytest.approx(float(silence), rel=1e-3)


def test_a_fingerprint_is_of_all_files(models: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["moonshine"], copy)
    mark = load(copy).fingerprint
    assert mark == load(models["moonshine"]).fingerprint
    (copy / "preprocessor_config.json").write_text(
        json.dumps({**json.loads((copy / "preprocessor_config.json").read_text()), "do_normalize": True})
    )
    assert load(copy).fingerprint != mark


def damaged(folder: Path, copy: Path, change: str) -> Path:
    shutil.copytree(folder, copy)
    if change == "no weights":
        (copy / "model.safetensors").unlink()
    elif change == "a pickle":
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    elif change == "half the weights":
        from safetensors.torch import load_file, save_file

        weights = load_file(copy / "model.safetensors")
        del weights[max(weights)]
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
    elif change == "no settings":
        (copy / "generation_config.json").unlink()
    elif change == "no tokenizer":
        for path in copy.glob("tokenizer*"):
            path.unlink()
    return copy


@pytest.mark.parametrize("change", ["no weights", "a pickle", "half the weights", "no tokenizer", "no settings"])
def test_a_damaged_folder_is_refused_in_a_sentence(models: dict[str, Path], tmp_path: Path, change: str) -> None:
    copy = damaged(models["whisper"], tmp_path / "copy", change)
    with pytest.raises(
        UserError,
        match=f"^{copy}: (cannot be loaded by transformers|its weights are not|holds no tokenizer|its generation_config)",
    ) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


#: a family, what its preprocessor_config.json says (None: there is none), and what is answered
FRONT_ENDS: list[tuple[str, dict[str, Any] | str | None, str]] = [
    ("whisper", None, "has no preprocessor_config.json, which says how it hears sound"),
    ("whisper", "{", "cannot be loaded by transformers"),
    ("whisper", "[]", "cannot be loaded by transformers"),
    ("whisper", {"sampling_rate": 8000}, "has sampling_rate 8000, and the network hears 16000"),
    ("whisper", {"sampling_rate": "fast"}, "cannot be loaded by transformers"),
    ("whisper", {"hop_length": 80}, "has hop_length 80, and the network hears 160"),
    ("whisper", {"hop_length": 0}, "cannot be loaded by transformers"),
    ("whisper", {"chunk_length": 15}, "has chunk_length 15, and the network hears 30"),
    ("whisper", {"chunk_length": 30.0}, r"has chunk_length 30\.0, and the network hears 30"),
    ("whisper", {"feature_size": 128}, "has feature_size 128, and the network hears 80"),
    ("whisper", {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, r"\(Wav2Vec2FeatureExtractor\) gives input_values, and the network hears input_features"),
    ("moonshine", None, "has no preprocessor_config.json"),
    ("moonshine", {"sampling_rate": 8000}, "has sampling_rate 8000, and the network hears 16000"),
    ("moonshine", {"feature_extractor_type": "WhisperFeatureExtractor"}, "gives input_features, and the network hears input_values"),
    ("ctranslate2", {"sampling_rate": 8000}, "has sampling_rate 8000, and the network hears 16000"),
    ("ctranslate2", {"sampling_rate": None}, "cannot be loaded by CTranslate2"),
    ("ctranslate2", {"chunk_length": 15}, "has chunk_length 15, and the network hears 30"),
    ("ctranslate2", "{", "not JSON"),
    ("ctranslate2", "[]", "cannot be loaded by CTranslate2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "front_end", "said"), FRONT_ENDS)
def test_a_front_end_of_another_network_is_refused_in_a_sentence(
    models: dict[str, Path], tmp_path: Path, name: str, front_end: dict[str, Any] | str | None, said: str
) -> None:
    if name not in models:
        pytest.skip("the extra whisper is not installed")
    copy = tmp_path / "copy"
    shutil.copytree(models[name], copy)
    path = copy / "preprocessor_config.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    if isinstance(front_end, str):
        path.write_text(front_end)
    elif front_end is not None:
        path.write_text(json.dumps(held | front_end))
    with pytest.raises(UserError, match=f"^{copy}.*{said}") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_a_folder_of_ctranslate2_needs_its_tokenizer(models: dict[str, Path], tmp_path: Path) -> None:
    if "ctranslate2" not in models:
        pytest.skip("the extra whisper is not installed")
    shutil.copytree(models["ctranslate2"], tmp_path / "copy")
    (tmp_path / "copy" / "model.bin").write_bytes((tmp_path / "copy" / "model.bin").read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded by CTranslate2"):
        load(tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load(tmp_path / "copy")


def test_int8_is_of_ctranslate2(models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"whisper\.compute: int8 needs a CTranslate2 model"):
        load(models["whisper"], compute="int8")
    if "ctranslate2" in models:
        assert isinstance(load(models["ctranslate2"], compute="int8")(sound(1.0)), Heard)


def test_padding_is_of_ctranslate2_and_shortens_what_the_encoder_hears(models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"whisper\.padding_seconds: needs a CTranslate2 model"):
        load(models["whisper"], padding_seconds=10)
    if "ctranslate2" not in models:
        pytest.skip("the extra whisper is not installed")
    whole, short = load(models["ctranslate2"]), load(models["ctranslate2"], padding_seconds=2)
    heard: list[int] = []
    for one in (whole, short):
        encoder = one.model.model  # type: ignore[attr-defined]

        class Counted:
            def __getattr__(self, name: str, encoder: Any = encoder) -> Any:
                return getattr(encoder, name)

            def encode(self, features: Any, encoder: Any = encoder, **more: Any) -> Any:
                heard.append(features.shape[-1])
                return encoder.encode(features, **more)

        one.model.model = Counted()  # type: ignore[attr-defined]
        assert isinstance(one(sound(1.51)), Heard)
    assert heard == [3000, 352]
    assert isinstance(short(sound(29.5)), Heard) and heard[-1] == 3000  # never more than it can hear


@pytest.mark.parametrize(("name", "extra"), [("whisper", "hf"), ("ctranslate2", "whisper")])
def test_a_missing_extra_is_named(name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whisper, "family", lambda _: name)
    monkeypatch.setitem(__import__("sys").modules, "transformers" if extra == "hf" else "faster_whisper", None)
    with pytest.raises(UserError, match=rf"pip install 'asr-kd\[{extra}\]'$"):
        load(tmp_path)
