"""Figures, page and files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dspark_hf.evaluation.plots import draw_figures
from dspark_hf.evaluation.report import render_report
from dspark_hf.evaluation.results import Evaluation, to_json
from dspark_hf.evaluation.run import evaluate
from dspark_hf.evaluation.settings import EvaluationSettings
from dspark_hf.evaluation.tables import all_tables, headline
from dspark_hf.evaluation.writing import write_evaluation
from dspark_hf.files import write_whole
from tests.evaluation.examples import tiny_models, tiny_sets

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """An evaluation of two sets."""
    settings = EvaluationSettings(max_new_tokens=10, repeats=1, temperatures=(1.0,))
    return evaluate(tiny_models(("ours",)), tiny_sets(left=2, right=2), settings)


@pytest.fixture(scope="module")
def paths(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Its files, in a folder that was made for them; drawing the figures takes long."""
    return list(write_evaluation(evaluation, tmp_path_factory.mktemp("parent") / "new" / "folder"))


def _renamed(evaluation: Evaluation, name: str) -> Evaluation:
    return replace(
        evaluation,
        target=name,
        drafters=tuple(replace(one, name=name) for one in evaluation.drafters),
        sets=tuple(
            replace(one, name=name, drafters=tuple(replace(result, drafter=name) for result in one.drafters))
            for one in evaluation.sets
        ),
    )


def test_all_files_are_written(paths):
    """A figure is missing, or the numbers are."""
    names = {path.name for path in paths}
    assert names == {path.name for path in paths[0].parent.iterdir()}
    assert {"evaluation.json", "report.html", "accepted_length.png"} <= names
    assert "acceptance_by_position_temperature_1.png" in names
    for kind in ("threshold_sweep", "survival_by_position", "reliability"):
        assert f"{kind}_ours_temperature_1.png" in names
    assert all(path.read_bytes().startswith(PNG) for path in paths if path.suffix == ".png")


def test_the_file_holds_what_was_measured(evaluation):
    """The numbers cannot be read back, or do not say where they came from."""
    fields = json.loads(to_json(evaluation))
    acceptance = fields["sets"][0]["drafters"][0]["acceptance"]
    assert acceptance["tau"]["value"] == evaluation.sets[0].drafters[0].acceptance.tau.value
    assert {"hardware", "versions", "date", "commit", "arguments"} <= set(fields["provenance"])


class _Page(HTMLParser):
    """Collect a page's text, its tags, and every address it names."""

    def __init__(self):
        super().__init__()
        self.text, self.tags, self.addresses = "", set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.text += data


def test_page_needs_nothing_else(evaluation, paths):
    """The page asks a server for something, or does not show a figure or a table."""
    (path,) = (one for one in paths if one.name == "report.html")
    html = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(html)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == sum(one.suffix == ".png" for one in paths)
    assert not {"script", "link", "iframe"} & page.tags
    assert not re.search(r"url\(|@import|https?:", html)
    assert headline(evaluation) in page.text
    for table in all_tables(evaluation):
        assert table.title in page.text


def test_names_cannot_break_the_page_or_leave_the_folder(evaluation):
    """A name with odd characters runs code in the reader's browser, breaks a figure, or opens another folder."""
    name = '../<script>alert("1")</script>&$x_1$'
    # every kind of figure once
    renamed = _renamed(replace(evaluation, sets=evaluation.sets[:1]), name)
    figures = draw_figures(renamed)
    assert len(figures) > 3
    assert all("/" not in figure.name for figure in figures)
    html = render_report(renamed, figures)
    page = _Page()
    page.feed(html)
    assert "script" not in page.tags
    assert name in page.text


def test_many_sets_and_no_confidence_are_drawn():
    """Nine sets, a drafter without a head or a set with one prompt breaks a figure."""
    models = tiny_models(with_confidence=False)
    sets = tiny_sets(**{f"set{index}": 1 for index in range(9)})
    evaluation = evaluate(models, sets, EvaluationSettings(max_new_tokens=3, repeats=1))
    assert [figure.name for figure in draw_figures(evaluation)] == [
        "accepted_length",
        "acceptance_by_position_temperature_0",
    ]


def test_missing_matplotlib_is_told_and_numbers_are_kept(evaluation, tmp_path, monkeypatch):
    """Without matplotlib an import error appears, or the numbers are lost with the figures."""
    monkeypatch.setattr("dspark_hf.figures.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`matplotlib` must be installed .*`pip install"):
        write_evaluation(evaluation, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    """A crash while writing leaves half a file, or takes the old one away."""
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert Path(path).read_bytes() == b"old"
