"""F as the paper uses it: a recogniser with a classification head over the training identities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.draws import Draws


class IdentityHead(nn.Module):
    """Cosine softmax over ``identities`` classes (Wang et al. 2018, CosFace, without its margin).

    ``forward(embeddings float [B, D]) -> logits float [B, identities]``, in [-scale, scale].
    """

    def __init__(self, embedding_size: int, identities: int, *, scale: float = 30.0) -> None:
        super().__init__()
        self.scale = scale
        self.centres = nn.Parameter(torch.randn(identities, embedding_size) / embedding_size**0.5)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(embeddings, dim=1), F.normalize(self.centres, dim=1))

    @torch.no_grad()
    def centre_on(self, embeddings: Tensor, identities: Tensor) -> None:
        """Start from the mean embedding of every identity, so that a pre-trained F classifies at once.

        Args:
            embeddings: float ``[M, D]``.
            identities: int64 ``[M]``, -1 where unlabelled.
        """
        unit = F.normalize(embeddings, dim=1)
        for identity in identities.unique().tolist():
            if identity >= 0:
                self.centres[identity] = F.normalize(unit[identities == identity].mean(dim=0), dim=0)


def augment_view(images: Tensor, draws: Draws) -> Tensor:
    """Slightly moved, scaled, rotated and at times coarser copies: what F is asked about must not hang on exact pixels.

    Args:
        images: float ``[B, 3, S, S]``.
        draws: whose samples these images are of, one block of the batch a kind.
    """
    b, size = images.shape[0], images.shape[-1]
    draw = (draws.rows(b, 4) * 2 - 1).float()
    angle, zoom = draw[:, 0] * 0.1, 1 + draw[:, 1] * 0.06
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack(
        [torch.stack([cos, -sin, draw[:, 2] * 0.06], 1), torch.stack([sin, cos, draw[:, 3] * 0.06], 1)], 1
    ).to(images)
    grid = F.affine_grid(theta, [b, 3, size, size], align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    # Half of the time F sees a coarse view: a pattern too fine for an eye must be of no use against it.
    is_coarse, amount = draws.shared(2).tolist()
    if is_coarse < 0.5:
        coarse = round(size / (1.5 + 2.0 * amount))
        views = F.interpolate(views, size=(coarse, coarse), mode="bilinear", antialias=True, align_corners=False)
        views = F.interpolate(views, size=(size, size), mode="bilinear", align_corners=False)
    return views
