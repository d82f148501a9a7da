"""``tiny_run.py FOLDER``: shards of made pictures, a recogniser of random weights and the config of a run of seconds.

In the training image. Each pod of a job makes the same for itself, so that no storage is needed.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mien.recognisers import MobileFaceNet

SIZE = 64


def shard(path: Path, count: int, seed: int) -> dict[str, object]:
    """A tar of ``count`` smooth pictures; its entry in the manifest."""
    random = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            small = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8))
            picture, file = small.resize((SIZE, SIZE), Image.Resampling.BICUBIC), io.BytesIO()
            picture.save(file, "JPEG", quality=95)
            label = {"identity": number % 4, "landmarks": [[0, 0]] * 5, "source": "made"}
            for extension, data in (("jpg", file.getvalue()), ("json", json.dumps(label).encode())):
                entry = tarfile.TarInfo(f"{number:06d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    data = path.read_bytes()
    return {"name": path.name, "split": path.name.split("-")[0], "samples": count, "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest()}  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1])
    shards = folder / "shards"
    shards.mkdir(parents=True)
    made = [shard(shards / "train-000000.tar", 24, 1), shard(shards / "val-000000.tar", 4, 2)]
    (shards / "manifest.json").write_text(json.dumps({"crop_size": SIZE, "shards": made}))
    torch.manual_seed(0)
    save_file(MobileFaceNet("casia").state_dict(), folder / "recogniser.safetensors")
    config = {
        "name": "e2e", "runs": str(folder / "runs"), "bits": 8, "crop_size": SIZE,
        "architecture": {"name": "unet", "widths": [8, 16], "condition": 16},
        "data": {"shards": str(shards)},
        "recogniser": {"name": "mobilefacenet-casia", "weights": str(folder / "recogniser.safetensors")},
        "discriminator": {"width": 8, "layers": 2, "pool_size": 6},
        "predictor": {"width": 8},
        "total_images": 16, "batch": 4, "ema": 20, "device": "cpu", "threads": 1, "timeout": 120, "patience": 30,
        "log_every": 4, "sample_every": 8, "checkpoint_every": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
