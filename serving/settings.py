"""What an operator can set, and every limit of the service: environment variables ``MIEN_*``."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


class Settings(BaseSettings):
    """The service's configuration, frozen once it is read. ``Settings()`` reads the environment.

    Every field is the environment variable of its name with ``MIEN_`` in front: ``MIEN_QUEUE_SIZE=4``.

    Raises:
        pydantic.ValidationError: a variable does not have the type or range of its field.
    """

    model_config = SettingsConfigDict(env_prefix="MIEN_", frozen=True, extra="ignore")

    model: Path = Field(default=Path("models/mien-128"), description="folder of the model that is served")
    realm: str = Field(default="mien", description="public name of the deployment; part of what a password means")
    device: str | None = Field(default=None, description="torch device; CUDA where there is one, else the CPU")

    max_body_bytes: int = Field(default=25 * MIB, ge=64 * 1024, description="largest request body, bytes")
    max_pixels: int = Field(default=50_000_000, ge=1, description="largest picture, pixels")
    max_faces: int = Field(default=100, ge=1, description="most faces in one picture")

    workers: int = Field(
        default_factory=lambda: min(8, os.cpu_count() or 1),
        ge=1,
        le=64,
        description="requests worked on at once; each may hold one decoded picture and one 64 MiB Argon2 block",
    )
    queue_size: int = Field(
        default=16, ge=0, description="requests that may wait for a worker; the next one is refused"
    )
    cpu_threads: int | None = Field(
        default=None, ge=1, description="threads of one torch operation; torch decides if unset"
    )
    batch_size: int = Field(default=16, ge=1, description="most face crops in one pass of the network")
    batch_wait_ms: float = Field(
        default=4.0, ge=0, le=1000, description="how long a batch waits for other callers' crops"
    )

    request_timeout: float = Field(default=60.0, gt=0, description="seconds from a request's admission to its answer")
    stall_timeout: float = Field(default=10.0, gt=0, description="seconds an upload may stand still")
