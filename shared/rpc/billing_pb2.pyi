import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Usage(_message.Message):
    __slots__ = ("input_tokens", "cached_input_tokens", "output_tokens")
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    def __init__(self, input_tokens: _Optional[int] = ..., cached_input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("hold_id", "org_id", "user_id", "key_id", "plan", "model", "worst_case", "clamp", "ttl_ms", "request_id")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    ORG_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORST_CASE_FIELD_NUMBER: _ClassVar[int]
    CLAMP_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    hold_id: str
    org_id: str
    user_id: str
    key_id: str
    plan: str
    model: str
    worst_case: Usage
    clamp: bool
    ttl_ms: int
    request_id: str
    def __init__(self, hold_id: _Optional[str] = ..., org_id: _Optional[str] = ..., user_id: _Optional[str] = ..., key_id: _Optional[str] = ..., plan: _Optional[str] = ..., model: _Optional[str] = ..., worst_case: _Optional[_Union[Usage, _Mapping]] = ..., clamp: _Optional[bool] = ..., ttl_ms: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class HoldReply(_message.Message):
    __slots__ = ("hold_id", "amount_nano", "output_tokens", "price_id", "expires_at", "available_nano")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRICE_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_NANO_FIELD_NUMBER: _ClassVar[int]
    hold_id: str
    amount_nano: int
    output_tokens: int
    price_id: str
    expires_at: _timestamp_pb2.Timestamp
    available_nano: int
    def __init__(self, hold_id: _Optional[str] = ..., amount_nano: _Optional[int] = ..., output_tokens: _Optional[int] = ..., price_id: _Optional[str] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., available_nano: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("hold_id", "org_id", "usage", "ttl_ms")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    ORG_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    hold_id: str
    org_id: str
    usage: Usage
    ttl_ms: int
    def __init__(self, hold_id: _Optional[str] = ..., org_id: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("expires_at",)
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    expires_at: _timestamp_pb2.Timestamp
    def __init__(self, expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ExtendRequest(_message.Message):
    __slots__ = ("hold_id", "org_id", "number", "output_tokens")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    ORG_ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    hold_id: str
    org_id: str
    number: int
    output_tokens: int
    def __init__(self, hold_id: _Optional[str] = ..., org_id: _Optional[str] = ..., number: _Optional[int] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class ExtendReply(_message.Message):
    __slots__ = ("hold_id", "amount_nano", "output_tokens", "available_nano")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_NANO_FIELD_NUMBER: _ClassVar[int]
    hold_id: str
    amount_nano: int
    output_tokens: int
    available_nano: int
    def __init__(self, hold_id: _Optional[str] = ..., amount_nano: _Optional[int] = ..., output_tokens: _Optional[int] = ..., available_nano: _Optional[int] = ...) -> None: ...

class SettleRequest(_message.Message):
    __slots__ = ("hold_id", "org_id", "usage", "build", "finish_reason", "duration_ms")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    ORG_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    hold_id: str
    org_id: str
    usage: Usage
    build: str
    finish_reason: str
    duration_ms: int
    def __init__(self, hold_id: _Optional[str] = ..., org_id: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., build: _Optional[str] = ..., finish_reason: _Optional[str] = ..., duration_ms: _Optional[int] = ...) -> None: ...

class SettleReply(_message.Message):
    __slots__ = ("cost_nano", "settled_nano", "receivable_nano", "available_nano")
    COST_NANO_FIELD_NUMBER: _ClassVar[int]
    SETTLED_NANO_FIELD_NUMBER: _ClassVar[int]
    RECEIVABLE_NANO_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_NANO_FIELD_NUMBER: _ClassVar[int]
    cost_nano: int
    settled_nano: int
    receivable_nano: int
    available_nano: int
    def __init__(self, cost_nano: _Optional[int] = ..., settled_nano: _Optional[int] = ..., receivable_nano: _Optional[int] = ..., available_nano: _Optional[int] = ...) -> None: ...

class VoidRequest(_message.Message):
    __slots__ = ("hold_id", "org_id", "reason")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    ORG_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    hold_id: str
    org_id: str
    reason: str
    def __init__(self, hold_id: _Optional[str] = ..., org_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class VoidReply(_message.Message):
    __slots__ = ("released_nano",)
    RELEASED_NANO_FIELD_NUMBER: _ClassVar[int]
    released_nano: int
    def __init__(self, released_nano: _Optional[int] = ...) -> None: ...

class ListPricesRequest(_message.Message):
    __slots__ = ("org_id", "plan")
    ORG_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    org_id: str
    plan: str
    def __init__(self, org_id: _Optional[str] = ..., plan: _Optional[str] = ...) -> None: ...

class Price(_message.Message):
    __slots__ = ("price_id", "model", "customer_class", "per_request_nano", "input_nano_per_million", "cached_input_nano_per_million", "output_nano_per_million", "valid_from")
    PRICE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CUSTOMER_CLASS_FIELD_NUMBER: _ClassVar[int]
    PER_REQUEST_NANO_FIELD_NUMBER: _ClassVar[int]
    INPUT_NANO_PER_MILLION_FIELD_NUMBER: _ClassVar[int]
    CACHED_INPUT_NANO_PER_MILLION_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_NANO_PER_MILLION_FIELD_NUMBER: _ClassVar[int]
    VALID_FROM_FIELD_NUMBER: _ClassVar[int]
    price_id: str
    model: str
    customer_class: str
    per_request_nano: int
    input_nano_per_million: int
    cached_input_nano_per_million: int
    output_nano_per_million: int
    valid_from: _timestamp_pb2.Timestamp
    def __init__(self, price_id: _Optional[str] = ..., model: _Optional[str] = ..., customer_class: _Optional[str] = ..., per_request_nano: _Optional[int] = ..., input_nano_per_million: _Optional[int] = ..., cached_input_nano_per_million: _Optional[int] = ..., output_nano_per_million: _Optional[int] = ..., valid_from: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListPricesReply(_message.Message):
    __slots__ = ("prices",)
    PRICES_FIELD_NUMBER: _ClassVar[int]
    prices: _containers.RepeatedCompositeFieldContainer[Price]
    def __init__(self, prices: _Optional[_Iterable[_Union[Price, _Mapping]]] = ...) -> None: ...

class OperateRequest(_message.Message):
    __slots__ = ("operations",)
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    def __init__(self, operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("id", "hold", "heartbeat", "settle", "void", "extend")
    ID_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    VOID_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    id: int
    hold: HoldRequest
    heartbeat: HeartbeatRequest
    settle: SettleRequest
    void: VoidRequest
    extend: ExtendRequest
    def __init__(self, id: _Optional[int] = ..., hold: _Optional[_Union[HoldRequest, _Mapping]] = ..., heartbeat: _Optional[_Union[HeartbeatRequest, _Mapping]] = ..., settle: _Optional[_Union[SettleRequest, _Mapping]] = ..., void: _Optional[_Union[VoidRequest, _Mapping]] = ..., extend: _Optional[_Union[ExtendRequest, _Mapping]] = ...) -> None: ...

class OperateReply(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    def __init__(self, answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("id", "hold", "heartbeat", "settle", "void", "extend", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    VOID_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    hold: HoldReply
    heartbeat: HeartbeatReply
    settle: SettleReply
    void: VoidReply
    extend: ExtendReply
    error: bytes
    def __init__(self, id: _Optional[int] = ..., hold: _Optional[_Union[HoldReply, _Mapping]] = ..., heartbeat: _Optional[_Union[HeartbeatReply, _Mapping]] = ..., settle: _Optional[_Union[SettleReply, _Mapping]] = ..., void: _Optional[_Union[VoidReply, _Mapping]] = ..., extend: _Optional[_Union[ExtendReply, _Mapping]] = ..., error: _Optional[bytes] = ...) -> None: ...

class ListLeadersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLeadersReply(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("operation",)
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    operation: bytes
    def __init__(self, operation: _Optional[bytes] = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: bytes
    def __init__(self, result: _Optional[bytes] = ...) -> None: ...
