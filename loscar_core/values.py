"""Value types on the wire: what a float32 vector looks like as little-endian bytes, and back.

`decode(encode(x))` is a function of x alone, so a worker knows exactly what the server will add. Finite
values stay finite: what a narrow type cannot hold becomes its largest, and the difference stays in the
sender's residual. NaN and infinity are refused on both ways, as one of them would spoil the sum of
everybody.

    float32    4 bytes each
    bfloat16   2 bytes each, the upper half of a float32, rounded to nearest, ties to even
    float16    2 bytes each, IEEE 754 binary16, rounded to nearest, ties to even
    int8       runs of 512 values, of which the last may be short: a float32 scale, then a signed byte q for
               each; value = float32(q) * scale, q in [-127, 127], scale = the run's max|x| / 127

Every type can be cut at multiples of INT8_RUN values: the pieces' payloads, one after another, are the
whole's.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loscar_core.errors import MalformedError, NonFiniteError

INT8_RUN: Final = 512

_SCALE_SIZE: Final = 4
_RUN_SIZE: Final = _SCALE_SIZE + INT8_RUN
_BLOCK: Final = 1 << 15
"""Values that are converted at a time: what is between two operations stays in the processor's cache, and in memory
that the allocator has at hand."""
_FLOAT16_MAX: Final = np.float32(65504.0)
_BFLOAT16_MAX: Final = np.float32(float.fromhex("0x1.fep+127"))
# The largest float32 whose product with 127 is finite: one place below float32's largest divided by 127,
# which rounds up.
_SCALE_MAX: Final = np.float32(float.fromhex("0x1.020406p+121"))
_SMALLEST_NORMAL: Final = np.finfo(np.float32).smallest_normal


class ValueType(Enum):
    """How values travel; the values of the enumeration are those of `--wire-dtype`."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"

    @property
    def itemsize(self) -> int:
        """Bytes of one value, without int8's scales; `payload_size` counts those too."""
        return _ITEM_SIZES[self]


_ITEM_SIZES: Final = {
    ValueType.FLOAT32: 4,
    ValueType.BFLOAT16: 2,
    ValueType.FLOAT16: 2,
    ValueType.INT8: 1,
}


Payload = bytes | memoryview
"""Encoded values; a view of them where a copy can be spared."""


