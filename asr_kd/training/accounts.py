"""What became of the utterances of a phase."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from asr_kd.training.batches import Lane, PhaseStream
from asr_kd.training.distributed.ranks import Ranks, total
from asr_kd.training.settings import TrainSettings


def account(settings: TrainSettings, ranks: Ranks, stream: PhaseStream, lanes: Sequence[Lane]) -> None:
    """Report the unusable utterances of a phase's sources; fail above `max_bad_share`.

    Args:
        ranks: the processes of the run; each counts its own lanes, and the sums are compared.
        lanes: position of each lane of the phase.

    Raises:
        UserError: when more than `max_bad_share` of a source's utterances, or all of them, could not be used.
    """
    for index, source in enumerate(stream.sources):
        own = range(ranks.rank, settings.lanes, ranks.world)
        cursors = [source.ends.get(lane, lanes[lane].cursors[index]) for lane in own]
        counts = torch.tensor([[one.seen, one.unused, one.incomplete] for one in cursors], dtype=torch.float64).sum(0)
        seen, unused, incomplete = map(int, total(counts, ranks).tolist())
        for bad in source.bad(seen, unused, incomplete):
            bad.refuse(source.plan.audio, "fix the data")
            if bad.count and ranks.first:
                what = f"{bad.count} of {seen} utterances cannot be {bad.done} {bad.example}"
                print(f"{source.plan.audio}: {what}", file=sys.stderr)
