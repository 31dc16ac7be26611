"""The training methods by name."""

from __future__ import annotations

from loscar_core.errors import ConfigError
from loscar_core.methods.base import Arrival, Merged, Method, parse_options, require_selection, settle
from loscar_core.methods.dppf import Dppf
from loscar_core.methods.loscar_sgd import LoscarSgd
from loscar_core.methods.mixvr import MixVr
from loscar_core.methods.neighbours import Blend, Cocod, LocalSgd, OverlapLocalSgd, Sparta

METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (LoscarSgd, Dppf, MixVr, LocalSgd, Cocod, OverlapLocalSgd, Blend, Sparta)
}


def parse_method(text: str) -> Method:
    """A method from NAME or NAME:KEY=VALUE,…

    Raises:
        ConfigError: naming the known methods, or the method's options.
    """
    name, _, options = text.partition(":")
    kind = METHODS.get(name.strip())
    if kind is None:
        raise ConfigError(f"method {name.strip()!r} is not one of {', '.join(METHODS)}")
    return parse_options(kind, options)


__all__ = ["METHODS", "Arrival", "Merged", "Method", "parse_method", "require_selection", "settle"]
