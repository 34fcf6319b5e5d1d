"""Batches made in the background while the network trains: in a thread, or in a process that does not share the interpreter's lock."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import traceback
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from asr_kd.distillation.answers import Foreign
from asr_kd.distillation.batch import Batch
from asr_kd.errors import UserError
from asr_kd.shards.stream import killed, read_ahead, serve_parent
from asr_kd.training.batches import Lane, PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Met
from asr_kd.units import Units

#: what the process sends: its batches, then what its sources met; or what went wrong
Message = Batch | None | list[Met] | Exception


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


def _from_process(stream: PhaseStream, *arguments: Any) -> Iterator[Batch | None]:
    # spawn, not fork: a fork of a process with torch's threads may hang
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_feed,
        args=(theirs, stream.settings, stream.phase, stream.units, stream.foreign, stream.on_device, *arguments),
        name="batches",
    )
    process.start()
    theirs.close()
    try:
        while not isinstance(message := _receive(ours), list):
            if isinstance(message, Exception):
                raise message
            yield message
        for source, met in zip(stream.sources, message, strict=True):
            source.met = met
    except (EOFError, ConnectionError):
        raise UserError(killed(stream.settings.loader_workers)) from None
    finally:
        ours.close()
        process.kill()
        process.join()


def _feed(
    connection: Connection,
    settings: TrainSettings,
    phase: int,
    units: Units,
    foreign: dict[str, Foreign],
    on_device: bool,
    *arguments: Any,
) -> None:
    """The process: makes batches and sends them, one ahead of the reader."""
    serve_parent()
    torch.set_num_threads(1)
    # this process decodes audio too: it counts as one of the loader workers
    settings = settings.model_copy(update={"loader_workers": settings.loader_workers - 1})
    try:
        stream = PhaseStream(settings, phase, units, foreign, on_device)
        for batch in stream.batches(*arguments):
            _send(connection, batch)
        _send(connection, [source.met for source in stream.sources])
    except UserError as error:
        _send(connection, error)
    except Exception:
        _send(connection, RuntimeError(f"the process that makes batches failed\n{traceback.format_exc()}"))


class _Pickler(pickle.Pickler):
    """Tensors as NumPy arrays, whose memory can be sent without a copy."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _send(connection: Connection, message: Message) -> None:
    """Send a pickle, followed by the raw bytes of its arrays."""
    buffers: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(message)
    connection.send_bytes(pickle.dumps((head.getvalue(), [buffer.raw().nbytes for buffer in buffers])))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _receive(connection: Connection) -> Message:
    head, sizes = pickle.loads(connection.recv_bytes())
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        connection.recv_bytes_into(buffer)
    message: Message = pickle.loads(head, buffers=buffers)
    return message
