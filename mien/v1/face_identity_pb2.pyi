from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_JPEG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_WEBP: _ClassVar[ImageFormat]
    IMAGE_FORMAT_RAW: _ClassVar[ImageFormat]

class Operation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_UNSPECIFIED: _ClassVar[Operation]
    OPERATION_ANONYMIZE: _ClassVar[Operation]
    OPERATION_RECOVER: _ClassVar[Operation]
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_JPEG: ImageFormat
IMAGE_FORMAT_WEBP: ImageFormat
IMAGE_FORMAT_RAW: ImageFormat
OPERATION_UNSPECIFIED: Operation
OPERATION_ANONYMIZE: Operation
OPERATION_RECOVER: Operation

class RawImage(_message.Message):
    __slots__ = ("width", "height", "rgb")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    RGB_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    rgb: bytes
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., rgb: _Optional[bytes] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("left", "top", "right", "bottom")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    left: float
    top: float
    right: float
    bottom: float
    def __init__(self, left: _Optional[float] = ..., top: _Optional[float] = ..., right: _Optional[float] = ..., bottom: _Optional[float] = ...) -> None: ...

class Point(_message.Message):
    __slots__ = ("x", "y")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    x: float
    y: float
    def __init__(self, x: _Optional[float] = ..., y: _Optional[float] = ...) -> None: ...

class FaceGeometry(_message.Message):
    __slots__ = ("box", "matrix")
    BOX_FIELD_NUMBER: _ClassVar[int]
    MATRIX_FIELD_NUMBER: _ClassVar[int]
    box: Box
    matrix: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, box: _Optional[_Union[Box, _Mapping]] = ..., matrix: _Optional[_Iterable[float]] = ...) -> None: ...

class Geometry(_message.Message):
    __slots__ = ("width", "height", "crop_size", "template", "model_digest", "faces")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    CROP_SIZE_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FACES_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    crop_size: int
    template: str
    model_digest: str
    faces: _containers.RepeatedCompositeFieldContainer[FaceGeometry]
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., crop_size: _Optional[int] = ..., template: _Optional[str] = ..., model_digest: _Optional[str] = ..., faces: _Optional[_Iterable[_Union[FaceGeometry, _Mapping]]] = ...) -> None: ...

class FaceSelection(_message.Message):
    __slots__ = ("faces", "boxes", "exclude_faces", "exclude_boxes")
    FACES_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FACES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_BOXES_FIELD_NUMBER: _ClassVar[int]
    faces: _containers.RepeatedScalarFieldContainer[int]
    boxes: _containers.RepeatedCompositeFieldContainer[Box]
    exclude_faces: _containers.RepeatedScalarFieldContainer[int]
    exclude_boxes: _containers.RepeatedCompositeFieldContainer[Box]
    def __init__(self, faces: _Optional[_Iterable[int]] = ..., boxes: _Optional[_Iterable[_Union[Box, _Mapping]]] = ..., exclude_faces: _Optional[_Iterable[int]] = ..., exclude_boxes: _Optional[_Iterable[_Union[Box, _Mapping]]] = ...) -> None: ...

class EditOptions(_message.Message):
    __slots__ = ("password", "passwords", "selection", "aligned", "format", "quality", "keep_metadata")
    class PasswordsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    PASSWORD_FIELD_NUMBER: _ClassVar[int]
    PASSWORDS_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    ALIGNED_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    KEEP_METADATA_FIELD_NUMBER: _ClassVar[int]
    password: str
    passwords: _containers.ScalarMap[int, str]
    selection: FaceSelection
    aligned: bool
    format: ImageFormat
    quality: int
    keep_metadata: bool
    def __init__(self, password: _Optional[str] = ..., passwords: _Optional[_Mapping[int, str]] = ..., selection: _Optional[_Union[FaceSelection, _Mapping]] = ..., aligned: _Optional[bool] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., quality: _Optional[int] = ..., keep_metadata: _Optional[bool] = ...) -> None: ...

class EditRequest(_message.Message):
    __slots__ = ("image", "options")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    options: EditOptions
    def __init__(self, image: _Optional[bytes] = ..., options: _Optional[_Union[EditOptions, _Mapping]] = ...) -> None: ...

