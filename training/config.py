"""One typed, frozen config per component, composed into the config of a run.

Loaded from YAML (or JSON) plus ``key=value`` overrides; unknown keys are refused; the whole is dumped into every
checkpoint and into the tracker.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mien import networks


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Config):
    """Where the crops are (services.ingest wrote them)."""

    shards: str = Field(description="folder or s3:// prefix with manifest.json and its shards")
    flip: bool = Field(True, description="mirror half of the training crops")
    limit: PositiveInt | None = Field(
        None, description="use only the first so many samples, of training and of validation each (dry runs)"
    )


class RecogniserConfig(Config):
    """F: the recogniser that the transformer has to deceive (paper, section 3.4)."""

    name: Literal["sphereface20", "mobilefacenet-casia", "inception-resnet-v1"] = "mobilefacenet-casia"
    weights: str | None = Field(None, description="safetensors file; None starts from scratch or the usual download")
    trainable: bool = Field(True, description="False is the ablation of eq. 20: F never learns to see through")
    against_recovered: NonNegativeFloat = Field(
        0.0, description="weight of F's training against R (negative cross entropy), as in the authors' code: 0.5"
    )
    embedding_augmentation: bool = Field(
        False, description="F sees slightly moved, scaled and blurred crops, so that no fixed pattern deceives it"
    )


class DiscriminatorConfig(Config):
    """D: PatchGANs at two scales (paper, eq. 14-15), and optionally heads on frozen features."""

    width: PositiveInt = 64
    layers: PositiveInt = 3
    projected_weights: str | None = Field(
        None, description="LPIPS AlexNet file: adds discriminator heads on its frozen features (Sauer et al. 2021)"
    )
    augment: bool = Field(False, description="DiffAugment on everything D sees (Zhao et al. 2020)")
    pool_size: NonNegativeInt = Field(500, description="buffer of generated images; 0 switches it off")
    on_recovered: bool = Field(True, description="judge R too, as the paper does")
    on_wrong: bool = Field(True, description="judge WR too, as the paper does")
    colour_pool: PositiveInt = Field(
        1, description="D sees colour averaged over so many pixels a side: it shall not hang on the fine colour that a"
        " network hides the face in",
    )  # fmt: skip


class PredictorConfig(Config):
    """Q: reads the code from a pair of images (paper, eq. 18)."""

    width: PositiveInt = 64


class WeightsConfig(Config):
    """Weights of the terms of eq. 16; the defaults are the paper's. A term of weight 0 is not computed."""

    auxiliary: NonNegativeFloat = Field(1.0, description="eq. 18")
    feature: NonNegativeFloat = Field(2.0, description="eq. 9")
    adversarial: NonNegativeFloat = Field(2.0, description="eq. 10")
    recovery_class: NonNegativeFloat = Field(2.0, description="eq. 12")
    recovery: NonNegativeFloat = Field(100.0, description="eq. 11")
    background: NonNegativeFloat = Field(10.0, description="eq. 13")
    gan: NonNegativeFloat = Field(1.0, description="eq. 14-15")
    # Ours
    identity: NonNegativeFloat = Field(0.0, description="hinge on cos(I, A) and cos(I, WR)")
    recovered_identity: NonNegativeFloat = Field(0.0, description="1 - cos(I, R)")
    perceptual: NonNegativeFloat = Field(0.0, description="LPIPS(I, R)")
    likeness: NonNegativeFloat = Field(0.0, description="LPIPS(I, A) and LPIPS(I, WR): keep pose, light and style")
    pose: NonNegativeFloat = Field(
        0.0,
        description="MTCNN's box and landmarks of A and WR against those of I, and its doubt (needs facenet-pytorch)",
    )
    own: NonNegativeFloat = Field(0.0, description="cover: L1 of I and I with its own likeness painted into it")
    own_perceptual: NonNegativeFloat = Field(0.0, description="cover: LPIPS of the same")
    steady: NonNegativeFloat = Field(
        0.0, description="cover: L1 of what is painted into I and into the saved A: recovery paints it again"
    )
    roughness: NonNegativeFloat = Field(0.0, description="Laplacian of A - I and WR - I: no lattices")
    range: NonNegativeFloat = Field(0.0, description="pixels outside [-1, 1], which saving would clip away")


class ObjectiveConfig(Config):
    """What is asked of the transformer."""

    weights: WeightsConfig = WeightsConfig()
    wrong_recovery: bool = Field(True, description="False is the ablation without WR")
    wrong_pair: bool = Field(
        True, description="make WR2 too, for the pair (WR1, WR2) of eq. 9; False saves a pass of T"
    )
    margin: float = Field(0.0, ge=-1, le=1, description="hinge: cosines below it cost nothing; eq. 8 has 0")
    face_weighted_background: bool = Field(
        False, description="eq. 13 weighted towards the border of the crop, so that it does not fight identity change"
    )
    through_anonymized: bool = Field(
        True, description="gradients reach A through what was made of it; False where T hides nothing that is learned"
    )
    near_miss: float = Field(0.0, ge=0, le=1, description="share of wrong codes drawn one to three bits from right")
    save: bool = Field(False, description="recover from the differentiably saved file instead of unrounded floats")
    save_jpeg: float = Field(0.0, ge=0, le=1, description="share of saves through JPEG 75..98")
    save_rescale: float = Field(0.0, ge=0, le=1, description="share of saves through a rescale of 0.5..1")
    identity_ramp: NonNegativeInt = Field(0, description="images over which the identity terms grow to full weight")
    perceptual_weights: str | None = Field(None, description="LPIPS AlexNet file for the perceptual terms")

    @model_validator(mode="after")
    def _perceptual_needs_weights(self) -> Self:
        weights = self.weights
        if (weights.perceptual or weights.likeness or weights.own_perceptual) and not self.perceptual_weights:
            raise ValueError("objective.perceptual_weights names the LPIPS file that the perceptual terms need")
        return self


