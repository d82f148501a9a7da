"""What is not face stays what it was: in crops, and in whole pictures."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mien import geometry
from mien.errors import MienError
from mien.model import Model
from mien.networks.blocks import head_mask
from services.evaluate.context import Context
from services.evaluate.figures import Result

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def run(context: Context) -> Result:
    """Error outside the head in crops, in 8-bit levels; pixels outside the crops and PSNR of whole saved pictures."""
    result = Result()
    original = context.chain("I").astype(np.int16)
    outside = head_mask(original.shape[1])[0, 0].numpy() == 0
    result.number("background.crop.share", float(outside.mean()))
    for kind in ("A", "R", "WR"):
        error = np.abs(context.chain(kind).astype(np.int16) - original)[:, outside]
        result.mean(f"background.crop.{kind}.levels", error.mean(axis=(1, 2)), context.groups)
        result.mean(f"background.crop.{kind}.unchanged", (error == 0).all(axis=2).mean(axis=1), context.groups)
    _pictures(context, result)
    return result


def _pictures(context: Context, result: Result) -> None:
    if context.photos is None or not isinstance(context.model, Model):
        result.skip("background.picture", "no whole pictures were given (--photos FOLDER or TAR)")
        return
    model = context.model
    code = context.chain.codes["first"][0]
    unchanged, outside_error, back_psnr, lost, found = [], [], [], 0, 0
    with context.progress.stage("whole pictures", context.sizes.photos) as advance:
        for data in photos(context.photos, context.sizes.photos, context.seed):
            advance(1)
            before = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            try:
                safe = model.anonymize_bytes(data, code=code, format="PNG")
            except MienError:
                lost += 1
                continue
            found += 1
            after = np.asarray(Image.open(io.BytesIO(safe.data)).convert("RGB"))
            crops = np.zeros(before.shape[:2], dtype=bool)
            for face in safe.faces:
                crops |= _inside(np.array(face.matrix), model.crop_size, before.shape[:2])
            same = (before == after).all(axis=2)
            unchanged.append(float(same.mean()))
            if (~crops).any():
                outside_error.append(float((~same[~crops]).mean()))
            again = model.recover_bytes(safe.data, code=code, format="PNG")
            back = np.asarray(Image.open(io.BytesIO(again.data)).convert("RGB"))
            error = ((back.astype(float) - before) ** 2).mean()
            back_psnr.append(min(60.0, float(10 * np.log10(255**2 / max(error, 1e-9)))))
    if not found:
        result.skip("background.picture", f"no face was found in {lost} pictures of {context.photos.name}")
        return
    result.number("background.picture.without-a-face", lost, found + lost)
    result.mean("background.picture.unchanged", unchanged)
    result.mean("background.picture.recovered-psnr", back_psnr)
    if outside_error:
        result.mean("background.picture.changed-outside-crops", outside_error)
    else:
        result.skip("background.picture.changed-outside-crops", "the crops cover these pictures whole")


def _inside(matrix: np.ndarray, size: int, shape: tuple[int, ...]) -> np.ndarray:
    ys, xs = np.mgrid[0 : shape[0], 0 : shape[1]]
    at = geometry.apply(matrix, np.stack([xs, ys], axis=-1).astype(float))
    inside: np.ndarray = ((at > -1) & (at < size)).all(axis=-1)
    return inside


def photos(path: Path, count: int, seed: int) -> Iterator[bytes]:
    """Bytes of a seeded sample of the pictures in a folder or an uncompressed tar."""
    rng = np.random.default_rng([seed, 4])
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        for i in rng.permutation(len(names))[:count]:
            yield names[i].read_bytes()
        return
    with tarfile.open(path, "r:") as tar:
        members = sorted((m for m in tar if m.name.lower().endswith(_SUFFIXES)), key=lambda m: m.name)
        for i in rng.permutation(len(members))[:count]:
            file = tar.extractfile(members[i])
            if file is not None:
                yield file.read()
