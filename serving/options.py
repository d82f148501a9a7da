"""What a caller may ask for beside the picture: one model for form fields and JSON values alike."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from serving.problems import MalformedRequest


def _split(value: Any) -> Any:
    """``"0,2"`` as a form writes it; an empty field is one that was not filled in."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")] if value.strip() else None
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class DetectOptions(BaseModel):
    """``/v1/detect`` takes the picture alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class EditOptions(DetectOptions):
    """``/v1/anonymize`` and ``/v1/recover``."""

    password: SecretStr = Field(description="1 to 1,024 characters of any script")
    faces: Annotated[
        Annotated[list[Annotated[int, Field(ge=0, le=9999)]], Field(min_length=1, max_length=1000)] | None,
        BeforeValidator(_split),
    ] = Field(None, description="which faces, by their place in the answer of /v1/detect; all if not given")
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
        return kind.model_validate(fields)
    except ValidationError as error:
        raise MalformedRequest(_describe(kind, error)) from None


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
