"""report.html: the paper's tables in its order, its numbers beside ours, and what it did not dare to measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from mien.store import write_atomically
from services.evaluate import baselines, keys, paper, plots
from services.evaluate.figures import Result
from services.evaluate.parts import ablations
from services.evaluate.parts.attacks_cover import FEW_PAIRS, KNOWN_PAIRS
from services.gates import Verdict

Flat = Mapping[str, Any]
NOTHING: Final = "-"
Tone = Literal["", "good", "bad"]

_WORDS: Final = {
    "I-A": "input, anonymized",
    "I-R": "input, recovered",
    "I-WR": "input, wrongly recovered",
    "I-WR-1bit": "input, recovered with a code wrong by 1 bit",
    "I-WR-2bit": "... by 2 bits",
    "I-WR-4bit": "... by 4 bits",
    "A-WR": "anonymized, wrongly recovered",
    "A1-A2": "anonymized under two passwords",
    "WR1-WR2": "recovered with two wrong passwords",
    "I-I2": "input, another photo of the person",
    "A-I2": "anonymized, another photo of the person",
    "R-I2": "recovered, another photo of the person",
    "WR-I2": "wrongly recovered, another photo of the person",
}
_CODECS: Final = {
    "": "PNG",
    "float.": "unrounded (no file)",
    "jpeg95.": "JPEG 95",
    "jpeg90.": "JPEG 90",
    "jpeg75.": "JPEG 75",
    "half.": "half size and back",
}
_BASELINES: Final = {
    "ren": "learned (after Ren et al.)",
    "superpixel": "superpixel",
    "edge": "edge",
    "blur": "blur 8x8",
    "noise": "noise, variance 0.5",
    "mask": "mask of 0.6",
}
_ABLATIONS: Final = {
    "full": "the whole objective",
    "without-dissimilarity": "without L_dis",
    "without-wrong-recovery": "without WR",
    "without-predictor": "without L_aux",
    "without-recovery-class": "without L_rec_cls",
    "fixed-recogniser": "F frozen",
    "eight-bits": "8 bits",
}
# name -> (what it is, what the attacker has, how success is counted)
ATTACKS: Final = {
    "sweep": ("sweep of codes with a gallery", "model, A, a gallery of photos", "the best match of all is the person"),
    "sweep.without-sweep": (
        "the gallery alone, no sweep", "A, a gallery of photos", "the best match of A itself is the person"
    ),
    "best-looking": ("likeliest among real faces", "model, A", "the right one of the candidates comes first"),
    "best-detected": ("best detected by MTCNN", "model, A", "the right one comes first"),
    "shortest": ("shortest PNG", "model, A", "the right one comes first"),
    "smoothest": ("smoothest", "model, A", "the right one comes first"),
    "round-trip": ("round trip back to A", "model, A", "the right one comes first"),
    "grid": ("nearest to whole 8-bit steps", "model, A", "the right one comes first"),
    "hill-climbing": ("hill climbing over bits", "model, A, a gallery", "the exact code is found"),
    "hill-climbing.named": ("hill climbing, the person", "model, A, a gallery", "the match found is the person"),
    "known-plaintext": (
        "known plaintext: codes tried",
        "model, one original with its A",
        "of the codes tried the right one alone turns I into A",
    ),
    "known-plaintext.climb": ("... hill climbing", "the same", "the exact code is found"),
    "known-plaintext.climb.other-picture": (
        "... the code it ends at", "the same, and another picture of that password", "it opens: passes as the person"
    ),
    **{
        f"known-pairs.{n}": (
            f"{n} known pair{'s' if n > 1 else ''}",
            "model and design, pairs of one password",
            "another picture is opened: passes as the person; chance: A does",
        )
        for n in KNOWN_PAIRS
    },
    **{
        f"chosen-pairs.{n}": (
            f"{n} pairs made for A",
            "model and design, A, the password's service",
            "A is opened: passes as the person; chance: A does",
        )
        for n in FEW_PAIRS
    },
    "pattern": ("codes by the known pattern", "model and design, A", "the right code comes first of all tried"),
    "outline": (
        "outline undone, middle guessed", "model and design, A", "what comes passes as the person; chance: A does"
    ),
    "hidden-linking": ("linking what is hidden", "model and design, A of one password", "the nearest is the person"),
    "likeness": ("the likeness read from A", "model and design, A", "the one the code picked"),
    "invariants": ("what no code changes", "model and design, A, a gallery", "the nearest is the person"),
    "linking": (
        "linking two pictures", "two A of one password", "two photos of one person pass as one; chance: of two people"
    ),
    "inverter": ("trained inverter A to I", "model, other faces", "what it gives passes as the person; chance: A does"),
    "code-predictor": ("trained code predictor A to p", "model, other faces", "all bits right"),
    "code-predictor.bits": ("... single bits", "model, other faces", "a bit right"),
    "recovery-classifier": ("classifier of R and WR", "model, other faces", "told apart"),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Text, an interval below it, how much of a bar behind it, whether it is as wanted, and the paper's figure."""

    text: str
    detail: str = ""
    bar: float | None = None
    tone: Tone = ""
    paper: str = ""


