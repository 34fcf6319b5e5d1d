"""Text → its words and a small n-gram model as an ARPA file, in memory: for transcripts. For gigabytes of text use KenLM's lmplz."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable

from asr_kd.decoding.grammar import compare_words
from asr_kd.decoding.ngram import END, START, UNKNOWN, UNKNOWN_TOO, Ngrams
from asr_kd.decoding.settings import LmSettings
from asr_kd.errors import UserError
from asr_kd.files import Place, claim_folder, place, write_whole
from asr_kd.shards.leases import sole_writer
from asr_kd.shards.texts import read_texts
from asr_kd.summary import tell_summary
from asr_kd.units import Units, load_units

#: files of the output: the model, and the vocabulary
MODEL, WORDS = "lm.arpa", "words.txt"
Gram = tuple[str, ...]


def estimate(settings: LmSettings) -> None:
    """Write the vocabulary of the labelled text of `settings.source`, and an n-gram model of its words (or pieces), to `settings.output`.

    A UserError when there is no text, or no word of it can be spelt by the units.
    """
    texts = list(read_texts(settings.source))
    units = load_units(settings.units) if settings.units else None
    strange = [text for text in texts if settings.pieces and units and units.unwritable(text)]
    if units:
        texts = [text for text in texts if text not in set(strange)]
        texts = [_pieces(units, text) if settings.pieces else units.written(text) for text in texts]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{settings.source}: holds no text; give labelled audio shards, a manifest or a text file")
    text_hash = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    words = sorted({word for text in texts for word in text.split()})
    if reserved := {START, END, UNKNOWN, UNKNOWN_TOO} & set(words):
        raise UserError(f"{settings.source}: a text holds {min(reserved)}, which language models reserve; leave it out")
    vocabulary = Ngrams(1, {(word,): (0.0, 0.0) for word in words})
    remark = compare_words(str(settings.source), vocabulary, units, None) if units and not settings.pieces else ""
    claim_folder(settings.output, "lm", {**settings.model_dump(), "text": text_hash})
    with sole_writer(settings.output):
        with write_whole(place(settings.output) / WORDS, "w") as file:
            file.writelines(f"{word}\n" for word in words)
        write_arpa(place(settings.output) / MODEL, texts, settings.order)
    if strange:
        assert units is not None
        what = f"{len(strange):,} texts hold what no unit covers ({units.unwritable(strange[0])[0]!r} and others)"
        remark = f"{settings.source}: {what} and are left out"
    if remark:
        print(remark, file=sys.stderr)
    kind = "pieces" if settings.pieces else "words"
    tell_summary(
        settings.output, utterances=len(texts) + len(strange), done=len(texts), figures={kind: len(words), "order": settings.order}
    )  # fmt: skip
    print(f"{settings.output}: {len(words):,} {kind} and their {settings.order}-grams from {len(texts):,} utterances")


def _pieces(units: Units, text: str) -> str:
    return " ".join(map(units.piece, units.encode(text)))


def write_arpa(path: Place | str, sentences: Iterable[str], order: int) -> None:
    """Write an interpolated n-gram model with Witten-Bell smoothing (Witten and Bell 1991).

    P(w | context) = (count of both + kinds · P(w | shorter context)) / (count of the context + kinds), where kinds is the
    number of different words seen after the context; unigrams back off to a uniform distribution over the vocabulary, the
    end of the sentence and the unknown word.
    """
    counts: Counter[Gram] = Counter()
    for sentence in sentences:
        words = [START, *sentence.split(), END]
        for size in range(1, order + 1):
            counts.update(tuple(words[end - size : end]) for end in range(max(size, 2), len(words) + 1))
    totals: defaultdict[Gram, int] = defaultdict(int)
    kinds: defaultdict[Gram, int] = defaultdict(int)
    for gram, count in counts.items():
        totals[gram[:-1]] += count
        kinds[gram[:-1]] += 1
    uniform = 1.0 / (kinds[()] + 1)

    def backoff(context: Gram) -> float:
        return kinds[context] / (totals[context] + kinds[context])

    probability: dict[Gram, float] = {(UNKNOWN,): backoff(()) * uniform}
    for gram in sorted(counts, key=len):
        shorter = probability[gram[1:]] if gram[1:] else uniform
        seen = counts[gram] / (totals[gram[:-1]] + kinds[gram[:-1]])
        probability[gram] = seen + backoff(gram[:-1]) * shorter

    sizes = range(1, order + 1)
    grams: list[list[Gram]] = [sorted(gram for gram in probability if len(gram) == size) for size in sizes]
    grams[0].append((START,))
    with write_whole(path, "w") as file:
        file.write("\\data\\\n" + "".join(f"ngram {size}={len(some)}\n" for size, some in enumerate(grams, 1)))
        for size, some in enumerate(grams, 1):
            file.write(f"\n\\{size}-grams:\n")
            for gram in some:
                value = math.log10(probability[gram]) if gram in probability else -99.0
                lower = f"\t{math.log10(backoff(gram)):.7f}" if size < order and totals.get(gram) else ""
                file.write(f"{value:.7f}\t{' '.join(gram)}{lower}\n")
        file.write("\n\\end\\\n")
