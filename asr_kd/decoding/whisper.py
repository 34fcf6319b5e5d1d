"""Whisper and Moonshine: sound of at most 30 s → text, by `transformers` or CTranslate2."""

from __future__ import annotations

import importlib.metadata
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asr_kd.decoding.whisper_settings import WhisperSettings
from asr_kd.errors import UserError
from asr_kd.files import hash_json, read_json, sha256_file

#: Hz; all of them hear this
RATE = 16000
#: characters of tokens that numbers are written with
NUMERALS = frozenset("0123456789%$£")
#: `model_type` of config.json
MOONSHINE = "moonshine"
TYPES = ("whisper", MOONSHINE)
#: files of a tokenizer, one of which is there
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
#: files of a feature extractor, one of which is there
FRONT_ENDS = ("preprocessor_config.json", "processor_config.json")
#: what all feature extractors of Whisper say, whose encoder hears 3000 frames
HEARS = {"sampling_rate": RATE, "n_fft": 400, "hop_length": 160, "chunk_length": 30}
#: tokens a second that Moonshine says at most: more is a loop. Source: its model card
MOONSHINE_TOKENS = 6.5


@dataclass(frozen=True)
class Heard:
    """What a model makes of a piece of sound.

    Attributes:
        text: as the model writes it, without surrounding space.
        avg_logprob: mean log-probability of its tokens and their end, nat; None where the model gave no token.
        no_speech_prob: that nobody speaks; None where the model does not say.
        language: code of the language that was asked for or guessed; None where the model knows none.
    """

    text: str
    avg_logprob: float | None = None
    no_speech_prob: float | None = None
    language: str | None = None


class Recogniser(ABC):
    """A speech-to-text model. The same sound gives the same text: a beam search, nothing drawn.

    Attributes:
        fingerprint: hash of the model's files and of the versions of the libraries that run it.
    """

    def __init__(self, folder: Path, settings: WhisperSettings, libraries: Iterable[str]) -> None:
        self.settings = settings
        files = {one.name: sha256_file(one) for one in sorted(folder.iterdir()) if one.is_file()}
        self.fingerprint = hash_json([files, {name: importlib.metadata.version(name) for name in libraries}])

    @abstractmethod
    def __call__(self, sound: np.ndarray) -> Heard:
        """Hear float32 [samples] at RATE, at most 30 s."""


def family(folder: Path) -> str | None:
    """`ctranslate2`, `whisper` or `moonshine`, if a folder holds such a model."""
    try:
        with open(folder / "model.bin", "rb") as file:
            if b"WhisperSpec" in file.read(64):
                return "ctranslate2"
    except OSError:
        pass
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return kind if kind in TYPES else None


def load_recogniser(folder: Path, settings: WhisperSettings, device: torch.device, threads: int) -> Recogniser:
    """The model of a folder of which `family` says so.

    Args:
        device: that it runs on.
        threads: of the CPU.

    Raises:
        UserError: when the extra that runs it is not installed, files are missing or damaged, or a setting does not fit it.
    """
    kind = family(folder)
    package, extra = ("faster_whisper", "whisper") if kind == "ctranslate2" else ("transformers", "hf")
    try:
        __import__(package)
    except ImportError:
        what = "a Whisper model of CTranslate2" if extra == "whisper" else f"a {str(kind).capitalize()} model"
        raise UserError(f"{folder}: is {what}, which needs {package}; pip install 'asr-kd[{extra}]'") from None
    if kind == "ctranslate2":
        return CTranslate2Whisper(folder, settings, device, threads)
    if settings.compute == "int8":
        raise UserError(
            f"whisper.compute: int8 needs a CTranslate2 model, and {folder} is one of transformers; use float32"
        )
    if settings.padding_seconds is not None:
        raise UserError(
            f"whisper.padding_seconds: needs a CTranslate2 model, and {folder} is one of transformers; leave it out"
        )
    return (TransformersMoonshine if kind == MOONSHINE else TransformersWhisper)(folder, settings, device, threads)