class OptimizerConfig(Config):
    """Adam for everything (paper, section 4.1)."""

    lr: PositiveFloat = 1e-4
    lr_discriminator: PositiveFloat = 1e-4
    lr_recogniser: PositiveFloat = 1e-5
    lr_likenesses: NonNegativeFloat = Field(
        0.0, description="cover: of the faces that codes pick, which keep their strength; 0 leaves them as they are"
    )
    betas: tuple[float, float] = (0.5, 0.999)
    warmup: NonNegativeInt = Field(0, description="images of linear warm-up")
    cosine: bool = Field(False, description="decay to a tenth along a cosine over the run")
    clip: PositiveFloat | None = Field(None, description="largest gradient norm of T and Q")


class RunConfig(Config):
    """A whole training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    runs: str = Field("runs", description="folder of runs; this one lies in runs/name")
    seed: NonNegativeInt = 0
    bits: int = Field(16, gt=0, multiple_of=4)
    crop_size: PositiveInt = 128
    architecture: networks.ArchitectureConfig = Field(networks.ResNetConfig(), discriminator="name")
    start: str | None = Field(
        None, description="model (a folder, or models:/NAME@ALIAS) whose T a new run begins with; Q, D and F begin anew"
    )
    data: DataConfig
    recogniser: RecogniserConfig = RecogniserConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    predictor: PredictorConfig = PredictorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    total_images: PositiveInt = Field(description="length of the run in images seen (nimg)")
    batch: PositiveInt = Field(48, description="images a step, over all processes and micro-batches together")
    ema: float = Field(0.0, ge=0, description="half-life of the averaged weights in images; 0 exports the raw ones")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = Field(None, description="CPU threads; None leaves torch's choice")
    strategy: Literal["ddp", "zero1", "zero2"] = Field(
        "ddp", description="how processes share the work: plain data parallel, or DeepSpeed's ZeRO 1 or 2"
    )
    accumulate: PositiveInt = Field(1, description="micro-batches that a process cuts its part of a batch into")
    timeout: PositiveFloat = Field(300, description="seconds after which a process that waits for another gives up")
    patience: PositiveFloat = Field(600, description="seconds for which a store that does not answer is asked again")
    cache: str | None = Field(
        None, description="folder for verified copies of shards; None: $XDG_CACHE_HOME/mien/shards for s3://, else none"
    )
    cache_limit: PositiveInt | None = Field(None, description="bytes that the cache may hold; None is 16 GiB")
    lanes: PositiveInt | None = Field(
        None, description="streams that an epoch is read in, part of the order; None is 8. A multiple of the processes"
        " that divides the batch lets each read shards of its own"
    )  # fmt: skip
    decoders: PositiveInt = Field(2, description="threads of a process that decode crops")
    max_skipped: PositiveInt = Field(10, description="steps in a row that may be skipped because they were not finite")
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    log_every: PositiveInt = Field(1_000, description="images between log lines")
    sample_every: PositiveInt = Field(20_000, description="images between sample grids and validation figures")
    checkpoint_every: PositiveInt = Field(20_000, description="images between checkpoints")
    checkpoints: str | None = Field(
        None, description="folder or s3:// prefix for checkpoints; None puts them in the run's folder"
    )
    keep_checkpoints: PositiveInt = Field(2, description="so many of the newest are kept, and the best one")
    export: str | None = Field(None, description="folder for the finished model; None puts it in the run's folder")
    mlflow: str | None = Field(None, description="tracking URI; None logs to the run folder alone")

    @model_validator(mode="after")
    def _likenesses_are_whole(self) -> Self:
        if self.optimizer.lr_likenesses and self.strategy != "ddp":
            raise ValueError(
                "optimizer.lr_likenesses needs strategy ddp: likenesses are kept at their strength as a whole"
            )
        return self


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run config, apply ``a.b.c=value`` overrides (values in JSON, else text), validate.

    ``${MIEN_SHARED}`` in a value stands for that environment variable, default ``../shared``.

    Raises:
        ValueError: the file is unreadable or a key or value is not allowed; the message says which.
    """
    return validate(read(path, overrides))


def read(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What :func:`load` validates: the file's mapping with the overrides in it, variables as they stand there."""
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"cannot read config {path}: {error.strerror}") from error
    if path.suffix == ".json":
        raw = json.loads(text)
    else:
        import yaml  # a GPU machine without a registry has no PyYAML; it is given JSON

        try:
            raw = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no mapping")
    return override(raw, overrides)


def override(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A mapping with ``a.b.c=value`` put into it, in place; raises ValueError where one is not written so."""
    for given in overrides:
        key, found, value = given.partition("=")
        if not found:
            raise ValueError(f"an override is written key=value, not {given!r}")
        _assign(raw, key.split("."), _parse(value))
    return raw


def validate(raw: dict[str, Any]) -> RunConfig:
    """A mapping as a config, ``${MIEN_SHARED}`` filled in; raises ValueError."""
    return RunConfig.model_validate(expand(raw))


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _assign(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ValueError(f"{'.'.join(keys)}: {key} is not a section")
        tree = child
    tree[keys[-1]] = value


def expand(value: Any) -> Any:
    """A config's mapping with ``${MIEN_SHARED}`` filled in, default ``../shared``."""
    if isinstance(value, dict):
        return {k: expand(v) for k, v in value.items()}
    if isinstance(value, str) and "${MIEN_SHARED}" in value:
        return value.replace("${MIEN_SHARED}", os.environ.get("MIEN_SHARED", "../shared"))
    return value
