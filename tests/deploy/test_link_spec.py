"""The link's text: what is accepted, what it means, and what the refusals say."""

from __future__ import annotations

import random
import statistics
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loscar_core.errors import ConfigError
from loscar_deploy.link_spec import PRESETS, DirectionSpec, Distribution, LinkSpec, parse_links

durations = st.floats(0, 60, allow_nan=False) | st.integers(0, 60_000).map(lambda ms: ms / 1000)
times = st.floats(0, 86_400, allow_nan=False)
rates = st.none() | st.floats(1, 1e12) | st.integers(1, 10_000).map(lambda mbit: mbit * 125_000.0)
directions = st.builds(DirectionSpec, durations, durations, rates, st.sampled_from(list(get_args(Distribution))))
links = st.builds(
    LinkSpec,
    directions,
    directions,
    st.lists(st.tuples(times, times.filter(bool)), max_size=3).map(tuple),
    st.lists(times, max_size=3).map(tuple),
)


@given(links)
@settings(max_examples=200, deadline=None)
def test_text_is_read_back_as_the_same_link(link: LinkSpec) -> None:
    text = str(link)
    assert LinkSpec.parse(text) == link
    assert str(LinkSpec.parse(text)) == text


@given(directions)
@settings(max_examples=50, deadline=None)
def test_equal_directions_are_written_once(direction: DirectionSpec) -> None:
    link = LinkSpec(direction, direction)
    assert LinkSpec.parse(str(link)) == link
    assert "-up" not in str(link)


def test_none_is_a_link_without_limits() -> None:
    assert LinkSpec.parse("none") == LinkSpec()
    assert str(LinkSpec()) == "none"


@pytest.mark.parametrize(
    ("name", "rtt_s", "jitter_s", "up_mbit", "down_mbit"),
    [
        ("lan", 0.001, 0.0, 1000, 1000),
        ("wan", 0.080, 0.0, 100, 100),
        ("4g", 0.060, 0.015, 8, 20),
        ("satellite", 0.600, 0.005, 3, 20),
    ],
)
def test_presets(name: str, rtt_s: float, jitter_s: float, up_mbit: float, down_mbit: float) -> None:
    link = LinkSpec.parse(name)
    assert link.rtt_s == pytest.approx(rtt_s)
    assert link.up.delay_s == link.down.delay_s == pytest.approx(rtt_s / 2)
    assert link.up.jitter_s == link.down.jitter_s == jitter_s
    assert link.up.rate_bytes_per_s == up_mbit * 125_000
    assert link.down.rate_bytes_per_s == down_mbit * 125_000


def test_every_preset_is_documented() -> None:
    import loscar_deploy.link_spec as module

    assert module.__doc__ is not None
    for name in PRESETS:
        assert f"    {name} " in module.__doc__


def test_the_full_syntax() -> None:
    link = LinkSpec.parse(
        " RTT=200ms, jitter=20ms ,rate=10mbit,up=1mbit,dist=Normal,reset@50s,outage=5s@1m,outage=500ms@2s,reset@250us"
    )
    assert link.up == DirectionSpec(0.1, 0.02, 125_000.0, "normal")
    assert link.down == DirectionSpec(0.1, 0.02, 1_250_000.0, "normal")
    assert link.outages == ((2.0, 0.5), (60.0, 5.0))
    assert link.resets == (0.00025, 50.0)


def test_directions_can_differ_in_everything() -> None:
    link = LinkSpec.parse("rtt=1s,delay-up=10ms,jitter=1ms,jitter-down=2ms,dist-up=pareto,up=1mbit,down=unlimited")
    assert link.up == DirectionSpec(0.01, 0.001, 125_000.0, "pareto")
    assert link.down == DirectionSpec(0.5, 0.002, None, "uniform")
    assert LinkSpec.parse(str(link)) == link


def test_an_item_for_one_direction_wins_in_any_order() -> None:
    assert LinkSpec.parse("up=1mbit,rate=2mbit") == LinkSpec.parse("rate=2mbit,up=1mbit")


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("satellite,rate=5mbit", "rtt=600ms,jitter=5ms,rate=5mbit"),
        ("4g,up=1mbit", "rtt=60ms,jitter=15ms,up=1mbit,down=20mbit"),
        ("4g,rate=unlimited,jitter=0ms", "rtt=60ms"),
        ("wan,outage=1s@2s,reset@3s", "rtt=80ms,rate=100mbit,outage=1s@2s,reset@3s"),
        ("none,rtt=5ms", "rtt=5ms"),
    ],
)
def test_items_after_a_preset_override_it(text: str, same_as: str) -> None:
    assert LinkSpec.parse(text) == LinkSpec.parse(same_as)


