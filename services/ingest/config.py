"""What an ingest run takes: sources and thresholds, from YAML or from the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from mien import geometry
from mien.errors import MienError

Layout = Literal["people", "unlabelled", "lfw", "casia-webface", "ffhq"]
Fill = Literal["mirror", "smooth"]
Aligned = Literal["insightface"]
# A path, or s3://bucket/key; a Path would make s3:/ of the latter.
Location = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]


class IngestError(MienError):
    """The sources or options of an ingest run are not usable as a whole."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Config):
    """Photos: a folder, an uncompressed ``.tar``, a RecordIO pair by its ``.rec``, or objects under an S3 prefix."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    path: Location = Field(min_length=1, description="on this machine, or s3://bucket/key of a tar, a rec or a prefix")
    landmarks: Location | None = Field(None, description="jsonl with `file` and `landmarks`; detected where None")
    aligned: Aligned | None = Field(
        None, description="photos are crops aligned to this template, and their landmarks follow from it"
    )
    layout: Layout = "people"
    namespace: str | None = Field(
        None, description="sources with one namespace share their people; the name of the source by default"
    )
    split: tuple[float, float, float] | None = Field(None, description="train, val, test; the run's where None")
    min_inside: float | None = Field(None, ge=0, le=1, description="overrides the run's")
    fill: Fill = Field("mirror", description="what crops hold beyond the photo's edge; smooth suits tight crops")
    licence: str = Field("not stated", description="terms of use, copied into the manifest")

    @property
    def labelled(self) -> bool:
        """Whether the folder of a photo names the person in it."""
        return self.layout not in ("unlabelled", "ffhq")

    @field_validator("split")
    @classmethod
    def _split(cls, value: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        return None if value is None else normalised(value)

    @model_validator(mode="after")
    def _one_origin_of_landmarks(self) -> Source:
        if self.aligned is not None and self.landmarks is not None:
            raise ValueError("aligned crops have the landmarks of their template; give either aligned or landmarks")
        return self


class IngestConfig(_Config):
    """One run of ingest."""

    sources: tuple[Source, ...] = Field(min_length=1)
    split: tuple[float, float, float] = Field((0.8, 0.1, 0.1), description="train, val, test, in any unit")
    seed: int = Field(0, ge=0)
    crop_size: int = Field(geometry.CROP_SIZE, ge=32, le=1024)
    shard_size: int = Field(1000, gt=0, description="samples in a shard, at most")
    image: Literal["jpg", "png"] = "jpg"
    min_confidence: float = Field(0.95, ge=0, le=1, description="the detector's, where it is known, at least")
    min_eyes: float = Field(16.0, gt=0, description="pixels of the photo between the eyes, at least")
    max_residual: float = Field(
        8.0,
        gt=0,
        description="RMS distance of the fitted landmarks from the template, pixels of a 128 px crop, at most",
    )
    min_inside: float = Field(0.3, ge=0, le=1, description="part of the crop that the photo covers, at least")
    exclude_like: Path | None = Field(None, description="shards whose people must not be in these")
    judge_weights: Path | None = Field(None, description="MobileFaceNet (casia) that compares them")
    max_cosine: float = Field(0.5, gt=0, le=1, description="similarity at which somebody is set aside")

    @field_validator("split")
    @classmethod
    def _split(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        return normalised(value)

    @model_validator(mode="after")
    def _consistent(self) -> IngestConfig:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"every source needs a name of its own, not {', '.join(names)}")
        if (self.exclude_like is None) != (self.judge_weights is None):
            raise ValueError("exclude_like and judge_weights go together")
        return self


def normalised(split: tuple[float, float, float]) -> tuple[float, float, float]:
    """Shares that add up to 1; raises ValueError where one is negative or all are 0."""
    total = sum(split)
    if min(split) < 0 or not total > 0:
        raise ValueError("a split is three shares (train/val/test), none negative and not all 0, like 80/10/10")
    return (split[0] / total, split[1] / total, split[2] / total)


def parse_split(text: str) -> tuple[float, float, float]:
    """``80/10/10`` to shares; raises :class:`IngestError`."""
    try:
        train, val, test = (float(part) for part in text.split("/"))
        return normalised((train, val, test))
    except ValueError as error:
        raise IngestError(f"--split {text!r} is not three shares like 80/10/10") from error


def load(path: Path, environment: Mapping[str, str] = os.environ) -> IngestConfig:
    """Read a YAML config; ``${MIEN_SHARED}`` and other variables are filled in from the environment.

    ``MIEN_SHARED`` is ``../shared`` where it is not set. Relative paths are relative to the working directory.

    Raises:
        IngestError: the file is unreadable, names an unset variable, or has an unknown or wrong key.
    """
    try:
        text = Template(path.read_text()).substitute({"MIEN_SHARED": "../shared", **environment})
        return IngestConfig.model_validate(yaml.safe_load(text))
    except OSError as error:
        raise IngestError(f"cannot read {path}: {error.strerror}") from error
    except KeyError as error:
        raise IngestError(f"{path} uses the environment variable {error.args[0]}, which is not set") from error
    except (yaml.YAMLError, ValidationError, ValueError) as error:
        raise IngestError(f"{path} is not an ingest config: {error}") from error
