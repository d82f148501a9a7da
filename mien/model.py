"""A loaded model: faces in, other faces out; pictures in, pictures out.

A picture goes through three steps, each of which can be had on its own: :meth:`Model.plan` says which crops will
change, :meth:`Model.steps` hands out batches of crops and takes transformed ones back, and the result is a finished
:class:`~mien.pictures.Picture`. :class:`Model` drives the steps itself; a server drives them through a queue in which
the crops of several callers meet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mien import compositing, geometry, networks, passwords, pictures, store
from mien.detection import Detector, Face, MTCNNDetector
from mien.errors import InvalidImage, InvalidPassword, ModelError, NoFaceFound, NoSuchFace, TooManyFaces, WrongModel
from mien.passwords import Code
from mien.pictures import DEFAULT_LIMITS, FaceGeometry, Format, Geometry, Limits, Picture

Operation = Literal["anonymize", "recover"]


class Crops(NamedTuple):
    """What a step asks to be transformed."""

    images: Tensor
    """float32 ``[F, 3, S, S]`` in [-1, 1]."""
    faces: tuple[int, ...]
    """Which of the plan's faces they are: where faces have codes of their own, the order in which to give them."""


Steps = Generator[Crops, Tensor, Picture]

# Crops in one batch: bounds memory, and costs nothing in speed above a few dozen.
_BATCH: Final = 32

# A crop whose strongest change is below this (of 2, so half an 8-bit step) was not changed.
_UNCHANGED: Final = 1 / 255

# How well a box must cover a face to mean it: of the two areas' union, or of the face where the box is a generous one.
_BOX_UNION: Final = 0.3
_BOX_COVER: Final = 0.6

# Two letters at least: C:\models is a folder.
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")


@dataclass(frozen=True)
class Result:
    """What :meth:`Model.anonymize_bytes` and :meth:`Model.recover_bytes` give back."""

    data: bytes
    """The encoded picture."""
    format: Format
    width: int
    height: int
    faces: tuple[FaceGeometry, ...]
    """The faces that were changed."""
    digest: str
    """Of the model that changed them."""


@dataclass(frozen=True)
class Selection:
    """Which faces of a picture to change; nothing given means all of them."""

    faces: Sequence[int] | None = None
    """By number; a face in ``faces`` *or* ``boxes`` is chosen."""
    boxes: Sequence[Sequence[float]] | None = None
    """By place (x0, y0, x1, y1): for each box the face that overlaps it most, and well."""
    exclude_faces: Sequence[int] | None = None
    """Left alone, whatever the above say."""
    exclude_boxes: Sequence[Sequence[float]] | None = None
    """Every face that overlaps one of these well is left alone."""

    def choose(self, found: Sequence[FaceGeometry]) -> list[int]:
        """Numbers of the chosen faces, ascending.

        Raises:
            NoSuchFace: a number is out of range, a box of ``boxes`` is over no face, or nothing is left to change.
        """
        named = [*(self.faces or ()), *(self.exclude_faces or ())]
        if any(not 0 <= n < len(found) for n in named) or self.faces == []:
            raise NoSuchFace(f"Faces are numbered from 0, and the last one here is {len(found) - 1}.")
        wanted = set(self.faces or ()) if self.faces is not None or self.boxes is not None else set(range(len(found)))
        for place, box in enumerate(self.boxes or ()):
            fit, best = max((_fit(box, face.box), -n) for n, face in enumerate(found))
            if not fit:
                raise NoSuchFace(f"There is no face at box {place}, counted from 0.")
            wanted.add(-best)
        wanted -= set(self.exclude_faces or ())
        wanted -= {n for n, face in enumerate(found) if any(_fit(box, face.box) for box in self.exclude_boxes or ())}
        if not wanted:
            raise NoSuchFace("Every face of the picture is to be left alone, so there is nothing to change.")
        return sorted(wanted)


