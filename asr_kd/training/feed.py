"""Batches made in the background while the network trains: in a thread, or in a process that does not share the interpreter's lock."""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from asr_kd.distillation.batch import Batch, Part
from asr_kd.errors import UserError
from asr_kd.shards.stream import killed, read_ahead, serve_parent
from asr_kd.training.batches import Lane, PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Cursor
from asr_kd.units import Units


def ready_batches(
    stream: PhaseStream, lanes: list[Lane], cycle: int, turn: int = 0, rank: int = 0, ranks: int = 1
) -> Generator[Batch | None]:
    """As `PhaseStream.batches`, with `ready_batches` of them made ahead; the result does not depend on `loader_workers`.

    Args: see `PhaseStream.batches`.

    Raises:
        UserError: when a loader process is killed.
    """
    arguments = (lanes, cycle, turn, rank, ranks)
    made = _from_process(stream, *arguments) if stream.settings.loader_workers else stream.batches(*arguments)
    return read_ahead(made, stream.settings.ready_batches)


@dataclasses.dataclass
class _End:
    """What the sources of a phase report at its end, a list entry a source; see `Source`."""

    ends: list[dict[int, Cursor]]
    first_unused: list[tuple[str, str]]
    first_incomplete: list[tuple[str, str]]


def _from_process(stream: PhaseStream, *arguments: Any) -> Iterator[Batch | None]:
    # spawn, not fork: a fork of a process with torch's threads may hang
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_feed, args=(theirs, stream.settings, stream.phase, stream.units, *arguments), name="batches"
    )
    process.start()
    theirs.close()
    try:
        while not isinstance(message := _receive(ours), _End):
            if isinstance(message, Exception):
                raise message
            yield message
        for source, ends, unused, incomplete in zip(
            stream.sources, message.ends, message.first_unused, message.first_incomplete, strict=True
        ):
            source.ends, source.first_unused, source.first_incomplete = ends, unused, incomplete
    except (EOFError, ConnectionError):
        raise UserError(killed(stream.settings.loader_workers)) from None
    finally:
        ours.close()
        process.kill()
        process.join()


def _feed(connection: Connection, settings: TrainSettings, phase: int, units: Units, *arguments: Any) -> None:
    """The process: makes batches and sends them, one ahead of the reader."""
    serve_parent()
    torch.set_num_threads(1)
    # this process decodes audio too: it counts as one of the loader workers
    settings = settings.model_copy(update={"loader_workers": settings.loader_workers - 1})
    try:
        stream = PhaseStream(settings, phase, units)
        for batch in stream.batches(*arguments):
            _send(connection, batch)
        _send(
            connection,
            _End(*([getattr(source, field.name) for source in stream.sources] for field in dataclasses.fields(_End))),
        )
    except UserError as error:
        _send(connection, error)
    except Exception:
        _send(connection, RuntimeError(f"the process that makes batches failed\n{traceback.format_exc()}"))


def _send(connection: Connection, message: Batch | _End | Exception | None) -> None:
    """Send a pickle, followed by the raw bytes of its arrays."""
    buffers: list[pickle.PickleBuffer] = []
    is_batch = isinstance(message, Batch)
    head = pickle.dumps(
        _arrays(message) if isinstance(message, Batch) else message, protocol=5, buffer_callback=buffers.append
    )
    connection.send_bytes(pickle.dumps((head, is_batch, [buffer.raw().nbytes for buffer in buffers])))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _receive(connection: Connection) -> Batch | _End | Exception | None:
    head, is_batch, sizes = pickle.loads(connection.recv_bytes())
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        connection.recv_bytes_into(buffer)
    value: Any = pickle.loads(head, buffers=buffers)
    return _tensors(value) if is_batch else value


def _arrays(batch: Batch) -> Batch:
    """The batch with NumPy arrays in place of its tensors: their memory can be sent without a copy."""
    return _changed(batch, lambda one: one.numpy() if isinstance(one, torch.Tensor) else one)


def _tensors(batch: Batch) -> Batch:
    return _changed(batch, lambda one: torch.from_numpy(one) if isinstance(one, np.ndarray) else one)


def _changed(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    values = {field.name: change(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
    values["parts"] = {name: Part(*map(change, part)) for name, part in batch.parts.items()}
    return Batch(**values)
