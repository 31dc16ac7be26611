from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Selection(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SELECTION_UNSPECIFIED: _ClassVar[Selection]
    SELECTION_RANDOM: _ClassVar[Selection]
    SELECTION_SWEEP: _ClassVar[Selection]
    SELECTION_BLOCK: _ClassVar[Selection]
    SELECTION_TOPK: _ClassVar[Selection]
    SELECTION_ALL: _ClassVar[Selection]
    SELECTION_HEAD: _ClassVar[Selection]
    SELECTION_TAIL: _ClassVar[Selection]

class ValueType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VALUE_TYPE_UNSPECIFIED: _ClassVar[ValueType]
    VALUE_TYPE_FLOAT32: _ClassVar[ValueType]
    VALUE_TYPE_BFLOAT16: _ClassVar[ValueType]
    VALUE_TYPE_FLOAT16: _ClassVar[ValueType]
    VALUE_TYPE_INT8: _ClassVar[ValueType]

class RoundKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUND_KIND_TRAIN: _ClassVar[RoundKind]
    ROUND_KIND_EVALUATION: _ClassVar[RoundKind]
    ROUND_KIND_CONSOLIDATION: _ClassVar[RoundKind]
    ROUND_KIND_FINAL: _ClassVar[RoundKind]
    ROUND_KIND_END: _ClassVar[RoundKind]

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_INITIAL_MODEL: _ClassVar[Purpose]
    PURPOSE_CATCH_UP: _ClassVar[Purpose]
    PURPOSE_ANCHOR: _ClassVar[Purpose]
    PURPOSE_PROGRESS: _ClassVar[Purpose]

class IndexCoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INDEX_CODING_SEEDED: _ClassVar[IndexCoding]
    INDEX_CODING_PLAIN: _ClassVar[IndexCoding]
    INDEX_CODING_GAPS: _ClassVar[IndexCoding]
SELECTION_UNSPECIFIED: Selection
SELECTION_RANDOM: Selection
SELECTION_SWEEP: Selection
SELECTION_BLOCK: Selection
SELECTION_TOPK: Selection
SELECTION_ALL: Selection
SELECTION_HEAD: Selection
SELECTION_TAIL: Selection
VALUE_TYPE_UNSPECIFIED: ValueType
VALUE_TYPE_FLOAT32: ValueType
VALUE_TYPE_BFLOAT16: ValueType
VALUE_TYPE_FLOAT16: ValueType
VALUE_TYPE_INT8: ValueType
ROUND_KIND_TRAIN: RoundKind
ROUND_KIND_EVALUATION: RoundKind
ROUND_KIND_CONSOLIDATION: RoundKind
ROUND_KIND_FINAL: RoundKind
ROUND_KIND_END: RoundKind
PURPOSE_INITIAL_MODEL: Purpose
PURPOSE_CATCH_UP: Purpose
PURPOSE_ANCHOR: Purpose
PURPOSE_PROGRESS: Purpose
INDEX_CODING_SEEDED: IndexCoding
INDEX_CODING_PLAIN: IndexCoding
INDEX_CODING_GAPS: IndexCoding

class WorkerMessage(_message.Message):
    __slots__ = ("contribution", "heartbeat", "hello", "vector", "ready", "refresh", "stop_run", "leave", "state_offer")
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    STOP_RUN_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    STATE_OFFER_FIELD_NUMBER: _ClassVar[int]
    contribution: Contribution
    heartbeat: Heartbeat
    hello: Hello
    vector: VectorChunk
    ready: Ready
    refresh: Refresh
    stop_run: StopRun
    leave: Leave
    state_offer: StateOffer
    def __init__(self, contribution: _Optional[_Union[Contribution, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., vector: _Optional[_Union[VectorChunk, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., refresh: _Optional[_Union[Refresh, _Mapping]] = ..., stop_run: _Optional[_Union[StopRun, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., state_offer: _Optional[_Union[StateOffer, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("answer", "commit", "heartbeat_reply", "welcome", "vector", "catch_up", "open_round", "roster_change", "send_state", "goodbye", "more")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_REPLY_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    CATCH_UP_FIELD_NUMBER: _ClassVar[int]
    OPEN_ROUND_FIELD_NUMBER: _ClassVar[int]
    ROSTER_CHANGE_FIELD_NUMBER: _ClassVar[int]
    SEND_STATE_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    answer: Answer
    commit: Commit
    heartbeat_reply: HeartbeatReply
    welcome: Welcome
    vector: VectorChunk
    catch_up: CatchUp
    open_round: OpenRound
    roster_change: RosterChange
    send_state: SendState
    goodbye: Goodbye
    more: _containers.RepeatedCompositeFieldContainer[ServerMessage]
    def __init__(self, answer: _Optional[_Union[Answer, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., heartbeat_reply: _Optional[_Union[HeartbeatReply, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., vector: _Optional[_Union[VectorChunk, _Mapping]] = ..., catch_up: _Optional[_Union[CatchUp, _Mapping]] = ..., open_round: _Optional[_Union[OpenRound, _Mapping]] = ..., roster_change: _Optional[_Union[RosterChange, _Mapping]] = ..., send_state: _Optional[_Union[SendState, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., more: _Optional[_Iterable[_Union[ServerMessage, _Mapping]]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("name", "shape", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("parameters", "statistics", "frozen_checksum")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FIELD_NUMBER: _ClassVar[int]
    FROZEN_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedCompositeFieldContainer[Segment]
    statistics: _containers.RepeatedCompositeFieldContainer[Segment]
    frozen_checksum: int
    def __init__(self, parameters: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., statistics: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., frozen_checksum: _Optional[int] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("epoch", "round")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    round: int
    def __init__(self, epoch: _Optional[int] = ..., round: _Optional[int] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("epoch", "first_round")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROUND_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    first_round: int
    def __init__(self, epoch: _Optional[int] = ..., first_round: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("round", "kind", "selection", "count", "value_type")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    VALUE_TYPE_FIELD_NUMBER: _ClassVar[int]
    round: int
    kind: RoundKind
    selection: Selection
    count: int
    value_type: ValueType
    def __init__(self, round: _Optional[int] = ..., kind: _Optional[_Union[RoundKind, str]] = ..., selection: _Optional[_Union[Selection, str]] = ..., count: _Optional[int] = ..., value_type: _Optional[_Union[ValueType, str]] = ...) -> None: ...

class CommittedRound(_message.Message):
    __slots__ = ("position", "plan", "digest")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    position: Position
    plan: Plan
    digest: int
    def __init__(self, position: _Optional[_Union[Position, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., digest: _Optional[int] = ...) -> None: ...

class InclusionTable(_message.Message):
    __slots__ = ("incarnations", "rounds", "mask_of", "masks")
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    MASK_OF_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    incarnations: bytes
    rounds: _containers.RepeatedScalarFieldContainer[int]
    mask_of: _containers.RepeatedScalarFieldContainer[int]
    masks: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, incarnations: _Optional[bytes] = ..., rounds: _Optional[_Iterable[int]] = ..., mask_of: _Optional[_Iterable[int]] = ..., masks: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("index", "count")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    index: int
    count: int
    def __init__(self, index: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class RunConfig(_message.Message):
    __slots__ = ("seed", "density", "coordinates", "selection", "value_type", "merge", "local_steps", "sync_interval_s", "overlap_steps", "rounds", "duration_s", "max_steps", "final_round", "evaluate_every", "method", "dependent", "shard")
    SEED_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    COORDINATES_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    VALUE_TYPE_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    SYNC_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_STEPS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    FINAL_ROUND_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_EVERY_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    DEPENDENT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    seed: int
    density: float
    coordinates: int
    selection: Selection
    value_type: ValueType
    merge: str
    local_steps: int
    sync_interval_s: float
    overlap_steps: int
    rounds: int
    duration_s: float
    max_steps: int
    final_round: str
    evaluate_every: int
    method: str
    dependent: int
    shard: Shard
    def __init__(self, seed: _Optional[int] = ..., density: _Optional[float] = ..., coordinates: _Optional[int] = ..., selection: _Optional[_Union[Selection, str]] = ..., value_type: _Optional[_Union[ValueType, str]] = ..., merge: _Optional[str] = ..., local_steps: _Optional[int] = ..., sync_interval_s: _Optional[float] = ..., overlap_steps: _Optional[int] = ..., rounds: _Optional[int] = ..., duration_s: _Optional[float] = ..., max_steps: _Optional[int] = ..., final_round: _Optional[str] = ..., evaluate_every: _Optional[int] = ..., method: _Optional[str] = ..., dependent: _Optional[int] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "run_id", "name", "incarnation", "slot", "observer", "layout", "vector_checksum", "epoch", "members", "position", "digest", "lineage", "recent", "capabilities", "weight", "partial", "shard")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    OBSERVER_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run_id: bytes
    name: str
    incarnation: bytes
    slot: int
    observer: bool
    layout: Layout
    vector_checksum: int
    epoch: int
    members: int
    position: Position
    digest: int
    lineage: _containers.RepeatedCompositeFieldContainer[Span]
    recent: _containers.RepeatedCompositeFieldContainer[CommittedRound]
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    weight: float
    partial: Partial
    shard: Shard
    def __init__(self, protocol_version: _Optional[int] = ..., run_id: _Optional[bytes] = ..., name: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., slot: _Optional[int] = ..., observer: bool = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., vector_checksum: _Optional[int] = ..., epoch: _Optional[int] = ..., members: _Optional[int] = ..., position: _Optional[_Union[Position, _Mapping]] = ..., digest: _Optional[int] = ..., lineage: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., recent: _Optional[_Iterable[_Union[CommittedRound, _Mapping]]] = ..., capabilities: _Optional[_Iterable[str]] = ..., weight: _Optional[float] = ..., partial: _Optional[_Union[Partial, _Mapping]] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ...) -> None: ...

class Partial(_message.Message):
    __slots__ = ("position", "digest", "filled")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FILLED_FIELD_NUMBER: _ClassVar[int]
    position: Position
    digest: int
    filled: int
    def __init__(self, position: _Optional[_Union[Position, _Mapping]] = ..., digest: _Optional[int] = ..., filled: _Optional[int] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("epoch", "round", "part", "offset", "values", "checksum", "local_steps", "overlap_steps", "indices", "base", "index_coding", "total")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_STEPS_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    INDEX_CODING_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    round: int
    part: int
    offset: int
    values: bytes
    checksum: int
    local_steps: int
    overlap_steps: int
    indices: bytes
    base: int
    index_coding: IndexCoding
    total: int
    def __init__(self, epoch: _Optional[int] = ..., round: _Optional[int] = ..., part: _Optional[int] = ..., offset: _Optional[int] = ..., values: _Optional[bytes] = ..., checksum: _Optional[int] = ..., local_steps: _Optional[int] = ..., overlap_steps: _Optional[int] = ..., indices: _Optional[bytes] = ..., base: _Optional[int] = ..., index_coding: _Optional[_Union[IndexCoding, str]] = ..., total: _Optional[int] = ...) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("steps", "loss", "idle_s", "run_s", "sent", "included", "returned", "bytes_up", "bytes_down", "round_trip_s")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    RUN_S_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    INCLUDED_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    steps: int
    loss: float
    idle_s: float
    run_s: float
    sent: int
    included: int
    returned: int
    bytes_up: int
    bytes_down: int
    round_trip_s: float
    def __init__(self, steps: _Optional[int] = ..., loss: _Optional[float] = ..., idle_s: _Optional[float] = ..., run_s: _Optional[float] = ..., sent: _Optional[int] = ..., included: _Optional[int] = ..., returned: _Optional[int] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., round_trip_s: _Optional[float] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("stamp_ns", "round", "report")
    STAMP_NS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    stamp_ns: int
    round: int
    report: WorkerReport
    def __init__(self, stamp_ns: _Optional[int] = ..., round: _Optional[int] = ..., report: _Optional[_Union[WorkerReport, _Mapping]] = ...) -> None: ...

class VectorChunk(_message.Message):
    __slots__ = ("purpose", "offset", "total", "values")
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    purpose: Purpose
    offset: int
    total: int
    values: bytes
    def __init__(self, purpose: _Optional[_Union[Purpose, str]] = ..., offset: _Optional[int] = ..., total: _Optional[int] = ..., values: _Optional[bytes] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: Position
    def __init__(self, position: _Optional[_Union[Position, _Mapping]] = ...) -> None: ...

class Refresh(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...

class StopRun(_message.Message):
    __slots__ = ("why",)
    WHY_FIELD_NUMBER: _ClassVar[int]
    why: str
    def __init__(self, why: _Optional[str] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("reason", "detail")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    detail: str
    def __init__(self, reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class StateOffer(_message.Message):
    __slots__ = ("position", "digest", "lineage", "inclusion", "recent", "members", "config", "elapsed_s")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    INCLUSION_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    position: Position
    digest: int
    lineage: _containers.RepeatedCompositeFieldContainer[Span]
    inclusion: InclusionTable
    recent: _containers.RepeatedCompositeFieldContainer[CommittedRound]
    members: int
    config: RunConfig
    elapsed_s: float
    def __init__(self, position: _Optional[_Union[Position, _Mapping]] = ..., digest: _Optional[int] = ..., lineage: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., inclusion: _Optional[_Union[InclusionTable, _Mapping]] = ..., recent: _Optional[_Iterable[_Union[CommittedRound, _Mapping]]] = ..., members: _Optional[int] = ..., config: _Optional[_Union[RunConfig, _Mapping]] = ..., elapsed_s: _Optional[float] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("run_id", "epoch", "slot", "config", "heartbeat_s", "lease_s", "position", "digest", "lineage", "roster", "elapsed_s", "waiting_for", "recovering")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    RECOVERING_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    epoch: int
    slot: int
    config: RunConfig
    heartbeat_s: float
    lease_s: float
    position: Position
    digest: int
    lineage: _containers.RepeatedCompositeFieldContainer[Span]
    roster: _containers.RepeatedScalarFieldContainer[bytes]
    elapsed_s: float
    waiting_for: int
    recovering: bool
    def __init__(self, run_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., slot: _Optional[int] = ..., config: _Optional[_Union[RunConfig, _Mapping]] = ..., heartbeat_s: _Optional[float] = ..., lease_s: _Optional[float] = ..., position: _Optional[_Union[Position, _Mapping]] = ..., digest: _Optional[int] = ..., lineage: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., roster: _Optional[_Iterable[bytes]] = ..., elapsed_s: _Optional[float] = ..., waiting_for: _Optional[int] = ..., recovering: bool = ...) -> None: ...

class SendState(_message.Message):
    __slots__ = ("purpose",)
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    purpose: Purpose
    def __init__(self, purpose: _Optional[_Union[Purpose, str]] = ...) -> None: ...

class CatchUp(_message.Message):
    __slots__ = ("position", "digest", "lineage", "base_round", "plans", "full", "inclusion", "recent", "members", "resume")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    BASE_ROUND_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    INCLUSION_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    position: Position
    digest: int
    lineage: _containers.RepeatedCompositeFieldContainer[Span]
    base_round: int
    plans: _containers.RepeatedCompositeFieldContainer[Plan]
    full: bool
    inclusion: InclusionTable
    recent: _containers.RepeatedCompositeFieldContainer[CommittedRound]
    members: int
    resume: int
    def __init__(self, position: _Optional[_Union[Position, _Mapping]] = ..., digest: _Optional[int] = ..., lineage: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., base_round: _Optional[int] = ..., plans: _Optional[_Iterable[_Union[Plan, _Mapping]]] = ..., full: bool = ..., inclusion: _Optional[_Union[InclusionTable, _Mapping]] = ..., recent: _Optional[_Iterable[_Union[CommittedRound, _Mapping]]] = ..., members: _Optional[int] = ..., resume: _Optional[int] = ...) -> None: ...

class OpenRound(_message.Message):
    __slots__ = ("plan", "elapsed_s")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    elapsed_s: float
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ..., elapsed_s: _Optional[float] = ...) -> None: ...

class SlotTaken(_message.Message):
    __slots__ = ("slot", "incarnation")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    slot: int
    incarnation: bytes
    def __init__(self, slot: _Optional[int] = ..., incarnation: _Optional[bytes] = ...) -> None: ...

class RosterChange(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[SlotTaken]
    def __init__(self, slots: _Optional[_Iterable[_Union[SlotTaken, _Mapping]]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("round", "part", "offset", "values", "included", "indices", "base", "index_coding", "total")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    INCLUDED_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    INDEX_CODING_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    round: int
    part: int
    offset: int
    values: bytes
    included: bytes
    indices: bytes
    base: int
    index_coding: IndexCoding
    total: int
    def __init__(self, round: _Optional[int] = ..., part: _Optional[int] = ..., offset: _Optional[int] = ..., values: _Optional[bytes] = ..., included: _Optional[bytes] = ..., indices: _Optional[bytes] = ..., base: _Optional[int] = ..., index_coding: _Optional[_Union[IndexCoding, str]] = ..., total: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("round", "members", "digest", "plan", "elapsed_ms")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_MS_FIELD_NUMBER: _ClassVar[int]
    round: int
    members: int
    digest: int
    plan: Plan
    elapsed_ms: int
    def __init__(self, round: _Optional[int] = ..., members: _Optional[int] = ..., digest: _Optional[int] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., elapsed_ms: _Optional[int] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("stamp_ns",)
    STAMP_NS_FIELD_NUMBER: _ClassVar[int]
    stamp_ns: int
    def __init__(self, stamp_ns: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason", "detail")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    detail: str
    def __init__(self, reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("name", "slot", "state", "heard_ago_s", "merged_round", "contributed", "missed", "deadline_s", "local_steps", "overlap_steps", "report", "observer", "cycle_s", "exchange", "joined_ago_s", "stream")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HEARD_AGO_S_FIELD_NUMBER: _ClassVar[int]
    MERGED_ROUND_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTED_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_STEPS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    OBSERVER_FIELD_NUMBER: _ClassVar[int]
    CYCLE_S_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    JOINED_AGO_S_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    name: str
    slot: int
    state: str
    heard_ago_s: float
    merged_round: int
    contributed: int
    missed: int
    deadline_s: float
    local_steps: int
    overlap_steps: int
    report: WorkerReport
    observer: bool
    cycle_s: float
    exchange: str
    joined_ago_s: float
    stream: int
    def __init__(self, name: _Optional[str] = ..., slot: _Optional[int] = ..., state: _Optional[str] = ..., heard_ago_s: _Optional[float] = ..., merged_round: _Optional[int] = ..., contributed: _Optional[int] = ..., missed: _Optional[int] = ..., deadline_s: _Optional[float] = ..., local_steps: _Optional[int] = ..., overlap_steps: _Optional[int] = ..., report: _Optional[_Union[WorkerReport, _Mapping]] = ..., observer: bool = ..., cycle_s: _Optional[float] = ..., exchange: _Optional[str] = ..., joined_ago_s: _Optional[float] = ..., stream: _Optional[int] = ...) -> None: ...

class DepartureStatus(_message.Message):
    __slots__ = ("name", "slot", "reason", "detail", "ago_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    AGO_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    slot: int
    reason: str
    detail: str
    ago_s: float
    def __init__(self, name: _Optional[str] = ..., slot: _Optional[int] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., ago_s: _Optional[float] = ...) -> None: ...

class RefusalStatus(_message.Message):
    __slots__ = ("address", "name", "kind", "count", "detail", "ago_s")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    AGO_S_FIELD_NUMBER: _ClassVar[int]
    address: str
    name: str
    kind: str
    count: int
    detail: str
    ago_s: float
    def __init__(self, address: _Optional[str] = ..., name: _Optional[str] = ..., kind: _Optional[str] = ..., count: _Optional[int] = ..., detail: _Optional[str] = ..., ago_s: _Optional[float] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("run_id", "protocol_version", "phase", "epoch", "round", "elapsed_s", "dimension", "config", "members", "departures", "refused", "stop_reason", "first_round", "bytes_in", "bytes_out", "digest", "refusals", "averages", "departed", "coordinates", "heartbeat_s", "workers_wanted")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    DEPARTURES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROUND_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    AVERAGES_FIELD_NUMBER: _ClassVar[int]
    DEPARTED_FIELD_NUMBER: _ClassVar[int]
    COORDINATES_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_WANTED_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    protocol_version: int
    phase: str
    epoch: int
    round: int
    elapsed_s: float
    dimension: int
    config: RunConfig
    members: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    departures: _containers.RepeatedCompositeFieldContainer[DepartureStatus]
    refused: _containers.ScalarMap[str, int]
    stop_reason: str
    first_round: int
    bytes_in: int
    bytes_out: int
    digest: int
    refusals: _containers.RepeatedCompositeFieldContainer[RefusalStatus]
    averages: _containers.RepeatedCompositeFieldContainer[AverageStatus]
    departed: int
    coordinates: int
    heartbeat_s: float
    workers_wanted: int
    def __init__(self, run_id: _Optional[bytes] = ..., protocol_version: _Optional[int] = ..., phase: _Optional[str] = ..., epoch: _Optional[int] = ..., round: _Optional[int] = ..., elapsed_s: _Optional[float] = ..., dimension: _Optional[int] = ..., config: _Optional[_Union[RunConfig, _Mapping]] = ..., members: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ..., departures: _Optional[_Iterable[_Union[DepartureStatus, _Mapping]]] = ..., refused: _Optional[_Mapping[str, int]] = ..., stop_reason: _Optional[str] = ..., first_round: _Optional[int] = ..., bytes_in: _Optional[int] = ..., bytes_out: _Optional[int] = ..., digest: _Optional[int] = ..., refusals: _Optional[_Iterable[_Union[RefusalStatus, _Mapping]]] = ..., averages: _Optional[_Iterable[_Union[AverageStatus, _Mapping]]] = ..., departed: _Optional[int] = ..., coordinates: _Optional[int] = ..., heartbeat_s: _Optional[float] = ..., workers_wanted: _Optional[int] = ...) -> None: ...

class AverageStatus(_message.Message):
    __slots__ = ("label", "offered", "missing", "answered")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    label: str
    offered: int
    missing: int
    answered: bool
    def __init__(self, label: _Optional[str] = ..., offered: _Optional[int] = ..., missing: _Optional[int] = ..., answered: bool = ...) -> None: ...

class FetchModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelChunk(_message.Message):
    __slots__ = ("layout", "position", "total", "offset", "values")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    position: Position
    total: int
    offset: int
    values: bytes
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., position: _Optional[_Union[Position, _Mapping]] = ..., total: _Optional[int] = ..., offset: _Optional[int] = ..., values: _Optional[bytes] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("why",)
    WHY_FIELD_NUMBER: _ClassVar[int]
    why: str
    def __init__(self, why: _Optional[str] = ...) -> None: ...

class StopReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AverageRequest(_message.Message):
    __slots__ = ("call", "values", "taken")
    CALL_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    call: AverageCall
    values: bytes
    taken: bool
    def __init__(self, call: _Optional[_Union[AverageCall, _Mapping]] = ..., values: _Optional[bytes] = ..., taken: bool = ...) -> None: ...

class AverageReply(_message.Message):
    __slots__ = ("accepted", "answer", "values")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    accepted: AverageAccepted
    answer: AverageAnswer
    values: bytes
    def __init__(self, accepted: _Optional[_Union[AverageAccepted, _Mapping]] = ..., answer: _Optional[_Union[AverageAnswer, _Mapping]] = ..., values: _Optional[bytes] = ...) -> None: ...

class AverageCall(_message.Message):
    __slots__ = ("run_id", "incarnation", "label", "size", "dtype", "wait_s", "at_least", "awaited", "settled")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    AWAITED_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    incarnation: bytes
    label: str
    size: int
    dtype: str
    wait_s: float
    at_least: int
    awaited: bytes
    settled: bytes
    def __init__(self, run_id: _Optional[bytes] = ..., incarnation: _Optional[bytes] = ..., label: _Optional[str] = ..., size: _Optional[int] = ..., dtype: _Optional[str] = ..., wait_s: _Optional[float] = ..., at_least: _Optional[int] = ..., awaited: _Optional[bytes] = ..., settled: _Optional[bytes] = ...) -> None: ...

class AverageAccepted(_message.Message):
    __slots__ = ("wanted", "awaited")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    AWAITED_FIELD_NUMBER: _ClassVar[int]
    wanted: bool
    awaited: bytes
    def __init__(self, wanted: bool = ..., awaited: _Optional[bytes] = ...) -> None: ...

class AverageAnswer(_message.Message):
    __slots__ = ("offered",)
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    offered: bytes
    def __init__(self, offered: _Optional[bytes] = ...) -> None: ...