def _fit(box: Sequence[float], face: Sequence[float]) -> float:
    """How well a box means a face: 0 where it does not, else intersection over union."""
    width = min(box[2], face[2]) - max(box[0], face[0])
    height = min(box[3], face[3]) - max(box[1], face[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = (face[2] - face[0]) * (face[3] - face[1])
    union = (box[2] - box[0]) * (box[3] - box[1]) + area - width * height
    share = width * height / union
    return share if share >= _BOX_UNION or width * height >= _BOX_COVER * area else 0.0


def load(
    path: str | os.PathLike[str],
    *,
    realm: str = passwords.DEFAULT_REALM,
    device: str | None = None,
    detector: Detector | None = None,
) -> Model:
    """Load a model.

    Args:
        path: folder with ``model.safetensors`` and ``config.json``, or the URI of a registered model
            (``models:/mien@champion``, ``models:/mien/3``; needs the serve or the train extra).
        realm: public name of the deployment; one password gives different codes in different realms.
        device: torch device; a CUDA device where there is one by default, else the CPU.
        detector: finds faces; MTCNN by default, loaded when it is first needed.

    Raises:
        ModelError: the folder is missing, incomplete or of an unknown format; nothing installed knows the URI's scheme.
        ModelIntegrityError: the weights do not have the digest that the config names.
    """
    network, config = store.load(locate(path))
    return Model(network, config, realm=realm, device=device, detector=detector)


def locate(path: str | os.PathLike[str]) -> Path:
    """The folder of a model given as a folder or as a URI.

    The library knows no registry: what fetches a URI is whatever is installed as the entry point of its scheme in the
    group ``mien.models``, a function from the URI to a folder.

    Raises:
        ModelError: nothing installed knows the scheme, or it could not fetch the model.
    """
    scheme = _SCHEME.match(path) if isinstance(path, str) else None
    if scheme is None:
        return Path(path)
    found = [entry for entry in metadata.entry_points(group="mien.models") if entry.name == scheme[1].lower()]
    if not found:
        raise ModelError(f"nothing installed can load a model from {scheme[1]}: URIs; give a folder")
    try:
        fetch: Callable[[str], Path] = found[0].load()
    except ImportError as error:
        raise ModelError(
            f"models from {scheme[1]}: URIs need the serve or the train extra: pip install 'mien[serve]' ({error})"
        ) from error
    return Path(fetch(str(path)))


class Model:
    """A face identity transformer with its detector; see :func:`load`. Safe to use from several threads."""

    def __init__(
        self,
        network: nn.Module,
        config: store.ModelConfig,
        *,
        realm: str = passwords.DEFAULT_REALM,
        device: str | None = None,
        detector: Detector | None = None,
    ) -> None:
        self.config = config
        self.realm = realm
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.detector: Detector = detector or MTCNNDetector(device=str(self.device))
        self._network = network.eval().requires_grad_(False).to(self.device)

    def __repr__(self) -> str:
        return (
            f"Model({self.config.architecture.name}, bits={self.bits}, digest={self.digest[:12]}, realm={self.realm!r})"
        )

    @property
    def network(self) -> nn.Module:
        """The transformer, in evaluation mode on :attr:`device`; for who runs batches by other means than ours."""
        return self._network

    @property
    def digest(self) -> str:
        """sha256 of the weights, hexadecimal."""
        return self.config.digest

    @property
    def bits(self) -> int:
        """N, the length of a code."""
        return self.config.bits

    @property
    def crop_size(self) -> int:
        """Side S of the square crops the network takes."""
        return self.config.crop_size

    # Faces. ------------------------------------------------------------------------------------------------------

    def transform(self, faces: NDArray[np.uint8], codes: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Transform aligned crops, each under its own code (recover with the inverse codes).

        Args:
            faces: uint8 RGB ``[B, S, S, 3]``, S being the model's crop size.
            codes: bool ``[B, N]``.

        Returns:
            uint8 ``[B, S, S, 3]``. A face's result does not depend on the rest of the batch.

        Raises:
            ValueError: wrong shape or dtype.
        """
        faces = np.asarray(faces)
        if faces.dtype != np.uint8 or faces.ndim != 4 or faces.shape[3] != 3:
            raise ValueError(f"expected uint8 faces [B, S, S, 3], not {faces.dtype} {faces.shape}")
        return to_bytes(self.transform_float(to_float(faces), codes))

    def transform_float(self, faces: Tensor, codes: NDArray[np.bool_] | Tensor) -> Tensor:
        """:meth:`transform` without rounding: float ``[B, 3, S, S]`` in [-1, 1], nominally to the same range.

        Returns float32 on the CPU.

        Raises:
            ValueError: wrong shape or dtype.
            ModelError: the network produced values that are not finite.
        """
        size, bits = self.crop_size, self.bits
        codes = torch.as_tensor(codes)
        if faces.ndim != 4 or tuple(faces.shape[1:]) != (3, size, size) or not faces.is_floating_point():
            raise ValueError(f"expected float faces [B, 3, {size}, {size}], not {faces.dtype} {tuple(faces.shape)}")
        if codes.dtype != torch.bool or tuple(codes.shape) != (len(faces), bits):
            raise ValueError(f"expected bool codes [{len(faces)}, {bits}], not {codes.dtype} {tuple(codes.shape)}")
        if not len(faces):
            return faces.float().cpu()
        with torch.inference_mode():
            conditions = networks.codes_to_tensor(codes.to(self.device))
            images = faces.to(self.device, torch.float32)
            starts = range(0, len(faces), _BATCH)
            parts = [self._network(images[i : i + _BATCH], conditions[i : i + _BATCH]) for i in starts]
            out = torch.cat(parts).float().cpu()
        if not bool(torch.isfinite(out).all()):
            raise ModelError("the network produced values that are not finite; the model is broken")
        # Out of inference mode: callers may do with it what they like.
        return out.clone()

    # Pictures. ---------------------------------------------------------------------------------------------------

    def detect(self, picture: Image.Image | Picture) -> list[Face]:
        """Every face in a picture, largest first; an empty list where there is none."""
        return self.detector.detect(_as_picture(picture).pixels)

    def anonymize(
        self,
        picture: Image.Image,
        password: str | None = None,
        *,
        code: Code | None = None,
        faces: Sequence[int] | None = None,
    ) -> Image.Image:
        """Change the faces of a picture.

        Args:
            picture: any PIL image; left as it is.
            password: see :func:`mien.passwords.derive_code`.
            code: a raw code, bool ``[N]``, instead of a password, for research.
            faces: indices into :meth:`detect` of the faces to change; all by default.

        Returns:
            ``RGB`` or ``RGBA`` image. It remembers where the faces are; saved as PNG, JPEG or WebP it keeps that in the
            file. PNG keeps what recovery needs, the others lose some of it.

        Raises:
            NoFaceFound, TooManyFaces, NoSuchFace, InvalidPassword, InvalidImage: see :mod:`mien.errors`.
        """
        return self._run_pil(picture, "anonymize", password, code, faces)

    def recover(
        self,
        picture: Image.Image,
        password: str | None = None,
        *,
        code: Code | None = None,
        faces: Sequence[int] | None = None,
    ) -> Image.Image:
        """Give the faces of an anonymized picture back; with a wrong password they become third ones.

        Arguments and errors as for :meth:`anonymize` (``code`` is the one that was used to anonymize, ``faces`` are
        indices into the faces changed then). Where the picture carries no geometry, faces are detected again.

        Raises:
            WrongModel: the picture says that another model changed it.
        """
        return self._run_pil(picture, "recover", password, code, faces)

    def anonymize_bytes(
        self,
        data: bytes,
        password: str | None = None,
        *,
        code: Code | None = None,
        faces: Sequence[int] | None = None,
        format: Format = "PNG",  # noqa: A002
        quality: int = 95,
        keep_metadata: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Result:
        """:meth:`anonymize` from file to file; see :func:`mien.pictures.decode` and :func:`mien.pictures.encode`."""
        picture = pictures.decode(data, limits=limits, keep_metadata=keep_metadata)
        return self._run_bytes(picture, "anonymize", password, code, faces, format, quality, limits)

    def recover_bytes(
        self,
        data: bytes,
        password: str | None = None,
        *,
        code: Code | None = None,
        faces: Sequence[int] | None = None,
        format: Format = "PNG",  # noqa: A002
        quality: int = 95,
        keep_metadata: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Result:
        """:meth:`recover` from file to file."""
        picture = pictures.decode(data, limits=limits, keep_metadata=keep_metadata)
        return self._run_bytes(picture, "recover", password, code, faces, format, quality, limits)

    # The steps. --------------------------------------------------------------------------------------------------

    def code_for(self, operation: Operation, password: str | None = None, *, code: Code | None = None) -> Code:
        """The code an operation conditions the network on: recovering takes the inverse (paper, eq. 2).

        Raises:
            InvalidPassword: neither or both are given, the password is empty or too long, the code is not bool ``[N]``.
        """
        if (password is None) == (code is None):
            raise InvalidPassword("Give a password, or a raw code instead of it.")
        if code is None:
            code = passwords.derive_code(password or "", realm=self.realm, bits=self.bits)
        code = np.asarray(code)
        if code.dtype != np.bool_ or code.shape != (self.bits,):
            raise InvalidPassword(f"This model takes raw codes of {self.bits} bits, as booleans.")
        return passwords.inverse(code) if operation == "recover" else code

    def plan(
        self,
        picture: Picture,
        operation: Operation,
        *,
        faces: Sequence[int] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Geometry:
        """Which crops an operation will change: those of :meth:`find`, or some of them.

        Args:
            picture, operation, limits: see :meth:`find`.
            faces: indices of the faces wanted, in any order; all by default. :class:`Selection` knows more ways.

        Raises:
            NoFaceFound, TooManyFaces, WrongModel: see :meth:`find`.
            NoSuchFace: an index is out of range, or none is given.
        """
        found = self.find(picture, operation, limits=limits)
        return subset(found, Selection(faces=None if faces is None else list(faces)).choose(found.faces))

    def find(self, picture: Picture, operation: Operation, *, limits: Limits = DEFAULT_LIMITS) -> Geometry:
        """Every face that an operation could change.

        Anonymizing detects faces. Recovering uses the geometry that the picture carries, and detects where it has none.

        Args:
            picture: a decoded picture.
            operation: ``anonymize`` or ``recover``.
            limits: ``max_faces`` counts.

        Raises:
            NoFaceFound, TooManyFaces: what the detector saw.
            WrongModel: recovering, and the geometry names another model.
        """
        carried = self._carried(picture) if operation == "recover" else None
        if carried is not None:
            # A digest names the weights and not their config, and anybody can write metadata.
            found = carried.faces if carried.crop_size == self.crop_size else ()
        else:
            found = tuple(_face_geometry(face, self.crop_size) for face in self.detector.detect(picture.pixels))
        if not found:
            raise NoFaceFound("No face was found in the picture.")
        if len(found) > limits.max_faces:
            raise TooManyFaces(f"The picture has {len(found)} faces; at most {limits.max_faces} are accepted.")
        return self._geometry(picture, found)

    def find_aligned(self, picture: Picture, operation: Operation, *, limits: Limits = DEFAULT_LIMITS) -> Geometry:
        """The faces of a picture that *is* an aligned crop, or several one below the other; nothing is detected.

        Raises:
            InvalidImage: the picture is not S pixels wide and a multiple of S high, S being the model's crop size.
            TooManyFaces: more than ``limits.max_faces``.
            WrongModel: recovering, and the picture says that another model changed it.
        """
        size = self.crop_size
        count, rest = divmod(picture.height, size)
        if picture.width != size or rest or not count:
            raise InvalidImage(
                f"The picture is {picture.width} x {picture.height} pixels. Aligned crops of this model are {size} "
                "wide and high, several of them one below the other."
            )
        if count > limits.max_faces:
            raise TooManyFaces(f"The picture has {count} crops; at most {limits.max_faces} are accepted.")
        if operation == "recover":
            self._carried(picture)
        return self._geometry(
            picture,
            [
                FaceGeometry(box=(0.0, top, size - 1.0, top + size - 1.0), matrix=((1.0, 0.0, 0.0), (0.0, 1.0, -top)))
                for top in (float(n * size) for n in range(count))
            ],
        )

    def _carried(self, picture: Picture) -> Geometry | None:
        if picture.geometry is not None and picture.geometry.model != self.digest:
            raise WrongModel(
                f"Model {picture.geometry.model[:12]}... changed this picture, and model {self.digest[:12]}... is "
                "loaded. Load that one to recover it."
            )
        return picture.geometry

    def _geometry(self, picture: Picture, faces: Sequence[FaceGeometry]) -> Geometry:
        return Geometry(
            width=picture.width,
            height=picture.height,
            crop_size=self.crop_size,
            template=self.config.template,
            model=self.digest,
            faces=tuple(faces),
        )

    def steps(self, picture: Picture, plan: Geometry, operation: Operation, *, aligned: bool = False) -> Steps:
        """Change the planned faces; the caller transforms.

        A generator that yields :class:`Crops`, must be sent the transformed images of the same shape, and returns the
        finished picture (``StopIteration.value``). Anonymized pictures carry the plan as their geometry; recovered ones
        carry what is still changed in them.

        Args:
            picture: a decoded picture.
            plan: faces of :meth:`find`, or of :meth:`find_aligned` with ``aligned``.
            operation: as for them.
            aligned: the whole crop is changed, and nothing is resampled or blended.

        Raises:
            ModelError: a transformed crop is not finite, of another shape, or (anonymizing) has not changed at all.
                Nothing of the picture is given out then.
        """
        must_change = operation == "anonymize"
        if aligned:
            pixels = yield from _aligned_steps(picture.pixels, plan, must_change=must_change)
        else:
            matrices = plan.matrices
            order = compositing.layers(matrices, plan.crop_size, (picture.height, picture.width))
            pixels = yield from edit_steps(
                picture.pixels,
                matrices,
                plan.crop_size,
                order if operation == "anonymize" else order[::-1],
                must_change=must_change,
            )
        left: Geometry | None = plan
        if operation == "recover":
            before = picture.geometry.faces if picture.geometry else ()
            rest = tuple(face for face in before if face not in plan.faces)
            left = plan.model_copy(update={"faces": rest}) if rest else None
        return picture.with_pixels(pixels, left)

    def run(self, picture: Picture, plan: Geometry, operation: Operation, code: Code) -> Picture:
        """Drive :meth:`steps` with this model; ``code`` comes from :meth:`code_for`."""
        steps = self.steps(picture, plan, operation)
        try:
            crops = next(steps)
            while True:
                codes = np.broadcast_to(code, (len(crops.faces), self.bits)).copy()
                crops = steps.send(self.transform_float(crops.images, codes))
        except StopIteration as finished:
            done: Picture = finished.value
            return done

    def _run_pil(
        self,
        image: Image.Image,
        operation: Operation,
        password: str | None,
        code: Code | None,
        faces: Sequence[int] | None,
    ) -> Image.Image:
        # In memory, a picture may be as large as the caller likes.
        picture = pictures.from_pil(image, limits=Limits(max_pixels=2**62, max_side=2**31))
        code = self.code_for(operation, password, code=code)
        return pictures.to_pil(self.run(picture, self.plan(picture, operation, faces=faces), operation, code))

    def _run_bytes(
        self,
        picture: Picture,
        operation: Operation,
        password: str | None,
        code: Code | None,
        faces: Sequence[int] | None,
        format: Format,  # noqa: A002
        quality: int,
        limits: Limits,
    ) -> Result:
        code = self.code_for(operation, password, code=code)
        plan = self.plan(picture, operation, faces=faces, limits=limits)
        done = self.run(picture, plan, operation, code)
        data = pictures.encode(done, format, quality=quality)
        return Result(data, format, done.width, done.height, plan.faces, self.digest)


def edit_steps(
    pixels: NDArray[np.uint8],
    matrices: NDArray[np.float64],
    size: int,
    order: Sequence[Sequence[int]],
    *,
    must_change: bool = False,
) -> Generator[Crops, Tensor, NDArray[np.uint8]]:
    """Take crops out of a picture and put transformed ones back, one layer of faces after the other.

    Args:
        pixels: uint8 ``[H, W, 3]``; not modified.
        matrices: ``[F, 2, 3]``, picture to crop.
        size: side S of the crops.
        order: layers of face indices (:func:`mien.compositing.layers`); each sees the result of those before it.
        must_change: refuse crops that come back as they went: a face must not leave unchanged (fail closed).

    Yields:
        Crops of one layer, at most 32; expects the transformed images to be sent.

    Returns:
        uint8 ``[H, W, 3]``.

    Raises:
        ModelError: what was sent cannot be used.
    """
    for layer in order:
        for start in range(0, len(layer), _BATCH):
            numbers = tuple(layer[start : start + _BATCH])
            chosen = matrices[list(numbers)]
            crops = compositing.extract(pixels, chosen, size)
            changed = yield Crops(crops, numbers)
            pixels = compositing.blend(pixels, _checked(crops, changed, must_change=must_change), chosen)
    return pixels


def _aligned_steps(
    pixels: NDArray[np.uint8], plan: Geometry, *, must_change: bool
) -> Generator[Crops, Tensor, NDArray[np.uint8]]:
    size = plan.crop_size
    out = pixels.copy()
    for start in range(0, len(plan.faces), _BATCH):
        numbers = tuple(range(start, min(start + _BATCH, len(plan.faces))))
        tops = [round(-plan.faces[n].matrix[1][2]) for n in numbers]
        crops = to_float(np.stack([pixels[top : top + size] for top in tops]))
        changed = yield Crops(crops, numbers)
        for top, crop in zip(tops, to_bytes(_checked(crops, changed, must_change=must_change)), strict=True):
            out[top : top + size] = crop
    return out


def _checked(crops: Tensor, changed: Tensor, *, must_change: bool) -> Tensor:
    # What is not finite makes the sum so too, in a twentieth of the time.
    if changed.shape != crops.shape or not bool(torch.isfinite(changed.sum())):
        raise ModelError("the network's output is not a finite picture of its input's shape")
    changed = changed.detach().cpu()
    if must_change and unchanged(crops, changed):
        raise ModelError("the network left a face unchanged; is it trained?")
    return changed


def unchanged(crops: Tensor, changed: Tensor) -> bool:
    """Whether any of the crops, float ``[F, 3, S, S]`` in [-1, 1], came back as it went (to half an 8-bit step)."""
    return bool(((changed - crops).abs().amax(dim=(1, 2, 3)) < _UNCHANGED).any())


def to_float(faces: NDArray[np.uint8]) -> Tensor:
    """uint8 ``[B, S, S, 3]`` to what networks take: float32 ``[B, 3, S, S]`` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(faces)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """The inverse of :func:`to_float`, clamped and rounded."""
    whole = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return whole.permute(0, 2, 3, 1).contiguous().numpy()


def subset(geometry: Geometry, faces: Sequence[int]) -> Geometry:
    """A geometry of some of its faces."""
    return geometry.model_copy(update={"faces": tuple(geometry.faces[n] for n in faces)})


def _as_picture(picture: Image.Image | Picture) -> Picture:
    return picture if isinstance(picture, Picture) else pictures.from_pil(picture)


def _face_geometry(face: Face, size: int) -> FaceGeometry:
    # Rounded here, once, so that the crop that is changed and the one that the file's metadata describes are the same.
    matrix = [[round(float(v), 9) for v in row] for row in geometry.crop_transform(face.landmarks, size)]
    return FaceGeometry.model_validate({"box": [round(float(v), 2) for v in face.box], "matrix": matrix})
