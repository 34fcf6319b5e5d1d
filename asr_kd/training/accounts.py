"""What became of the utterances of a phase."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from asr_kd.errors import UserError
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
        for what, count, (key, reason) in (
            ("left out", unused, source.first_unused),
            ("without every teacher", incomplete, source.first_incomplete),
        ):
            example = f" (first: {key}: {reason})" if key else ""
            if what == "left out" and 0 < seen == count:
                raise UserError(f"{source.plan.audio}: none of {seen} utterances can be used{example}; fix the data")
            if count > settings.max_bad_share * seen:
                raise UserError(
                    f"{source.plan.audio}: {what}: {count} of {seen} utterances{example}, more than max_bad_share "
                    f"{settings.max_bad_share}; fix the data or raise max_bad_share"
                )
            if count and ranks.first:
                print(f"{source.plan.audio}: {what}: {count} of {seen} utterances{example}", file=sys.stderr)
