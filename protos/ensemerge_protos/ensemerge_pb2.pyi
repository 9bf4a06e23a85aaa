from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Label(_message.Message):
    __slots__ = ("prediction_id", "row", "class_index", "class_name", "time_seconds")
    PREDICTION_ID_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    TIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    prediction_id: str
    row: int
    class_index: int
    class_name: str
    time_seconds: float
    def __init__(self, prediction_id: _Optional[str] = ..., row: _Optional[int] = ..., class_index: _Optional[int] = ..., class_name: _Optional[str] = ..., time_seconds: _Optional[float] = ...) -> None: ...

class SendLabelsRequest(_message.Message):
    __slots__ = ("labels",)
    LABELS_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedCompositeFieldContainer[Label]
    def __init__(self, labels: _Optional[_Iterable[_Union[Label, _Mapping]]] = ...) -> None: ...

class LabelResult(_message.Message):
    __slots__ = ("status", "message")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[LabelResult.Status]
        JOINED: _ClassVar[LabelResult.Status]
        DUPLICATE: _ClassVar[LabelResult.Status]
        CONFLICT: _ClassVar[LabelResult.Status]
        PENDING: _ClassVar[LabelResult.Status]
        AMBIGUOUS: _ClassVar[LabelResult.Status]
        INVALID: _ClassVar[LabelResult.Status]
    STATUS_UNSPECIFIED: LabelResult.Status
    JOINED: LabelResult.Status
    DUPLICATE: LabelResult.Status
    CONFLICT: LabelResult.Status
    PENDING: LabelResult.Status
    AMBIGUOUS: LabelResult.Status
    INVALID: LabelResult.Status
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    status: LabelResult.Status
    message: str
    def __init__(self, status: _Optional[_Union[LabelResult.Status, str]] = ..., message: _Optional[str] = ...) -> None: ...

class SendLabelsResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[LabelResult]
    def __init__(self, results: _Optional[_Iterable[_Union[LabelResult, _Mapping]]] = ...) -> None: ...

class ListExperimentsRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Arm(_message.Message):
    __slots__ = ("name", "model", "share", "predictions", "labelled", "correct", "log_loss_sum", "scored")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FIELD_NUMBER: _ClassVar[int]
    CORRECT_FIELD_NUMBER: _ClassVar[int]
    LOG_LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    share: float
    predictions: int
    labelled: int
    correct: int
    log_loss_sum: float
    scored: int
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., share: _Optional[float] = ..., predictions: _Optional[int] = ..., labelled: _Optional[int] = ..., correct: _Optional[int] = ..., log_loss_sum: _Optional[float] = ..., scored: _Optional[int] = ...) -> None: ...

class Experiment(_message.Message):
    __slots__ = ("name", "unit", "arms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    ARMS_FIELD_NUMBER: _ClassVar[int]
    name: str
    unit: str
    arms: _containers.RepeatedCompositeFieldContainer[Arm]
    def __init__(self, name: _Optional[str] = ..., unit: _Optional[str] = ..., arms: _Optional[_Iterable[_Union[Arm, _Mapping]]] = ...) -> None: ...

class ListExperimentsResponse(_message.Message):
    __slots__ = ("experiments",)
    EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    experiments: _containers.RepeatedCompositeFieldContainer[Experiment]
    def __init__(self, experiments: _Optional[_Iterable[_Union[Experiment, _Mapping]]] = ...) -> None: ...
