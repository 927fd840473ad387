"""The picture of the first page."""

from __future__ import annotations

from xml.etree import ElementTree

from benchmarks.answer_picture import draw
from dspark_hf.demo.tiny import write_tiny_pair


def test_the_picture_shows_an_answer(tmp_path):
    """The picture is no picture, loads fonts from elsewhere, or does not say what its colours mean."""
    target, drafter = write_tiny_pair(tmp_path)
    picture = draw(str(target), str(drafter), "A title", max_new_tokens=12)
    text = "".join(ElementTree.fromstring(picture).itertext()).replace("\N{NO-BREAK SPACE}", " ")
    assert "A title" in text
    for part in ("target", "drafter", "lookup", "12 tokens in"):
        assert part in text
    assert "url(http" not in picture