class CTranslate2Whisper(Recogniser):
    """Whisper by faster-whisper. Args: as of `load_recogniser`."""

    def __init__(self, folder: Path, settings: WhisperSettings, device: torch.device, threads: int) -> None:
        from faster_whisper import WhisperModel

        super().__init__(folder, settings, ("faster-whisper", "ctranslate2"))
        if not (folder / "tokenizer.json").is_file():  # it would be fetched from the network
            raise UserError(
                f"{folder}: holds no tokenizer.json; copy it from the model that this one was converted from"
            )
        if (front_end := folder / FRONT_ENDS[0]).is_file():  # a damaged one would be passed over
            read_json(front_end)

        class Short(WhisperModel):
            """Its encoder hears no more than `frames` of the window."""

            frames: int | None = None

            def encode(self, features: np.ndarray) -> Any:
                return super().encode(np.ascontiguousarray(features[..., : self.frames]))

        try:
            self.model = Short(
                str(folder), device=device.type, device_index=device.index or 0, compute_type=settings.compute,
                cpu_threads=threads, local_files_only=True,
            )  # fmt: skip
        except Exception as error:  # whatever a damaged file makes of it
            raise UserError(f"{folder}: cannot be loaded by CTranslate2 ({error})") from None
        _check_front_end(folder, self.model.feature_extractor, HEARS)
        filters = len(self.model.feature_extractor.mel_filters)
        if filters != self.model.model.n_mels:
            raise UserError(
                f"{folder}: hears {self.model.model.n_mels} mel filters, and its preprocessor_config.json gives {filters}; copy that file from "
                "the model that this one was converted from"
            )
        known = self.model.supported_languages
        _check_language(settings.language, known, folder)
        tokens = self.model.hf_tokenizer.get_vocab()
        specials = {one.content for one in self.model.hf_tokenizer.get_added_tokens_decoder().values()}
        self._forbidden = [-1] if settings.numerals else [-1, *_numerals(tokens, specials)]  # -1: its own list

    def __call__(self, sound: np.ndarray) -> Heard:
        """See `Recogniser`."""
        if (padding := self.settings.padding_seconds) is not None:
            # in whole pairs of hops, which the encoder joins
            self.model.frames = 2 * math.ceil((len(sound) / RATE + padding) * RATE / HEARS["hop_length"] / 2)
        segments, info = self.model.transcribe(
            sound, language=self.settings.language, beam_size=self.settings.beam, temperature=0.0, without_timestamps=True,
            condition_on_previous_text=False, suppress_tokens=list(self._forbidden),
            compression_ratio_threshold=None, log_prob_threshold=None, no_speech_threshold=None,
        )  # fmt: skip
        for one in segments:  # without timestamps there is one, or none where it said nothing
            return Heard(one.text.strip(), one.avg_logprob, one.no_speech_prob, info.language)
        return Heard("", language=info.language)


