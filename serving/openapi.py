"""The OpenAPI 3.1 description, made from the very tables and models that the service runs on."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from pydantic import BaseModel

from mien import errors, pictures
from mien.passwords import MAX_PASSWORD_CHARACTERS
from serving import problems
from serving.options import DetectOptions, EditOptions
from serving.problems import PROBLEM_TYPE, PROBLEMS
from serving.settings import Settings

_COMMON: tuple[type[Exception], ...] = (
    problems.MalformedRequest,
    problems.Unauthenticated,
    problems.UploadStalled,
    problems.BodyTooLarge,
    errors.ImageTooLarge,
    problems.UnsupportedMediaType,
    errors.InvalidImage,
    errors.TooManyFaces,
    problems.RateLimited,
    problems.Overloaded,
    Exception,
    problems.NotReady,
    problems.TookTooLong,
)
_EDIT: tuple[type[Exception], ...] = (
    *_COMMON,
    problems.NotAcceptable,
    errors.NoFaceFound,
    errors.NoSuchFace,
    errors.InvalidPassword,
)
_RECOVER = (*_EDIT, errors.WrongModel)

_NUMBER_TEXT = r"^(0|[1-9]\d{0,2})$"  # of a face
_NUMBER = {"type": "number"}
_BOX = {
    "type": "array",
    "items": _NUMBER,
    "minItems": 4,
    "maxItems": 4,
    "description": "left, top, right, bottom in pixels; an integer is a pixel's centre",
}
_LANDMARKS = {
    "type": "array",
    "description": "left eye, right eye, nose tip, left and right mouth corner, as seen in the image",
    "items": {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2},
    "minItems": 5,
    "maxItems": 5,
}
_DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "sha256 of the model's weights"}
_REQUEST_ID = {"type": "string", "description": "the request's id, as in the service's log"}


def document(settings: Settings, version: str) -> dict[str, Any]:
    """The description of a service with these limits."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Mien",
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": (
                "Changes the faces in a picture into other believable faces under a password, and gives the real ones "
                "back to who knows it. A wrong password is not an error: it gives a third face. Nothing is kept.\n\n"
                f"Limits: {settings.max_body_bytes:,} bytes a request, {settings.max_pixels:,} pixels and "
                f"{settings.max_faces} faces a picture."
            ),
        },
        "tags": [
            {"name": "faces", "description": "What the service is for"},
            {"name": "service", "description": "How it is doing"},
        ],
        "paths": {
            "/v1/anonymize": {"post": _edit("anonymize", "Change every face of a picture into somebody else's")},
            "/v1/recover": {"post": _edit("recover", "Give the real faces back (or a third one: wrong password)")},
            "/v1/detect": {"post": _detect()},
            "/v1/model": {"get": _model()},
            "/healthz": {
                "get": _plain("health", "Whether the process lives", {503: "the model could not be loaded: restart it"})
            },
            "/readyz": {"get": _plain("ready", "Whether requests would be served", {503: "not (yet)"})},
            "/metrics": {"get": _plain("metrics", "Prometheus metrics", {})},
        },
        "components": {
            "schemas": _schemas(),
            "headers": _headers(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "an API key, where the service has keys"}
            },
        },
    }


def _edit(operation: str, summary: str) -> dict[str, Any]:
    pictures: dict[str, Any] = {f"image/{name}": {} for name in ("png", "jpeg", "webp")}
    return {
        "tags": ["faces"],
        "operationId": operation,
        "security": [{"key": []}, {}],
        "summary": summary,
        "description": (
            "Answers the picture itself, or, where `Accept` prefers `application/json`, a JSON object with the "
            "picture in base64."
        ),
        "parameters": [_request_id_parameter()],
        "requestBody": _request_body("EditForm", "EditJson", {"password": "correct horse", "aligned": True}),
        "responses": {
            "200": {
                "description": "the picture",
                "headers": {
                    "X-Mien-Faces": {"$ref": "#/components/headers/Faces"},
                    "X-Mien-Model-Digest": {"$ref": "#/components/headers/ModelDigest"},
                    "X-Request-Id": {"$ref": "#/components/headers/RequestId"},
                },
                "content": {**pictures, "application/json": {"schema": {"$ref": "#/components/schemas/Edited"}}},
            },
            **_problems(_RECOVER if operation == "recover" else _EDIT),
        },
    }


def _detect() -> dict[str, Any]:
    return {
        "tags": ["faces"],
        "operationId": "detect",
        "security": [{"key": []}, {}],
        "summary": "Find the faces of a picture, the largest first",
        "description": "A picture without a face is no error here: `faces` is empty.",
        "parameters": [_request_id_parameter()],
        "requestBody": _request_body("DetectForm", "DetectJson", {}),
        "responses": {
            "200": {
                "description": "the faces",
                "headers": {
                    "X-Mien-Model-Digest": {"$ref": "#/components/headers/ModelDigest"},
                    "X-Request-Id": {"$ref": "#/components/headers/RequestId"},
                },
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Detected"}}},
            },
            **_problems(_COMMON),
        },
    }


