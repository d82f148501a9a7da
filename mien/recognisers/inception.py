"""InceptionResnetV1 ("FaceNet") through facenet-pytorch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mien import geometry
from mien.errors import ModelError
from mien.recognisers.base import Recogniser

Pretrained = Literal["vggface2", "casia-webface"]


class InceptionResnet(Recogniser):
    """512-d embeddings of a 160x160 crop.

    Args:
        pretrained: data set of the weights, which facenet-pytorch downloads on first use into torch's cache, or None
            for random weights.

    Raises:
        ModelError: the weights are not in the cache and cannot be downloaded.
    """

    def __init__(self, pretrained: Pretrained | None = "vggface2") -> None:
        super().__init__(
            name="inception-resnet-v1", embedding_size=512, threshold=None, matrix=geometry.TO_160, size=(160, 160)
        )
        # Imported here: it brings torchvision, which takes seconds.
        from facenet_pytorch import InceptionResnetV1

        try:
            self.network: nn.Module = InceptionResnetV1(pretrained=pretrained)
        except OSError as error:  # URLError, timeouts and unwritable caches alike
            raise ModelError(
                f"the {pretrained} weights of InceptionResnetV1 are not in torch's cache and could not be downloaded"
                f" ({error}). Download them once on a machine with a connection, or use another recogniser."
            ) from error
        self.eval()

    def embed(self, aligned: Tensor) -> Tensor:
        # (x - 127.5) / 128 of 0..255 pixels, the library's fixed_image_standardization.
        out: Tensor = self.network(aligned * (127.5 / 128))
        return out