@dataclass
class Table:
    """Columns and rows; the first cell of a row is its name."""

    columns: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    caption: str = ""

    def add(self, *cells: Cell | str) -> None:
        """A row."""
        self.rows.append([c if isinstance(c, Cell) else Cell(c) for c in cells])


@dataclass(frozen=True)
class Picture:
    """A grid as base64 PNG, and what its columns and rows are."""

    png: str
    caption: str
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()


@dataclass
class Section:
    """A heading, what it says in a sentence or two, and what shows it."""

    anchor: str
    title: str
    paper: str = ""
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[tuple[str, str]] = field(default_factory=list)  # SVG, caption
    pictures: list[Picture] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)


def write(path: Path, flat: Flat, results: Mapping[str, Result], verdicts: Sequence[Verdict]) -> None:
    """The whole report into one file that needs no other."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("services.evaluate"), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        flat=flat,
        sections=sections(flat, results),
        summary=summary(flat),
        verdicts=verdicts,
        passed=sum(v.passed for v in verdicts),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())


# Cells. --------------------------------------------------------------------------------------------------------------


def percent(flat: Flat, key: str, want: Literal["low", "high", ""] = "", limit: float = 0.05) -> Cell:
    """A share in percent, its interval and a bar; good below ``limit`` (or above 1 - limit), bad from 4 times on."""
    if key not in flat:
        return Cell(NOTHING, flat.get(f"skipped.{key}", ""))
    value = float(flat[key])
    tone: Tone = ""
    if want:
        away = value if want == "low" else 1 - value
        tone = "good" if away <= limit else "bad" if away > 4 * limit else ""
    return Cell(f"{100 * value:.1f} %", _interval(flat, key, 100, 1), value, tone)


def number(flat: Flat, key: str, digits: int = 3, unit: str = "", asked: float | None = None) -> Cell:
    """A figure with its interval, and the paper's (``asked``)."""
    theirs = _of_paper(asked)
    if key not in flat:
        return Cell(NOTHING, flat.get(f"skipped.{key}", ""), paper=theirs)
    return Cell(f"{_text(float(flat[key]), digits)}{unit}", _interval(flat, key, 1, digits), paper=theirs)


def _interval(flat: Flat, key: str, factor: float, digits: int) -> str:
    if f"{key}.low" not in flat:
        return ""
    low, high = (_text(factor * float(flat[f"{key}.{end}"]), digits) for end in ("low", "high"))
    return f"{low} to {high}, n = {flat[f'{key}.n']}"


def _text(value: float, digits: int) -> str:
    """Fixed digits; what would read as zero and is none, as a power of ten."""
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 0.5 * 10.0**-digits else f"{value:.0e}"


def _of_paper(value: float | None, factor: float = 1, unit: str = "") -> str:
    return "" if value is None else f"{value * factor:g}{unit}"


def _judges(flat: Flat) -> list[str]:
    return str(flat["judges"]).split(",")


def _judge_name(name: str) -> str:
    return f"{name} (trainer)" if name == "mobilefacenet-casia" else name


# The sections, in the paper's order. ---------------------------------------------------------------------------------


