"""CTC models of Hugging Face's `transformers`: what AutoModelForCTC loads, from safetensors alone, without any code of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr_kd.audio.settings import SoundSettings
from asr_kd.errors import UserError
from asr_kd.files import read_json
from asr_kd.models.acoustic import Checkpoint
from asr_kd.models.outside.families import Family, encoder_of, family_of
from asr_kd.models.outside.network import OutsideModel, exactly, finished
from asr_kd.models.outside.tokens import language_of, read_tokens
from asr_kd.models.outside.vocabulary import Vocabulary, vocabulary_of
from asr_kd.models.settings import OutsideSettings

#: files of a front end: of older versions of transformers, and of newer ones
FRONT_ENDS = ("preprocessor_config.json", "processor_config.json")
#: keys of settings files that change no output
IDLE = frozenset({"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures", "auto_map"})
#: parts of names of weights that training alone uses: published models lack some, and keep others
TRAINING = ("masked_spec_embed", "quantizer.", "project_q.", "project_hid.")
#: what answers with text alone
TEXT_ALONE = ("whisper", "moonshine", "speech-encoder-decoder", "speech_to_text", "seamless_m4t", "seamless_m4t_v2")
#: of these, what `transcribe` runs
HEARD = ("whisper", "moonshine")


class HuggingFaceModel(OutsideModel):
    """A network of transformers.

    Args:
        network: of a class …ForCTC.
        extractor: its feature extractor.
        family: how it is run.
        vocabulary: of its outputs.
    """

    def __init__(self, network: nn.Module, extractor: Any, family: Family, vocabulary: Vocabulary) -> None:
        width = encoder_of(network.config).hidden_size
        super().__init__(vocabulary, {f"layer.{layer}": width for layer in range(1, family.layers + 1)}, family.pads)
        self.network, self.extractor, self.family = network, extractor, family

    def frames(self, rows: int) -> int:
        """See `OutsideModel.frames`."""
        return self.family.frames(rows)

    def hear(self, sounds: list[Tensor], taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `OutsideModel.hear`."""
        masked = (
            {"return_attention_mask": True} if self.pads or "input_features" in self.extractor.model_input_names else {}
        )
        with exactly():
            inputs = self.extractor(
                [sound.cpu().numpy() for sound in sounds], sampling_rate=self.extractor.sampling_rate, padding=True, return_tensors="pt", **masked
            )  # fmt: skip
        device = sounds[0].device
        given = {name: one.to(device) for name, one in inputs.items()}
        with self.arithmetic(device):
            said = self.network(**given, output_hidden_states=bool(taps))
        return said.logits, {tap: said.hidden_states[int(tap.removeprefix("layer."))] for tap in taps}