def _model() -> dict[str, Any]:
    return {
        "tags": ["service"],
        "operationId": "model",
        "security": [{"key": []}, {}],
        "summary": "Which model is served, and the service's limits",
        "responses": {
            "200": {
                "description": "the model",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ModelInfo"}}},
            },
            **_problems((problems.Unauthenticated, problems.NotReady)),
        },
    }


def _plain(name: str, summary: str, others: dict[int, str]) -> dict[str, Any]:
    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    return {
        "tags": ["service"],
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "yes" if others else "the metrics", **text},
            **{str(status): {"description": why, **text} for status, why in others.items()},
        },
    }


def _request_id_parameter() -> dict[str, Any]:
    return {
        "name": "X-Request-Id",
        "in": "header",
        "required": False,
        "description": "an id of the caller's own for the log; made up where absent",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    }


def _request_body(form: str, json: str, example: dict[str, Any]) -> dict[str, Any]:
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"$ref": f"#/components/schemas/{form}"}},
            "application/json": {
                "schema": {"$ref": f"#/components/schemas/{json}"},
                "examples": {
                    "crop": {
                        "summary": "shades of the size of an aligned crop (128 x 128), as one PNG",
                        "value": {"image": _picture(), **example},
                    }
                },
            },
        },
    }


@cache
def _picture() -> str:
    """A small PNG in base64."""
    ramp = np.linspace(40, 215, 128).astype(np.uint8)
    shades = np.stack(np.broadcast_arrays(ramp, ramp[:, None], ramp[::-1]), axis=-1)
    return base64.b64encode(pictures.encode(pictures.Picture(np.ascontiguousarray(shades)))).decode()