def summary(flat: Flat) -> list[tuple[str, Cell, str]]:
    """What a reader who stops here should know: claim, figure, what it means."""
    judge = flat["judges.headline"]
    gallery = flat.get(f"reidentification.{judge}.gallery", 0)
    rows: list[tuple[str, Cell, str]] = []

    def row(title: str, cell: Cell, meaning: str) -> None:
        if cell.text != NOTHING:
            rows.append((title, cell, meaning))

    row("Hides", percent(flat, f"verification.{judge}.I-A.same", "low"), "of anonymized faces still pass as the person")
    row(
        "Gives back",
        percent(flat, f"verification.{judge}.I-R.same", "high", 0.01),
        "are the person again when recovered",
    )
    row(
        "Keeps from others",
        percent(flat, f"verification.{judge}.I-WR.same", "low"),
        "pass as the person under a wrong password",
    )
    row(
        "Near misses",
        percent(flat, f"verification.{judge}.I-WR-1bit.same", "low"),
        "under a code that is wrong by one bit",
    )
    row(
        "Found in a gallery",
        percent(flat, f"reidentification.{judge}.A.rank1", "low"),
        f"of anonymized faces are named by the nearest of {float(gallery):.0f} photos",
    )
    row("Recovery", number(flat, "recovery.psnr", 1, " dB"), "PSNR of what the right password gives back, through PNG")
    row("After JPEG 75", percent(flat, f"verification.{judge}.I-R@jpeg75.same", "high"), "are still given back")
    row("Still a face", percent(flat, "detection.mtcnn.A.rate", "high"), "of anonymized faces are found by MTCNN")
    row(
        "Known plaintext",
        percent(flat, "attack.known-plaintext.success", "low"),
        "of right codes are known when they are tried, from one original" + _effort(flat),
    )
    return rows


def _effort(flat: Flat) -> str:
    hours = flat.get("attack.known-plaintext.hours-for-all-codes")
    return f"; trying all takes {hours:,.0g} hours" if isinstance(hours, (int, float)) else ""


def sections(flat: Flat, results: Mapping[str, Result]) -> list[Section]:
    """All sections; what was not measured is named with its reason in its section."""
    series: dict[str, Any] = {k: v for result in results.values() for k, v in result.series.items()}
    pictures: dict[str, str] = {k: v for result in results.values() for k, v in result.pictures.items()}
    made = [
        _pictures(pictures, series),
        _verification(flat, series),
        _gallery(flat),
        _recovery(flat, pictures, series),
        _files(flat),
        _realism(flat),
        _diversity(flat, series, pictures),
        _detection(flat),
        _background(flat),
        _ablations(flat),
        _video(flat),
        _attacks(flat, series, pictures),
        _runtime(flat, series),
    ]
    reasons = {k.removeprefix("skipped."): str(v) for k, v in flat.items() if k.startswith("skipped.")}
    prefixes = {
        "same-person": ("verification", "lfw-pairs"), "gallery": ("reidentification",),
        "recovery": ("recovery", "baselines"), "realism": ("realism",), "diversity": ("diversity",),
        "detection": ("detection",), "background": ("background",), "ablations": ("ablations",), "video": ("video",),
        "attacks": ("attack",), "runtime": ("runtime",),
    }  # fmt: skip
    for section in made:
        for key, why in reasons.items():
            if key.split(".")[0] in prefixes.get(section.anchor, ()):
                section.missing.append((key, why))
    return made


def _pictures(pictures: Mapping[str, str], series: Mapping[str, Any]) -> Section:
    section = Section("pictures", "What it looks like", "figures 1 and 3")
    if "faces" in pictures:
        names = {
            "I": "input", "A": "anonymized", "A2": "under another password", "R": "recovered", "WR": "wrong password",
            "WR2": "another wrong one", "WR-1bit": "wrong by one bit",
        }  # fmt: skip
        columns = [names[k] for k in series.get("grid", [])]
        caption = f"From left to right: {', '.join(columns)}. A seeded sample, not chosen."
        section.pictures.append(Picture(pictures["faces"], caption, columns))
    section.text.append("These are people of the data set: this page is for you, not for publication.")
    return section


