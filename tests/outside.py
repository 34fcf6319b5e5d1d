"""Small teachers of other programs with random weights, as their own `save_pretrained` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

LETTERS = "ETAONIHSRDLUMWCFGYPBVKXJQZ'"
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]
#: a network of each kind that hears the sound itself: settings of its own
WAVES: dict[str, dict[str, Any]] = {
    "Wav2Vec2": {}, "Hubert": {}, "WavLM": {}, "UniSpeech": {"num_ctc_classes": len(TOKENS)}, "UniSpeechSat": {"num_ctc_classes": len(TOKENS)},
    "Data2VecAudio": {"conv_pos_kernel_size": 5}, "Wav2Vec2Conformer": {"conv_depthwise_kernel_size": 5}, "SEW": {"squeeze_factor": 2},
}  # fmt: skip
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def write_tokens(folder: Path, tokens: list[str] = TOKENS, **described: Any) -> None:
    """vocab.json and tokenizer_config.json."""
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    said = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "word_delimiter_token": "|",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said | described))


def loud(network: torch.nn.Module) -> torch.nn.Module:
    """With a head that is sure of something, so that differences are seen."""
    head = next(one for name in ("lm_head", "ctc_head") if (one := getattr(network, name, None)) is not None)
    with torch.no_grad():
        for weight in head.parameters():
            weight.mul_(20.0)
    return network


#: a network of each kind that hears filterbanks, or brings a normalisation of its own
OTHERS = ("Wav2Vec2Bert", "ParakeetCTC", "LasrCTC", "OmniASRCTC", "GraniteSpeech5CTC", "SEWD")


def write_other(folder: Path, kind: str, seed: int = 0) -> Path:
    """A CTC model of another family; the blank of Parakeet is its last output, that of OmniASR is not its padding."""
    torch.manual_seed(seed)
    tokens, config, front = (
        TOKENS,
        {"vocab_size": len(TOKENS), "pad_token_id": 0},
        transformers.SeamlessM4TFeatureExtractor(),
    )
    convolved = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    if kind == "Wav2Vec2Bert":
        config |= SMALL | {"conv_depthwise_kernel_size": 5}
    elif kind == "SEWD":
        config |= (
            SMALL
            | convolved
            | {"conv_kernel": (10, 3, 3, 3, 3, 2, 2), "conv_stride": (5, 2, 2, 2, 2, 2, 2), "squeeze_factor": 2}
        )
        config |= {"max_position_embeddings": 64, "position_buckets": 32}
        front = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    elif kind == "OmniASRCTC":
        config |= {"audio_config": SMALL | convolved, "blank_token_id": 0, "pad_token_id": 1}
        front = transformers.OmniASRFeatureExtractor()
    elif kind == "GraniteSpeech5CTC":
        config |= {"encoder_config": SMALL | {"vocab_size": len(TOKENS), "num_mel_bins": 80, "context_size": 16}}
        front = transformers.GraniteSpeech5FeatureExtractor()
    else:
        mels = 80 if kind == "ParakeetCTC" else 128
        config |= {
            "encoder_config": SMALL | {"num_mel_bins": mels, "subsampling_conv_channels": 8, "conv_kernel_size": 5}
        }
        front = transformers.ParakeetFeatureExtractor() if mels == 80 else transformers.LasrFeatureExtractor()
    if kind == "ParakeetCTC":
        tokens = [*TOKENS[1:], "<pad>"]
        config |= {"pad_token_id": len(tokens) - 1}
    name = kind.removesuffix("CTC")
    network = loud(getattr(transformers, f"{name}ForCTC")(getattr(transformers, f"{kind}Config")(**config)))
    network.save_pretrained(folder)
    front.save_pretrained(folder)
    write_tokens(folder, tokens)
    return folder


def write_wave(folder: Path, kind: str = "Wav2Vec2", by_layer: bool = False, seed: int = 0, **changes: Any) -> Path:
    """A CTC model that hears the sound itself, normalised by layer (as large models are) or by group."""
    torch.manual_seed(seed)
    values = SMALL | {
        "vocab_size": len(TOKENS), "conv_dim": [8] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0,
        "feat_extract_norm": "layer" if by_layer else "group", "do_stable_layer_norm": by_layer,
    }  # fmt: skip
    if kind == "SEW":
        values |= {"conv_kernel": (10, 3, 3, 3, 3, 2, 2), "conv_stride": (5, 2, 2, 2, 2, 2, 2)}
    config = getattr(transformers, f"{kind}Config")(**values | WAVES[kind] | changes)
    network = loud(getattr(transformers, f"{kind}ForCTC")(config))
    network.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=by_layer).save_pretrained(folder)
    write_tokens(folder)
    return folder


#: of Whisper's tokens, those that are no text
SPECIAL = (
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>",
    "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip


def save_whisper(folder: Path, positions: int = 24, **more: Any) -> None:
    """A Whisper whose tokens are bytes, with `positions` of them in a text at most; `more` are settings of its generation."""
    letters = {one: number for number, one in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = transformers.WhisperTokenizer(vocab={**letters, SPECIAL[0]: len(letters)}, merges=[])
    times = [f"<|{number * 0.02:.2f}|>" for number in range(1501)]
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=name in SPECIAL) for name in (*SPECIAL, *times)])
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    number = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    end, start = number["<|endoftext|>"], number["<|startoftranscript|>"]
    ends = {"eos_token_id": end, "pad_token_id": end, "bos_token_id": end, "decoder_start_token_id": start}
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=len(tokenizer), d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=positions, init_std=1.0,
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, **ends,
        )
    )  # fmt: skip
    model.generation_config = transformers.GenerationConfig(
        max_length=positions, is_multilingual=True, lang_to_id={name: number[name] for name in ("<|en|>", "<|de|>")},
        task_to_id={name: number[f"<|{name}|>"] for name in ("transcribe", "translate")}, no_timestamps_token_id=number["<|notimestamps|>"],
        suppress_tokens=[number[name] for name in SPECIAL[1:]], begin_suppress_tokens=[end], **ends, **more,
    )  # fmt: skip
    model.save_pretrained(folder)


def only_letters(folder: Path, letters: str) -> None:
    """A random Whisper writes any bytes; after this, letters that the student has."""
    settings = json.loads((folder / "generation_config.json").read_text())
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    kept = {alphabet.index(letter) for letter in letters} | {settings["eos_token_id"]}
    settings["suppress_tokens"] = sorted(set(range(size)) - kept)
    (folder / "generation_config.json").write_text(json.dumps(settings))
