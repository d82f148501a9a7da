"""Plots as inline SVG; colours that survive colour blindness (Okabe and Ito) and both page themes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#808080"
_STYLE: Final = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "mien",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "text.color": GRAY,
    "legend.frameon": False,
}


def anonymized_recovered(series: Mapping[str, Any], judge: str, threshold: float) -> str:
    """The paper's figure 4: how alike A is to I, and how alike R (and WR) is to I, a dot a face."""
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6, 4.2))
        hidden = series[f"cosines.{judge}.I-A"]
        axes.scatter(
            hidden, series[f"cosines.{judge}.I-WR"], s=9, color=ORANGE, alpha=0.5, label="wrong password", lw=0
        )
        axes.scatter(hidden, series[f"cosines.{judge}.I-R"], s=9, color=BLUE, alpha=0.6, label="right password", lw=0)
        for name, marker in (
            ("superpixel", "s"),
            ("blur", "^"),
            ("noise", "v"),
            ("mask", "D"),
            ("edge", "P"),
            ("ren", "*"),
        ):
            x, y = series.get(f"cosines.{name}.I-A"), series.get(f"cosines.{name}.I-R")
            if x and y:
                axes.scatter(sum(x) / len(x), sum(y) / len(y), s=48, marker=marker, color=GREEN, label=f"{name} (mean)")
        axes.axvline(threshold, color=GRAY, lw=0.8, ls="--")
        axes.axhline(threshold, color=GRAY, lw=0.8, ls="--")
        axes.set_xlabel("cosine of input and anonymized")
        axes.set_ylabel("cosine of input and recovered")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
        return _svg(figure)


def near_misses(flat: Mapping[str, Any], judges: Sequence[str]) -> str:
    """Share passing as the person against the number of wrong bits; the uniform ones on the right."""
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.2))
        kinds = ("I-R", "I-WR-1bit", "I-WR-2bit", "I-WR-4bit", "I-WR")
        for judge, colour in zip(judges, (BLUE, ORANGE, GRAY, GREEN, "#cc79a7"), strict=False):
            keys = [f"verification.{judge}.{kind}.same" for kind in kinds]
            values = [100 * float(flat[k]) for k in keys]
            low = [100 * (float(flat[k]) - float(flat[f"{k}.low"])) for k in keys]
            high = [100 * (float(flat[f"{k}.high"]) - float(flat[k])) for k in keys]
            errors = [[max(0.0, v) for v in low], [max(0.0, v) for v in high]]
            axes.errorbar(range(5), values, yerr=errors, color=colour, marker="o", ms=4, lw=1.2, capsize=2, label=judge)
        axes.set_xticks(range(5), ["right", "1 bit", "2 bits", "4 bits", "uniform"])
        axes.set_xlabel("wrong by")
        axes.set_ylabel("passes as the person, %")
        axes.set_ylim(-3, 103)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
        return _svg(figure)


def bits(series: Mapping[str, Any]) -> str:
    """How much the anonymized face changes with each bit."""
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6, 2.6))
        values = series["diversity.bits.l1"]
        axes.bar(range(len(values)), values, color=BLUE, width=0.7)
        axes.set_xlabel("bit of the code")
        axes.set_ylabel("mean L1 of the change")
        axes.set_xticks(range(len(values)))
        twin = axes.twinx()
        twin.spines["right"].set_visible(True)
        twin.plot(range(len(values)), series["diversity.bits.cosine"], color=ORANGE, marker="o", ms=4, lw=1)
        twin.set_ylabel("cosine of the two faces", color=ORANGE)
        return _svg(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
