"""Whether processes beside the network make `eval` faster: python tests/benchmarks/eval_workers.py CHECKPOINT AUDIO [key=value …]

Scores the whole set with each number of workers, by turns, `--turns` times; a further argument is a setting of eval (decoder=beam …). `seconds`
is the median over the turns, the start of the processes included, `of_none` the median and the range of the ratios to none in the same turn.
`--json` prints one object a row.
"""

from __future__ import annotations

import argparse
import statistics
import time

from tables import print_rows


def main() -> None:
    # here, as in asr-kd, for the processes import this file
    import torch

    from asr_kd.config.load import build, override
    from asr_kd.evaluation.parts import Shard
    from asr_kd.evaluation.score import System, score
    from asr_kd.evaluation.settings import EvalSettings
    from asr_kd.files import place
    from asr_kd.models.acoustic import load_checkpoint
    from asr_kd.shards.tarset import read_index

    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("audio")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="beside none")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    values = {
        "systems": {"system": arguments.checkpoint},
        "audio": arguments.audio,
        "output": "unused",
        "device": "cpu",
    }
    settings = build(EvalSettings, override(values, arguments.settings), "command line")
    torch.set_num_threads(settings.threads)
    shards = [Shard("test", arguments.audio, info) for info in read_index(arguments.audio)]
    took: dict[int, list[float]] = {count: [] for count in (0, *arguments.workers)}
    for _ in range(arguments.turns):
        for count, seconds in took.items():
            systems = [System("system", place(arguments.checkpoint), load_checkpoint(arguments.checkpoint))]
            began = time.perf_counter()
            for _ in score(settings.model_copy(update={"workers": count}), systems, shards):
                pass
            seconds.append(time.perf_counter() - began)
    rows = []
    for count, seconds in took.items():
        ratios = [one / none for one, none in zip(seconds, took[0], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        rows.append({"workers": count, "seconds": round(statistics.median(seconds), 1), "of_none": spread})
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
