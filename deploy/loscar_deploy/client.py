"""One-off calls to a running server: status, stop, the model."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import numpy as np

from loscar_core.errors import MalformedError
from loscar_core.layout import Layout
from loscar_core.replica import Floats
from loscar_core.state import Position
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.pieces import layout_from_pb
from loscar_wire.status import from_status
from loscar_wire.transport import FETCH_MODEL, STATUS, STOP, ClientSecurity, call_metadata, channel

CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """The consensus of one committed round: parameters, statistics, and what they are."""

    layout: Layout
    position: Position
    vector: Floats
    statistics: Floats


class Client:
    """A channel to one server for one-off calls.

    Args:
        target: HOST:PORT.
        security: token and certificates.

    Every call raises ConnectError when the server cannot be reached, or the error that the server answered with.
    """

    def __init__(self, target: str, security: ClientSecurity) -> None:
        self._channel = channel(target, security)
        self._metadata = call_metadata(security)
        self._status = self._channel.unary_unary(STATUS, pb.StatusRequest.SerializeToString, pb.StatusReply.FromString)
        self._stop = self._channel.unary_unary(STOP, pb.StopRequest.SerializeToString, pb.StopReply.FromString)
        self._fetch = self._channel.unary_stream(
            FETCH_MODEL, pb.FetchModelRequest.SerializeToString, pb.ModelChunk.FromString
        )

    async def status(self) -> pb.StatusReply:
        try:
            reply: pb.StatusReply = await self._status(
                pb.StatusRequest(), timeout=CALL_TIMEOUT_S, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise from_status(error.code(), error.details()) from None
        return reply

    async def stop(self, why: str) -> None:
        """End the run after the open round."""
        try:
            await self._stop(pb.StopRequest(why=why), timeout=CALL_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_status(error.code(), error.details()) from None

    async def fetch_model(self) -> FetchedModel:
        """Raises MalformedError when the stream is not whole."""
        layout: Layout | None = None
        position = Position()
        values = np.empty(0, np.float32)
        filled = 0
        try:
            async for chunk in self._fetch(pb.FetchModelRequest(), metadata=self._metadata):
                if layout is None:
                    layout = layout_from_pb(chunk.layout)
                    position = Position(chunk.position.epoch, chunk.position.round)
                    if chunk.total != layout.dimension + layout.statistics_size:
                        raise MalformedError(f"the model has {chunk.total} values where its layout says otherwise")
                    values = np.empty(chunk.total, np.float32)
                piece = np.frombuffer(chunk.values, "<f4")
                if chunk.offset != filled or piece.size > values.size - filled:
                    raise MalformedError(f"a model chunk at {chunk.offset}; {filled} was next")
                values[filled : filled + piece.size] = piece
                filled += piece.size
        except grpc.RpcError as error:
            raise from_status(error.code(), error.details()) from None
        if layout is None or filled != values.size:
            raise MalformedError(f"the model ended after {filled} of {values.size} values")
        return FetchedModel(layout, position, values[: layout.dimension], values[layout.dimension :])

    async def close(self) -> None:
        await self._channel.close()
