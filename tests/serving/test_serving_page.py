"""What `docs/serving.md` says is what the server does."""

from __future__ import annotations

import re
from pathlib import Path

from dspark_hf.serving.schemas import FIXED, ChatBody, CompletionBody
from tests.serving.running import NAME, serve

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_code_runs_as_it_is(capsys):
    """A reader pastes the page's code, and it fails or prints nothing."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with serve() as running:
        for written, here in (("http://127.0.0.1:8000", running.url), ('"smollm2"', repr(NAME))):
            assert written in block
            block = block.replace(written, here)
        exec(block, {})
    assert capsys.readouterr().out.strip()


def test_every_field_is_on_the_page():
    """A client looks for a field, and finds neither that it is honoured nor that it is refused."""
    # which model is asked, and what is asked: told before the table
    fields = {*ChatBody.model_fields, *CompletionBody.model_fields, *FIXED} - {"model", "messages", "prompt"}
    named = set(re.findall(r"`([a-z_]+)", PAGE))
    assert fields - named == set()
