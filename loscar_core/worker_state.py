"""A worker's half of the run as it is saved and restored, so that a pre-empted worker comes back as itself.

Same name, another incarnation: it knows which one it goes on from, and the inclusion table of the state that it meets
decides what of that one's contributions is in. The process that saved the state may have lived on and contributed more;
what of the saved progress went out with that is told by the table too, and forgotten (`WorkerCatchUp`).
Arrays are NumPy, everything else is JSON-ready.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loscar_core.errors import ConfigError, MalformedError, WrongRunError
from loscar_core.layout import require_same
from loscar_core.messages import Contribution
from loscar_core.plan import Part, RoundKind, RoundPlan
from loscar_core.replica import Indices, size_of
from loscar_core.saved_state import SavedState, restore
from loscar_core.selection import SelectionKind
from loscar_core.sparse_delta import CODING
from loscar_core.values import ValueType
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_ledger import Record

FORMAT = 1
FORMERS_KEPT = 64


def export_worker(engine: WorkerEngine) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The engine's state: JSON-ready values, and arrays that are not shared with it.

    Raises:
        ConfigError: the worker has not joined yet.
    """
    if engine.config is None or not engine.initialised:
        raise ConfigError("a session's state can be saved once it has joined")
    anchor = engine.anchor.copy()
    saved = SavedState(
        engine.run_id, engine.epoch, engine.config, engine.layout, anchor, None, max(0.0, engine.elapsed_s)
    )
    ledger = engine.ledger
    arrays: dict[str, NDArray[Any]] = {"anchor": anchor.vector, "anchor_statistics": anchor.statistics}
    records = []
    for number, record in enumerate(ledger.all()):
        arrays[f"sent_{number}"] = record.sent.copy()
        payload = b"".join(m.values for m in record.messages)
        arrays[f"payload_{number}"] = np.frombuffer(payload, np.uint8).copy()
        if record.plan.explicit:
            arrays[f"where_{number}"] = record.indices.copy()
            coded = b"".join(m.indices for m in record.messages)
            arrays[f"indices_{number}"] = np.frombuffer(coded, np.uint8).copy()
        records.append(_record_values(record))
    values = {
        "format": FORMAT,
        "name": engine.name,
        "incarnation": engine.incarnation.hex(),
        "formers": [i.hex() for i in engine.formers],
        "slot": engine.slot,
        "state": saved.metadata(),
        "records": records,
        "counts": [ledger.sent, ledger.included, ledger.returned],
        "bytes": [engine.bytes_up, engine.bytes_down],
    }
    return values, arrays


def _record_values(record: Record) -> dict[str, Any]:
    p = record.plan
    values = {
        "plan": [p.round, int(p.kind), p.selection.value, p.count, p.value_type.value],
        "subtracted": format(record.subtracted, "x"),
        "decided": record.decided,
        "epochs": sorted(record.epochs),
        "outcomes": [[epoch, format(mask, "x")] for epoch, mask in record.outcomes.items()],
        "messages": [
            [m.epoch, m.part, m.offset, len(m.values), m.checksum, m.local_steps, m.overlap_steps]
            for m in record.messages
        ],
    }
    if p.explicit:
        values["parts"] = [[part.start, part.stop] for part in record.parts]
        values["exhausted"] = record.exhausted
        values["explicit"] = [[len(m.indices), m.base, m.total, m.coding is not None] for m in record.messages]
    return values


def resumed_as(values: dict[str, Any], incarnation: bytes) -> dict[str, Any]:
    """The same state, noting who resumes from it. To be saved before that process joins: should it die before it has
    saved a state of its own, what it did in the meantime is known to be of the same worker."""
    former = [values["resumed_as"]] if "resumed_as" in values else []
    return {**values, "formers": [*values["formers"], *former], "resumed_as": incarnation.hex()}


