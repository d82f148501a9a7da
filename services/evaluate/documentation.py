"""The tables of docs/evaluation.md, made from the code: ``python -m services.evaluate document`` writes them."""

from __future__ import annotations

import re
from typing import Final

from services.evaluate import keys, parts

# Part -> what it measures, and what it needs beside the model and the faces.
ABOUT: Final[dict[str, tuple[str, str]]] = {
    "verification": ("pairs by every judge, near misses, galleries", "two photos of some people, for I2 and galleries"),
    "recovery": (
        "LPIPS, DSSIM, L1, L2, PSNR through PNG, JPEG 95/90/75, half size and back",
        "`lpips_alex.safetensors` in `--weights` for LPIPS",
    ),
    "detection": ("MTCNN's boxes and keypoints against the input's; dlib's HOG detector", ""),
    "lfw-pairs": ("LFW's standard pairs, before and after", "`--pairs`, and LFW as data"),
    "realism": ("Frechet distances on named features", "20 real faces of other people"),
    "diversity": ("32 passwords a face, each bit, a grid of codes", ""),
    "background": ("error outside the face, in crops and in whole pictures", "`--photos` for the pictures"),
    "runtime": ("seconds a batch of 12, faces a second, the paper's network in the same run", ""),
    "baselines": ("table 2's baselines and their deanonymizers", "`train-baselines`, below"),
    "ablations": ("the models without one term each", "`train-ablations`, below"),
    "video": (
        "flicker, unchanged frames, recovery per codec, in clips made of the faces or given",
        "the extra `video`; `--clips` for clips of one's own",
    ),
    "attack-denial": ("does a re-saved picture still open?", ""),
    "attack-candidates": ("does the right one of many candidates give itself away?", ""),
    "attack-known-plaintext": ("one original beside its A: is the code found, does it open another picture?", ""),
    "attack-known-pairs": (
        "many originals beside their A under one password: does least squares open others?",
        "cover; `--train-data`",
    ),
    "attack-chosen-pairs": (
        "pairs of the password made for one A: do they open it?",
        "cover; `--train-data`",
    ),
    "attack-pattern": ("does a code betray that it is right when it is tried, and how long does trying take?", "cover"),
    "attack-likeness": ("what does the face that A shows tell of the code?", "cover"),
    "attack-outline": ("the painted face taken away towards the outline, without a code", "cover"),
    "attack-hidden-linking": (
        "do two A of one password betray that they hide one person?",
        "cover; two photos of some people",
    ),
    "attack-invariants": ("is there something that A keeps of I under every password?", "cover"),
    "attack-linking": ("do two A of one person betray that they are of one?", "two photos of some people"),
    "attack-hill-climbing": ("climbing over bits by a gallery", "two photos of some people"),
    "attack-inverter": ("a trained A to I", "`--train-data`, else other faces of the data"),
    "attack-code-predictor": ("a trained A to p", "the same"),
    "attack-recovery-classifier": ("a trained R or WR", "the same"),
    "attack-sweep": ("all codes, or `--sweep-codes`, against a gallery", "two photos of some people"),
}


def refreshed(text: str) -> str:
    """The text with what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` made anew.

    Raises:
        ValueError: the text has no such place.
    """
    for name, table in (("parts", _parts()), ("keys", keys.markdown())):
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=table: f"{m[1]}{t}{m[2]}", text, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"there is one place <!-- {name} --> ... <!-- /{name} --> in the docs, not {found}")
    return text


def _parts() -> str:
    lines = ["| part | CPU s | measures | needs |", "| --- | --- | --- | --- |"]
    for name in parts.NAMES:
        measures, needs = ABOUT.get(name, ("", ""))
        lines.append(f"| `{name}` | {parts.SECONDS[name]} | {measures} | {needs} |")
    minutes = sum(parts.SECONDS.values()) / 60
    return "\n".join([*lines, "", f"{minutes:.0f} minutes of one core together."]) + "\n"