def _verification(flat: Flat, series: Mapping[str, Any]) -> Section:
    section = Section("same-person", "The same person?", "section 5.3 and figure 4")
    judges = _judges(flat)
    section.text.append(
        f"Share of pairs that pass as one person, at the threshold where {100 * flat['fpr']:g} % of pairs of different"
        " people pass. The paper asked people; recognisers are stricter in telling that two faces are one person."
    )
    people = ["people asked (this model)"] if any(key.startswith("study.") for key in flat) else []
    table = Table(["pair", *(_judge_name(j) for j in judges), *people, "people asked (paper)", "wanted"])
    for pair, words in _WORDS.items():
        if not any(f"verification.{j}.{pair}.same" in flat for j in judges):
            continue
        want: Literal["low", "high"] = "high" if pair in ("I-R", "I-I2", "R-I2") else "low"
        limit = 0.01 if pair == "I-R" else 0.05
        cells = [percent(flat, f"verification.{j}.{pair}.same", want, limit) for j in judges]
        cells += [percent(flat, f"study.{pair}.same", want, limit) for _ in people]
        asked = paper.SAME_PERSON.get(pair)
        table.add(Cell(words, pair), *cells, _of_paper(asked, 100, " %"), want)
    section.tables.append(table)
    table = Table(["mean cosine", *(_judge_name(j) for j in judges)])
    for pair, words in _WORDS.items():
        if any(f"verification.{j}.{pair}.cosine" in flat for j in judges):
            table.add(Cell(words, pair), *(number(flat, f"verification.{j}.{pair}.cosine", 2) for j in judges))
    table.add("threshold", *(number(flat, f"verification.{j}.threshold", 3) for j in judges))
    table.add("threshold at equal error", *(number(flat, f"verification.{j}.threshold-eer", 3) for j in judges))
    table.add("equal error of real photos", *(percent(flat, f"verification.{j}.eer") for j in judges))
    for pair in ("I-A", "I-R", "I-WR"):
        table.add(
            Cell(f"{_WORDS[pair]} pass at equal error", pair),
            *(percent(flat, f"verification.{j}.{pair}.same-eer") for j in judges),
        )
    section.tables.append(table)
    judge = str(flat["judges.headline"])
    if f"cosines.{judge}.I-A" in series:
        section.plots.append(
            (
                plots.anonymized_recovered(series, judge, float(flat[f"verification.{judge}.threshold"])),
                f"The plot of figure 4, by {judge}: each face once. Left of the line it is hidden, above the line it is"
                " given back; the upper left is where faces should be, and wrong recoveries in the lower left.",
            )
        )
    if any(f"verification.{j}.I-WR-1bit.same" in flat for j in judges):
        section.plots.append(
            (
                plots.near_misses(flat, judges),
                "How warm a guess gets: wrong codes by Hamming distance from the right one.",
            )
        )
    pairs = Table(["LFW's standard pairs", "accuracy", "TPR", "FPR", "judge"])
    for j in judges:
        for kind in ("real", "anonymized", "recovered", "wrongly-recovered"):
            key = f"lfw-pairs.{j}.{kind}"
            if f"{key}.accuracy" in flat:
                want = "" if kind == "real" else "high" if kind == "recovered" else "low"
                pairs.add(
                    f"{kind.replace('-', ' ')} against real",
                    percent(flat, f"{key}.accuracy"),
                    percent(flat, f"{key}.tpr", want),  # type: ignore[arg-type]
                    percent(flat, f"{key}.fpr"),
                    j,
                )
    if pairs.rows:
        pairs.caption = "Folds 1-5; accuracy by the threshold that is best on the other folds; hidden is 50 %."
        section.tables.append(pairs)
    field_table = Table(["anonymized against real photos, TPR at FPR 1e-3", "FaceNet", "ArcFace"])
    for name, (facenet, arcface) in paper.FIELD_TPR.items():
        field_table.add(name, f"{100 * facenet:.1f} %", f"{100 * arcface:.1f} %")
    field_table.caption = "The field since the paper, LFW (PrIdentity's table). Ours is A against another photo, above."
    section.tables.append(field_table)
    return section


def _gallery(flat: Flat) -> Section:
    section = Section("gallery", "Named by a gallery", "not in the paper")
    judges = [j for j in _judges(flat) if f"reidentification.{j}.A.rank1" in flat]
    if not judges:
        return section
    size = flat[f"reidentification.{judges[0]}.gallery"]
    section.text.append(
        f"Is the nearest of {size:.0f} real photos another photo of the same person? Chance: {1 / size:.2%}."
    )
    table = Table(["rank 1", *(_judge_name(j) for j in judges)])
    for kind, words, want in (
        ("I", "input", "high"), ("A", "anonymized", "low"),
        ("R", "recovered", "high"), ("WR", "wrongly recovered", "low"),
    ):  # fmt: skip
        table.add(words, *(percent(flat, f"reidentification.{j}.{kind}.rank1", want) for j in judges))  # type: ignore
    section.tables.append(table)
    field_table = Table(["the field, gallery of 1,000", "rank 1"])
    for name, value in paper.FIELD_RANK1.items():
        field_table.add(name, f"{100 * value:.1f} %")
    field_table.caption = (
        "Face Anonymization Made Simple, table 1; other data and recogniser, so orders of magnitude only."
    )
    section.tables.append(field_table)
    return section


