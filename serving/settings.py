"""What an operator can set, and every limit of the service: environment variables ``MIEN_*``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


def _shipped_model() -> str:
    """The model beside this package, in a checkout and in a Bento; else one in the working directory."""
    name = Path("models") / "mien-128"
    beside = Path(__file__).resolve().parents[1] / name
    return str(beside if beside.is_dir() else name)


class Settings(BaseSettings):
    """The service's configuration, frozen once it is read. ``Settings()`` reads the environment.

    Every field is the environment variable of its name with ``MIEN_`` in front: ``MIEN_QUEUE_SIZE=4``.

    Raises:
        pydantic.ValidationError: a variable does not have the type or range of its field.
    """

    model_config = SettingsConfigDict(env_prefix="MIEN_", frozen=True, extra="ignore", env_ignore_empty=True)

    # The model.
    model: Annotated[str, BeforeValidator(os.fspath)] = Field(
        default_factory=_shipped_model,
        description="what is served: a folder, or models:/NAME/VERSION, models:/NAME@ALIAS (MLFLOW_TRACKING_URI)",
    )
    model_poll: float = Field(
        default=30.0,
        ge=0,
        description="seconds between looks for another model (a moved alias, a changed folder); 0 never looks again",
    )
    cache: Path | None = Field(default=None, description="folder for models from a registry; ~/.cache/mien if unset")
    realm: str = Field(default="mien", description="public name of the deployment; part of what a password means")
    device: str | None = Field(default=None, description="torch device; CUDA where there is one, else the CPU")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="arithmetic of the network; bfloat16 is for GPUs, and recovers a little less"
    )
    channels_last: bool = Field(default=False, description="memory layout NHWC: faster on recent GPUs, not on CPUs")
    compile: bool = Field(default=False, description="torch.compile the network; minutes at the start and at a swap")
    cuda_graphs: bool = Field(default=False, description="replay captured CUDA graphs instead of launching kernels")

    # What a request may cost.
    max_body_bytes: int = Field(default=25 * MIB, ge=64 * 1024, description="largest request body or message, bytes")
    max_pixels: int = Field(default=50_000_000, ge=1, description="largest picture, pixels")
    max_side: int = Field(default=16_384, ge=16, description="longest side of a picture, pixels")
    max_faces: int = Field(default=100, ge=1, le=256, description="most faces in one picture")
    request_timeout: float = Field(default=60.0, gt=0, description="seconds from a request's admission to its answer")
    stall_timeout: float = Field(default=10.0, gt=0, description="seconds an upload may stand still")
    min_upload_rate: int = Field(
        default=4096, ge=0, description="bytes a second an upload must average, once it is stall_timeout old"
    )

    # What all requests together may cost.
    workers: int = Field(
        default_factory=lambda: min(8, os.cpu_count() or 1),
        ge=1,
        le=64,
        description="requests worked on at once; each may hold one decoded picture and one 64 MiB Argon2 block",
    )
    queue_size: int = Field(
        default=16, ge=0, description="requests that may wait for a worker; the next one is refused"
    )
    max_uploads: int = Field(default=128, ge=1, description="uploads under way at once, over HTTP")
    max_buffered_bytes: int = Field(
        default=512 * MIB, ge=MIB, description="bytes of all request bodies in memory; more is refused"
    )
    cpu_threads: int | None = Field(
        default=None, ge=1, description="threads of one torch operation; torch decides if unset"
    )
    batch_size: int = Field(default=16, ge=1, description="most face crops in one pass of the network")
    batch_wait_ms: float = Field(
        default=4.0, ge=0, le=1000, description="how long a batch waits for other callers' crops"
    )

    # gRPC.
    grpc_port: int | None = Field(default=None, ge=0, le=65535, description="port of gRPC; off if unset, any free if 0")
    grpc_host: str | None = Field(default=None, description="address gRPC binds to; that of HTTP if unset")
    grpc_tls_cert: Path | None = Field(default=None, description="PEM chain; gRPC speaks TLS then")
    grpc_tls_key: Path | None = Field(default=None, description="PEM key of grpc_tls_cert")
    grpc_tls_client_ca: Path | None = Field(
        default=None, description="PEM authorities; clients must then show a certificate of theirs (mTLS)"
    )
    max_streams: int = Field(default=8, ge=1, description="TransformStream calls open at once")
    stream_window: int = Field(default=4, ge=1, le=64, description="frames of one stream worked on at once")

    # Who may ask, and how often.
    api_keys: Path | None = Field(
        default=None, description="file of API keys (NAME SHA256 a line; python -m serving.keys), read again on change"
    )
    insecure: bool = Field(default=False, description="allow an address other machines reach without API keys")
    rate_limit: int | None = Field(
        default=None, ge=0, description="requests a minute and key; 1200 with API keys and 0 (any) without, if unset"
    )
    recover_rate_limit: int | None = Field(
        default=None,
        ge=0,
        description="passwords tried by recover a minute and key; 120 with API keys and 0 (any) without, if unset",
    )

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.grpc_tls_cert is None) != (self.grpc_tls_key is None):
            raise ValueError("grpc_tls_cert and grpc_tls_key go together")
        if self.grpc_tls_client_ca is not None and self.grpc_tls_cert is None:
            raise ValueError("grpc_tls_client_ca needs grpc_tls_cert and grpc_tls_key")
        return self

    @property
    def requests_per_minute(self) -> int:
        """Of one caller; 0 for any number."""
        return self._limit(self.rate_limit, 1200)

    @property
    def recoveries_per_minute(self) -> int:
        """Passwords of one caller tried by recover; 0 for any number."""
        return self._limit(self.recover_rate_limit, 120)

    def _limit(self, given: int | None, with_keys: int) -> int:
        if given is not None:
            return given
        return with_keys if self.api_keys is not None else 0