@pytest.mark.parametrize(
    ("text", "rate_bytes_per_s"),
    [
        ("8bit", 1),
        ("80kbit", 10_000),
        ("0.5mbit", 62_500),
        ("1Gbit/s", 125e6),
        ("100B/s", 100),
        ("3kB/s", 3000),
        ("2MB/s", 2e6),
        ("1GB/s", 1e9),
    ],
)
def test_units_of_rate(text: str, rate_bytes_per_s: float) -> None:
    assert LinkSpec.parse(f"rate={text}").up.rate_bytes_per_s == rate_bytes_per_s


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "text is empty"),
        ("wann", "did you mean 'wan'"),
        ("rrt=5ms", "did you mean 'rtt'"),
        ("rtt", "write rtt=200ms"),
        ("rtt=", "not a number with a unit"),
        ("rtt=fast", "not a number with a unit"),
        ("rtt=nan", "not a number with a unit"),
        ("rtt=200", "no unit: write for example 200ms"),
        ("rtt=1h", "'h' in '1h' is not a unit of time: use one of us, ms, s, m"),
        ("rtt=-5ms", "negative"),
        ("jitter=-1ms", "negative"),
        ("rtt=5m", "more than 120s"),
        ("rtt=1ms,rtt=2ms", "'rtt' is given twice"),
        ("rtt=1ms,,rate=1mbit", "empty item"),
        ("rtt=1ms,", "empty item"),
        ("rtt=1ms,wan", "must stand first"),
        ("rate=0", "write rate=unlimited"),
        ("up=0mbit", "write up=unlimited"),
        ("rate=-1mbit", "negative"),
        ("rate=5", "no unit: write for example 5mbit"),
        ("rate=5mbps", "not a unit of rate"),
        ("rate=5mb/s", "not a unit of rate"),
        ("rate=1bit", "outside 8bit"),
        ("dist=gauss", "unknown distribution 'gauss'"),
        ("outage", "write outage=5s@30s"),
        ("outage=5s", "does not say when: write outage=5s@30s"),
        ("outage=5s@", "not a number with a unit"),
        ("outage=5s@30", "no unit: write for example 30s"),
        ("outage=0s@30s", "longer than 0 s"),
        ("outage=5s@-3s", "negative"),
        ("reset=20s", "write reset@20s"),
        ("reset@20", "no unit: write for example 20s"),
        ("loss=1%", "unknown item 'loss'"),
    ],
)
def test_refusals_say_what_to_write(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LinkSpec.parse(text)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


@given(st.text(alphabet="rtupdown=jier@,;.-0123456789msbkgMB/ ", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_link_or_a_config_error(text: str) -> None:
    try:
        link = LinkSpec.parse(text)
    except ConfigError:
        return
    assert LinkSpec.parse(str(link)) == link


@pytest.mark.parametrize(
    "values",
    [
        {"delay_s": -1.0},
        {"delay_s": float("nan")},
        {"jitter_s": float("inf")},
        {"rate_bytes_per_s": 0.0},
        {"rate_bytes_per_s": float("nan")},
        {"distribution": "gauss"},
    ],
)
def test_impossible_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        DirectionSpec(**values)  # type: ignore[arg-type]


def test_one_spec_serves_all_workers() -> None:
    assert parse_links("wan", 3) == (LinkSpec.parse("wan"),) * 3


def test_unequal_workers_get_a_spec_each() -> None:
    assert parse_links("wan; 4g,rate=1mbit;none", 3) == tuple(
        LinkSpec.parse(text) for text in ("wan", "4g,rate=1mbit", "none")
    )


def test_a_wrong_number_of_specs_names_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"2 specs given.*there are 3 workers"):
        parse_links("wan;lan", 3)


def test_a_wrong_spec_among_several_is_located() -> None:
    with pytest.raises(ConfigError, match="spec 2 of 2"):
        parse_links("wan;rtt=5", 2)


@pytest.mark.parametrize(
    ("distribution", "mean_s", "low_s", "high_s"),
    [
        ("uniform", 0.100, 0.090, 0.110),
        ("normal", 0.100, 0.060, 0.140),
        ("exponential", 0.110, 0.100, 0.180),
        ("pareto", 0.110, 0.100, 0.300),
    ],
)
def test_distributions(distribution: Distribution, mean_s: float, low_s: float, high_s: float) -> None:
    direction = DirectionSpec(0.1, 0.01, None, distribution)
    rng = random.Random(1)
    samples = [direction.sample_delay_s(rng) for _ in range(20_000)]
    assert statistics.fmean(samples) == pytest.approx(mean_s, abs=0.0005)
    assert low_s <= min(samples)
    assert max(samples) <= high_s + 1e-12
    assert direction.max_delay_s == pytest.approx(high_s)


def test_delays_are_never_negative() -> None:
    direction = DirectionSpec(0.001, 0.05, None, "normal")
    rng = random.Random(1)
    assert min(direction.sample_delay_s(rng) for _ in range(1000)) == 0.0
