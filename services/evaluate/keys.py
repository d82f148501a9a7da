"""Every key of report.json in words: the table of docs/evaluation.md is made of this; tests hold both to it.

``<judge>`` and the like stand for what :data:`WORDS` says. A key marked with an interval is followed by ``KEY.low`` and
``KEY.high`` (95 %) and ``KEY.n`` (how many values); a key with a count has ``KEY.n`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from services.evaluate import baselines, judges, paper
from services.evaluate.files import LOSSY
from services.evaluate.parts import ablations, verification
from services.evaluate.parts.attacks_cover import FEW_PAIRS, KNOWN_PAIRS

WORDS: Final[dict[str, tuple[str, ...]]] = {
    "judge": tuple(judges.JUDGES),
    "pair": (*verification.PAIRS, "I-I2", "A-I2", "R-I2", "WR-I2"),
    "codec": LOSSY,
    "kind": ("I", "A", "R", "WR"),
    "metric": ("lpips", "dssim", "l1", "l2", "psnr"),
    "asked": tuple(paper.SAME_PERSON),
    "made": tuple(paper.MORE_REAL),
    "network": (*judges.JUDGES, "alexnet"),
    "baseline": baselines.NAMES,
    "ablation": ablations.NAMES,
    "side": ("real", "anonymized", "recovered", "wrongly-recovered"),
    "score": ("best-looking", "best-detected", "shortest", "smoothest", "round-trip", "grid"),
    "file": ("png", *LOSSY),
    "pairs": tuple(str(n) for n in KNOWN_PAIRS),
    "few": tuple(str(n) for n in FEW_PAIRS),
    "setting": (
        "lossless",
        "h264-444-crf5",
        "h264-crf12",
        "h264-crf17",
        "h264-crf23",
        "h265-crf20",
        "h265-crf28",
        "av1-crf28",
    ),
}


@dataclass(frozen=True)
class Key:
    """A line of the table. ``with_``: "interval" (low, high, n), "n", or "" (the figure alone, or a text)."""

    pattern: str
    text: str
    with_: str = ""


KEYS: Final[dict[str, tuple[Key, ...]]] = {
    "about the run": (
        Key("format", "version of this table; 1"),
        Key("model.path", "what was judged"),
        Key("model.digest", "sha256 of its weights"),
        Key("model.architecture", "its network"),
        Key("model.bits", "bits of a code"),
        Key("model.images-seen", "length of its training, as its config says"),
        Key("data.path", "the shards"),
        Key("data.digest", "sha256 of their manifest"),
        Key("data.split", "train, val or test"),
        Key("seed", "of the sample and of the codes"),
        Key("faces", "faces judged"),
        Key("people", "how many people they are"),
        Key("people-with-two-photos", "of whom so many have another photo, I2"),
        Key("fpr", "share of pairs of different people that pass at the threshold: 0.001, with few faces 0.05"),
        Key("judges", "those that loaded, comma-separated"),
        Key("judges.headline", "the first that was in no loss"),
        Key("gates.passed", "gates that hold"),
        Key("gates.count", "of so many"),
    ),
    "verification": (
        Key("verification.<judge>.threshold", "cosine from which a pair passes as one person, at `fpr`"),
        Key("verification.<judge>.threshold-eer", "the cosine at equal error"),
        Key("verification.<judge>.eer", "equal error rate of real photos, pairs (I, I2) against different people", "n"),
        Key("verification.<judge>.<pair>.same", "share of pairs that pass as one person", "interval"),
        Key("verification.<judge>.<pair>.same-eer", "the same at the threshold of equal error", "interval"),
        Key("verification.<judge>.<pair>.cosine", "mean cosine", "interval"),
        Key("verification.<judge>.I-A@<codec>.same", "A looked at after a lossy file, by the headline", "interval"),
        Key("verification.<judge>.I-R@<codec>.same", "R recovered from A after a lossy file", "interval"),
        Key("reidentification.<judge>.<kind>.rank1", "the nearest in the gallery is the person's I2", "interval"),
        Key("reidentification.<judge>.gallery", "people in the gallery, one photo each"),
        Key("reidentification.<judge>.chance", "1 / gallery"),
    ),
    "recovery": (
        Key("recovery.<metric>", "R against I, A saved as PNG; L1, L2 on [-1, 1], PSNR in dB, at most 60", "interval"),
        Key("recovery.<codec>.<metric>", "A saved with loss before it is recovered", "interval"),
        Key("recovery.float.<metric>", "nothing saved between: what the paper measures", "interval"),
        Key("change.<metric>", "A against I", "interval"),
    ),
    "detection": (
        Key("detection.mtcnn.<kind>.rate", "share in which MTCNN finds a face", "interval"),
        Key("detection.mtcnn.<kind>.confidence", "its confidence, where it does", "interval"),
        Key("detection.mtcnn.<kind>.box", "mean shift of a box's coordinate against I, pixels of a crop", "interval"),
        Key("detection.mtcnn.<kind>.landmarks", "mean shift of a keypoint's coordinate", "interval"),
        Key("detection.mtcnn.box", "over A, R and WR, as in the paper's table 3", "interval"),
        Key("detection.mtcnn.landmarks", "over A, R and WR", "interval"),
        Key("detection.dlib-hog.<kind>.rate", "share in which dlib's HOG detector finds a face", "interval"),
    ),
    "lfw-pairs": (
        Key("lfw-pairs.n", "LFW's standard pairs, as many of folds 1-5 as were asked for"),
        Key("lfw-pairs.<judge>.<side>.accuracy", "that side against a real photo, LFW's protocol", "interval"),
        Key("lfw-pairs.<judge>.<side>.tpr", "pairs of one person that pass at the threshold above", "interval"),
        Key("lfw-pairs.<judge>.<side>.fpr", "pairs of two people that pass", "interval"),
    ),
    "realism": (
        Key("realism.n", "faces on either side"),
        Key("realism.frechet.<network>.<kind>", "Frechet distance to real faces of other people; not FID", "n"),
    ),
    "study": (
        Key("study.id", "which study, with `--study`: digest of its model, seed, number of questions"),
        Key("study.<asked>.same", "share of pairs that people took for one person", "interval"),
        Key("study.<made>.more-real", "share of made faces that people took for the real one of two", "interval"),
    ),
    "diversity": (
        Key("diversity.passwords", "passwords a face"),
        Key("diversity.<judge>.same", "pairs of A of one face under two of them that pass as one person", "interval"),
        Key("diversity.<judge>.cosine", "their mean cosine", "interval"),
        Key("diversity.<judge>.people", "different people among the A of one face", "interval"),
        Key("diversity.one-bit.l1", "change of A when one bit changes", "interval"),
        Key("diversity.one-bit.<judge>.same", "A before and after pass as one person, by the headline", "interval"),
        Key("diversity.one-bit.<judge>.cosine", "their mean cosine", "interval"),
    ),
    "background": (
        Key("background.crop.share", "share of a crop that counts as outside the head"),
        Key("background.crop.<kind>.levels", "mean error there against I, in 8-bit levels", "interval"),
        Key("background.crop.<kind>.unchanged", "pixels there that stay bit for bit", "interval"),
        Key("background.picture.unchanged", "pixels of whole pictures that stay bit for bit", "interval"),
        Key("background.picture.changed-outside-crops", "pixels outside every crop that do not", "interval"),
        Key("background.picture.recovered-psnr", "PSNR of whole recovered pictures, dB", "interval"),
        Key("background.picture.without-a-face", "pictures in which no face was found", "n"),
    ),
    "runtime": (
        Key("runtime.batch12.seconds", "median seconds for 12 faces, bytes in and bytes out", "n"),
        Key("runtime.best.images-per-second", "faces a second at the best batch size", "n"),
        Key("runtime.best.batch", "which is this one"),
        Key("runtime.paper-architecture.batch12.seconds", "the paper's network on 12 faces in the same run", "n"),
        Key("runtime.threads", "threads of torch"),
    ),
    "baselines": (
        Key("baselines.<baseline>.<metric>", "what its deanonymizer gives back, against I", "interval"),
        Key("baselines.<baseline>.I-A.same", "its hidden faces that pass as the person, by the headline", "interval"),
        Key("baselines.<baseline>.I-R.same", "its recovered faces that do", "interval"),
        Key("baselines.order.spearman", "rank correlation of their order in recovery with table 2's", "n"),
    ),
    "ablations": (
        Key("ablations.<ablation>.<pair>.same", "share that passes as one person, by the headline", "interval"),
        Key("ablations.<ablation>.<pair>.cosine", "mean cosine", "interval"),
        Key("ablations.<ablation>.l1", "L1 of R against I", "interval"),
        Key("ablations.<ablation>.images-seen", "length of its training"),
        Key("ablations.<ablation>.crop", "pixels a side that it was trained on and is judged at"),
    ),
    "video": (
        Key("video.frames", "frames of the clips"),
        Key("video.faces", "faces in them, counted in every frame"),
        Key("video.masked", "of these masked, because their place was not sure"),
        Key("video.unchanged-frames", "frames that show a face as it was; must be 0", "n"),
        Key("video.unchanged", "share of faces in frames that are as they were; must be 0", "interval"),
        Key("video.flicker.l1", "difference of neighbouring frames' aligned faces, anonymized, of 1", "interval"),
        Key("video.flicker.l1.of-input", "the same of the input", "interval"),
        Key("video.<judge>.same", "share of faces in frames that pass as the person in that frame", "interval"),
        Key("video.<judge>.flicker", "1 - cosine of neighbouring frames' faces, anonymized", "interval"),
        Key("video.<judge>.flicker.of-input", "the same of the input", "interval"),
        Key("video.<judge>.constancy", "share of a track's anonymized faces that pass as its first one", "interval"),
        Key("video.<judge>.constancy.of-input", "the same of the input", "interval"),
        Key("video.codec.<setting>.psnr", "inner face recovered from it, against the input, dB", "interval"),
        Key("video.codec.<setting>.same", "share that passes as the person, by the headline", "interval"),
        Key("video.codec.<setting>.kbit", "kbit/s of the anonymized clips", "n"),
    ),
    "attacks": (
        Key("attack.denial.<file>.success", "the right password no longer gives the person back", "interval"),
        Key("attack.denial.chance", "that through PNG"),
        Key("attack.<score>.success", "the right one of the candidates scores best", "interval"),
        Key("attack.<score>.chance", "1 / candidates"),
        Key("attack.<score>.auc", "chance that the right one scores above a wrong one; 0.5 is guessing", "interval"),
        Key("attack.<score>.several.success", "it does by the mean rank over eight pictures of one password", "n"),
        Key("attack.<score>.several.chance", "1 / candidates"),
        Key("attack.known-plaintext.success", "of the codes tried the right one alone turns I into A", "interval"),
        Key("attack.known-plaintext.chance", "1 / codes tried"),
        Key("attack.known-plaintext.codes-tried", "codes tried, the right one among them"),
        Key("attack.known-plaintext.hours-for-all-codes", "hours that trying all 2^bits takes at the speed measured"),
        Key("attack.known-plaintext.climb.success", "the exact code is found by flipping bits", "interval"),
        Key("attack.known-plaintext.climb.chance", "by as many guesses"),
        Key("attack.known-plaintext.climb.evaluations", "codes tried", "interval"),
        Key("attack.known-plaintext.climb.bits-wrong", "bits of the found code that are wrong", "interval"),
        Key("attack.known-plaintext.climb.other-picture.success", "another picture opened with it passes", "interval"),
        Key("attack.known-plaintext.climb.other-picture.chance", "as often does a uniformly wrong code"),
        Key(
            "attack.known-pairs.<pairs>.success",
            "opened by what so many pairs of the password tell, it passes",
            "interval",
        ),
        Key("attack.known-pairs.<pairs>.chance", "the anonymized face itself passes"),
        Key("attack.known-pairs.<pairs>.psnr", "what is opened so, against I, dB", "interval"),
        Key("attack.known-pairs.<pairs>.explained", "of the variance of the hidden face, solved so", "interval"),
        Key(
            "attack.chosen-pairs.<few>.success", "opened by so many pairs that were made for it, it passes", "interval"
        ),
        Key("attack.chosen-pairs.<few>.chance", "the anonymized face itself passes"),
        Key("attack.chosen-pairs.<few>.explained", "of the power of the hidden face, solved so", "interval"),
        Key("attack.chosen-pairs.<few>.seconds", "seconds of solving a picture"),
        Key(
            "attack.chosen-pairs.same-number",
            "share of faces that have A's number once they are in its context",
            "interval",
        ),
        Key("attack.pattern.success", "of the codes tried the right one finds most of the known pattern", "interval"),
        Key("attack.pattern.chance", "1 / codes tried"),
        Key("attack.pattern.codes-tried", "codes tried a face, all of which pick the likeness that A shows"),
        Key("attack.pattern.codes-left", "codes that do, of all there are"),
        Key("attack.pattern.right.cosine", "of the pattern and what the right code finds", "interval"),
        Key("attack.pattern.wrong.cosine", "the largest of the wrong codes tried", "interval"),
        Key("attack.pattern.seconds", "seconds a code"),
        Key("attack.pattern.hours-for-all-codes", "hours that trying all that are left takes at this speed"),
        Key("attack.likeness.success", "the likeness that the code picked is read from A", "interval"),
        Key("attack.likeness.chance", "1 / likenesses"),
        Key("attack.likeness.bits-told", "bits of the code that it tells"),
        Key("attack.outline.success", "without a code: outline as it was, middle guessed; it passes", "interval"),
        Key("attack.outline.chance", "A itself does"),
        Key("attack.outline.psnr", "what is guessed so, against I, dB", "interval"),
        Key("attack.hidden-linking.success", "of A of one password the nearest hides the same person", "interval"),
        Key("attack.hidden-linking.chance", "1 / people"),
        Key("attack.hidden-linking.two-passwords", "the same where each photo has a password of its own", "interval"),
        Key("attack.hidden-linking.of-input", "the same by what would be hidden of the photos themselves", "interval"),
        Key("attack.invariants.success", "the nearest by what no code changes is the person's I2", "interval"),
        Key("attack.invariants.chance", "1 / gallery"),
        Key("attack.invariants.of-input", "the same of I instead of A", "interval"),
        Key("attack.linking.success", "two photos of a person, one password: A passes as one person", "interval"),
        Key("attack.linking.chance", "two people's A under one password do"),
        Key("attack.linking.two-passwords", "two photos of a person, two passwords: A does", "interval"),
        Key("attack.linking.unprotected", "the photos themselves do", "interval"),
        Key("attack.hill-climbing.success", "the exact code is found", "interval"),
        Key("attack.hill-climbing.chance", "by as many guesses"),
        Key("attack.hill-climbing.named", "the person is named", "interval"),
        Key("attack.hill-climbing.named.chance", "1 / gallery"),
        Key("attack.hill-climbing.evaluations", "codes tried", "interval"),
        Key("attack.inverter.success", "what the inverter gives passes as the person, by the headline", "interval"),
        Key("attack.inverter.chance", "A itself does", "interval"),
        Key("attack.inverter.<judge>.success", "the same by another judge", "interval"),
        Key("attack.inverter.<judge>.chance", "A itself does", "interval"),
        Key("attack.inverter.<metric>", "what it gives, against I", "interval"),
        Key("attack.inverter.nothing-done.<metric>", "A against I", "interval"),
        Key("attack.inverter.images", "images it learned from"),
        Key("attack.code-predictor.bits", "bits of the code read from A", "interval"),
        Key("attack.code-predictor.bits.chance", "0.5"),
        Key("attack.code-predictor.success", "all bits", "interval"),
        Key("attack.code-predictor.chance", "2^-bits"),
        Key("attack.recovery-classifier.success", "R and WR told apart", "interval"),
        Key("attack.recovery-classifier.chance", "0.5"),
        Key("attack.recovery-classifier.auc", "area under its curve", "n"),
        Key("attack.sweep.success", "the best match of all codes tried is the person", "interval"),
        Key("attack.sweep.chance", "1 / gallery"),
        Key("attack.sweep.without-sweep", "the best match of A itself is the person", "interval"),
        Key("attack.sweep.right-code-first", "no wrong code matches better than the right one", "interval"),
        Key("attack.sweep.wrong-codes-above", "wrong codes that match better, of all there are", "interval"),
        Key("attack.sweep.codes-tried", "codes tried a face, the right one among them"),
        Key("attack.sweep.codes", "codes there are"),
        Key("attack.sweep.gallery", "people in the gallery"),
    ),
}
"""Part (or what they have in common) -> its keys."""

SKIPPED: Final = "skipped."


def describe(key: str) -> Key | None:
    """The line that speaks of a key of report.json, ``.low``, ``.high`` and ``.n`` included; None where none does."""
    for line in (line for lines in KEYS.values() for line in lines):
        if _expression(line).fullmatch(key):
            return line
    return None


def unknown(report: Mapping[str, Any]) -> list[str]:
    """Keys of a report that no line speaks of; reasons (``skipped.KEY``) speak for themselves."""
    return [key for key in report if not key.startswith(SKIPPED) and describe(key) is None]


def markdown() -> str:
    """The table of docs/evaluation.md."""
    out = []
    for part, lines in KEYS.items():
        if not lines:
            continue
        out += [f"### {part[0].upper()}{part[1:]}", "", "| key | | with |", "| --- | --- | --- |"]
        out += [f"| `{line.pattern}` | {line.text} | {line.with_} |" for line in lines]
        out.append("")
    used = {word for lines in KEYS.values() for line in lines for word in re.findall(r"<([a-z]+)>", line.pattern)}
    out += ["where", "", *(f"- `<{word}>` is {_listed(WORDS[word])}" for word in WORDS if word in used)]
    return "\n".join(out) + "\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


@cache
def _expression(line: Key) -> re.Pattern[str]:
    pieces = re.split(r"<([a-z]+)>", line.pattern)
    text = "".join(
        re.escape(piece) if i % 2 == 0 else f"(?:{'|'.join(map(re.escape, WORDS[piece]))})"
        for i, piece in enumerate(pieces)
    )
    ends = {"interval": r"(?:\.low|\.high|\.n)?", "n": r"(?:\.n)?", "": ""}[line.with_]
    return re.compile(text + ends)