def payload_size(kind: ValueType, count: int) -> int:
    """Bytes of `count` encoded values. Raises MalformedError for a negative count."""
    if count < 0:
        raise MalformedError(f"a count of values cannot be {count}")
    scales = -(-count // INT8_RUN) * _SCALE_SIZE if kind is ValueType.INT8 else 0
    return count * kind.itemsize + scales


def value_count(kind: ValueType, size: int) -> int:
    """How many values a payload of `size` bytes holds: the inverse of `payload_size`.

    Raises MalformedError where no number of values takes that many bytes.
    """
    count = size // kind.itemsize
    if kind is ValueType.INT8 and size > 0:
        count = size - -(-size // _RUN_SIZE) * _SCALE_SIZE
    if count < 0 or payload_size(kind, count) != size:
        raise MalformedError(f"no number of {kind.value} values takes {size} bytes")
    return count


def require_finite(values: NDArray[np.float32], what: str) -> None:
    """Raise NonFiniteError, naming `what` and the first bad position, if `values` holds NaN or infinity.

    `values`: 1-D float32. One pass without temporary arrays in the usual case: once a sum has met NaN or
    infinity it never becomes finite again, so a finite sum clears everything; finite values whose sum
    overflows are checked one by one.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduce(values)
    if np.isfinite(total):
        return
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        first = int(bad[0])
        raise NonFiniteError(
            f"{what}: {bad.size} of {values.size} are not finite, the first is {values[first]} at {first}"
        )


def encode(values: NDArray[np.float32], kind: ValueType) -> bytes:
    """The wire bytes of `values` (1-D float32): `payload_size(kind, len(values))` bytes.

    Raises MalformedError unless `values` is 1-D float32, NonFiniteError for NaN or infinity.
    """
    _check_vector(values)
    require_finite(values, "values to send")
    match kind:
        case ValueType.FLOAT32:
            return values.astype("<f4", copy=False).tobytes()
        case ValueType.BFLOAT16:
            return _to_bfloat16(values).astype("<u2", copy=False).tobytes()
        case ValueType.FLOAT16:
            return np.clip(values, -_FLOAT16_MAX, _FLOAT16_MAX).astype("<f2").tobytes()
        case ValueType.INT8:
            return _to_int8(values)


def encode_view(values: NDArray[np.float32], kind: ValueType) -> Payload:
    """As `encode`; float32 are not copied, so `values` must stay as they are for as long as the bytes are needed."""
    if kind is not ValueType.FLOAT32:
        return encode(values, kind)
    _check_vector(values)
    require_finite(values, "values to send")
    if values.size == 0:
        return b""
    return np.ascontiguousarray(values, dtype="<f4").data.cast("B").toreadonly()


def decode(payload: Payload, kind: ValueType, count: int, largest: float | None = None) -> NDArray[np.float32]:
    """The `count` values of a payload as 1-D float32; for float32 a read-only view of the payload.

    With `largest`, values beyond ± that are a MalformedError.

    Raises MalformedError for a wrong length, and for an int8 scale that is negative or a -128, neither of
    which `encode` writes; NonFiniteError for NaN or infinity, also where they would arise from an int8
    scale.
    """
    _check_payload(payload, kind, count)
    if kind is ValueType.FLOAT32:
        out = np.frombuffer(payload, dtype="<f4").astype(np.float32, copy=False)
        out.flags.writeable = False
    else:
        out = np.empty(count, dtype=np.float32)
        _decode_narrow(payload, kind, out)
    # What is within bounds is finite; NaN is not within any.
    within = largest is not None and count > 0 and bool(out.max() <= largest) and bool(out.min() >= -largest)
    if not within:
        if kind is ValueType.FLOAT32 or largest is not None:
            require_finite(out, "received values")
        if largest is not None and count > 0:
            raise MalformedError(f"values beyond ±{largest:g}")
    return out


def decode_into(payload: Payload, kind: ValueType, out: NDArray[np.float32]) -> None:
    """Decode `len(out)` values into `out` (1-D float32, C-contiguous, writable).

    Raises what `decode` raises, and MalformedError if `out` is of another form; after an error `out` may hold
    anything.
    """
    _check_vector(out)
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise MalformedError("the output must be contiguous and writable")
    _check_payload(payload, kind, out.size)
    if kind is ValueType.FLOAT32:
        out[:] = np.frombuffer(payload, dtype="<f4")
        require_finite(out, "received values")
    else:
        _decode_narrow(payload, kind, out)


def _decode_narrow(payload: Payload, kind: ValueType, out: NDArray[np.float32]) -> None:
    if kind is ValueType.BFLOAT16:
        bits = out.view(np.uint32)
        bits[:] = np.frombuffer(payload, dtype="<u2")
        np.left_shift(bits, np.uint32(16), out=bits)
    elif kind is ValueType.FLOAT16:
        out[:] = np.frombuffer(payload, dtype="<f2")
    else:
        _from_int8(payload, out)
        return
    require_finite(out, "received values")


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even: add half of the last kept place, less one unless that is odd."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    halves = np.empty(bits.size, np.uint16)
    scratch = np.empty(min(_BLOCK, bits.size), np.uint32)
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        rounded = scratch[: block.size]
        np.right_shift(block, np.uint32(16), out=rounded)
        rounded &= np.uint32(1)
        rounded += block
        rounded += np.uint32(0x7FFF)
        np.right_shift(rounded, np.uint32(16), out=halves[start : start + _BLOCK], casting="unsafe")
    # A finite value rounds at most one step beyond the largest, to infinity; one step back is the largest.
    if bits.size and max(values.max(), -values.min()) >= _BFLOAT16_MAX:
        halves -= (halves & np.uint16(0x7FFF)) == np.uint16(0x7F80)
    return halves


def _to_int8(values: NDArray[np.float32]) -> bytes:
    full = values.size // INT8_RUN
    cut = full * INT8_RUN
    payload = _quantised(values[:cut].reshape(full, INT8_RUN)).tobytes()
    if cut < values.size:
        payload += _quantised(values[cut:].reshape(1, -1)).tobytes()
    return payload


def _quantised(runs: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Runs of shape (m, w), float32, as rows of 4 + w bytes: the scale, then the bytes."""
    count, width = runs.shape
    rows = np.empty((count, _SCALE_SIZE + width), dtype=np.uint8)
    step = max(1, _BLOCK // width)
    scratch = np.empty((min(step, count), width), np.float32)
    for start in range(0, count, step):
        block, into = runs[start : start + step], rows[start : start + step]
        quotients = scratch[: len(block)]
        np.abs(block, out=quotients)
        # The cap only bites within a rounding error of float32's largest, where 127 * scale would overflow.
        scales = np.minimum(quotients.max(axis=1) / np.float32(127.0), _SCALE_MAX)
        # A run whose largest magnitude underflows in the division is sent as zeros.
        divisors = np.where(scales > 0.0, scales, np.float32(np.inf))
        np.divide(block, divisors[:, np.newaxis], out=quotients)
        np.rint(quotients, out=quotients)
        if scales.min() < _SMALLEST_NORMAL:
            # A subnormal scale has few bits: the quotient of the largest may then be above 127.
            np.clip(quotients, -127.0, 127.0, out=quotients)
        into[:, :_SCALE_SIZE] = scales.astype("<f4", copy=False)[:, np.newaxis].view(np.uint8)
        np.copyto(into[:, _SCALE_SIZE:].view(np.int8), quotients, casting="unsafe")
    return rows


def _from_int8(payload: Payload, out: NDArray[np.float32]) -> None:
    raw = np.frombuffer(payload, dtype=np.uint8)
    full = out.size // INT8_RUN
    cut = full * INT8_RUN
    _dequantise(raw[: full * _RUN_SIZE].reshape(full, _RUN_SIZE), out[:cut].reshape(full, INT8_RUN))
    if cut < out.size:
        _dequantise(raw[full * _RUN_SIZE :].reshape(1, -1), out[cut:].reshape(1, -1))


def _dequantise(rows: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """The inverse of `_quantised`, into `out` of shape (m, w)."""
    scales = np.ascontiguousarray(rows[:, :_SCALE_SIZE]).view("<f4").astype(np.float32, copy=False)
    if not np.all(np.isfinite(scales)):
        raise NonFiniteError("received values: an int8 scale is not finite")
    if np.any(np.signbit(scales)):
        raise MalformedError("an int8 scale is negative")
    if scales.size and scales.max() > _SCALE_MAX:
        raise NonFiniteError("received values: an int8 scale is so large that its values overflow")
    quotients = rows[:, _SCALE_SIZE:].view(np.int8)
    if quotients.size and int(quotients.min()) == -128:
        raise MalformedError("an int8 value is -128, which no sender writes")
    np.multiply(quotients, scales, out=out, dtype=np.float32)


def _check_vector(values: NDArray[np.float32]) -> None:
    if values.ndim != 1 or values.dtype != np.float32:
        raise MalformedError(f"values must be 1-D float32, not {values.ndim}-D {values.dtype.name}")


def _check_payload(payload: Payload, kind: ValueType, count: int) -> None:
    expected = payload_size(kind, count)
    size = payload.nbytes if isinstance(payload, memoryview) else len(payload)
    if size != expected:
        raise MalformedError(f"{count} {kind.value} values take {expected} bytes, not {size}")
