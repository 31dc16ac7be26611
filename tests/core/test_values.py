"""Value types: exact sizes, exact rounding, saturation instead of infinity, and every refusal."""

from __future__ import annotations

import itertools
import math
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loscar_core.errors import MalformedError, NonFiniteError
from loscar_core.values import (
    INT8_RUN,
    ValueType,
    decode,
    decode_into,
    encode,
    payload_size,
    require_finite,
    value_count,
)

FLOAT32_MAX = float(np.finfo(np.float32).max)
LOSSY = [ValueType.BFLOAT16, ValueType.FLOAT16, ValueType.INT8]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def round_trip(values: NDArray[np.float32], kind: ValueType) -> NDArray[np.float32]:
    return decode(encode(values, kind), kind, values.size)


def random_finite_bits(count: int, seed: int) -> NDArray[np.float32]:
    """Float32 values of uniformly random bits, subnormal and huge ones included, without NaN and infinity."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, size=count, dtype=np.uint32)
    values = bits.view(np.float32)
    return values[np.isfinite(values)]


# --- sizes


@pytest.mark.parametrize(
    ("kind", "itemsize", "sizes"),
    [
        (ValueType.FLOAT32, 4, [0, 4, 2048, 2052]),
        (ValueType.BFLOAT16, 2, [0, 2, 1024, 1026]),
        (ValueType.FLOAT16, 2, [0, 2, 1024, 1026]),
        (ValueType.INT8, 1, [0, 5, 516, 521]),
    ],
)
def test_sizes(kind: ValueType, itemsize: int, sizes: list[int]) -> None:
    assert kind.itemsize == itemsize
    for count, size in zip([0, 1, 512, 513], sizes, strict=True):
        assert payload_size(kind, count) == size
        assert len(encode(np.ones(count, dtype=np.float32), kind)) == size


@pytest.mark.parametrize("kind", list(ValueType))
def test_value_count_is_the_inverse_of_payload_size(kind: ValueType) -> None:
    sizes = {payload_size(kind, count): count for count in range(1200)}
    for size in range(-4, payload_size(kind, 1199) + 1):
        if size in sizes:
            assert value_count(kind, size) == sizes[size]
        else:
            with pytest.raises(MalformedError, match="no number"):
                value_count(kind, size)


def test_negative_count() -> None:
    with pytest.raises(MalformedError, match="count"):
        payload_size(ValueType.INT8, -1)


# --- every type


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(list(ValueType)), values=st.lists(finite, max_size=40), repeat=st.integers(1, 40))
def test_round_trip_is_finite_and_the_same_everywhere(kind: ValueType, values: list[float], repeat: int) -> None:
    array = np.array(values * repeat, dtype=np.float32)
    payload = encode(array, kind)
    assert len(payload) == payload_size(kind, array.size)
    decoded = decode(payload, kind, array.size)
    assert decoded.dtype == np.float32
    assert decoded.shape == array.shape
    assert np.isfinite(decoded).all()
    out = np.full(array.size, np.nan, dtype=np.float32)
    decode_into(payload, kind, out)
    assert out.tobytes() == decoded.tobytes()
    view = memoryview(bytearray(b"x" + payload))[1:]
    assert decode(view, kind, array.size).tobytes() == decoded.tobytes()
    if kind is not ValueType.INT8:
        assert round_trip(decoded, kind).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("kind", list(ValueType))
def test_pieces_cut_at_runs_make_the_whole(kind: ValueType) -> None:
    values = np.random.default_rng(1).standard_normal(5 * INT8_RUN + 77).astype(np.float32)
    cuts = [0, INT8_RUN, 4 * INT8_RUN, values.size]
    pieces = [encode(values[a:b], kind) for a, b in itertools.pairwise(cuts)]
    assert b"".join(pieces) == encode(values, kind)


@pytest.mark.parametrize("kind", list(ValueType))
def test_strided_input_and_no_values(kind: ValueType) -> None:
    values = np.arange(40, dtype=np.float32)
    assert encode(values[::2], kind) == encode(values[::2].copy(), kind)
    assert encode(values[:0], kind) == b""
    assert decode(b"", kind, 0).size == 0


@pytest.mark.parametrize("kind", list(ValueType))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_encoding_refuses_what_is_not_finite(kind: ValueType, bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"the first is -?(nan|inf) at 1"):
        encode(floats(1.0, bad, 2.0), kind)


@pytest.mark.parametrize("kind", list(ValueType))
@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((1, 3), dtype=np.float32)])
def test_encoding_refuses_other_arrays(kind: ValueType, values: NDArray[np.float32]) -> None:
    with pytest.raises(MalformedError, match="1-D float32"):
        encode(values, kind)


@pytest.mark.parametrize("kind", list(ValueType))
@pytest.mark.parametrize("change", [-1, 1])
def test_decoding_refuses_a_wrong_length(kind: ValueType, change: int) -> None:
    payload = encode(np.ones(600, dtype=np.float32), kind)
    wrong = payload[:-1] if change < 0 else payload + b"\0"
    for data in (wrong, memoryview(wrong)):
        with pytest.raises(MalformedError, match="bytes"):
            decode(data, kind, 600)
        with pytest.raises(MalformedError, match="bytes"):
            decode_into(data, kind, np.empty(600, dtype=np.float32))


def test_decode_into_refuses_other_outputs() -> None:
    payload = encode(np.ones(4, dtype=np.float32), ValueType.FLOAT32)
    frozen = np.empty(4, dtype=np.float32)
    frozen.flags.writeable = False
    wide: NDArray[Any] = np.empty(4)
    for out in (np.empty(8, dtype=np.float32)[::2], frozen, wide, np.empty((2, 2), dtype=np.float32)):
        with pytest.raises(MalformedError):
            decode_into(payload, ValueType.FLOAT32, out)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (ValueType.FLOAT32, struct.pack("<2f", 1.0, math.nan)),
        (ValueType.FLOAT32, struct.pack("<2f", math.inf, -math.inf)),
        (ValueType.BFLOAT16, struct.pack("<2H", 0x3F80, 0x7F80)),
        (ValueType.BFLOAT16, struct.pack("<2H", 0x3F80, 0xFFC1)),
        (ValueType.FLOAT16, struct.pack("<2H", 0x3C00, 0xFC00)),
        (ValueType.FLOAT16, struct.pack("<2H", 0x3C00, 0x7E00)),
        (ValueType.INT8, struct.pack("<f2b", math.nan, 1, 2)),
        (ValueType.INT8, struct.pack("<f2b", math.inf, 0, 0)),
        (ValueType.INT8, struct.pack("<f2b", FLOAT32_MAX, 1, 1)),
    ],
)
def test_decoding_refuses_what_is_not_finite(kind: ValueType, payload: bytes) -> None:
    with pytest.raises(NonFiniteError):
        decode(payload, kind, 2)
    with pytest.raises(NonFiniteError):
        decode_into(payload, kind, np.empty(2, dtype=np.float32))


# --- float32


def test_float32_is_little_endian_and_exact() -> None:
    assert encode(floats(1.0, -2.5), ValueType.FLOAT32) == struct.pack("<2f", 1.0, -2.5)
    values = random_finite_bits(2000, 1)
    assert round_trip(values, ValueType.FLOAT32).tobytes() == values.tobytes()


def test_float32_decodes_to_a_read_only_view() -> None:
    for payload in (encode(floats(1, 2), ValueType.FLOAT32), bytearray(8)):
        view = decode(memoryview(payload), ValueType.FLOAT32, 2)
        assert not view.flags.owndata
        assert not view.flags.writeable


# --- bfloat16 and float16


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F808000, 0x3F80),  # a tie goes to the even neighbour below
        (0x3F818000, 0x3F82),  # a tie goes to the even neighbour above
        (0x3F808001, 0x3F81),
        (0x3F80FFFF, 0x3F81),
        (0x3FFFFFFF, 0x4000),  # the carry reaches the exponent
        (0x80000000, 0x8000),  # -0
        (0x00000001, 0x0000),  # the smallest subnormal
        (0x00008001, 0x0001),
        (0x7F7F7FFF, 0x7F7F),
        (0x7F7F8000, 0x7F7F),  # would round to infinity
        (0x7F7FFFFF, 0x7F7F),
        (0xFF7FFFFF, 0xFF7F),
    ],
)
def test_bfloat16_rounding(bits: int, expected: int) -> None:
    payload = encode(np.array([bits], dtype=np.uint32).view(np.float32), ValueType.BFLOAT16)
    assert payload == expected.to_bytes(2, "little")


def test_bfloat16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    values = random_finite_bits(100_000, 2)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16 | np.uint32(0x8000)).view(np.float32)
    values = np.concatenate([values, ties[np.isfinite(ties)]])
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    ours = round_trip(values, ValueType.BFLOAT16)
    inside = np.isfinite(expected)
    assert not inside.all()
    assert ours[inside].tobytes() == expected[inside].tobytes()
    largest = np.array([0x7F7F0000], dtype=np.uint32).view(np.float32)[0]
    assert np.array_equal(ours[~inside], np.copysign(largest, values[~inside]))


def test_float16_rounds_to_even_and_saturates() -> None:
    values = floats(1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.0, 65520.0, -1e30, FLOAT32_MAX, 2**-25, 2**-24)
    expected = floats(1.0, 1.0, 1 + 2**-9, 65504, 65504, 65504, -65504, 65504, 0, 2**-24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = round_trip(values, ValueType.FLOAT16)
    assert decoded.tobytes() == expected.tobytes()


@settings(max_examples=50, deadline=None)
@given(value=st.floats(-60000, 60000, width=32))
def test_float16_agrees_with_the_standard_library(value: float) -> None:
    assert encode(floats(value), ValueType.FLOAT16) == struct.pack("<e", value)


# --- int8


def test_int8_layout() -> None:
    values = np.zeros(INT8_RUN + 3, dtype=np.float32)
    values[0], values[1], values[2] = 127.0, -127.0, 0.4
    values[INT8_RUN:] = [254.0, 1.0, -3.0]
    payload = encode(values, ValueType.INT8)
    first = struct.pack("<f", 1.0) + bytes([127, 129]) + bytes(INT8_RUN - 2)
    assert payload == first + struct.pack("<f3b", 2.0, 127, 0, -2)  # .5 and -1.5 are ties: to 0 and -2
    assert decode(payload, ValueType.INT8, values.size)[INT8_RUN:].tolist() == [254.0, 0.0, -4.0]


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=30))
def test_int8_is_within_half_a_step(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    step = float(np.abs(array).max()) / 127
    error = np.abs(round_trip(array, ValueType.INT8).astype(np.float64) - array)
    # A step may not be below the smallest subnormal, nor closer to max/127 than float32 can say.
    assert error.max() <= 0.5 * step * (1 + 1e-4) + 127 * 1.5e-45


def test_int8_runs_have_their_own_scales() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal(10 * INT8_RUN).astype(np.float32)
    values *= np.repeat(10.0 ** np.arange(-5, 5), INT8_RUN).astype(np.float32)
    decoded = round_trip(values, ValueType.INT8)
    for start in range(0, values.size, INT8_RUN):
        run = slice(start, start + INT8_RUN)
        assert np.abs(decoded[run] - values[run]).max() <= np.abs(values[run]).max() / 253


def test_int8_of_zeros_subnormals_and_the_largest() -> None:
    assert encode(np.zeros(3, dtype=np.float32), ValueType.INT8) == bytes(7)
    tiny = floats(1e-45, -3e-44, 1e-40)
    assert np.isfinite(round_trip(tiny, ValueType.INT8)).all()
    assert encode(floats(1e-45, -1e-45), ValueType.INT8) == bytes(6)
    # 190 / 127 of the smallest subnormal rounds to one of it, and 190 of those do not fit a byte.
    smallest = 2.0**-149
    assert round_trip(floats(190 * smallest, -190 * smallest), ValueType.INT8).tolist() == [
        127 * smallest,
        -127 * smallest,
    ]
    large = floats(FLOAT32_MAX, -FLOAT32_MAX, FLOAT32_MAX / 2)
    decoded = round_trip(large, ValueType.INT8)
    assert np.isfinite(decoded).all()
    assert np.allclose(decoded[:2], large[:2], rtol=1e-6)


@pytest.mark.parametrize(
    "payload",
    [struct.pack("<f2b", -1.0, 1, 2), struct.pack("<f2b", -0.0, 1, 2), struct.pack("<f2b", 1.0, 5, -128)],
)
def test_int8_refuses_what_no_sender_writes(payload: bytes) -> None:
    with pytest.raises(MalformedError):
        decode(payload, ValueType.INT8, 2)


# --- the finiteness check


def test_finite_values_whose_sum_overflows_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_finite(np.full(1000, FLOAT32_MAX, dtype=np.float32), "x")
        require_finite(np.empty(0, dtype=np.float32), "x")


@pytest.mark.parametrize("position", [0, 8191, 99_999])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found(position: int, bad: float) -> None:
    values = np.ones(100_000, dtype=np.float32)
    values[position] = bad
    with pytest.raises(NonFiniteError, match=f"gradient of layer 3: 1 of 100000 .* at {position}"):
        require_finite(values, "gradient of layer 3")


def test_opposite_infinities_do_not_cancel() -> None:
    with pytest.raises(NonFiniteError, match="2 of 2"):
        require_finite(floats(math.inf, -math.inf), "x")


@pytest.mark.parametrize("kind", LOSSY)
def test_no_warnings_on_extreme_values(kind: ValueType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        round_trip(random_finite_bits(3000, 4), kind)


def _bfloat16_at_once(values: np.ndarray) -> np.ndarray:
    """Rounding of a whole array in single passes."""
    bits = values.view(np.uint32)
    halves = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where((halves & 0x7FFF) == 0x7F80, halves - 1, halves).astype("<u2")


def _int8_at_once(values: np.ndarray) -> bytes:
    """Run by run."""
    out = []
    for start in range(0, values.size, INT8_RUN):
        run = values[start : start + INT8_RUN]
        scale = np.minimum(np.abs(run).max() / np.float32(127), np.float32(float.fromhex("0x1.020406p+121")))
        quotients = np.clip(np.rint(run / (scale if scale > 0 else np.float32(np.inf))), -127, 127)
        out.append(np.float32(scale).tobytes() + quotients.astype(np.int8).tobytes())
    return b"".join(out)


@pytest.mark.parametrize("size", [32767, 32768, 32769, 65536 + 777])
@pytest.mark.parametrize("where", [0, 32768, 65536])
@pytest.mark.parametrize("odd", [3.4e38, -3.4028235e38, 1e-42, 1.2e-38, 0.0])
def test_blocks_make_no_difference(size: int, where: int, odd: float) -> None:
    """What is out of the ordinary in one block changes nothing in the others."""
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    values[where : where + 600] *= np.float32(1e-43) if abs(odd) < 1 else np.float32(1)
    if where < size:
        values[where] = odd
    assert encode(values, ValueType.BFLOAT16) == _bfloat16_at_once(values).tobytes()
    assert encode(values, ValueType.INT8) == _int8_at_once(values)
