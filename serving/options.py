"""What a caller may ask for beside the picture: one model for form fields, JSON values and gRPC messages alike."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from serving.problems import MalformedRequest


def _numbers(value: Any) -> Any:
    """``"0,2"`` as a form writes it; an empty field is one that was not filled in."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")] if value.strip() else None
    return value


def _boxes(value: Any) -> Any:
    """``"10,20,90,120;200,20,280,120"`` as a form writes it."""
    if isinstance(value, str):
        return [part.split(",") for part in value.split(";")] if value.strip() else None
    return value


def _mapping(value: Any) -> Any:
    """``{"0": "..."}``: a form's field holds the JSON text of it."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            return json.loads(value, object_pairs_hook=unique)
        except (ValueError, RecursionError):
            # `from None`: the chained error's message would quote it.
            raise ValueError("it is not a JSON object") from None
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, for ``object_pairs_hook``; ``ValueError`` where a name appears twice.

    What such an object means, nobody knows: of two passwords for one face, the caller may believe in the other one.
    """
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    return out


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Index = Annotated[int, Field(ge=0, le=9999)]
Coordinate = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Box = tuple[Coordinate, Coordinate, Coordinate, Coordinate]
"""left, top, right, bottom in pixels of the upright picture."""
Indices = Annotated[
    Annotated[list[Index], Field(min_length=1, max_length=1000)] | None,
    BeforeValidator(_numbers),
]
Boxes = Annotated[
    Annotated[list[Box], Field(min_length=1, max_length=1000)] | None,
    BeforeValidator(_boxes),
]


class DetectOptions(BaseModel):
    """``/v1/detect`` takes the picture alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class EditOptions(DetectOptions):
    """``/v1/anonymize`` and ``/v1/recover``."""

    password: SecretStr | None = Field(
        None, description="1 to 1,024 characters of any script; for every face that `passwords` does not name"
    )
    passwords: Annotated[
        Annotated[dict[Index, SecretStr], Field(min_length=1, max_length=32)] | None,
        BeforeValidator(_mapping),
    ] = Field(
        None,
        description=(
            'passwords of single faces by number, {"0": "..."}; a form\'s field holds the JSON text. Without '
            "`password`, recover changes only the faces named here; anonymize refuses to leave a selected face as it is"
        ),
    )
    faces: Indices = Field(
        None,
        description=(
            "which faces to change, by their place in the answer of /v1/detect (recover: among those changed then); "
            "all where neither this nor `boxes` is given. A form writes 0,2"
        ),
    )
    boxes: Boxes = Field(
        None,
        description=(
            "which faces to change, by where they are: for each box the face that overlaps it most, which must overlap "
            "it well. A form writes left,top,right,bottom;..."
        ),
    )
    exclude_faces: Indices = Field(None, description="faces to leave alone, by number; wins over `faces` and `boxes`")
    exclude_boxes: Boxes = Field(None, description="faces to leave alone: all that overlap one of these boxes well")
    aligned: bool = Field(
        False,
        description=(
            "the picture is one aligned crop, or several one below the other: nothing is detected or blended. "
            "/v1/model names the crop size"
        ),
    )
    format: Annotated[Literal["png", "jpeg", "webp"], BeforeValidator(_lower)] = Field(
        "png", description="format of the answer; recovery is exact to rounding only from png"
    )
    quality: int = Field(95, ge=1, le=100, description="of jpeg and webp")
    keep_metadata: bool = Field(False, description="keep EXIF and comments, which may name the place and the camera")


OptionsT = TypeVar("OptionsT", bound=DetectOptions)


def parse(kind: type[OptionsT], fields: Any) -> OptionsT:
    """Validate a request's fields.

    Raises:
        MalformedRequest: naming the fields of ours that are wrong, and quoting nothing of what was sent: an unknown
            field's name comes from the caller, and may be a password in the wrong place.
    """
    try:
        options = kind.model_validate(fields)
    except ValidationError as error:
        raise MalformedRequest(_describe(kind, error)) from None
    if isinstance(options, EditOptions) and options.password is None and options.passwords is None:
        raise MalformedRequest("The field 'password' is missing.")
    return options


def _describe(kind: type[DetectOptions], error: ValidationError) -> str:
    messages: list[str] = []
    for item in error.errors(include_input=False, include_context=False, include_url=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "extra_forbidden" or name not in kind.model_fields:
            known = ", ".join(["image", *kind.model_fields])
            message = f"There is a field this operation does not know; it takes: {known}."
        elif item["type"] == "missing":
            message = f"The field '{name}' is missing."
        else:
            message = f"The field '{name}' is not valid: {item['msg']}."
        if message not in messages:
            messages.append(message)
    return " ".join(messages)
