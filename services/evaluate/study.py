"""The paper's human study, ready to be held: a page of randomised pairs, and the scores of what people answered.

The page holds pictures and numbers of pairs, never the truth; that is in the key beside it, which stays with whoever
holds the study.
"""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from mien.store import write_atomically
from services.evaluate.chain import Chain
from services.evaluate.distances import Pixels
from services.evaluate.figures import Result

KINDS: Final = {
    "I-A": ("I", "A"), "I-R": ("I", "R"), "I-WR": ("I", "WR"), "A-WR": ("A", "WR"), "A1-A2": ("A", "A2"),
    "WR1-WR2": ("WR", "WR2"),
}  # fmt: skip
_JPEG: Final = 92  # of all pictures alike, so that the file betrays nothing


class StudyError(ValueError):
    """The answers do not belong to this key, or are not answers."""


@dataclass(frozen=True)
class Counts:
    """Pairs asked: who is who (evenly over six kinds), and which is real for A and for WR; the paper's numbers."""

    same: int = 600
    real_anonymized: int = 200
    real_wrong: int = 300


def build(chain: Chain, real: Pixels, counts: Counts, *, seed: int, folder: Path) -> tuple[Path, Path]:
    """Write ``study.html`` (for participants) and ``study-key.json`` (not for them).

    Args:
        chain: of the faces that are shown.
        real: uint8 ``[K, S, S, 3]``, photos of other people, for "which is real?".

    Raises:
        ValueError: fewer than two faces on either side.
    """
    faces = len(chain.images)
    if faces < 2 or len(real) < 2:
        raise ValueError(f"a study needs faces and real photos of others, not {faces} and {len(real)}")
    rng = np.random.default_rng([seed, 12])
    questions: list[dict[str, Any]] = []
    for number in range(counts.same):
        kind = list(KINDS)[number % len(KINDS)]
        i = int(rng.integers(faces))
        sides = [chain(k)[i] for k in KINDS[kind]]
        order = rng.permutation(2)
        questions.append({"ask": "same", "kind": kind, "pictures": [sides[j] for j in order], "truth": None})
    for kind, count in (("A", counts.real_anonymized), ("WR", counts.real_wrong)):
        for _ in range(count):
            made, photo = chain(kind)[int(rng.integers(faces))], real[int(rng.integers(len(real)))]
            left = bool(rng.integers(2))
            pictures = [made, photo] if left else [photo, made]
            questions.append({"ask": "real", "kind": kind, "pictures": pictures, "truth": "left" if left else "right"})
    order = rng.permutation(len(questions))
    shown = [questions[i] for i in order]
    # Numbers that say nothing: neither their size nor their order follows the kinds.
    numbers = rng.permutation(10 * len(shown))[: len(shown)]
    identifier = f"{chain.subject.digest[:12]}-{seed}-{len(shown)}"
    page = [
        {"id": int(n), "ask": q["ask"], "left": _data(q["pictures"][0]), "right": _data(q["pictures"][1])}
        for n, q in zip(numbers, shown, strict=True)
    ]
    key = {
        "study": identifier,
        "questions": {str(n): {k: q[k] for k in ("ask", "kind", "truth")} for n, q in zip(numbers, shown, strict=True)},
    }
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("services.evaluate"), autoescape=True).get_template("study.html.j2")
    folder.mkdir(parents=True, exist_ok=True)
    html, secret = folder / "study.html", folder / "study-key.json"
    write_atomically(html, template.render(study=identifier, questions=page).encode())
    write_atomically(secret, (json.dumps(key) + "\n").encode())
    return html, secret


def score(answers: Mapping[str, Any], key: Mapping[str, Any]) -> Result:
    """Shares as the paper gives them, from one answers file or several merged by :func:`merge`.

    ``study.<kind>.same``: taken for one person. ``study.<kind>.more-real``: the made face taken for the real one.
    Intervals are over answers; with several participants they are over participants and answers alike.

    Raises:
        StudyError: the answers are of another study, or an answer is none of those that can be given.
    """
    if answers.get("study") != key["study"]:
        raise StudyError(
            f"these are answers to the study {answers.get('study')!r}, the key is that of {key['study']!r}"
        )
    values: dict[str, list[float]] = defaultdict(list)
    for given in answers.get("answers", []):
        question = key["questions"].get(str(given.get("id")))
        allowed = {"same": ("yes", "no"), "real": ("left", "right")}
        if question is None or given.get("answer") not in allowed[question["ask"]]:
            raise StudyError(f"{given!r} is no answer to a question of this study")
        if question["ask"] == "same":
            values[f"study.{question['kind']}.same"].append(float(given["answer"] == "yes"))
        else:  # truth is the side of the made face
            values[f"study.{question['kind']}.more-real"].append(float(given["answer"] == question["truth"]))
    if not values:
        raise StudyError("the file has no answers")
    result = Result()
    for name in sorted(values):
        result.mean(name, values[name])
    return result


def scores(file: Path, digest: str) -> dict[str, Any]:
    """What ``study-score`` wrote, for a report on the model with this digest.

    Raises:
        StudyError: it is of another model, or no such file.
    """
    try:
        flat: dict[str, Any] = json.loads(file.read_text())
        of = str(flat["study.id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{file} is not what study-score writes") from error
    if not of.startswith(digest[:12]):
        raise StudyError(f"{file} is a study of the model {of.partition('-')[0]}, not of {digest[:12]}")
    return flat


def merge(files: list[Path]) -> dict[str, Any]:
    """Several participants' answers to one study.

    Raises:
        StudyError: they are of different studies, or a file is not JSON.
    """
    merged: dict[str, Any] = {}
    for file in files:
        try:
            record = json.loads(file.read_text())
            answers = list(record["answers"])
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{file} is not a file of answers") from error
        if merged and record.get("study") != merged["study"]:
            raise StudyError(f"{file} answers another study than the files before it")
        merged = {"study": record.get("study"), "answers": [*merged.get("answers", []), *answers]}
    return merged


def _data(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode()