def _recovery(flat: Flat, pictures: Mapping[str, str], series: Mapping[str, Any]) -> Section:
    section = Section("recovery", "Recovery, beside the baselines", "table 2")
    section.text.append(
        "L1 and L2 are on images in [-1, 1]; the paper does not state its range. All of ours from saved files. Each"
        " baseline has a deanonymizer of its own, all of one architecture and one (small) budget."
    )
    metrics = [m for m in ("lpips", "dssim", "l1", "l2") if f"recovery.{m}" in flat]
    judge = flat["judges.headline"]
    table = Table(["method", *(m.upper() for m in metrics), "PSNR", "A passes", "R passes"])
    table.add(
        Cell("this model", f"n = {flat.get('recovery.l1.n', 0)}"),
        *(number(flat, f"recovery.{m}", 4) for m in metrics),
        number(flat, "recovery.psnr", 1, " dB"),
        percent(flat, f"verification.{judge}.I-A.same", "low"),
        percent(flat, f"verification.{judge}.I-R.same", "high"),
    )
    for data, theirs in paper.RECOVERY_ON.items():
        table.add(Cell(f"the paper, {data}"), *(f"{theirs[m]:g}" for m in metrics), "", "", "")
    for name in baselines.NAMES:
        if f"baselines.{name}.l1" in flat:
            cells = [number(flat, f"baselines.{name}.{m}", 3, asked=paper.BASELINES[name][m]) for m in metrics]
            psnr = number(flat, f"baselines.{name}.psnr", 1, " dB")
            passes = [percent(flat, f"baselines.{name}.{pair}.same") for pair in ("I-A", "I-R")]
        else:
            cells = [Cell(NOTHING, paper=_of_paper(paper.BASELINES[name][m])) for m in metrics]
            psnr, passes = Cell(NOTHING), [Cell(NOTHING), Cell(NOTHING)]
        count = flat.get(f"baselines.{name}.l1.n")
        table.add(Cell(_BASELINES[name], "" if count is None else f"n = {count}"), *cells, psnr, *passes)
    # The count is in the row's name: the table would be too wide for a page.
    table.rows = [
        [name, *(replace(c, detail=c.detail.partition(", n = ")[0]) for c in cells)] for name, *cells in table.rows
    ]
    table.caption = (
        f"Each figure with its 95 % interval, and the paper's on LFW. A and R pass as the person by {judge}."
    )
    section.tables.append(table)
    if "baselines.order.spearman" in flat:
        rho = float(flat["baselines.order.spearman"])
        ours, theirs = (", ".join(series[k]) for k in ("baselines.order", "baselines.order.paper"))
        agrees = "agrees with the paper's" if ours == theirs else "differs from the paper's"
        section.text.append(
            f"The baselines' order in recovery (by {series['baselines.order.metric'].upper()}, best first: {ours})"
            f" {agrees} ({theirs}); rank correlation {rho:.2f}. {_why_order(ours, theirs)}"
        )
    if "baselines" in pictures:
        shown = [f"{_BASELINES[n]}, {what}" for n in series["baselines.shown"] for what in ("hidden", "recovered")]
        caption = "The baselines, and what their deanonymizers make of them."
        section.pictures.append(Picture(pictures["baselines"], caption, rows=["input", *shown]))
    return section


def _why_order(ours: str, theirs: str) -> str:
    if ours == theirs:
        return ""
    return (
        "Reasons to expect a difference: our deanonymizers see a few thousand images where the paper's were trained to"
        " the end; the number of superpixels and the detector of edges are not stated there; and our crops show the"
        " face half as large again, which is a larger part of it under the mask and finer detail lost in the blur. The"
        " learned anonymizer is after Ren et al., not theirs: the more it hides, the less is left to give back."
    )


def _files(flat: Flat) -> Section:
    section = Section("files", "Through files that lose something", "not in the paper")
    section.text.append(
        "The paper recovers from unrounded floats. Here A is saved, read again, and recovered. A password is of no use"
        " for a picture that was recompressed beyond what recovery bears."
    )
    metrics = [m for m in ("lpips", "dssim", "l1", "l2") if f"recovery.{m}" in flat]
    judge = flat["judges.headline"]
    table = Table(["A is saved as", *(m.upper() for m in metrics), "PSNR", "I-R passes", "I-A passes"])
    for prefix, words in _CODECS.items():
        if f"recovery.{prefix}l1" not in flat:
            continue
        codec = prefix.rstrip(".")
        suffix = "" if codec in ("", "float") else f"@{codec}"
        same = [
            Cell("") if codec == "float" else percent(flat, f"verification.{judge}.I-{kind}{suffix}.same", want)  # type: ignore[arg-type]
            for kind, want in (("R", "high"), ("A", "low"))
        ]
        cells = [number(flat, f"recovery.{prefix}{m}", 4) for m in metrics]
        table.add(words, *cells, number(flat, f"recovery.{prefix}psnr", 1, " dB"), *same)
    if table.rows:
        section.tables.append(table)
    return section


