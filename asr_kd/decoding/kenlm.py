"""KenLM's binary language models, by the extra `lm`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

from asr_kd.decoding.ngram import UNKNOWN
from asr_kd.errors import UserError
from asr_kd.files import local_copy, place

#: whether flashlight-text, which torchaudio's KenLM is, has a wheel for this Python
HAS_WHEEL = sys.version_info < (3, 13)


class KenLm:
    """A KenLM model (binary or ARPA) for the words of a lexicon, with the interface of `Ngrams`."""

    def __init__(self, name: str, words: Iterable[str]) -> None:
        try:  # torchaudio's binding; torch comes with it, which other language models are read without
            library = importlib.import_module("torchaudio.models.decoder._ctc_decoder")
        except ImportError:
            remedy = "the extra lm; install it with pip install 'asr-kd[lm]'"
            if not HAS_WHEEL:
                remedy = "flashlight-text, which is not there for Python 3.13; give the ARPA file that it was made from, or use Python 3.12 or 3.11"
            raise UserError(f"{name}: a KenLM binary needs {remedy}") from None
        known = [UNKNOWN, *dict.fromkeys(words)]
        self._number = {word: number for number, word in enumerate(known)}
        try:
            with local_copy(place(name)) as path:
                self._model = library._KenLM(str(path), library._Dictionary(known))
        except (RuntimeError, OSError) as error:  # RuntimeError: KenLM's exceptions
            reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else "unreadable"
            raise UserError(
                f"{name}: not a language model that KenLM reads ({reason}); make it again with KenLM's build_binary"
            ) from None
        self.start = self._model.start(False)

    def knows(self, word: str) -> bool:
        """Whether the model has a word, judging by its score: KenLM scores missing words as the unknown word."""
        alone = self._model.start(True)
        return self._model.score(alone, self._number.get(word, 0))[1] != self._model.score(alone, 0)[1]

    def score(self, context: Any, word: str) -> tuple[float, Any]:
        """log10 P(word | context), and the context of the next word."""
        after, score = self._model.score(context, self._number.get(word, 0))
        return score, after

    def finish(self, context: Any) -> float:
        """log10 P(end of the sentence | context)."""
        return self._model.finish(context)[1]
