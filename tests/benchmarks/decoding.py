"""WER and speed of the decoders: python tests/benchmarks/decoding.py CHECKPOINT AUDIO [key=value,key=value …] [--json]

Each further argument is a row: settings of the decoder, e.g. decoder=beam,lm=lm.arpa,lm_weight=0.7 (none: greedy). The network's
output is computed once and decoded by all. `oracle` is the WER of the best of the `nbest` texts; `nce` the normalised cross-entropy
of the word confidences (1: they tell right from wrong for certain; 0: no more than the share of right words does).
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np
import torch
from tables import print_rows

from asr_kd.config.load import build, override
from asr_kd.decoding.decoder import make_decoder
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.evaluation.wer import align, count_errors
from asr_kd.models.acoustic import infer_batches, load_checkpoint
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import read_index


def normalised_cross_entropy(confidences: list[float], right: list[bool]) -> float | None:
    share = sum(right) / len(right)
    if share in (0.0, 1.0):
        return None
    clipped = np.clip(confidences, 1e-4, 1 - 1e-4)
    heard = np.where(right, np.log(clipped), np.log(1 - clipped)).sum()
    constant = len(right) * (share * math.log(share) + (1 - share) * math.log(1 - share))
    return float((constant - heard) / constant)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("audio")
    parser.add_argument("decoders", nargs="*")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(arguments.checkpoint)
    wanted = ShardInput(folder=arguments.audio, features=checkpoint.features, max_seconds=60.0)
    texts, outputs = [], []
    for shard in read_index(arguments.audio):
        items = load_features(wanted, shard).items
        for batch, answers in infer_batches(checkpoint, [item.features for item in items], 4000):
            outputs += answers
            texts += [items[index].fields["text"] for index in batch]
    hours = sum(map(len, outputs)) * checkpoint.frame_ms / 3.6e6
    rows: list[dict[str, Any]] = []
    for words in arguments.decoders or ["decoder=greedy"]:
        decoder = make_decoder(build(DecodingSettings, override({}, words.split(",")), words), checkpoint)
        began = time.process_time()
        found = [decoder(log_probs) for log_probs in outputs]
        spent = time.process_time() - began
        counts = [[count_errors(text, one.text) for one in nbest] for text, nbest in zip(texts, found, strict=True)]
        total = sum(some[0].words for some in counts)
        confidences, right = [], []
        for text, nbest in zip(texts, found, strict=True):
            edits = [edit for edit in align(text, nbest[0].text) if edit.hypothesis]
            confidences += [word.confidence for word in nbest[0].words]
            right += [edit.kind == "equal" for edit in edits]
        nce = normalised_cross_entropy(confidences, right)
        rows.append(
            {
                "decoder": words,
                "wer": round(100 * sum(some[0].errors for some in counts) / total, 2),
                "oracle": round(100 * sum(min(one.errors for one in some) for some in counts) / total, 2),
                "real_time_factor": round(spent / 3600 / hours, 5),
                "nce": None if nce is None else round(nce, 3),
            }
        )
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