def _realism(flat: Flat) -> Section:
    section = Section("realism", "Do they look real?", "section 5.3")
    names = sorted({k.split(".")[2] for k in flat if k.startswith("realism.frechet.") and k.count(".") == 3})
    table = Table(["Frechet distance to real faces of other people", *names])
    for kind, words in (
        ("I", "input: the floor"),
        ("R", "recovered"),
        ("A", "anonymized"),
        ("WR", "wrongly recovered"),
    ):
        if names:
            table.add(words, *(number(flat, f"realism.frechet.{n}.{kind}", 3) for n in names))
    if names:
        table.caption = f"n = {flat.get('realism.n', 0):.0f} on each side; only comparable within this table. Not FID."
        section.tables.append(table)
    people = ["people asked (this model)"] if any(key.startswith("study.") for key in flat) else []
    asked = Table(["taken for more real than a real face", *people, "people asked (paper)"])
    for kind, value in paper.MORE_REAL.items():
        words = {"A": "anonymized", "WR": "wrongly recovered"}[kind]
        asked.add(
            Cell(words, kind), *(percent(flat, f"study.{kind}.more-real") for _ in people), f"{100 * value:.1f} %"
        )
    asked.caption = (
        "Chance is 50 %. To ask people about this model: python -m services.evaluate study, study-score, and --study."
    )
    section.tables.append(asked)
    return section


def _diversity(flat: Flat, series: Mapping[str, Any], pictures: Mapping[str, str]) -> Section:
    section = Section("diversity", "Many passwords, many people?", "section 5.4")
    judges = [j for j in _judges(flat) if f"diversity.{j}.same" in flat]
    if judges:
        each = flat["diversity.passwords"]
        table = Table([f"{each:.0f} passwords a face", *judges])
        table.add("pairs that pass as one person", *(percent(flat, f"diversity.{j}.same", "low", 0.1) for j in judges))
        table.add("mean cosine", *(number(flat, f"diversity.{j}.cosine", 2) for j in judges))
        table.add(f"different people seen, of {each:.0f}", *(number(flat, f"diversity.{j}.people", 1) for j in judges))
        judge = flat["judges.headline"]
        table.add(
            "one bit changed: passes as the same",
            *(percent(flat, f"diversity.one-bit.{j}.same", "low", 0.1) if j == judge else Cell("") for j in judges),
        )
        table.caption = "The paper's people took 12.2 % of (A1, A2) for one person."
        section.tables.append(table)
    if "diversity.bits.l1" in series:
        section.plots.append((plots.bits(series), "What each bit of the code does to the anonymized face."))
    if "codes" in pictures:
        what = (
            "All 256 codes of one face." if len(series["codes.bits"]) == 8
            else f"One face under 64 codes: bits {', '.join(map(str, series['codes.bits']))} count up, the others stay."
        )  # fmt: skip
        section.pictures.append(Picture(pictures["codes"], what))
    return section


def _detection(flat: Flat) -> Section:
    section = Section("detection", "Use by other software", "table 3")
    if "detection.mtcnn.box" not in flat:
        return section
    table = Table(
        ["against the input", "found by MTCNN", "box, px", "keypoints, px", "confidence", "found by dlib's HOG"]
    )
    for kind, words in (("I", "input"), ("A", "anonymized"), ("R", "recovered"), ("WR", "wrongly recovered")):
        key = f"detection.mtcnn.{kind}"
        table.add(
            words,
            percent(flat, f"{key}.rate", "high"),
            number(flat, f"{key}.box", 2),
            number(flat, f"{key}.landmarks", 2),
            number(flat, f"{key}.confidence", 4),
            percent(flat, f"detection.dlib-hog.{kind}.rate"),
        )
    table.add(
        "A, R and WR together",
        "",
        number(flat, "detection.mtcnn.box", 2),
        number(flat, "detection.mtcnn.landmarks", 2),
        "",
        "",
    )
    for data, theirs in paper.DETECTION_ON.items():
        table.add(f"the paper, {data}", "", f"{theirs['box']:g}", f"{theirs['landmarks']:g}", "", "")
    table.caption = (
        "Mean absolute shift of a coordinate in pixels of a 128 px crop. Our crops show the face about half as large"
        " again as the paper's frames (32 against 22 px between the eyes): the same relative shift counts 1.45 times."
    )
    section.tables.append(table)
    return section


