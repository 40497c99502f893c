"""The report of a conversion: what its figures are, what its page shows, and what it says when something is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case
from models import images, vit
from PIL import Image

import msa2conv
from msa2conv import errors, write_report
from msa2conv.levers import DEFAULT
from msa2conv.report import page

PICTURES = {"plan", "flops", "tradeoff", "heads"}


@pytest.fixture(scope="module")
def result() -> msa2conv.Conversion:
    return msa2conv.convert(vit(), 0.7, data=images(), progress=False)


@pytest.fixture
def saved(result: msa2conv.Conversion, tmp_path: Path) -> Path:
    result.save(tmp_path / "out")
    return tmp_path / "out"


def test_what_the_sites_take_adds_up(case: Case) -> None:
    report, costs = case.result.report, case.seen.costs
    assert [site.path for site in report.sites] == [site.path for site in case.seen.claims.sites]
    assert costs.rest + sum(site.before for site in report.sites) == report.flops_before
    assert costs.rest + sum(site.after for site in report.sites) == report.flops_after
    assert {site.path: site.choice for site in report.sites} == case.result.plan.sites


def test_the_hybrid_is_timed_beside_the_original(result: msa2conv.Conversion) -> None:
    latency = result.report.latency
    assert latency is not None and latency.target is None and latency.predicted is None and latency.attempts == []
    assert latency.batch_size == 1 and latency.before.seconds > 0 and latency.after.seconds > 0
    assert re.search(r"ms, batch 1, float32 +[\d.e+]+ +[\d.e+]+ +[\d.]+%", str(result.report))
    assert result.model.training == vit().training


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def test_the_page_is_whole_by_itself_and_shows_every_figure(result: msa2conv.Conversion, saved: Path) -> None:
    text = (saved / "report.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(text)
    assert all(
        link.startswith(("#", "data:image/png;base64,")) for link in links.found
    )  # nothing is loaded from elsewhere
    assert text.count("<svg") == len(PICTURES) and "<script" not in text
    assert {path.stem for path in (saved / "figures").iterdir()} == PICTURES
    for path in (saved / "figures").iterdir():
        with Image.open(path) as picture:
            assert picture.width > 800 and picture.getpixel((0, 0))[:3] == (255, 255, 255)
    report = result.report
    for shown in (
        f"{report.flops_after / report.flops_before:.1%}",
        f"{report.distance:.4f}",
        report.versions["torch"],
        result.plan.base.weights_sha256,
        f"convert(model, {report.target}, levers={list(DEFAULT)!r}, data=images",
    ):
        assert shown in text.replace("&#39;", "'"), shown


def test_the_page_follows_light_and_dark(saved: Path) -> None:
    text = (saved / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "currentColor" in drawn and "var(--line)" in drawn
    assert "#111213" not in drawn and "#c1c2c3" not in drawn  # the stand-ins are gone
    assert not re.search(r"<svg[^>]*width=", drawn)


def test_the_same_figures_give_the_same_bytes(result: msa2conv.Conversion, saved: Path) -> None:
    before = {path: path.read_bytes() for path in [saved / "report.html", *(saved / "figures").iterdir()]}
    assert write_report(saved) == saved / "report.html"
    assert {path: path.read_bytes() for path in before} == before


def test_names_are_text_and_not_markup(result: msa2conv.Conversion, tmp_path: Path) -> None:
    base = result.plan.base.model_copy(update={"name": "<script>alert(1)</script>"})
    page.write_page(tmp_path, result.plan.model_copy(update={"base": base}), result.report)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text


def test_a_report_of_an_earlier_version_says_less(saved: Path) -> None:
    known = json.loads((saved / "report.json").read_text())
    for name in ("schema_version", "sites", "tradeoff", "locality", "levers", "latency"):
        del known[name]
    (saved / "report.json").write_text(json.dumps(known))
    text = write_report(saved).read_text(encoding="utf-8")
    assert "<svg" not in text and text.count("Not recorded: ") == 4
    assert "Not recorded: what decided this hybrid did not tell what every site takes." in text
    assert "Not recorded: other budgets are known after a calibrated search only." in text


def _training(**changes: Any) -> Any:
    from msa2conv.report.training import Training

    curve = [{"stage": "distill", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
    curve += [{"stage": "distill", "epoch": 1, "step": 3, "val": {"top1": 0.5, "loss": 1.0}}]
    known: dict[str, Any] = {
        "stages": [{"kind": "distill"}], "teacher": "the original", "labels": False, "images": 8, "batch_size": 4,
        "processes": 1, "precision": "no", "seed": 0, "curve": curve, "metric": "top1", "best": None, "seconds": 1.0,
        "images_per_second": 8.0, "versions": {},
    }  # fmt: skip
    return Training(**known | changes)


def test_a_training_shows_its_curves(result: msa2conv.Conversion, tmp_path: Path) -> None:
    report = result.report.model_copy(update={"training": _training(), "search": _training().curve[:3]})
    page.write_page(tmp_path, result.plan, report)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") == len(PICTURES) + 2 and "top-1 50.00 %" in text
    assert (tmp_path / "figures" / "training.png").is_file() and (tmp_path / "figures" / "search.png").is_file()


def test_a_training_says_how_many_processes_at_which_precision() -> None:
    assert "8 images/s on 1 process (float32), 1 s" in str(_training())
    assert "8 images/s on 2 processes (bf16), 1 s" in str(_training(processes=2, precision="bf16"))


def test_a_gate_search_tells_its_sites_and_its_curve() -> None:
    batches = [(images(), torch.randint(0, 10, (len(images()),)))] * 2
    found = msa2conv.convert(vit(), 0.7, data=batches, search="gates", progress=False)
    assert {site.path: site.choice for site in found.report.sites} == found.plan.sites
    assert [line["step"] for line in found.report.search] and all("loss" in line for line in found.report.search)


def test_saving_anew_forgets_what_was_measured_of_another_hybrid(result: msa2conv.Conversion, saved: Path) -> None:
    (saved / "evaluation.json").write_text("{}")
    result.save(saved)
    assert not (saved / "evaluation.json").exists()


def test_without_matplotlib_a_hybrid_is_saved_and_only_the_page_asks_for_it(
    result: msa2conv.Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == "matplotlib" else object())
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "report.json").is_file() and not (tmp_path / "out" / "report.html").exists()
    with pytest.raises(errors.MissingDependency) as raised:
        write_report(tmp_path / "out")
    assert str(raised.value) == (
        "report: found no package 'matplotlib'; expected matplotlib and jinja2. pip install 'msa2conv[report]'"
    )


def test_a_report_of_a_later_version_is_refused(saved: Path) -> None:
    known = json.loads((saved / "report.json").read_text())
    (saved / "report.json").write_text(json.dumps(known | {"schema_version": 2}))
    with pytest.raises(errors.UnsupportedSchema) as raised:
        write_report(saved)
    assert str(raised.value) == (
        f"{saved / 'report.json'}: found report schema version 2; expected version 1. Read it with the msa2conv "
        "release that wrote it; the hybrid itself does not need it."
    )


def test_a_damaged_evaluation_is_refused(saved: Path) -> None:
    (saved / "evaluation.json").write_text("{}")
    with pytest.raises(errors.InvalidCheckpoint) as raised:
        write_report(saved)
    assert str(raised.value) == (
        f"{saved / 'evaluation.json'}: found an evaluation that this version cannot read; expected the evaluation.json "
        "that `msa2conv eval` wrote. Delete it, or run `msa2conv eval` again."
    )


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidCheckpoint) as raised:
        write_report(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}: found no report.json; expected a folder written by Conversion.save or msa2conv convert. Convert "
        "with an output folder: a .safetensors file alone holds no figures."
    )
