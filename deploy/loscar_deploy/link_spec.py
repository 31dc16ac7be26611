"""What a link is like: latency, jitter, rate, outages and resets, and the text that `--link` accepts for it.

The text is `none`, another preset, or comma-separated items; items after a preset override it:

    rtt=200ms,jitter=20ms,rate=10mbit
    rtt=60ms,up=1mbit,down=20mbit,dist=normal,outage=5s@30s,reset@50s
    satellite,rate=5mbit

    item             meaning
    rtt=D            round trip: half of it is the one-way delay of each direction
    delay-up=D       one-way delay of one direction, instead of half the rtt (also delay-down=D)
    jitter=D         how far the delay of *each direction* varies (also jitter-up=D, jitter-down=D)
    dist=NAME        how it varies: uniform, normal, exponential or pareto (also dist-up=, dist-down=)
    rate=R           capacity of each direction, or `unlimited`
    up=R, down=R     capacity of one direction, instead of the rate
    outage=D@T       nothing passes for D, from T after the link's clock starts; may be repeated
    reset@T          all connections open at T are reset; may be repeated

An item that names one direction wins over one that names both, in whatever order they stand. `up` is from
client to server. Durations D and T need a unit: us, ms, s or m (minutes). Rates R need one too: bit, kbit,
mbit or gbit (per second, decimal), or B/s, kB/s, MB/s, GB/s.

The presets:

    name        round trip   jitter each way   up           down
    none        0            0                 unlimited    unlimited
    lan         1 ms         0                 1 gbit       1 gbit
    wan         80 ms        0                 100 mbit     100 mbit
    4g          60 ms        ±15 ms            8 mbit       20 mbit
    satellite   600 ms       ±5 ms             3 mbit       20 mbit
"""

from __future__ import annotations

import difflib
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, Literal, TypeVar, get_args

from loscar_core.errors import ConfigError

_T = TypeVar("_T")

Distribution = Literal["uniform", "normal", "exponential", "pareto"]

DISTRIBUTIONS: Final[tuple[Distribution, ...]] = get_args(Distribution)

PRESETS: Final[Mapping[str, str]] = {
    "none": "",
    "lan": "rtt=1ms,rate=1gbit",
    "wan": "rtt=80ms,rate=100mbit",
    "4g": "rtt=60ms,jitter=15ms,up=8mbit,down=20mbit",
    "satellite": "rtt=600ms,jitter=5ms,up=3mbit,down=20mbit",
}

# Beyond these a value is a slip of the unit rather than a link that anybody wants.
_MAX_DELAY_S: Final = 60.0
_MAX_TIME_S: Final = 30 * 86_400.0
_MIN_RATE_BYTES_PER_S: Final = 1.0
_MAX_RATE_BYTES_PER_S: Final = 1e12

# A sample never exceeds this many times the jitter: the tails are cut so that what a link holds is bounded.
_TAIL: Final[Mapping[Distribution, float]] = {
    "uniform": 1.0,
    "normal": 4.0,
    "exponential": 8.0,
    "pareto": 20.0,
}
_PARETO_SHAPE: Final = 3.0  # the smallest whole shape whose variance is finite

_DURATION_UNITS: Final[Mapping[str, Decimal]] = {
    "us": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "m": Decimal(60),
}
_BIT_UNITS: Final[Mapping[str, Decimal]] = {
    "bit": Decimal("0.125"),
    "kbit": Decimal("125"),
    "mbit": Decimal("125e3"),
    "gbit": Decimal("125e6"),
}
_BYTE_UNITS: Final[Mapping[str, Decimal]] = {
    "B/s": Decimal(1),
    "kB/s": Decimal("1e3"),
    "KB/s": Decimal("1e3"),
    "MB/s": Decimal("1e6"),
    "GB/s": Decimal("1e9"),
}

