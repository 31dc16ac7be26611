"""What a training method is: what it asks of a run, and how a worker merges an average.

The service, the wire and the state machines know nothing of methods: they average what workers send. A method says
which settings it needs (density, selection, pace) and turns a delayed average into new live values. Its options are a
dataclass, written on the command line as NAME:KEY=VALUE,KEY=VALUE and carried in the run's configuration as that text.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from loscar_core.errors import ConfigError
from loscar_core.merge import MergeKind, merge_pieces
from loscar_core.selection import SelectionKind


def having(**values: Any) -> Mapping[str, Any]:
    """Settings, as methods list them."""
    return MappingProxyType(values)


NOTHING = having()


class Array(Protocol):
    """What a method needs of an array: elementwise arithmetic with its like and with numbers, and the sum."""

    def __add__(self, other: Self, /) -> Self: ...
    def __sub__(self, other: Self, /) -> Self: ...
    def __mul__(self, other: Any, /) -> Self: ...
    def sum(self) -> Any: ...


V = TypeVar("V", bound=Array)


@dataclass(frozen=True, slots=True)
class Arrival(Generic[V]):
    """An average that has arrived, on the round's selection: K float32 values in pieces (one for each device and
    dtype; a method that needs a norm needs all of them).

    Attributes:
        live: z, the values now.
        anchor: a, the consensus before the round.
        new_anchor: a_new, the consensus after it.
        sent: δ̂, what of this worker is in the average (y = a + δ̂ is where it was), or None when nothing is.
        whole: all that it contributed to the round is in.
        fraction: K/d, the share of the coordinates that this is about, in (0, 1].
        progress: how much of the run is over, in 0..1; 0 when nobody knows.
    """

    live: Sequence[V]
    anchor: Sequence[V]
    new_anchor: Sequence[V]
    sent: Sequence[V] | None
    whole: bool
    fraction: float
    progress: float


@dataclass(frozen=True, slots=True)
class Merged(Generic[V]):
    """What becomes of it.

    Attributes:
        values: the new live values, piece by piece.
        distance: ‖x − x_A‖ over all coordinates just after the merge, for methods that hold one; else None.
    """

    values: list[V]
    distance: float | None = None


def merged_by(kind: MergeKind, arrival: Arrival[V]) -> Merged[V]:
    """The merge of LOSCAR-SGD, or the overwriting one."""
    return Merged(merge_pieces(kind, arrival.live, arrival.anchor, arrival.new_anchor, arrival.sent))


@dataclass(frozen=True)
class Method:
    """One training method; subclasses are frozen dataclasses whose fields are its options.

    Class attributes:
        name: on the command line.
        summary: one line for the documentation.
        source: where it is published.
        fixed: settings of `RunConfig` that it is not itself without.
        defaults: settings that it has unless the user says otherwise.
        stays: a worker moves only by its own steps and rounds, never because the consensus has.
        follows: a worker that was away takes over the consensus as it is.
        by_coordinate: what becomes of a coordinate depends on nothing but its own values, so that a round can be merged
            a little at a time.
        vectors: names of what is averaged beside the model.
        in_common: why all workers have to select the same coordinates; empty where they need not.
        spelling: option names that are no Python names (`lambda`), to their fields.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    fixed: ClassVar[Mapping[str, Any]] = NOTHING
    defaults: ClassVar[Mapping[str, Any]] = NOTHING
    stays: ClassVar[bool] = False
    follows: ClassVar[bool] = False
    by_coordinate: ClassVar[bool] = False
    vectors: ClassVar[tuple[str, ...]] = ()
    in_common: ClassVar[str] = ""
    spelling: ClassVar[Mapping[str, str]] = NOTHING

    def merge(self, arrival: Arrival[V]) -> Merged[V]:
        """The live values after a round; a pure function of what has arrived."""
        raise NotImplementedError

    @property
    def needs_length(self) -> bool:
        """It needs to know when the run ends."""
        return False

    @property
    def uses_merge(self) -> bool:
        """`--merge` is one of its settings."""
        return False

    def with_merge(self, kind: MergeKind) -> Method:
        """The method with the run's `--merge`."""
        return self

    def demands(self) -> Mapping[str, Any]:
        """The settings that it is fixed to, those that follow from its options included."""
        return self.fixed

    @classmethod
    def options(cls) -> dict[str, tuple[str, type, Any]]:
        """Its options by their names on the command line: (field, type, default)."""
        hints = typing.get_type_hints(cls)
        back = {field: spelled for spelled, field in cls.spelling.items()}
        own = (f for f in fields(cls) if f.default is not MISSING and f.metadata.get("option", True))
        return {back.get(f.name, f.name): (f.name, hints[f.name], f.default) for f in own}

    def settings(self) -> dict[str, Any]:
        """Its options and their values, by their names on the command line."""
        return {spelled: getattr(self, field) for spelled, (field, _, _) in self.options().items()}

    def text(self) -> str:
        """As on the command line, with every option written out; `parse_method` reads it."""
        return self.name + "".join(
            f"{',' if i else ':'}{key}={value.value if isinstance(value, Enum) else repr(value)}"
            for i, (key, value) in enumerate(self.settings().items())
        )


def parse_options(kind: type[Method], text: str) -> Method:
    """A method from the KEY=VALUE,… after its name. Raises ConfigError naming what is wrong."""
    known = kind.options()
    given: dict[str, Any] = {}
    for piece in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = piece.partition("=")
        if not equals or key.strip() not in known:
            options = ", ".join(f"{name}={_shown(default)}" for name, (_, _, default) in known.items())
            raise ConfigError(f"method {kind.name}: {piece!r} is not one of its options: {options or 'it has none'}")
        field, type_, _ = known[key.strip()]
        if field in given:
            raise ConfigError(f"method {kind.name}: {key.strip()} is given twice")
        try:
            given[field] = type_(value.strip())
        except ValueError:
            choices = f" is not one of {', '.join(m.value for m in type_)}" if issubclass(type_, Enum) else ""
            raise ConfigError(
                f"method {kind.name}: {key.strip()}={value.strip()}{choices or ' is not a number'}"
            ) from None
    return kind(**given)


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def settle(method: Method, values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """A run's settings as the method has them.

    Args:
        values: settings of `RunConfig`.
        given: names of those that the user has chosen; the others are somebody's defaults.

    Raises:
        ConfigError: a chosen setting is not the one that the method is fixed to, or the run has no known end and the
            method needs one.
    """
    settled = {**values, **{name: value for name, value in method.defaults.items() if name not in given}}
    for name, value in method.demands().items():
        if name in given and values[name] != value:
            option, shown = name.replace("_", "-"), "auto" if values[name] is None else _shown(values[name])
            raise ConfigError(f"--{option} {shown} is not {method.name}, which has {_shown(value)}: leave it out")
        settled[name] = value
    if "merge" in given and not method.uses_merge:
        raise ConfigError(f"--merge is a setting of --method loscar: {method.name} has a merge of its own")
    if method.needs_length and all(settled.get(name) is None for name in ("rounds", "duration_s", "max_steps")):
        raise ConfigError(f"method {method.name} needs to know the run's end: give --rounds, --duration or --max-steps")
    require_selection(method, settled.get("selection"))
    return settled


def require_selection(method: Method, selection: SelectionKind | None) -> None:
    """Raises ConfigError for a method that is none with that selection."""
    if selection is SelectionKind.TOPK and method.in_common:
        raise ConfigError(f"--selection topk is not for method {method.name}, which {method.in_common}")
