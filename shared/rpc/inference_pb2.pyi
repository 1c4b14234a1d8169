from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Action(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTION_UNSPECIFIED: _ClassVar[Action]
    ACTION_LOAD: _ClassVar[Action]
    ACTION_UNLOAD: _ClassVar[Action]
    ACTION_AUTO: _ClassVar[Action]
    ACTION_RELOAD: _ClassVar[Action]
    ACTION_PIN: _ClassVar[Action]

class BuildState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BUILD_STATE_UNSPECIFIED: _ClassVar[BuildState]
    BUILD_STATE_READY: _ClassVar[BuildState]
    BUILD_STATE_LOADING: _ClassVar[BuildState]
    BUILD_STATE_UNAVAILABLE: _ClassVar[BuildState]
    BUILD_STATE_UNLOADED: _ClassVar[BuildState]
ACTION_UNSPECIFIED: Action
ACTION_LOAD: Action
ACTION_UNLOAD: Action
ACTION_AUTO: Action
ACTION_RELOAD: Action
ACTION_PIN: Action
BUILD_STATE_UNSPECIFIED: BuildState
BUILD_STATE_READY: BuildState
BUILD_STATE_LOADING: BuildState
BUILD_STATE_UNAVAILABLE: BuildState
BUILD_STATE_UNLOADED: BuildState

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EnsureRequest(_message.Message):
    __slots__ = ("build", "wait_ms")
    BUILD_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    build: str
    wait_ms: int
    def __init__(self, build: _Optional[str] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class ControlRequest(_message.Message):
    __slots__ = ("build", "action", "version")
    BUILD_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    build: str
    action: Action
    version: str
    def __init__(self, build: _Optional[str] = ..., action: _Optional[_Union[Action, str]] = ..., version: _Optional[str] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("models", "revision")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    revision: int
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., revision: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("alias", "description", "created", "stable_build", "builds", "kind")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    STABLE_BUILD_FIELD_NUMBER: _ClassVar[int]
    BUILDS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    alias: str
    description: str
    created: int
    stable_build: str
    builds: _containers.RepeatedCompositeFieldContainer[Build]
    kind: str
    def __init__(self, alias: _Optional[str] = ..., description: _Optional[str] = ..., created: _Optional[int] = ..., stable_build: _Optional[str] = ..., builds: _Optional[_Iterable[_Union[Build, _Mapping]]] = ..., kind: _Optional[str] = ...) -> None: ...

class Build(_message.Message):
    __slots__ = ("name", "triton_model", "triton_version", "triton_target", "engine", "quantization", "context_tokens", "slots", "state", "reason", "parameters", "on_demand", "lost_at_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRITON_MODEL_FIELD_NUMBER: _ClassVar[int]
    TRITON_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRITON_TARGET_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ON_DEMAND_FIELD_NUMBER: _ClassVar[int]
    LOST_AT_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    triton_model: str
    triton_version: str
    triton_target: str
    engine: str
    quantization: str
    context_tokens: int
    slots: int
    state: BuildState
    reason: str
    parameters: int
    on_demand: bool
    lost_at_ms: int
    def __init__(self, name: _Optional[str] = ..., triton_model: _Optional[str] = ..., triton_version: _Optional[str] = ..., triton_target: _Optional[str] = ..., engine: _Optional[str] = ..., quantization: _Optional[str] = ..., context_tokens: _Optional[int] = ..., slots: _Optional[int] = ..., state: _Optional[_Union[BuildState, str]] = ..., reason: _Optional[str] = ..., parameters: _Optional[int] = ..., on_demand: _Optional[bool] = ..., lost_at_ms: _Optional[int] = ...) -> None: ...