_PAIRED_KEYS: Final = ("jitter", "dist")
_KEYS: Final = (
    "rtt",
    "delay-up",
    "delay-down",
    *(f"{key}{suffix}" for key in _PAIRED_KEYS for suffix in ("", "-up", "-down")),
    "rate",
    "up",
    "down",
    "outage",
    "reset",
)
_NUMBER: Final = re.compile(r"([+-]?)(\d{1,40}(?:\.\d{0,400})?|\.\d{1,400})\s*(.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class DirectionSpec:
    """One direction of a link.

    `delay_s` is the one-way delay in seconds. `jitter_s` (seconds) and `distribution` say how each chunk's
    delay differs from it; the sum is never below zero:

    - uniform: evenly within ±jitter;
    - normal: standard deviation jitter, cut at ±4 jitter;
    - exponential: `delay_s` is the smallest delay, and jitter the mean of what is added, cut at 8 jitter;
    - pareto: the same with a heavy tail (Lomax, shape 3), cut at 20 jitter.

    `rate_bytes_per_s` is the capacity in bytes per second, None for unlimited. Raises ConfigError for values
    that no link has: negative, not finite, delays beyond a minute, rates below one byte per second.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    rate_bytes_per_s: float | None = None
    distribution: Distribution = "uniform"

    def __post_init__(self) -> None:
        for name, value_s in (("delay", self.delay_s), ("jitter", self.jitter_s)):
            if not (math.isfinite(value_s) and 0 <= value_s <= _MAX_DELAY_S):
                raise ConfigError(f"link: {name} of {value_s} s is outside 0 s to {_MAX_DELAY_S:.0f} s")
        rate = self.rate_bytes_per_s
        if rate is not None and not _MIN_RATE_BYTES_PER_S <= rate <= _MAX_RATE_BYTES_PER_S:
            raise ConfigError(
                f"link: rate of {rate} bytes per second is outside {_MIN_RATE_BYTES_PER_S:.0f} to "
                f"{_MAX_RATE_BYTES_PER_S:.0e} (None means unlimited)"
            )
        if self.distribution not in DISTRIBUTIONS:
            raise ConfigError(_unknown("distribution", self.distribution, DISTRIBUTIONS))

    @property
    def max_delay_s(self) -> float:
        """The largest delay that a chunk can meet besides queueing, in seconds."""
        return self.delay_s + _TAIL[self.distribution] * self.jitter_s

    def sample_delay_s(self, rng: random.Random) -> float:
        """One chunk's one-way delay with jitter, in seconds, at least 0."""
        if self.jitter_s == 0:
            return self.delay_s
        if self.distribution == "uniform":
            units = rng.uniform(-1.0, 1.0)
        elif self.distribution == "normal":
            units = rng.gauss(0.0, 1.0)
        elif self.distribution == "exponential":
            units = rng.expovariate(1.0)
        else:
            # Lomax with mean 1: a Pareto variable starts at 1, so the 1 is taken off and the mean scaled.
            units = (rng.paretovariate(_PARETO_SHAPE) - 1.0) * (_PARETO_SHAPE - 1.0)
        tail = _TAIL[self.distribution]
        return max(0.0, self.delay_s + self.jitter_s * min(tail, max(-tail, units)))


@dataclass(frozen=True)
class LinkSpec:
    """A link: both directions, and what happens to it when.

    `up` is from client to server. `outages` holds (start, duration) and `resets` times, all in seconds after
    the link's clock starts; both are kept sorted. `str()` gives canonical text that `parse` turns back into
    an equal spec; it names figures, never presets, so a recorded spec keeps its meaning. Raises ConfigError
    for negative or absurd times.
    """

    up: DirectionSpec = DirectionSpec()
    down: DirectionSpec = DirectionSpec()
    outages: tuple[tuple[float, float], ...] = ()
    resets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for start_s, duration_s in self.outages:
            _check_time("outage's start", start_s)
            _check_time("outage's duration", duration_s)
            if duration_s == 0:
                raise ConfigError("link: an outage must last longer than 0 s")
        for at_s in self.resets:
            _check_time("reset's time", at_s)
        object.__setattr__(self, "outages", tuple(sorted(self.outages)))
        object.__setattr__(self, "resets", tuple(sorted(self.resets)))

    @property
    def rtt_s(self) -> float:
        """The round trip without jitter and queueing, in seconds."""
        return self.up.delay_s + self.down.delay_s

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """The link that `text` describes; the module's description has the syntax.

        Raises ConfigError, with the item at fault and what is accepted instead, for anything else.
        """
        items = [item.strip() for item in text.split(",")]
        if items == [""]:
            raise ConfigError(f"link: the text is empty: give one of {', '.join(PRESETS)}, or rtt=200ms,rate=10mbit")
        preset: list[str] = []
        if items[0].lower() in PRESETS:
            figures = PRESETS[items[0].lower()]
            preset = figures.split(",") if figures else []
            items = items[1:]
        base = _collect(preset)
        given = _collect(items)
        # A general item in the overrides must also win over the preset's particular ones: `4g,rate=1mbit`.
        for key in list(base.single):
            general = _GENERAL.get(key)
            if general is not None and general in given.single:
                del base.single[key]
        single = {**base.single, **given.single}
        return cls(
            up=_direction(single, "up"),
            down=_direction(single, "down"),
            outages=tuple(_parse_outage(item) for item in given.outages),
            resets=tuple(_parse_duration(f"reset@{at}", at, _MAX_TIME_S) for at in given.resets),
        )

    def __str__(self) -> str:
        up, down = self.up, self.down
        items: list[str] = []
        if up.delay_s == down.delay_s:
            if up.delay_s:
                items.append(f"rtt={_format(2 * _exact(up.delay_s), _DURATION_UNITS, ('s', 'ms', 'us'))}")
        else:
            items += [
                f"delay-up={_format_duration(up.delay_s)}",
                f"delay-down={_format_duration(down.delay_s)}",
            ]
        items += _pair("jitter", "jitter-up", "jitter-down", up.jitter_s, down.jitter_s, 0.0, _format_duration)
        items += _pair("rate", "up", "down", up.rate_bytes_per_s, down.rate_bytes_per_s, None, _format_rate)
        items += _pair("dist", "dist-up", "dist-down", up.distribution, down.distribution, "uniform", str)
        items += [
            f"outage={_format_duration(duration_s)}@{_format_duration(start_s)}" for start_s, duration_s in self.outages
        ]
        items += [f"reset@{_format_duration(at_s)}" for at_s in self.resets]
        return ",".join(items) or "none"


def parse_links(text: str, count: int) -> tuple[LinkSpec, ...]:
    """The links of `count` workers, in slot order: one spec for all of them, or `count` separated by `;`.

    Raises ConfigError when a spec is wrong, naming its place, or when their number is neither 1 nor `count`.
    """
    texts = text.split(";")
    if len(texts) not in (1, count):
        raise ConfigError(
            f"link: {len(texts)} specs given, separated by ';', but there are {count} workers: "
            f"give one spec for all of them, or {count}"
        )
    specs: list[LinkSpec] = []
    for number, part in enumerate(texts, start=1):
        try:
            specs.append(LinkSpec.parse(part))
        except ConfigError as error:
            if len(texts) == 1:
                raise
            raise ConfigError(f"{error} (in spec {number} of {len(texts)})") from None
    return tuple(specs) if len(specs) == count else tuple(specs) * count


_GENERAL: Final[Mapping[str, str]] = {
    "delay-up": "rtt",
    "delay-down": "rtt",
    "jitter-up": "jitter",
    "jitter-down": "jitter",
    "dist-up": "dist",
    "dist-down": "dist",
    "up": "rate",
    "down": "rate",
}


@dataclass(frozen=True)
class _Items:
    """The items of one text, sorted by kind, values still as text."""

    single: dict[str, str]
    outages: list[str]
    resets: list[str]


def _collect(items: list[str]) -> _Items:
    found = _Items({}, [], [])
    for item in items:
        if not item:
            raise ConfigError("link: there is an empty item: two commas in a row, or one at the end")
        if re.match(r"reset\s*@", item, re.IGNORECASE):
            found.resets.append(item.split("@", 1)[1].strip())
            continue
        key, equals, value = (part.strip() for part in item.partition("="))
        key = key.lower()
        if not equals:
            if key in PRESETS:
                raise ConfigError(f"link: the preset {item!r} must stand first, before any other item")
            if key in _KEYS:
                raise ConfigError(f"link: {item!r} has no value: write {_example(key)}")
            raise ConfigError(_unknown("item", item, (*PRESETS, *_KEYS)))
        if key == "reset":
            raise ConfigError(f"link: {item!r} is not a reset: write {_example(key)}")
        if key not in _KEYS:
            raise ConfigError(_unknown("item", key, _KEYS))
        if key == "outage":
            found.outages.append(value)
        elif key in found.single:
            raise ConfigError(f"link: {key!r} is given twice")
        else:
            found.single[key] = value
    return found


def _direction(single: Mapping[str, str], side: Literal["up", "down"]) -> DirectionSpec:
    delay_s = 0.0
    if f"delay-{side}" in single:
        delay_s = _parse_duration(f"delay-{side}", single[f"delay-{side}"], _MAX_DELAY_S)
    elif "rtt" in single:
        delay_s = _parse_duration("rtt", single["rtt"], 2 * _MAX_DELAY_S, Decimal("0.5"))
    jitter_s = 0.0
    for key in (f"jitter-{side}", "jitter"):
        if key in single:
            jitter_s = _parse_duration(key, single[key], _MAX_DELAY_S)
            break
    rate: float | None = None
    for key in (side, "rate"):
        if key in single:
            rate = _parse_rate(key, single[key])
            break
    distribution = single.get(f"dist-{side}", single.get("dist", "uniform")).lower()
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(_unknown("distribution", distribution, DISTRIBUTIONS))
    return DirectionSpec(delay_s, jitter_s, rate, distribution)


def _parse_outage(value: str) -> tuple[float, float]:
    duration, at, start = value.partition("@")
    if not at:
        raise ConfigError(f"link: outage={value} does not say when: write {_example('outage')} (duration@start)")
    duration_s = _parse_duration(f"outage={value}", duration.strip(), _MAX_TIME_S)
    return _parse_duration(f"outage={value}", start.strip(), _MAX_TIME_S), duration_s


def _split_number(what: str, text: str, units: str, example: str) -> tuple[Decimal, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ConfigError(f"link: {what}: {text!r} is not a number with a unit, such as {example}")
    sign, digits, unit = match.groups()
    number = Decimal(digits)
    if sign == "-" and number:
        raise ConfigError(f"link: {what}: {text!r} is negative")
    if not unit:
        raise ConfigError(f"link: {what}: {text!r} has no unit: write for example {example} (units: {units})")
    return number, unit


def _parse_duration(what: str, text: str, max_s: float, factor: Decimal = Decimal(1)) -> float:
    units = ", ".join(_DURATION_UNITS)
    digits = re.match(r"\s*\d+", text)
    likely = "ms" if max_s < _MAX_TIME_S else "s"
    number, unit = _split_number(what, text, units, f"{digits[0].strip() if digits else 20}{likely}")
    scale = _DURATION_UNITS.get(unit.lower())
    if scale is None:
        raise ConfigError(f"link: {what}: {unit!r} in {text!r} is not a unit of time: use one of {units}")
    duration = number * scale
    if duration > Decimal(max_s):
        raise ConfigError(f"link: {what}: {text!r} is more than {max_s:.0f}s")
    return float(duration * factor)


def _parse_rate(what: str, text: str) -> float | None:
    if text.lower() == "unlimited":
        return None
    if re.fullmatch(r"0+(\.0*)?\D*", text, re.ASCII):
        raise ConfigError(f"link: {what}: a rate of 0 passes nothing: write {what}=unlimited, or an outage")
    units = ", ".join((*_BIT_UNITS, "B/s", "kB/s", "MB/s", "GB/s"))
    digits = re.match(r"\s*\d+", text)
    number, unit = _split_number(what, text, units, f"{digits[0].strip()}mbit" if digits else "10mbit")
    scale = _BYTE_UNITS.get(unit) or _BIT_UNITS.get(unit.lower().removesuffix("/s"))
    if scale is None:
        # Not guessed: `mb/s` and `mbps` mean bits to some tools and bytes to others.
        raise ConfigError(f"link: {what}: {unit!r} in {text!r} is not a unit of rate: use one of {units}")
    rate = number * scale
    if not _MIN_RATE_BYTES_PER_S <= rate <= _MAX_RATE_BYTES_PER_S:
        raise ConfigError(f"link: {what}: {text!r} is outside 8bit to {_MAX_RATE_BYTES_PER_S * 8 / 1e9:.0f}gbit")
    return float(rate)


def _check_time(what: str, value_s: float) -> None:
    if not (math.isfinite(value_s) and 0 <= value_s <= _MAX_TIME_S):
        raise ConfigError(f"link: an {what} of {value_s} s is outside 0 s to {_MAX_TIME_S:.0f} s")


def _example(key: str) -> str:
    if key in ("rate", "up", "down"):
        return f"{key}=10mbit"
    if key.startswith("dist"):
        return f"{key}=normal"
    return {"outage": "outage=5s@30s", "reset": "reset@20s"}.get(key, f"{key}=200ms")


def _unknown(what: str, word: str, accepted: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word.lower(), accepted, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return f"link: unknown {what} {word!r}{guess}: use one of {', '.join(accepted)}"


def _exact(value: float) -> Decimal:
    """The shortest decimal that is read back as `value`: what people write, and exact in both directions."""
    return Decimal(repr(abs(float(value))))


def _format(amount: Decimal, units: Mapping[str, Decimal], order: tuple[str, ...]) -> str:
    unit = next((name for name in order if amount >= units[name]), order[-1])
    # Dividing by these units is exact: their reciprocals have a few digits, and a float's decimal at most 17.
    digits = format(amount / units[unit], "f")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"{digits}{unit}"


def _format_duration(value_s: float) -> str:
    return _format(_exact(value_s), _DURATION_UNITS, ("s", "ms", "us"))


def _format_rate(rate: float | None) -> str:
    return "unlimited" if rate is None else _format(_exact(rate), _BIT_UNITS, ("gbit", "mbit", "kbit", "bit"))


def _pair(
    both: str, up: str, down: str, up_value: _T, down_value: _T, default: _T, show: Callable[[_T], str]
) -> list[str]:
    if up_value == down_value:
        return [] if up_value == default else [f"{both}={show(up_value)}"]
    return [f"{up}={show(up_value)}", f"{down}={show(down_value)}"]