class EditResponse(_message.Message):
    __slots__ = ("image", "media_type", "faces", "model_digest", "request_id")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    FACES_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    media_type: str
    faces: _containers.RepeatedCompositeFieldContainer[FaceGeometry]
    model_digest: str
    request_id: str
    def __init__(self, image: _Optional[bytes] = ..., media_type: _Optional[str] = ..., faces: _Optional[_Iterable[_Union[FaceGeometry, _Mapping]]] = ..., model_digest: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class DetectRequest(_message.Message):
    __slots__ = ("image",)
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    def __init__(self, image: _Optional[bytes] = ...) -> None: ...

class DetectedFace(_message.Message):
    __slots__ = ("box", "landmarks", "confidence")
    BOX_FIELD_NUMBER: _ClassVar[int]
    LANDMARKS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    box: Box
    landmarks: _containers.RepeatedCompositeFieldContainer[Point]
    confidence: float
    def __init__(self, box: _Optional[_Union[Box, _Mapping]] = ..., landmarks: _Optional[_Iterable[_Union[Point, _Mapping]]] = ..., confidence: _Optional[float] = ...) -> None: ...

class DetectResponse(_message.Message):
    __slots__ = ("faces", "width", "height", "model_digest", "request_id")
    FACES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    faces: _containers.RepeatedCompositeFieldContainer[DetectedFace]
    width: int
    height: int
    model_digest: str
    request_id: str
    def __init__(self, faces: _Optional[_Iterable[_Union[DetectedFace, _Mapping]]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., model_digest: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class StreamOptions(_message.Message):
    __slots__ = ("operation", "edit", "fail_without_face", "tracking")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    EDIT_FIELD_NUMBER: _ClassVar[int]
    FAIL_WITHOUT_FACE_FIELD_NUMBER: _ClassVar[int]
    TRACKING_FIELD_NUMBER: _ClassVar[int]
    operation: Operation
    edit: EditOptions
    fail_without_face: bool
    tracking: Tracking
    def __init__(self, operation: _Optional[_Union[Operation, str]] = ..., edit: _Optional[_Union[EditOptions, _Mapping]] = ..., fail_without_face: _Optional[bool] = ..., tracking: _Optional[_Union[Tracking, _Mapping]] = ...) -> None: ...

class Tracking(_message.Message):
    __slots__ = ("lookahead", "rate", "drop")
    LOOKAHEAD_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    lookahead: int
    rate: float
    drop: bool
    def __init__(self, lookahead: _Optional[int] = ..., rate: _Optional[float] = ..., drop: _Optional[bool] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("id", "encoded", "raw", "geometry", "time")
    ID_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    id: int
    encoded: bytes
    raw: RawImage
    geometry: Geometry
    time: float
    def __init__(self, id: _Optional[int] = ..., encoded: _Optional[bytes] = ..., raw: _Optional[_Union[RawImage, _Mapping]] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., time: _Optional[float] = ...) -> None: ...

class TransformStreamRequest(_message.Message):
    __slots__ = ("options", "frame")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    options: StreamOptions
    frame: Frame
    def __init__(self, options: _Optional[_Union[StreamOptions, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ...) -> None: ...

class TrackedFace(_message.Message):
    __slots__ = ("track", "box", "state", "masked")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[TrackedFace.State]
        STATE_DETECTED: _ClassVar[TrackedFace.State]
        STATE_FLOW: _ClassVar[TrackedFace.State]
        STATE_HELD: _ClassVar[TrackedFace.State]
    STATE_UNSPECIFIED: TrackedFace.State
    STATE_DETECTED: TrackedFace.State
    STATE_FLOW: TrackedFace.State
    STATE_HELD: TrackedFace.State
    TRACK_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    track: int
    box: Box
    state: TrackedFace.State
    masked: bool
    def __init__(self, track: _Optional[int] = ..., box: _Optional[_Union[Box, _Mapping]] = ..., state: _Optional[_Union[TrackedFace.State, str]] = ..., masked: _Optional[bool] = ...) -> None: ...

class TransformStreamResponse(_message.Message):
    __slots__ = ("id", "encoded", "raw", "geometry", "model_digest", "tracked", "dropped")
    ID_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TRACKED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    id: int
    encoded: bytes
    raw: RawImage
    geometry: Geometry
    model_digest: str
    tracked: _containers.RepeatedCompositeFieldContainer[TrackedFace]
    dropped: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[int] = ..., encoded: _Optional[bytes] = ..., raw: _Optional[_Union[RawImage, _Mapping]] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., model_digest: _Optional[str] = ..., tracked: _Optional[_Iterable[_Union[TrackedFace, _Mapping]]] = ..., dropped: _Optional[_Iterable[int]] = ...) -> None: ...
