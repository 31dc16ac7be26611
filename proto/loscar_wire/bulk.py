"""Values in and out of a message without the copies that protobuf makes of them.

The bulk of a run's bytes are the `values` of contributions, answers and vector chunks. Here they are cut out of the
encoded message, which protobuf then reads without them, or put into it. The bytes on the wire are those of an ordinary
message: whoever reads or writes all of it with protobuf understands the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from google.protobuf.message import Message

LEAST_BYTES = 4096
"""Below, two copies cost less than looking for the values."""

_LENGTH = 2  # wire type of bytes and messages


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def message_of(body: Message, number: int, values_number: int, values: bytes | memoryview) -> bytes:
    """A message whose field `number` is `body`, with `values` as that one's field `values_number`."""
    inner = body.SerializeToString()
    head = b"" if not values else _varint(values_number << 3 | _LENGTH) + _varint(len(values))
    size = _varint(len(inner) + len(head) + len(values))
    return b"".join((_varint(number << 3 | _LENGTH), size, inner, head, values))


def append(data: bytes, number: int, messages: Iterable[bytes]) -> bytes:
    """A message with others in its repeated field `number`."""
    tag = _varint(number << 3 | _LENGTH)
    return b"".join((data, *(piece for message in messages for piece in (tag, _varint(len(message)), message))))


def cut(data: bytes, values_numbers: Mapping[int, int], after: int | None = None) -> tuple[bytes, memoryview] | None:
    """A message without its values, and these as a view of it.

    Args:
        values_numbers: for those bodies that have values, by the number of the body's field.
        after: number of a field that may follow the body.

    Returns:
        None for a message that is better read as it is: a small one, one of another body, or one that is written as
        nobody does who writes it with `message_of` or protobuf.
    """
    if len(data) < LEAST_BYTES:
        return None
    try:
        data_tag, at = _read(data, 0)
        values_number = values_numbers.get(data_tag >> 3)
        size, start = _read(data, at)
        end = start + size
        if data_tag & 7 != _LENGTH or values_number is None or not _only(data, end, after):
            return None
        at = start
        while at < end:
            before = at
            tag, at = _read(data, at)
            kind = tag & 7
            if kind == 0:
                _, at = _read(data, at)
            elif kind == 5:
                at += 4
            elif kind == 1:
                at += 8
            elif kind == _LENGTH:
                size, at = _read(data, at)
                if tag >> 3 == values_number:
                    if at + size > end:
                        return None
                    rest = data[start:before] + data[at + size : end]
                    head = _varint(data_tag) + _varint(len(rest))
                    return head + rest + data[end:], memoryview(data)[at : at + size]
                at += size
            else:
                return None
    except IndexError:
        pass
    return None


def _only(data: bytes, at: int, number: int | None) -> bool:
    """Whether nothing but messages in the field `number` follows."""
    while at < len(data) and number is not None:
        tag, at = _read(data, at)
        size, at = _read(data, at)
        if tag != number << 3 | _LENGTH:
            return False
        at += size
    return at == len(data)


def _read(data: bytes, at: int) -> tuple[int, int]:
    """A varint, and where it ends. Raises IndexError when it does not, within 10 bytes."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
        if shift > 63:
            raise IndexError
