"""What a command is told to load: slips are named before a hub is asked."""

from __future__ import annotations

import pytest

from dspark_hf import loading
from dspark_hf.loading import check_slip, read_drafter_config


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with `drafters/smollm2` in it, in which the process runs."""
    (tmp_path / "drafters" / "smollm2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_slip_in_a_folder_is_told_at_once(here, monkeypatch):
    """A typing error in a folder's name is taken for a name on the hub: half a minute, then "couldn't connect"."""
    monkeypatch.setattr(loading.DSparkConfig, "from_pretrained", lambda name: pytest.fail("a hub was asked"))
    with pytest.raises(ValueError, match=r"no folder of this name is here. Did you mean 'drafters/smollm2'"):
        read_drafter_config("drafters/smolm2")
    with pytest.raises(ValueError, match=r"got .*: no folder of this name is here. Correct the path."):
        read_drafter_config(str(here / "elsewhere"))


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "gpt2", "drafters/smollm2", "drafters/another", "drafters"])
def test_other_names_are_let_through(here, name):
    """A name on the hub is refused because a folder happens to be called like its author."""
    check_slip(name, "--target")


def test_a_name_that_was_downloaded_is_let_through(here, monkeypatch):
    """A model in the hub's cache is refused because a folder here is called nearly so."""
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda name, file: "/cache/config.json")
    check_slip("drafters/smolm2", "--target")