def load_huggingface(folder: Path, name: str, device: torch.device | str) -> Checkpoint:
    """A CTC model from a local folder, as `save_pretrained` writes it.

    Args:
        folder: with config.json, safetensors, and the files of feature extractor and tokenizer.
        name: how the user has named it, for messages.
        device: where its weights go.

    Raises:
        UserError: when transformers is missing, or the folder holds no CTC model that can be run without code of its own.
    """
    config = _described(folder, name)
    transformers = _library()
    _check_kind(config, name, transformers)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{name}: holds no *.safetensors, and other weights may run code when they are read, so they never are; save the model again with "
            "save_pretrained(…, safe_serialization=True)"
        )
    if not _front_ends(folder):
        raise UserError(
            f"{name}: has no {FRONT_ENDS[0]}, which says how it hears sound; give the folder with its feature extractor"
        )
    try:
        network, info = transformers.AutoModelForCTC.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )  # fmt: skip
        if (language := language_of(folder)) and getattr(network.config, "adapter_attn_dim", None):
            # the weights beside it are those of one language
            network.load_adapter(language, local_files_only=True, use_safetensors=True)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever a damaged file makes of it
        raise UserError(
            f"{name}: cannot be loaded by transformers ({_first_line(error)}); copy the model again"
        ) from None
    for what, advice in (
        ("missing_keys", "give a model that was trained for CTC, with its head"),
        ("mismatched_keys", "copy the model again"),
        ("unexpected_keys", "give the model that config.json describes"),
    ):
        if found := sorted(key for key in map(str, info[what]) if not any(part in key for part in TRAINING)):
            raise UserError(
                f"{name}: {what.replace('_', ' ')} of weights ({found[0]} and {len(found) - 1} more); {advice}"
            )
    network.requires_grad_(False)
    for key in info["missing_keys"]:  # made up anew in each process, and never used
        network.get_parameter(key).zero_()
    rate = getattr(extractor, "sampling_rate", None)
    if type(rate) is not int or rate <= 0:
        raise UserError(
            f"{name}: its feature extractor has a sampling_rate of {rate!r}, which is no rate in Hz; copy the model again"
        )
    if (gives := extractor.model_input_names[0]) != network.main_input_name:
        raise UserError(
            f"{name}: its feature extractor ({type(extractor).__name__}) gives {gives}, and the network hears {network.main_input_name}; copy the "
            "model again"
        )
    odd = "cannot hear what its feature extractor gives"
    try:
        family = family_of(network, extractor, name)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:  # of its hop, window, …
        raise UserError(f"{name}: {odd} ({_first_line(error)}); copy the model again") from None
    frame_ms, rest = divmod(1000 * family.samples, rate)
    if rest:
        raise UserError(
            f"{name}: its frames of {family.samples} samples at {rate} Hz are no whole milliseconds; give another model"
        )
    blank = getattr(network.config, "blank_token_id", None)
    blank = network.config.pad_token_id if blank is None else blank
    vocabulary = vocabulary_of(
        read_tokens(folder, name, network.config.vocab_size, -1 if blank is None else blank), name
    )
    model = HuggingFaceModel(network, extractor, family, vocabulary)
    try:
        with torch.inference_mode():
            said, _ = model.hear([torch.zeros(family.least)], ())
        if said.shape[1] < family.frames(family.least):
            raise ValueError(f"{family.least} samples give {said.shape[1]} frames")
    except Exception as error:  # whatever a front end of another network makes of it
        raise UserError(f"{name}: {odd} ({_first_line(error)}); copy the model again") from None
    features = SoundSettings(sample_rate=rate, frame_ms=frame_ms, offset_ms=family.offset_ms(rate), least=family.least)
    settings = OutsideSettings(family="huggingface", network=type(network).__name__)
    told = [{key: value for key, value in one.items() if key not in IDLE} for one in (config, *_front_ends(folder))]
    return finished(model.to(device), vocabulary, features, settings, told, name)


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("teacher: transformers is not installed; run `pip install 'asr-kd[hf]'`") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _described(folder: Path, name: str) -> dict[str, Any]:
    config = read_json(folder / "config.json", "file of a Hugging Face model")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        if (folder / "model.bin").is_file():
            raise UserError(
                f"{name}: looks like a Whisper of CTranslate2, which writes text and has no CTC posteriors; let `asr-kd transcribe` write its "
                "texts, and train on them with transcripts="
            )
        raise UserError(f"{name}: its config.json names no model_type; give the folder of a Hugging Face model")
    return config


def _check_kind(config: dict[str, Any], name: str, transformers: Any) -> None:
    kind = config["model_type"]
    known = sorted(transformers.models.auto.modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES)
    if kind in known:
        return
    if kind in TEXT_ALONE:
        advice = (
            "let `asr-kd transcribe` write its texts"
            if kind in HEARD
            else "write its texts into JSON lines of key and text"
        )
        raise UserError(
            f"{name}: is a {kind}, which writes text and has no CTC posteriors; {advice}, and train on them with transcripts="
        )
    if "auto_map" in config:
        raise UserError(
            f"{name}: brings code of its own (auto_map in config.json), which is never run; give a model of {', '.join(known)}"
        )
    raise UserError(f"{name}: is a {kind}, which has no CTC posteriors; give a model of {', '.join(known)}")


def _front_ends(folder: Path) -> list[dict[str, Any]]:
    found = {file: read_json(folder / file) for file in FRONT_ENDS if (folder / file).is_file()}
    if odd := next((file for file, one in found.items() if not isinstance(one, dict)), None):
        raise UserError(f"{folder / odd}: must hold settings, not a {type(found[odd]).__name__}; copy the model again")
    return list(found.values())


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) < 200 else text[:200] + "…"