def _problems(kinds: Iterable[type[Exception]]) -> dict[str, Any]:
    """Responses of the errors given, those of one status together."""
    by_status: dict[int, list[problems.Problem]] = {}
    for kind in kinds:
        by_status.setdefault(PROBLEMS[kind].status, []).append(PROBLEMS[kind])
    out: dict[str, Any] = {}
    for status, rows in sorted(by_status.items()):
        out[str(status)] = {
            "description": "; ".join(f"{row.title} (`{row.type}`)" for row in rows),
            "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        if any(row.retry_after is not None for row in rows):
            out[str(status)]["headers"] = {"Retry-After": {"$ref": "#/components/headers/RetryAfter"}}
    return out


def _with_image(kind: type[BaseModel], image: dict[str, Any]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    schema.pop("description", None)
    schema["properties"] = {"image": image, **schema.get("properties", {})}
    schema["required"] = ["image", *schema.get("required", [])]
    if "passwords" in schema["properties"]:
        (mapping,) = (k for k in schema["properties"]["passwords"]["anyOf"] if k.get("type") == "object")
        mapping["propertyNames"] = {"pattern": _NUMBER_TEXT}
        (text,) = (k for k in schema["properties"]["password"]["anyOf"] if k.get("type") == "string")
        for password in (text, mapping["additionalProperties"]):
            password.update(minLength=1, maxLength=MAX_PASSWORD_CHARACTERS)
        given = {"not": {"type": "null"}}
        schema["anyOf"] = [{"required": [name], "properties": {name: given}} for name in ("password", "passwords")]
    return schema


_NUMBERS_TEXT = r"^\s*(\d{1,4}\s*(,\s*\d{1,4}\s*)*)?$"
_BOX_TEXT = r"-?\d{1,6}(\.\d+)?(,-?\d{1,6}(\.\d+)?){3}"
_ENTRY = r'"(0|[1-9]\d{0,2})": ?"([^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4}){1,1024}"'
_PASSWORDS_TEXT = rf"^\{{{_ENTRY}(, ?{_ENTRY}){{0,31}}\}}$"
_AS_TEXT: dict[str, dict[str, Any]] = {
    "faces": {"pattern": _NUMBERS_TEXT, "example": "0,2"},
    "exclude_faces": {"pattern": _NUMBERS_TEXT, "example": "1"},
    "boxes": {"pattern": f"^({_BOX_TEXT}(;{_BOX_TEXT})*)?$", "example": "10,20,90,120;200,20,280,120"},
    "exclude_boxes": {"pattern": f"^({_BOX_TEXT}(;{_BOX_TEXT})*)?$", "example": "10,20,90,120"},
    # The pattern cannot say that no number comes twice; the format, which is ours, means what contentSchema describes.
    "passwords": {
        "pattern": _PASSWORDS_TEXT,
        "contentMediaType": "application/json",
        "format": "passwords-by-face",
        "example": '{"0": "secret"}',
    },
}


def _as_form(schema: dict[str, Any]) -> dict[str, Any]:
    """A form's fields are text: lists are written with commas and semicolons, mappings as JSON; nothing is null."""
    properties = schema["properties"]
    for name, text in _AS_TEXT.items():
        if name in properties:
            description = EditOptions.model_fields[name].description
            text = {"type": "string", "description": description, **text}
            if name == "passwords":
                text["contentSchema"] = _kept(properties[name])
            properties[name] = text
    for name, value in properties.items():
        if "anyOf" in value:
            rest = {key: item for key, item in value.items() if key not in ("anyOf", "default")}
            properties[name] = {**_kept(value), **rest}
    return schema


def _kept(value: dict[str, Any]) -> dict[str, Any]:
    """What a value may be beside null."""
    (kept,) = (kind for kind in value["anyOf"] if kind.get("type") != "null")
    return dict(kept)


def _schemas() -> dict[str, Any]:
    binary = {"type": "string", "contentMediaType": "application/octet-stream", "description": "the picture's bytes"}
    encoded = {
        "type": "string",
        "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
        "contentEncoding": "base64",
        "description": "the picture's bytes in base64 (RFC 4648, no line breaks)",
    }
    face = {
        "type": "object",
        "required": ["box"],
        "properties": {"box": _BOX},
    }
    return {
        "EditForm": _as_form(_with_image(EditOptions, binary)),
        "EditJson": _with_image(EditOptions, encoded),
        "DetectForm": _with_image(DetectOptions, binary),
        "DetectJson": _with_image(DetectOptions, encoded),
        "Face": face,
        "Edited": {
            "type": "object",
            "required": ["image", "media_type", "faces", "model_digest", "request_id"],
            "properties": {
                "image": {"type": "string", "contentEncoding": "base64"},
                "media_type": {"type": "string", "enum": ["image/png", "image/jpeg", "image/webp"]},
                "faces": {"type": "array", "items": {"$ref": "#/components/schemas/Face"}},
                "model_digest": _DIGEST,
                "request_id": _REQUEST_ID,
            },
        },
        "Detected": {
            "type": "object",
            "required": ["faces", "size", "model_digest", "request_id"],
            "properties": {
                "faces": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["box", "landmarks", "confidence"],
                        "properties": {
                            "box": _BOX,
                            "landmarks": _LANDMARKS,
                            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
                        },
                    },
                },
                "size": {
                    "type": "array",
                    "items": {"type": "integer"},
                    "minItems": 2,
                    "maxItems": 2,
                    "description": "width and height of the picture as it is seen (EXIF rotation applied), pixels",
                },
                "model_digest": _DIGEST,
                "request_id": _REQUEST_ID,
            },
        },
        "ModelInfo": {
            "type": "object",
            "required": [
                "digest",
                "version",
                "model_version",
                "source",
                "since",
                "follows",
                "failure",
                "architecture",
                "bits",
                "crop_size",
                "images_seen",
                "realm",
                "limits",
            ],
            "properties": {
                "digest": _DIGEST,
                "version": {"type": "string", "description": "version of Mien"},
                "model_version": {"type": "string", "description": "number in the registry, or the folder's name"},
                "source": {"type": "string", "description": "where the model came from"},
                "since": {"type": "string", "format": "date-time", "description": "when it began to serve"},
                "follows": {"type": "boolean", "description": "whether the service looks for another model"},
                "failure": {
                    "description": "why the model that was asked for last is not the one that serves, or null",
                    "type": ["object", "null"],
                    "properties": {
                        "at": {"type": "string", "format": "date-time"},
                        "source": {"type": "string"},
                        "reason": {"type": "string"},
                    },
                },
                "architecture": {"type": "string"},
                "bits": {"type": "integer", "description": "length of a code"},
                "crop_size": {"type": "integer"},
                "images_seen": {"type": "integer", "description": "training images seen"},
                "realm": {"type": "string"},
                "limits": {
                    "type": "object",
                    "required": ["body_bytes", "pixels", "faces"],
                    "properties": {name: {"type": "integer"} for name in ("body_bytes", "pixels", "faces")},
                },
            },
        },
        "Problem": {
            "type": "object",
            "description": "RFC 9457",
            "required": ["type", "title", "status", "detail", "request_id"],
            "properties": {
                "type": {"type": "string", "enum": sorted({row.type for row in PROBLEMS.values()})},
                "title": {"type": "string"},
                "status": {"type": "integer"},
                "detail": {"type": "string"},
                "request_id": _REQUEST_ID,
            },
        },
    }


def _headers() -> dict[str, Any]:
    return {
        "Faces": {"description": "number of faces changed", "schema": {"type": "integer"}},
        "ModelDigest": {"description": "which model did it", "schema": _DIGEST},
        "RequestId": {"description": "the request's id", "schema": _REQUEST_ID},
        "RetryAfter": {"description": "seconds to wait before trying again", "schema": {"type": "integer"}},
    }
