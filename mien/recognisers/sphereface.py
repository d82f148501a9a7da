"""SphereFace-20 (Liu et al. 2017, "SphereFace", table 2), the F of the paper."""

from __future__ import annotations

from torch import Tensor, nn

from mien import geometry
from mien.recognisers.base import Recogniser

# (channels, residual units) of each stage; a stage opens with a 3x3 convolution of stride 2.
_STAGES = ((64, 1), (128, 2), (256, 4), (512, 1))


class _Unit(nn.Module):
    """Two 3x3 convolutions with PReLU, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.PReLU(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class SphereFace20(Recogniser):
    """512-d embeddings of a 112x96 crop: 20 convolutions without normalisation, then one linear layer.

    The angular softmax it is trained with belongs to training; here is what remains at inference. Initialisation is
    that of its authors: Xavier, and N(0, 0.01) inside residual units.
    """

    def __init__(self) -> None:
        super().__init__(
            name="sphereface20", embedding_size=512, threshold=None, matrix=geometry.TO_112X96, size=(112, 96)
        )
        layers: list[nn.Module] = []
        channels = 3
        for outputs, units in _STAGES:
            layers += [nn.Conv2d(channels, outputs, 3, stride=2, padding=1), nn.PReLU(outputs)]
            layers += [_Unit(outputs) for _ in range(units)]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.embedding = nn.Linear(channels * 7 * 6, 512)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for unit in self.modules():
            if isinstance(unit, _Unit):
                for module in unit.modules():
                    if isinstance(module, nn.Conv2d):
                        nn.init.normal_(module.weight, std=0.01)
        self.eval()

    def embed(self, aligned: Tensor) -> Tensor:
        # (x - 127.5) / 128 of 0..255 pixels, as its authors feed it.
        out: Tensor = self.embedding(self.features(aligned * (127.5 / 128)).flatten(1))
        return out