def _background(flat: Flat) -> Section:
    section = Section("background", "What is not face", "section 5.1")
    if "background.crop.A.levels" in flat:
        share = flat["background.crop.share"]
        table = Table(
            [f"crops, outside the head ({share:.0%} of the crop)", "mean error, 8-bit levels", "pixels unchanged"]
        )
        for kind, words in (("A", "anonymized"), ("R", "recovered"), ("WR", "wrongly recovered")):
            key = f"background.crop.{kind}"
            table.add(words, number(flat, f"{key}.levels", 3), percent(flat, f"{key}.unchanged", "high"))
        section.tables.append(table)
    if "background.picture.unchanged" in flat:
        table = Table(["whole pictures, PNG to PNG", "measured"])
        table.add("pixels bit for bit as before", percent(flat, "background.picture.unchanged"))
        table.add(
            "pixels changed outside every crop", percent(flat, "background.picture.changed-outside-crops", "low", 0.0)
        )
        table.add("PSNR of the whole recovered picture", number(flat, "background.picture.recovered-psnr", 1, " dB"))
        table.add(
            "pictures without a found face",
            f"{flat['background.picture.without-a-face']:.0f} of {flat['background.picture.without-a-face.n']}",
        )
        section.tables.append(table)
    return section


def _ablations(flat: Flat) -> Section:
    section = Section("ablations", "Ablations", "section 5.6 and appendix D")
    trained = [name for name in ablations.NAMES if f"ablations.{name}.l1" in flat]
    pairs = ("I-A", "I-R", "I-WR", "A1-A2", "WR1-WR2")
    if trained:
        table = Table(["trained", "crop", "images seen", *(f"{p} passes" for p in pairs), "cos(I, A)", "L1 of R"])
        for name in trained:
            key = f"ablations.{name}"
            table.add(
                _ABLATIONS[name],
                f"{flat[f'{key}.crop']:.0f} px",
                f"{flat[f'{key}.images-seen']:,.0f}",
                *(percent(flat, f"{key}.{p}.same") for p in pairs),
                number(flat, f"{key}.I-A.cosine", 2),
                number(flat, f"{key}.l1", 4),
            )
        section.tables.append(table)
        fewest = min(float(flat[f"ablations.{name}.images-seen"]) for name in trained)
        if fewest < 50_000:
            section.text.append(
                f"Trained for {fewest:,.0f} images: enough to see that each runs, not enough to say what a term is for."
            )
    return section


def _video(flat: Flat) -> Section:
    section = Section("video", "Over time", "not in the paper: its videos are shown, not measured")
    table = Table(["clips", "measured", "what it is"])
    for key in flat:
        base, _, end = key.rpartition(".")
        line = keys.describe(key) if key.startswith("video.") else None
        if line is not None and not (end in ("low", "high", "n") and base in flat):
            table.add(key.removeprefix("video."), number(flat, key, 3), line.text)
    if table.rows:
        section.tables.append(table)
    return section


