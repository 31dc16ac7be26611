"""A model spread over several servers: whose coordinates are whose, and nobody at the wrong one."""

from __future__ import annotations

import numpy as np
import pytest
from desk import Desk, incarnation
from hypothesis import given
from hypothesis import strategies as st

from loscar_core.config import RunConfig
from loscar_core.effects import Refused
from loscar_core.errors import ConfigError, MalformedError, WrongRunError
from loscar_core.layout import Layout, Segment, Shard, joined, parse_shard
from loscar_core.messages import Welcome
from loscar_core.replica import Replica
from loscar_core.saved_state import SavedState, restore
from loscar_core.state import Lineage, Position
from loscar_core.worker_engine import WorkerEngine

SIDES = st.integers(0, 7)
SEGMENTS = st.lists(st.lists(SIDES, max_size=3).map(tuple), min_size=1, max_size=8)


def layout_of(shapes: list[tuple[int, ...]]) -> Layout:
    segments = tuple(Segment(f"layer.{i}", shape, "float32") for i, shape in enumerate(shapes))
    return Layout(segments, (Segment("mean", (3,), "float32"),), 99)


@given(SEGMENTS, st.integers(1, 9))
def test_the_shards_of_a_model_are_the_model(shapes: list[tuple[int, ...]], count: int) -> None:
    try:
        whole = layout_of(shapes)
    except ConfigError:
        return  # no coordinates at all
    shards = [Shard(i, count) for i in range(count)]
    if count > whole.dimension:
        with pytest.raises(ConfigError, match=r"cannot be spread|nothing to average"):
            [shard.layout(whole) for shard in shards]
        return
    parts = [shard.layout(whole) for shard in shards]
    spans = [shard.span(whole.dimension) for shard in shards]
    assert [end - first for first, end in spans] == [part.dimension for part in parts]
    assert [first for first, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == whole.dimension
    assert max(p.dimension for p in parts) - min(p.dimension for p in parts) <= 1
    assert joined(parts) == whole
    assert [part.statistics_size for part in parts] == [3] + [0] * (count - 1)
    assert len({part.fingerprint for part in parts}) == count


def test_parts_that_do_not_fit_together() -> None:
    whole = layout_of([(4, 4), (5,)])
    first, second, third = (Shard(i, 3).layout(whole) for i in range(3))
    for wrong in ([first, third], [second, third], [first, second], [third, second, first], [first, first]):
        with pytest.raises(MalformedError, match="do not fit together"):
            joined(wrong)
    other = Layout(third.parameters, (), 100)
    with pytest.raises(MalformedError, match="frozen parameters differ"):
        joined([first, second, other])


def test_a_shard_in_words() -> None:
    assert parse_shard("0/2") == Shard(0, 2)
    assert str(Shard(1, 2)) == "1/2"
    for text in ("", "2", "1/", "/2", "-1/2", "0/2/3", "a/b", "0x1/2", "1.0/2", " 0/2"):
        with pytest.raises(ConfigError, match="not of the form K/N"):
            parse_shard(text)
    for text, what in (("2/2", "no shard 2 of 2"), ("0/0", "0 shards"), ("0/99999", "99999 shards")):
        with pytest.raises(ConfigError, match=what):
            parse_shard(text)


def test_every_shard_has_a_seed_of_its_own() -> None:
    seeds = {Shard(i, 8).seed(seed) for i in range(8) for seed in range(4)}
    assert len(seeds) == 32
    assert Shard(0, 8).seed(5) == 5
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_configurations_that_make_no_sense() -> None:
    for ending in ({"rounds": 3}, {"duration_s": 1.0}, {"max_steps": 3}):
        with pytest.raises(ConfigError, match="only shard 0 says when a run ends"):
            RunConfig(shard=Shard(1, 2), **ending)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="which takes one server"):
        RunConfig(method="mixvr", dependent=2, shard=Shard(0, 2))


def test_the_server_refuses_those_who_take_it_for_another_shard() -> None:
    desk = Desk(config={"shard": Shard(1, 2)})
    for peer, shard in enumerate((Shard(), Shard(0, 2), Shard(1, 3))):
        refused = [e for e in desk.hello(peer, shard=shard) if isinstance(e, Refused)]
        assert [type(e.error) for e in refused] == [WrongRunError]
        assert "this server is shard 1/2" in str(refused[0].error)
    assert not [e for e in desk.hello(9, shard=Shard(1, 2)) if isinstance(e, Refused)]


def test_a_worker_refuses_a_server_that_lets_everybody_in() -> None:
    vector, statistics = np.zeros(4, np.float32), np.zeros(3, np.float32)
    engine = WorkerEngine("w", incarnation("w"), layout_of([(4,)]), vector, statistics, shard=Shard(1, 2))
    assert engine.hello().shard == Shard(1, 2)
    welcome = Welcome(b"r" * 16, 1, 0, RunConfig(), 1.0, 5.0, Position(), 0, Lineage(), (), -1.0)
    with pytest.raises(WrongRunError, match="the server is shard 0/1 of the run, not 1/2"):
        engine.received(welcome)


def test_a_saved_state_knows_its_shard() -> None:
    layout = Shard(1, 2).layout(layout_of([(4, 4)]))
    state = Replica.initial(np.zeros(8, np.float32), np.empty(0, np.float32))
    saved = SavedState(b"r" * 16, 1, RunConfig(shard=Shard(1, 2)), layout, state, None, 0.0)
    again = restore(saved.metadata(), state.vector, state.statistics, None)
    assert again.config == saved.config
    assert again.layout == layout
    before_there_were_shards = saved.metadata()
    del before_there_were_shards["config"]["shard"]
    assert restore(before_there_were_shards, state.vector, state.statistics, None).config.shard == Shard()
