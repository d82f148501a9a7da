"""docs/clients.md: every example is run, in order, against a real service."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grpc", reason="the grpc extra is not installed")

PAGE = Path(__file__).resolve().parents[2] / "docs/clients.md"
EXAMPLES = re.findall(r"^```(python|sh)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.S | re.M)


def aimed(text: str, service: Any) -> str:
    """An example, with the service's addresses in the place of the usual ones."""
    return text.replace("localhost:3000", f"127.0.0.1:{service.port}").replace("localhost:3001", service.grpc)


def test_the_page_has_examples_of_every_kind() -> None:
    kinds = [kind for kind, _ in EXAMPLES]
    shell = "".join(text for kind, text in EXAMPLES if kind == "sh")
    assert kinds.count("python") == 4
    assert all(f"{name} " in shell for name in ("mien", "curl", "grpcurl"))


def test_the_python_examples_run(service: Any, astronaut: bytes) -> None:
    photo = Image.open(io.BytesIO(astronaut)).convert("RGB")
    pixels = np.asarray(photo)
    names: dict[str, Any] = {"photo": photo, "data": astronaut, "frames": [pixels, pixels[:, ::-1].copy()]}
    for kind, text in EXAMPLES:
        if kind == "python":
            exec(compile(aimed(text, service), str(PAGE), "exec"), names)
    original, safe, back = (np.asarray(names[n].convert("RGB")).astype(int) for n in ("photo", "safe", "back"))
    assert np.abs(back - original).mean() < np.abs(safe - original).mean() / 2
    assert names["faces"] and names["answer"].face_count == 1 and names["frame"].geometry.faces


@pytest.mark.parametrize("command", ["mien", "curl", "grpcurl"])
def test_the_shell_examples_run(command: str, service: Any, astronaut: bytes, tmp_path: Path) -> None:
    beside = Path(sys.executable).parent
    if shutil.which(command, path=f"{beside}:/usr/local/bin:/usr/bin:/bin") is None and shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    (text,) = [text for kind, text in EXAMPLES if kind == "sh" and text.startswith(f"{command} ")]
    (tmp_path / "photo.png").write_bytes(astronaut)
    (tmp_path / "password.txt").write_text("correct horse\n")
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'PATH="{beside}:$PATH"\n{aimed(text, service)}'],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    for made in re.findall(r"-o (\S+)", text):
        with Image.open(tmp_path / made) as picture:
            assert picture.size == Image.open(io.BytesIO(astronaut)).size, made