class Transformers(Recogniser):
    """An encoder-decoder of `transformers`, from a folder: safetensors alone, no code of the folder is run.

    Args: as of `load_recogniser`.
    """

    def __init__(self, folder: Path, settings: WhisperSettings, device: torch.device, threads: int) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer, logging

        super().__init__(folder, settings, ("transformers", "torch"))
        if not any((folder / name).is_file() for name in TOKENIZERS):  # an empty one would be made
            raise UserError(f"{folder}: holds no tokenizer ({' or '.join(TOKENIZERS)}); copy the whole model")
        if not any((folder / name).is_file() for name in FRONT_ENDS):
            raise UserError(f"{folder}: has no {FRONT_ENDS[0]}, which says how it hears sound; copy the whole model")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        closed = {"local_files_only": True, "trust_remote_code": False}
        dtype = getattr(torch, settings.compute)
        try:
            self._extract = AutoFeatureExtractor.from_pretrained(str(folder), **closed)
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), **closed)
            model, loaded = AutoModelForSpeechSeq2Seq.from_pretrained(
                str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, **closed
            )
        except Exception as error:  # whatever a damaged file makes of it
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(f"{folder}: cannot be loaded by transformers ({reason})") from None
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if odd := loaded[name]:
                raise UserError(
                    f"{folder}: its weights are not those of its config.json ({name.replace('_', ' ')}: {min(map(str, odd))}); copy it again"
                )
        _check_front_end(folder, self._extract, self._hears(model.config))
        if (gives := self._extract.model_input_names[0]) != model.main_input_name:
            raise UserError(
                f"{folder}: its feature extractor ({type(self._extract).__name__}) gives {gives}, and the network hears {model.main_input_name}; "
                "copy the whole model again"
            )
        self.model = model.to(device).eval()
        self._dtype = dtype
        config = self.model.generation_config
        own = list(getattr(config, "suppress_tokens", None) or [])
        tokens = self._tokenizer.get_vocab()
        self._forbidden = own + ([] if settings.numerals else _numerals(tokens, self._tokenizer.all_special_tokens))

    @torch.inference_mode()
    def __call__(self, sound: np.ndarray) -> Heard:
        """See `Recogniser`."""
        features = self._extract(sound, sampling_rate=RATE, return_tensors="pt")
        inputs = {name: value.to(self.model.device) for name, value in features.items()}
        inputs = {name: value.to(self._dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        tokens = self.model.generate(
            **inputs, **self._asked(len(sound)), num_beams=self.settings.beam, do_sample=False,
            suppress_tokens=self._forbidden or None, return_dict_in_generate=True,
        ).sequences  # fmt: skip
        # a second pass over the text that was found: log-probabilities as they are, whatever the search did with them
        logits = self.model(**inputs, decoder_input_ids=tokens[:, :-1]).logits[0].float()
        spoken = tokens[0].tolist()
        begin = self._prompt(spoken)
        said = logits[begin - 1 :].clone()
        said[:, self._forbidden] = -torch.inf
        scores = said.log_softmax(-1).gather(1, tokens[0, begin:, None])
        text = self._tokenizer.decode(spoken[begin:], skip_special_tokens=True).strip()
        average = float(scores.mean()) if len(scores) else None
        return Heard(text, average, self._silence(logits), self._language(spoken))

    def _hears(self, config: Any) -> dict[str, int]:
        """What its feature extractor must say, by the settings of the network."""
        return {"sampling_rate": RATE, "feature_size": 1}

    def _asked(self, samples: int) -> dict[str, Any]:
        """What `generate` is asked for, of so many samples."""
        return {}

    def _prompt(self, tokens: list[int]) -> int:
        """How many tokens stand before the text."""
        return 1

    def _silence(self, logits: torch.Tensor) -> float | None:
        """The probability that nobody speaks, by logits float32 [tokens, vocabulary] behind each token."""
        return None

    def _language(self, tokens: list[int]) -> str | None:
        return None


class TransformersWhisper(Transformers):
    """Whisper by transformers. Args: as of `load_recogniser`."""

    def __init__(self, folder: Path, settings: WhisperSettings, device: torch.device, threads: int) -> None:
        super().__init__(folder, settings, device, threads)
        config = self.model.generation_config
        if getattr(config, "no_timestamps_token_id", None) is None:
            raise UserError(
                f"{folder}: its generation_config.json is missing, or none of Whisper; copy the whole model"
            )
        self._ids: Mapping[str, int] = getattr(config, "lang_to_id", None) or {}
        self._begins = {config.decoder_start_token_id, *self._ids.values(), config.no_timestamps_token_id}
        self._begins |= set((getattr(config, "task_to_id", None) or {}).values())
        known = [name.strip("<|>") for name in self._ids] or ["en"]
        _check_language(settings.language, known, folder)

    def _hears(self, config: Any) -> dict[str, int]:
        return HEARS | {"feature_size": config.num_mel_bins}

    def _asked(self, samples: int) -> dict[str, Any]:
        fixed: dict[str, Any] = {"return_timestamps": False, "force_unique_generate_call": True}
        return {**fixed, "task": "transcribe", "language": self.settings.language} if self._ids else fixed

    def _prompt(self, tokens: list[int]) -> int:
        return next((at for at, token in enumerate(tokens) if token not in self._begins), len(tokens))

    def _silence(self, logits: torch.Tensor) -> float | None:
        # of the word that could follow the start of the transcript; its token stands before that for no timestamps
        return float(logits[0].softmax(-1)[self.model.generation_config.no_timestamps_token_id - 1])

    def _language(self, tokens: list[int]) -> str | None:
        names = {number: name.strip("<|>") for name, number in self._ids.items()}
        return next((names[token] for token in tokens if token in names), "en")


class TransformersMoonshine(Transformers):
    """Moonshine by transformers: it hears raw sound, and knows one language, which it does not name.

    Args: as of `load_recogniser`.
    """

    def __init__(self, folder: Path, settings: WhisperSettings, device: torch.device, threads: int) -> None:
        super().__init__(folder, settings, device, threads)
        if settings.language is not None:
            raise UserError(f"whisper.language: {folder} is a Moonshine model, of one language; leave it out")

    def _asked(self, samples: int) -> dict[str, Any]:
        return {"max_new_tokens": max(1, round(MOONSHINE_TOKENS * samples / RATE))}


def _numerals(tokens: Mapping[str, int], special: Iterable[str]) -> list[int]:
    without = set(special)
    return sorted(number for token, number in tokens.items() if token not in without and NUMERALS & set(token))


def _check_front_end(folder: Path, extractor: Any, wanted: Mapping[str, int]) -> None:
    for name, value in wanted.items():
        if type(said := getattr(extractor, name, None)) is not int or said != value:
            raise UserError(
                f"{folder}: its feature extractor ({type(extractor).__name__}) has {name} {said}, and the network hears {value}; copy the whole model again"
            )


def _check_language(wanted: str | None, known: Iterable[str], folder: Path) -> None:
    if wanted is not None and wanted not in (names := sorted(known)):
        raise UserError(f"whisper.language: {wanted} is not spoken by {folder}, which knows {', '.join(names)}")
