"""Errors as statuses, tokens, addresses and exposure."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from loscar_core.errors import (
    AuthenticationError,
    ConfigError,
    ConnectError,
    LoscarError,
    ProtocolError,
    all_errors,
)
from loscar_wire.status import MAX_DETAILS, from_status, to_status
from loscar_wire.transport import (
    ClientSecurity,
    ServerSecurity,
    call_metadata,
    check_exposure,
    check_token,
    format_address,
    is_loopback,
    parse_address,
)


@pytest.mark.parametrize("kind", all_errors(), ids=lambda k: k.__name__)
def test_errors_survive_as_statuses(kind: type[LoscarError]) -> None:
    code, details = to_status(kind("part 3: what is wrong: this"))
    assert code is not grpc.StatusCode.OK
    back = from_status(code, details)
    assert type(back) is kind
    assert str(back) == "part 3: what is wrong: this"


def test_details_are_one_short_line() -> None:
    _, details = to_status(ConfigError("a\nb" * 5000))
    assert "\n" not in details
    assert len(details) <= MAX_DETAILS


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.OK])
def test_a_network_s_status_may_be_tried_again(code: grpc.StatusCode) -> None:
    error = from_status(code, "Connection refused")
    assert type(error) is ConnectError
    assert error.retriable
    assert type(from_status(code, None)) is ConnectError


def test_a_stranger_s_status_is_not_tried_again() -> None:
    error = from_status(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    assert type(error) is ProtocolError
    assert not error.retriable


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:50051", "127.0.0.1", 50051),
        (" server.example:1 ", "server.example", 1),
        ("[::1]:65535", "::1", 65535),
        ("localhost:0", "localhost", 0),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text, "--server") == (host, port)
    assert parse_address(format_address(host, port), "--server") == (host, port)


@pytest.mark.parametrize(
    "text", ["", "nowhere", ":1", "host:", "host:x", "host:65536", "host:-1", "::1:50051", "[::1]", "host:٣", "[]:1"]
)
def test_wrong_addresses_name_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--server "):
        parse_address(text, "--server")


@pytest.mark.parametrize(
    ("host", "inside"),
    [("localhost", True), ("127.0.0.9", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("a.b", False)],
)
def test_loopback(host: str, inside: bool) -> None:
    assert is_loopback(host) is inside


def test_a_public_address_wants_protection() -> None:
    pem = Path("some.pem")
    check_exposure("127.0.0.1", ServerSecurity())
    check_exposure("0.0.0.0", ServerSecurity(insecure=True))
    check_exposure("0.0.0.0", ServerSecurity(token="t", certificate=pem, key=pem))
    with pytest.raises(ConfigError, match="--tls-cert and --tls-key and --token, or --insecure"):
        check_exposure("0.0.0.0", ServerSecurity())
    with pytest.raises(ConfigError, match="give --token, or"):
        check_exposure("host", ServerSecurity(certificate=pem, key=pem))
    with pytest.raises(ConfigError, match="give --tls-cert and --tls-key, or"):
        check_exposure("::", ServerSecurity(token="t"))


def test_tokens() -> None:
    check_token(None, None)
    check_token([("authorization", "Bearer whatever")], None)
    metadata = call_metadata(ClientSecurity("secret"))
    check_token(metadata, "secret")
    check_token([("user-agent", "x"), ("authorization", b"Bearer secret")], "secret")
    for wrong in ([], None):
        with pytest.raises(AuthenticationError, match="wants a token"):
            check_token(wrong, "secret")
    for text in ("Bearer", "Bearer ", "secret", "Bearer secret2", "bearer secret"):
        with pytest.raises(AuthenticationError, match="wrong token"):
            check_token([("authorization", text)], "secret")
    assert call_metadata(ClientSecurity()) == call_metadata(ClientSecurity("")) == []


@pytest.mark.parametrize("text", ["pässword", "two\nlines", "tab\t", " "])
def test_a_token_that_cannot_travel_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ConfigError, match="token"):
        call_metadata(ClientSecurity(text))
    with pytest.raises(ConfigError, match="token"):
        check_exposure("127.0.0.1", ServerSecurity(token=text))