def _attacks(flat: Flat, series: Mapping[str, Any], pictures: Mapping[str, str]) -> Section:
    section = Section("attacks", "Attacks", "appendix B, and more")
    section.text.append(
        "The attacker holds the model and the anonymized picture, not the password. The paper says its own model does"
        " not withstand this. Trained attackers had minutes of a CPU: what they reach is a lower bound."
    )
    table = Table(["attack", "the attacker has", "success", "chance", "success means"])
    for name, (words, has, means) in ATTACKS.items():
        key = f"attack.{name}"
        value = key if key in flat and f"{key}.success" not in flat else f"{key}.success"
        if value not in flat:
            continue
        chance = flat.get(f"{key}.chance", flat.get("attack.sweep.chance"))
        cell = percent(flat, value)
        better = float(flat.get(f"{value}.low", flat[value])) > float(chance) + 1e-9
        text = f"{100 * float(chance):.3g} %"
        table.add(words, has, Cell(cell.text, cell.detail, cell.bar, "bad" if better else "good"), text, means)
    if table.rows:
        table.caption = "Red: the whole interval lies above chance."
        section.tables.append(table)
    if "attack.sweep.codes-tried" in flat:
        tried, total = flat["attack.sweep.codes-tried"], flat["attack.sweep.codes"]
        above = float(flat["attack.sweep.wrong-codes-above"])
        section.text.append(
            f"The sweep tried {tried:,.0f} of {total:,.0f} codes for each face, the right one among them. By the share"
            f" of wrong codes that matched the gallery better than the right one, about {above:,.0f} of all"
            f" {total - 1:,.0f} would. `--sweep-codes {total:.0f}` tries them all."
        )
    if "attack.known-plaintext.hours-for-all-codes" in flat:
        hours = float(flat["attack.known-plaintext.hours-for-all-codes"])
        section.text.append(
            f"At the speed measured here, trying all {2.0 ** float(flat['model.bits']):,.0f} codes on one picture takes"
            f" {hours:,.1f} hours; a code of 64 bits would take {hours * 2.0 ** (64 - float(flat['model.bits'])):.0e}."
            " Codes are tried without deriving them from passwords, so the key derivation does not slow this down."
        )
    if "attack.likeness.bits-told" in flat:
        told, bits = float(flat["attack.likeness.bits-told"]), float(flat["model.bits"])
        section.text.append(
            f"The face that A shows is one of {2.0**told:,.0f} likenesses, which the code picks: where it is read,"
            f" {told:.0f} of its {bits:.0f} bits are known. And who may have pictures of their own anonymized under the"
            " password makes pairs of original and anonymized picture that open the pictures that they are made for,"
            " whatever the length of its code. One password for one purpose."
        )
    ranks = Table(
        ["does the right one of the candidates come out on top?", "area under the curve (chance 0.5)", "first by eight"]
    )
    for name in ("best-looking", "best-detected", "shortest", "smoothest", "round-trip", "grid"):
        if f"attack.{name}.auc" in flat:
            several = percent(flat, f"attack.{name}.several.success")
            ranks.add(ATTACKS[name][0], number(flat, f"attack.{name}.auc", 3), several)
    if "attack.recovery-classifier.auc" in flat:
        ranks.add("classifier of R and WR", number(flat, "attack.recovery-classifier.auc", 3), NOTHING)
    if "attack.smoothest.several.chance" in flat:
        ranks.caption = (
            "First by eight: how often the right code comes first when what eight pictures of one password say is added"
            f" up; chance {100 * float(flat['attack.smoothest.several.chance']):.1f} %."
        )
    if ranks.rows:
        section.tables.append(ranks)
    if "round-trip" in series:
        section.text.append(series["round-trip"])
    lost = Table(["denial: the picture is re-saved as", "recovery fails"])
    for codec in ("png", "jpeg95", "jpeg90", "jpeg75", "half"):
        if f"attack.denial.{codec}.success" in flat:
            name = _CODECS.get(f"{codec}.", "PNG")
            lost.add(name, percent(flat, f"attack.denial.{codec}.success", "low"))
    if lost.rows:
        section.tables.append(lost)
    if "known-pairs" in pictures:
        opened = [f"opened with {n} pair{'s' if n > 1 else ''}" for n in series["known-pairs.shown"]]
        caption = "Pictures opened without their password, by who has pairs of others of that password."
        section.pictures.append(Picture(pictures["known-pairs"], caption, rows=["input", "anonymized", *opened]))
    if "inverter" in pictures:
        rows = ("input", "anonymized", "inverted")
        section.pictures.append(Picture(pictures["inverter"], "What the trained inverter makes of it.", rows=rows))
    return section


def _runtime(flat: Flat, series: Mapping[str, Any]) -> Section:
    section = Section("runtime", "Runtime", "section 4")
    if "runtime.batch12.seconds" in flat:
        table = Table(["how fast", "this model", "the paper's architecture, same run", "the paper, Titan V"])
        table.add(
            "seconds a batch of 12",
            number(flat, "runtime.batch12.seconds", 3),
            number(flat, "runtime.paper-architecture.batch12.seconds", 3),
            f"{paper.BATCH_OF_12}",
        )
        best = f"{flat['runtime.best.images-per-second']:.0f} (batch {flat['runtime.best.batch']:.0f})"
        theirs = 12 / float(flat["runtime.paper-architecture.batch12.seconds"])
        table.add("images a second", best, f"{theirs:.1f}", f"{12 / paper.BATCH_OF_12:.0f}")
        table.caption = str(series.get("machine", ""))
        section.tables.append(table)
    return section
