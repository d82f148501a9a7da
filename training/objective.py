"""The paper's objective (eq. 16), one function a term, and the terms that ours adds.

Notation: I the image, A = T_p I, R = T_-p A, WR = T_w A with a wrong code w; A1, A2 and WR1, WR2 under two codes each.
Images are float ``[B, 3, S, S]`` in [-1, 1]; embeddings float ``[B, D]``, of any length; every function gives a scalar.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.predictor import code_classes


def dissimilarity(first: Tensor, second: Tensor, margin: float = 0.0) -> Tensor:
    """Eq. 8, L_dis: mean of max(0, cos(F(M1), F(M2)) - margin); the paper's margin is 0. Range [0, 1 - margin]."""
    return F.relu(F.cosine_similarity(first, second, dim=1) - margin).mean()


def feature_dissimilarity(
    a1: Tensor, a2: Tensor, wr1: Tensor | None, wr2: Tensor | None, margin: float = 0.0
) -> Tensor:
    """Eq. 9, L_feat: L_dis over (A1, A2), (WR1, WR2), (A1, WR1), weighted 2 / 1 / 1 as in the authors' code.

    What is ``None`` was not made: without wrong recovery only the first pair is left.
    """
    loss = 2 * dissimilarity(a1, a2, margin)
    if wr1 is not None:
        loss = loss + dissimilarity(a1, wr1, margin)
        if wr2 is not None:
            loss = loss + dissimilarity(wr1, wr2, margin)
    return loss


def classification(logits: Sequence[Tensor], identities: Tensor) -> Tensor:
    """The cross entropy in eq. 10 and 12: mean over the groups of images given, over labelled samples.

    In eq. 10 F minimises it on (I, A, WR) and T maximises it on (A, WR); in eq. 12 T minimises it on R.

    Args:
        logits: each float ``[B, K]``.
        identities: int64 ``[B]``; -1 where unlabelled, which is left out.

    Returns:
        Range [0, inf); 0 where nothing is labelled.
    """
    labelled = identities >= 0
    if not bool(labelled.any()):
        return logits[0].sum() * 0
    return torch.stack([F.cross_entropy(x[labelled], identities[labelled]) for x in logits]).mean()


def recovery(recovered: Tensor, image: Tensor) -> Tensor:
    """Eq. 11, L_rec: L1(R, I), in [0, 2] on images in [-1, 1]."""
    return F.l1_loss(recovered, image)


def background(changed: Sequence[Tensor], image: Tensor, weight: Tensor | None = None) -> Tensor:
    """Eq. 13, L_1: L1(A, I) + L1(WR, I).

    ``weight`` (float ``[1, 1, S, S]``, mean 1) moves the term towards the crop's border, so that it keeps the
    background without fighting the change of the face.
    """
    total = image.new_zeros(())
    for x in changed:
        distance = (x - image).abs()
        total = total + (distance if weight is None else distance * weight).mean()
    return total


def gan_generator(scores: Sequence[Sequence[Tensor]]) -> Tensor:
    """Eq. 14-15, T's side, LSGAN: (D(x) - 1)^2, mean over the kinds of image, summed over the discriminators.

    Args:
        scores: for each kind (A, R, WR) a list of score maps, one a discriminator.
    """
    return torch.stack([torch.stack([(s - 1).square().mean() for s in kind]).sum() for kind in scores]).mean()


def gan_discriminator(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """Eq. 14-15, D's side, LSGAN: ((D(real) - 1)^2 + D(fake)^2) / 2, mean over kinds, summed over discriminators."""
    kinds = []
    for r, f in zip(real, fake, strict=True):
        kinds.append(
            torch.stack([((a - 1).square().mean() + b.square().mean()) / 2 for a, b in zip(r, f, strict=True)]).sum()
        )
    return torch.stack(kinds).mean()


def auxiliary(logits: Sequence[Tensor], codes: Sequence[Tensor]) -> Tensor:
    """Eq. 18, L_aux: cross entropy of Q's N/4 parallel 16-way classifiers, mean over heads and over the pairs given.

    Args:
        logits: Q's output for (I, A), (A, R), (A, WR), each float ``[B, N/4, 16]``.
        codes: the code each was made with, float ``[B, N]`` in {-0.5, +0.5}.
    """
    return torch.stack(
        [F.cross_entropy(x.flatten(0, 1), code_classes(c).flatten()) for x, c in zip(logits, codes, strict=True)]
    ).mean()


# What ours adds; each has a weight of 0 in the paper's config.


def identity(image: Tensor, changed: Sequence[Tensor], margin: float = 0.0) -> Tensor:
    """L_dis between I and every changed image: the direct form of eq. 3 and 5, mean over the images given."""
    return torch.stack([dissimilarity(image, x, margin) for x in changed]).mean()


def recovered_identity(image: Tensor, recovered: Tensor) -> Tensor:
    """1 - cos(F(I), F(R)), in [0, 2]: the direct form of eq. 4, without labels."""
    return (1 - F.cosine_similarity(image, recovered, dim=1)).mean()


def out_of_range(images: Sequence[Tensor]) -> Tensor:
    """Mean distance outside [-1, 1]: what saving would clip away and recovery would miss."""
    return torch.stack([F.relu(x.abs() - 1).mean() for x in images]).mean()


def roughness(changed: Sequence[Tensor], image: Tensor) -> Tensor:
    """Mean absolute Laplacian of what was changed, over the images given: lattices cost much, shades little."""
    total = image.new_zeros(())
    for x in changed:
        d = x - image
        laplacian = 4 * d[..., 1:-1, 1:-1] - d[..., :-2, 1:-1] - d[..., 2:, 1:-1] - d[..., 1:-1, :-2] - d[..., 1:-1, 2:]
        total = total + laplacian.abs().mean()
    return total / len(changed)
