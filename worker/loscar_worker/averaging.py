"""A worker's part in a one-off average: calls for it, over and over until it has the answer and all others have it too.

Runs on the background's loop. The training thread waits for the answer only; after that the answer is kept until the
server says that nobody needs it any more, since a server that dies before has to get it from those who have it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import grpc
import numpy as np

from loscar_core.errors import (
    ConnectError,
    LoscarError,
    MalformedError,
    ServerLostError,
    SessionFailedError,
    WrongRunError,
)
from loscar_core.gathering import Answer, Values
from loscar_wire.averages import (
    CHUNK_BYTES,
    TAKEN,
    Accepted,
    AnswerHead,
    AverageCall,
    decode_reply,
    encode_call,
    encode_values,
)
from loscar_wire.status import from_status
from loscar_wire.transport import AVERAGE, ClientSecurity, call_metadata, channel

_JITTER = random.Random()  # not the training loop's

log = logging.getLogger("loscar.worker")

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0


class Averaging:
    """One vector's way to its average.

    Args:
        call: what is called for; its vector is `values`.
        target: where the worker's server is now, HOST:PORT.
        security: token and certificates.

    Attributes:
        answer: what came of it, or why nothing did; set once, from the loop.
    """

    def __init__(self, call: AverageCall, values: Values, target: Callable[[], str], security: ClientSecurity) -> None:
        self.answer: Future[Answer] = Future()
        self._call = call
        self._values = values
        self._target = target
        self._security = security
        self._awaited: tuple[bytes, ...] = ()

    async def run(self) -> None:
        """Until all who take part have the answer, or there is none."""
        backoff = FIRST_BACKOFF_S
        while True:
            target = self._target()
            try:
                await self._one_call(target)
                return
            except LoscarError as error:
                if not isinstance(error, (ConnectError, ServerLostError, WrongRunError)):
                    if not self.answer.done():
                        self.answer.set_exception(error)
                    return
                log.debug("average %r at %s: %s", self._call.label, target, error)
            except BaseException as error:
                if not self.answer.done():
                    self.answer.set_exception(SessionFailedError(f"the average {self._call.label!r} ended: {error!r}"))
                raise
            await asyncio.sleep(backoff * _JITTER.uniform(0.5, 1.5))
            backoff = min(MAX_BACKOFF_S, backoff * 2)

    async def _one_call(self, target: str) -> None:
        """Raises what ended it, unless everybody has the answer."""
        opened = channel(target, self._security)
        try:
            stream = opened.stream_stream(AVERAGE)(metadata=call_metadata(self._security))
            try:
                await self._converse(stream)
            except (grpc.RpcError, asyncio.InvalidStateError):
                raise from_status(await stream.code(), await stream.details()) from None
            finally:
                stream.cancel()
        finally:
            await opened.close()

    async def _converse(self, stream: Any) -> None:
        settled = self.answer.result() if self.answer.done() else None
        call = self._call
        said = AverageCall(
            call.run_id,
            call.incarnation,
            call.label,
            call.size,
            call.dtype,
            call.wait_s,
            call.at_least,
            self._awaited,
            () if settled is None else settled.offered,
        )
        await stream.write(encode_call(said))
        accepted = await self._heard(stream)
        if not isinstance(accepted, Accepted):
            raise MalformedError("a call for an average was not answered by whether it is accepted")
        self._awaited = accepted.awaited
        if accepted.wanted:
            data = memoryview((self._values if settled is None else settled.values).view(np.uint8))  # type: ignore[arg-type]
            for start in range(0, data.nbytes, CHUNK_BYTES):
                await stream.write(encode_values(bytes(data[start : start + CHUNK_BYTES])))
        if settled is None:
            self.answer.set_result(await self._read_answer(stream))
            self._values = np.empty(0, np.float32)  # only the answer counts from now on
            await stream.write(TAKEN)
        if await stream.read() is not grpc.aio.EOF:
            raise MalformedError("more than an answer came for an average")
        code = await stream.code()
        if code is not grpc.StatusCode.OK:
            raise from_status(code, await stream.details())

    async def _read_answer(self, stream: Any) -> Answer:
        head = await self._heard(stream)
        if not isinstance(head, AnswerHead):
            raise MalformedError("an average's answer did not begin with whose it is")
        values = np.empty(self._call.size, np.dtype(self._call.dtype).newbyteorder("<"))
        room = memoryview(values.view(np.uint8))  # type: ignore[arg-type]
        filled = 0
        while filled < room.nbytes:
            chunk = await self._heard(stream)
            if not isinstance(chunk, bytes) or not 1 <= len(chunk) <= room.nbytes - filled:
                raise MalformedError(f"an average's answer is of another size than {self._call.size} values")
            room[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return Answer(values, head.offered)

    async def _heard(self, stream: Any) -> Accepted | AnswerHead | bytes:
        data = await stream.read()
        if data is grpc.aio.EOF:
            code = await stream.code()
            raise from_status(code, await stream.details() or "the server ended the call")
        return decode_reply(data)