def import_worker(engine: WorkerEngine, values: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Give a new engine, of an incarnation of its own, the state of a saved one; its layout must be the same.

    Raises:
        WrongModelError, WrongRunError: the state is of another model, or not of the run that the engine insists on.
        MalformedError: it makes no sense.
    """
    try:
        if values["format"] != FORMAT:
            raise MalformedError(f"a worker's state of format {values['format']}; this version reads {FORMAT}")
        vector = np.array(arrays["anchor"], np.float32)
        statistics = np.array(arrays["anchor_statistics"], np.float32)
        saved = restore(values["state"], vector, statistics, None)
        require_same(saved.layout, engine.layout)
        if engine.run_id and engine.run_id != saved.run_id:
            raise WrongRunError(f"the saved state is of run {saved.run_id.hex()}, not {engine.run_id.hex()}")
        engine.name = values["name"]
        if "resumed_as" in values:
            engine.incarnation = bytes.fromhex(values["resumed_as"])
        incarnations = [*values["formers"], values["incarnation"]]
        engine.formers = tuple(bytes.fromhex(i) for i in incarnations[-FORMERS_KEPT:])
        engine._former_at_work = True
        engine.run_id, engine.epoch, engine.config = saved.run_id, saved.epoch, saved.config
        engine.slot = values["slot"]
        engine.elapsed_s = saved.elapsed_s
        engine.anchor = saved.replica
        engine.initialised = True
        engine.bytes_up, engine.bytes_down = values["bytes"]
        ledger = engine.ledger
        ledger.records.clear()
        ledger.superseded.clear()
        for number, entry in enumerate(values["records"]):
            record = _record(engine, number, entry, arrays)
            if record.plan.round in ledger.records:  # superseded ones come first
                ledger.superseded.append(ledger.records[record.plan.round])
            ledger.records[record.plan.round] = record
        ledger.sent, ledger.included, ledger.returned = values["counts"]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise MalformedError(f"a worker's state that does not make sense: {error!r}") from None


def _record(engine: WorkerEngine, number: int, entry: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Record:
    assert engine.config is not None
    round_, kind, selection, count, value_type = entry["plan"]
    plan = RoundPlan(round_, RoundKind(kind), SelectionKind(selection), count, ValueType(value_type))
    anchor = engine.anchor
    where = plan.where(engine.config.seed, anchor.vector.size)
    parts = plan.parts(engine.config.seed, anchor.vector.size, anchor.statistics.size)
    payload = arrays[f"payload_{number}"].tobytes()
    messages, start = [], 0
    for epoch, part, offset, size, checksum, local, overlap in entry["messages"]:
        piece = payload[start : start + size]
        messages.append(Contribution(epoch, round_, part, offset, piece, checksum, local, overlap))
        start += size
    if plan.explicit:
        where, parts, messages = _explicit(number, entry, arrays, parts, messages)
        if where.size and (where[0] < 0 or where[-1] >= anchor.vector.size or not np.all(np.diff(where) > 0)):
            raise MalformedError("a contribution to coordinates that are none")
    record = Record(
        plan,
        where,
        np.array(arrays[f"sent_{number}"], np.float32),
        parts,
        tuple(messages),
        int(entry["subtracted"], 16),
        entry["decided"],
        set(entry["epochs"]),
        {epoch: int(mask, 16) for epoch, mask in entry["outcomes"]},
        entry.get("exhausted", False),
    )
    if record.sent.size != size_of(where):
        raise MalformedError(f"a contribution of {record.sent.size} values to {size_of(where)} coordinates")
    return record


def _explicit(
    number: int,
    entry: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    parts: tuple[Part, ...],
    messages: list[Contribution],
) -> tuple[Indices, tuple[Part, ...], list[Contribution]]:
    """What of a contribution does not follow from the seed: its coordinates, its parts in them, its messages'."""
    where = np.array(arrays[f"where_{number}"], np.int64)
    own = [replace(p, start=int(a), stop=int(b)) for p, (a, b) in zip(parts, entry["parts"], strict=True)]
    cuts = [0, *(p.stop for p in own if not p.statistics)]
    if [p.start for p in own if not p.statistics] != cuts[:-1] or cuts != sorted(cuts) or cuts[-1] != where.size:
        raise MalformedError(f"a contribution of {where.size} coordinates in parts up to {cuts}")
    coded = arrays[f"indices_{number}"].tobytes()
    found, at = [], 0
    for message, (size, base, total, explicit) in zip(messages, entry["explicit"], strict=True):
        indices, coding = coded[at : at + size], CODING if explicit else None
        found.append(replace(message, indices=indices, base=base, total=total, coding=coding))
        at += size
    return where, tuple(own), found
