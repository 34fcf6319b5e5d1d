"""ONNX CTC models as icefall (sherpa-onnx), WeNet and NeMo export them: a folder with model.onnx and tokens.txt."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_kd.audio.settings import SoundSettings
from asr_kd.errors import UserError
from asr_kd.files import read_text, sha256_file
from asr_kd.models.acoustic import Checkpoint
from asr_kd.models.outside.fbank import HOP_MS, ICEFALL, NEMO, NEMO_AS_IT_IS, WENET, FrontEnd
from asr_kd.models.outside.network import OutsideModel, exactly, finished
from asr_kd.models.outside.tokens import PIECES
from asr_kd.models.outside.vocabulary import Tokens, Vocabulary, vocabulary_of
from asr_kd.models.settings import OutsideSettings

MODEL, TOKENS = "model.onnx", "tokens.txt"
#: `model_type` in a model's metadata → the front end of the toolkit that has trained it
FRONT_ENDS = {
    "zipformer2_ctc": ICEFALL, "wenet_ctc": WENET,
    "EncDecCTCModel": NEMO, "EncDecCTCModelBPE": NEMO, "EncDecHybridRNNTCTCBPEModel": NEMO,
}  # fmt: skip
#: names of the blank, and of tokens that no text holds; behind them icefall lists #0, #1, … of its graphs, which no output stands for
BLANKS = ("<blk>", "<blank>", "<eps>")
DROPPED = frozenset({"<s>", "</s>", "<sos/eos>", "<sos>", "<eos>", "<pad>"})
UNKNOWN = "<unk>"
OF_GRAPHS = re.compile(r"#\d+")
#: icefall's sentencepiece model of bytes
BYTES = "bbpe.model"
#: feature frames that the measurement begins at: a multiple of every factor of subsampling in use
PROBE = 240
#: the largest factor of subsampling, and the fewest feature frames, that are looked for
MOST, FEWEST = 16, 64
RATE = 16000


class OnnxModel(OutsideModel):
    """A graph with inputs features [1, frames, bins] (NeMo: [1, bins, frames]) and length [1], by position; output 0 is [1, frames, tokens].

    Args:
        session: of onnxruntime.
        front_end: of its toolkit.
        vocabulary: of its tokens.
        rate: of its sound, Hz.
        bins: of its features.

    Attributes:
        factor: feature frames in an output frame.
        shift: T of them give (T + shift) // factor output frames.
        outputs: how many tokens there are.
        least: samples that give an output frame.

    Raises:
        ValueError: when its output frames do not follow its input evenly; the message says how.
    """

    def __init__(self, session: Any, front_end: FrontEnd, vocabulary: Vocabulary, rate: int, bins: int) -> None:
        super().__init__(vocabulary, {}, pads=False)
        self.session, self.front_end, self.rate, self.bins = session, front_end, rate, bins
        # onnxruntime holds the weights; the device is where what it says goes
        self.anchor = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self.factor, self.shift = self._measured()
        self.outputs = self._run(torch.zeros(PROBE, bins)).shape[-1]
        fewest = next(
            (count for count in range(max(1, self.factor - self.shift), FEWEST) if self._count(count) > 0), FEWEST
        )
        fewest = max(fewest, front_end.fewest)
        self.least = next(n for n in itertools.count(1) if front_end.frames(n, rate) >= fewest)

    def frames(self, rows: int) -> int:
        """See `OutsideModel.frames`."""
        return max(0, (self.front_end.frames(rows, self.rate) + self.shift) // self.factor)

    def hear(self, sounds: list[Tensor], taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `OutsideModel.hear`; one utterance at a time."""
        with exactly():
            heard = [self.front_end.compute(sound.cpu().float(), self.rate, self.bins) for sound in sounds]
        said = list(map(self._run, heard))
        return torch.from_numpy(np.stack(said)).to(sounds[0].device), {}

    def _run(self, features: Tensor) -> np.ndarray:
        """The answer [frames, tokens] to features [frames, bins]."""
        inputs = self.session.get_inputs()
        values = [(features.T if self.front_end.channels_first else features).numpy()[None].astype(np.float32)]
        if len(inputs) > 1:
            values.append(np.array([len(features)], np.int32 if "int32" in inputs[1].type else np.int64))
        named = {one.name: value for one, value in zip(inputs, values, strict=True)}
        found: np.ndarray = self.session.run([self.session.get_outputs()[0].name], named)[0][0]
        return found

    def _count(self, frames: int) -> int:
        """Output frames of so many feature frames; 0 where the graph cannot run on so few."""
        try:
            return len(self._run(torch.zeros(frames, self.bins)))
        except Exception:  # onnxruntime's own kinds
            return 0

    def _measured(self) -> tuple[int, int]:
        """`factor` and `shift`."""
        first, second = self._count(PROBE), self._count(2 * PROBE)
        if not 0 < first < second or PROBE % (second - first) or PROBE // (second - first) > MOST:
            raise ValueError(f"{PROBE} frames of features give {first}, {2 * PROBE} give {second}")
        factor = PROBE // (second - first)
        more = 1 + bisect.bisect_left(range(1, factor), True, key=lambda more: self._count(PROBE + more) > first)
        shift = factor * (first + 1) - PROBE - more
        for frames in (PROBE // 2 + 1, PROBE + PROBE // 3):
            if (frames + shift) // factor != self._count(frames):
                raise ValueError(
                    f"{frames} frames of features give {self._count(frames)}, not {(frames + shift) // factor}"
                )
        return factor, shift


def load_onnx(folder: Path, name: str, device: torch.device | str) -> Checkpoint:
    """A CTC model from a local folder.

    Args:
        folder: with model.onnx and tokens.txt; a sentencepiece model beside them is used.
        name: how the user has named it, for messages.
        device: where it runs: on a GPU if onnxruntime can.

    Raises:
        UserError: when onnxruntime is missing, or the folder holds no model of a known kind.
    """
    session = _session(folder / MODEL, name, torch.device(device))
    said = session.get_modelmeta().custom_metadata_map
    kind = said.get("model_type", "")
    if kind not in FRONT_ENDS:
        what = f"its model_type {kind} is not known here" if kind else "its metadata name no model_type"
        raise UserError(
            f"{name}: {what}, so the features it hears are not known; give a model of {', '.join(FRONT_ENDS)}"
        )
    front_end, normal = FRONT_ENDS[kind], said.get("normalize_type", "per_feature")
    if front_end is NEMO and (normal not in ("per_feature", "NA", "") or said.get("is_giga_am", "0") not in ("", "0")):
        raise UserError(
            f"{name}: its features are those of GigaAM, or normalised by {normal}; give a model with per_feature or NA"
        )
    if front_end is NEMO and normal != "per_feature":
        front_end = NEMO_AS_IT_IS
    shape = session.get_inputs()[0].shape
    if len(shape) != 3 or len(session.get_inputs()) > 2:
        inputs = ", ".join(f"{one.name} {one.shape}" for one in session.get_inputs())
        raise UserError(
            f"{name}: must take features and their length, and takes {inputs}; export it for whole utterances"
        )
    bins = shape[1 if front_end.channels_first else 2]
    if (
        not (told := said.get("sample_rate", str(RATE))).isdecimal()
        or int(told) % 200
        or not 8000 <= int(told) <= 48000
    ):
        raise UserError(
            f"{name}: its metadata say sample_rate {told}, which is no usual rate in Hz; correct it in {MODEL}"
        )
    rate = int(told)
    if (folder / BYTES).is_file():
        raise UserError(
            f"{name}: has a byte-level BPE vocabulary ({BYTES}), which no units can be made of; give a model with characters or BPE"
        )
    tokens = read_table(folder / TOKENS)
    while tokens and OF_GRAPHS.fullmatch(tokens[-1]):
        tokens.pop()
    model_file = next((path for file in PIECES if (path := folder / file).is_file()), None)
    pieces = model_file.read_bytes() if model_file else None
    vocabulary = vocabulary_of(_meant(tokens, pieces, name), name)
    try:
        model = OnnxModel(session, front_end, vocabulary, rate, bins if isinstance(bins, int) else 80)
    except ValueError as error:
        raise UserError(
            f"{name}: its output frames do not follow its input evenly ({error}); give another model"
        ) from None
    if model.outputs != len(tokens):
        raise UserError(
            f"{name}: {TOKENS} has {len(tokens)} tokens, the network {model.outputs} outputs; give the files that belong together"
        )
    if (factor := said.get("subsampling_factor")) not in (None, str(model.factor)):
        raise UserError(
            f"{name}: its metadata say subsampling_factor {factor}, and it gives a frame for {model.factor}; export it again"
        )
    # the middle of what the first frame hears, of a network that hears both ends alike
    offset_ms = round(front_end.start_ms - HOP_MS * model.shift / 2)
    features = SoundSettings(sample_rate=rate, frame_ms=HOP_MS * model.factor, offset_ms=offset_ms, least=model.least)
    settings = OutsideSettings(family="onnx", network=kind)
    # a graph too large for one file names those that hold its weights
    graph, below = (folder / MODEL).read_bytes(), sorted(one for one in folder.rglob("*") if one.is_file())
    named = {one.relative_to(folder).as_posix(): one for one in below}
    files = {path: sha256_file(one) for path, one in named.items() if path == MODEL or path.encode() in graph}
    return finished(model.to(device), vocabulary, features, settings, {"files": files}, name)


def _session(path: Path, name: str, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError("teacher: onnxruntime is not installed; run `pip install 'asr-kd[onnx]'`") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError(
                f"{name}: this onnxruntime has no CUDA; set device=cpu, or install onnxruntime-gpu in its place"
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own kinds
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{name}: {MODEL} cannot be loaded ({reason[:200]}); copy the model again") from None


def read_table(path: Path) -> list[str]:
    """The token of each output: lines of a token and its number, numbers from 0 on, in any order; UserError when they are not that."""
    found: dict[int, str] = {}
    for count, line in enumerate(read_text(path, "list of tokens").removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        token, _, number = line.rstrip("\r").replace("\t", " ").rpartition(" ")
        if not number.isdecimal() or int(number) in found:
            raise UserError(f"{path}, line {count}: must be a token and its number, each once; copy the file again")
        found[int(number)] = token or " "  # of the space itself some write the number alone
    if sorted(found) != list(range(len(found))) or not found:
        raise UserError(f"{path}: its numbers are not 0 to {len(found) - 1}; copy the file again")
    return [found[number] for number in range(len(found))]


def _meant(tokens: list[str], model: bytes | None, name: str) -> Tokens:
    blank = next((tokens.index(one) for one in BLANKS if one in tokens), None)
    if blank is None:
        raise UserError(f"{name}: {TOKENS} names no blank ({', '.join(BLANKS)}); add it with its number")
    unknown = UNKNOWN if UNKNOWN in tokens else None
    return Tokens(list(tokens), blank, unknown, None, DROPPED | set(BLANKS), [], model)
