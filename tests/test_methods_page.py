"""docs/methods.md says what the methods are, and its example is one."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from loscar_core import methods
from loscar_core.config import RunConfig
from loscar_core.errors import ConfigError
from loscar_core.methods import METHODS, Arrival, parse_method, settle

PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")


def table() -> dict[str, list[str]]:
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|(.*)\|(.*)\|(.*)\|$", PAGE, re.MULTILINE)
    return {name: [cell.strip() for cell in cells] for name, *cells in rows if not cells[0].strip().startswith("z ←")}


def text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value.value if isinstance(value, Enum) else value)


def words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {text(value)}" for name, value in settings.items())


def test_the_table_has_every_method_with_its_options_and_settings() -> None:
    found = table()
    assert list(found) == list(METHODS)
    for name, kind in METHODS.items():
        options = ", ".join(f"`{o}={text(default)}`" for o, (_, _, default) in kind.options().items())
        assert found[name][:3] == [options, words(dict(kind.fixed)), words(dict(kind.defaults))], name


def test_the_sources_are_named() -> None:
    for kind in METHODS.values():
        for paper in re.findall(r"arXiv \S+", kind.source):
            if kind.name != "loscar":  # whose page is the algorithm's
                assert paper.strip(",;") in PAGE, kind.name


def test_the_example_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    body = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert body is not None
    assert len(body[1].strip().splitlines()) <= 32
    module = ModuleType("elastic")
    monkeypatch.setitem(sys.modules, "elastic", module)  # where dataclasses look a class up
    exec(body[1], module.__dict__)
    monkeypatch.setitem(methods.METHODS, "elastic", module.Elastic)
    method = parse_method("elastic:pull=0.3")
    usual = RunConfig(method=method.text())
    config = RunConfig(**settle(method, {f.name: getattr(usual, f.name) for f in fields(RunConfig)}, ()))
    assert config.density == 1.0
    assert parse_method(config.method) == method
    live, anchor, average, sent = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    arrival = Arrival([live], [anchor], [average], [sent], True, 1.0, 0.0)
    expected = live + np.float32(0.3) * (average - (anchor + sent))
    np.testing.assert_allclose(method.merge(arrival).values[0], expected, rtol=1e-6)
    with pytest.raises(ConfigError, match="outside"):
        parse_method("elastic:pull=2")
