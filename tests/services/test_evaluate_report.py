"""All parts on stand-ins, and the report that is made of them: complete, in words, in one file, readable."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services import gates
from services.evaluate import documentation, keys, parts, report, run
from services.evaluate.context import Context, Sizes
from services.evaluate.figures import Result
from tests.services.stand_ins import context_of, perfect, two_photos_each

ROOT = Path(__file__).parents[2]
# What may be missing where no weights, photos, clips or trained models are; all else must have figures.
MAY_LACK = (
    "realism.fid", "realism.frechet.alexnet", "recovery.lpips", "recovery.float", "background.picture", "lfw-pairs",
    "video", "baselines.", "ablations.", "diversity.grid-256", "detection.", "attack.best-looking", "attack.grid",
    "attack.known-pairs", "attack.chosen-pairs", "attack.pattern", "attack.likeness", "attack.outline",
    "attack.hidden-linking", "attack.invariants",
)  # fmt: skip


@dataclass
class Written:
    """One report, and the figures it was made of."""

    folder: Path
    flat: dict[str, Any]
    results: dict[str, Result]
    context: Context

    @property
    def html(self) -> str:
        return (self.folder / "report.html").read_text()


META = {
    "format": 1, "model.path": "stand-in", "model.digest": "0" * 64, "model.architecture": "xor", "model.bits": 8,
    "model.images-seen": 0, "data.path": "noise", "data.digest": "1" * 64, "data.split": "test", "seed": 0,
    "faces": 160, "people": 160, "people-with-two-photos": 160, "fpr": 1e-3, "judges": "dlib",
    "judges.headline": "dlib",
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("report")
    context = context_of(perfect, two_photos_each(200))
    context.sizes = Sizes().quick()
    results = run.run(context, parts.NAMES, folder, "mark")
    flat: dict[str, Any] = run.flatten(results, META)
    verdicts = gates.check(gates.load(), flat)
    flat |= {"gates.passed": sum(v.passed for v in verdicts), "gates.count": len(verdicts)}
    report.write(folder / "report.html", flat, results, verdicts)
    return Written(folder, flat, results, context)


def test_every_part_gives_figures_or_says_why_not(written: Written) -> None:
    assert tuple(written.results) == parts.NAMES
    for name, result in written.results.items():
        assert result.figures or result.skipped, name
    for key, why in written.flat.items():
        if key.startswith(keys.SKIPPED):
            assert key.removeprefix(keys.SKIPPED).startswith(MAY_LACK) and len(why) > 10, key
        elif not isinstance(why, str):
            assert math.isfinite(why), key


def test_every_key_is_in_words(written: Written) -> None:
    assert keys.unknown(written.flat) == []
    assert keys.unknown({"verification.dlib.I-A.sam": 1.0, "fpr.low": 1.0}) == ["verification.dlib.I-A.sam", "fpr.low"]


def test_figures_with_an_interval_have_all_of_it(written: Written) -> None:
    for key, value in written.flat.items():
        line = keys.describe(key)
        if line is not None and line.with_ == "interval" and not key.endswith((".low", ".high", ".n")):
            assert written.flat[f"{key}.low"] <= value + 1e-9 and value <= written.flat[f"{key}.high"] + 1e-9, key
            assert written.flat[f"{key}.n"] >= 1


def test_the_tables_in_the_docs_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert text == documentation.refreshed(text), "python -m services.evaluate document writes it"
    assert "`verification.<judge>.<pair>.same`" in text
    with pytest.raises(ValueError, match="one place"):
        documentation.refreshed("no place")


def test_the_docs_name_every_part_with_its_time_and_every_judge() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    for name in parts.NAMES:
        assert f"| `{name}` | {parts.SECONDS[name]} | {documentation.ABOUT[name][0]} |" in text, name
    for judge in keys.WORDS["judge"]:
        assert f"`{judge}`" in text
    assert sum(parts.SECONDS.values()) <= 30 * 60, "the default run is to take half an hour on two cores"


def test_a_part_is_measured_again_only_where_its_sizes_changed(written: Written, tmp_path: Path) -> None:
    """``--sweep-codes`` after a first report costs the sweep alone."""
    shutil.copytree(written.folder / "parts", tmp_path / "parts")
    recovery = json.loads((tmp_path / "parts" / "recovery.json").read_text())
    assert recovery["sizes"] == {"lossy": written.context.sizes.lossy}
    recovery["figures"]["recovery.l1"] = 0.125  # seen again only if it was not measured again
    (tmp_path / "parts" / "recovery.json").write_text(json.dumps(recovery))

    def again() -> float:
        return run.run(written.context, ["recovery"], tmp_path, "mark")["recovery"].figures["recovery.l1"]

    sizes = written.context.sizes
    try:
        assert again() == 0.125
        written.context.sizes = Sizes(**{**sizes.__dict__, "sweep_codes": sizes.sweep_codes + 1})
        assert again() == 0.125
        written.context.sizes = Sizes(**{**sizes.__dict__, "lossy": sizes.lossy - 1})
        assert again() == 0
    finally:
        written.context.sizes = sizes


def test_the_report_has_a_section_for_all_of_the_paper_and_beyond(written: Written) -> None:
    html = written.html
    for words in ("table 2", "table 3", "figure 4", "section 5.3", "section 5.4", "section 5.6", "appendix B"):
        assert words in html, words
    for anchor in ("gates", "same-person", "recovery", "realism", "diversity", "detection", "background", "ablations",
                   "attacks", "runtime", "video"):  # fmt: skip
        assert f'id="{anchor}"' in html, anchor
    assert (
        "paper 0.24" in html and "the paper, FFHQ" in html and "4.7 %" in html and "28.9 %" in html and "0.0266" in html
    )


def test_what_people_said_of_the_model_stands_beside_what_they_said_in_the_paper(written: Written) -> None:
    study = {f"study.I-A.same{end}": value for end, value in (("", 0.123), (".low", 0.1), (".high", 0.2), (".n", 100))}
    tables = {s.anchor: s.tables for s in report.sections(written.flat | study, written.results)}
    table = tables["same-person"][0]
    column = list(table.columns).index("people asked (this model)")
    assert [row[column].text for row in table.rows if row[0].detail in ("I-A", "I-R")] == ["12.3 %", "-"]
    assert "people asked (this model)" in tables["realism"][-1].columns
    without = {s.anchor: s.tables for s in report.sections(written.flat, written.results)}
    assert "people asked (this model)" not in without["same-person"][0].columns


def test_what_was_not_measured_is_there_with_its_reason(written: Written) -> None:
    for key, why in written.flat.items():
        if key.startswith(keys.SKIPPED):
            assert f"<code>{key.removeprefix(keys.SKIPPED)}</code>" in written.html, key
            assert why.replace("'", "&#39;").replace("`", "`") in written.html, why


def test_the_report_is_one_file_that_asks_for_no_other(written: Written) -> None:
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", written.html)
    assert "<script" not in written.html and "@import" not in written.html


CHROMIUM = os.environ.get("MIEN_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here (install one, or set MIEN_CHROMIUM)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_reads_well_in_a_browser_wide_and_narrow(written: Written, browser: Any, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = browser.new_page(viewport={"width": width, "height": 900})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
    page.goto((written.folder / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "tables scroll, the page does not"
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found] == []
    assert wrong == []
    page.close()
