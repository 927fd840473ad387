"""Which packaging a folder's drafter comes in, its configuration and its tensors under our names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_hf.modeling.formats import gguf, packed
from dspark_hf.modeling.formats.contradictions import warn_of_contradictions
from dspark_hf.modeling.formats.deepspec import DEEPSPEC
from dspark_hf.modeling.formats.reading import Packaging, Shapes, our_name
from dspark_hf.modeling.formats.specforge import DFLASH, LFM2, SPECFORGE
from dspark_hf.modeling.formats.speculators import SPECULATORS
from dspark_hf.modeling.formats.tensors import read_shapes, read_tensors

# speculators' first: its architectures bear SpecForge's names
PACKAGINGS = (SPECULATORS, DEEPSPEC, SPECFORGE, LFM2, DFLASH)
# parts of names in a configuration, and whose layouts they tell of
_KNOWN_ELSEWHERE = (("k3", "Kimi K3's"), ("kimi", "Kimi's"), ("nemotron", "Nemotron's"))
_MARKS = ("dspark", "dflash")


def find_packaging(fields: dict[str, Any]) -> Packaging | None:
    """Return the foreign packaging that the fields of a `config.json` tell of, or None."""
    return next((packaging for packaging in PACKAGINGS if packaging.recognises(fields)), None)


def translate(
    packaging: Packaging, name_or_path: str | os.PathLike, fields: dict[str, Any], **hub_options: Any
) -> Any:
    """Return `DSparkConfig`'s fields for a drafter; of its tensors only the shapes are read."""
    shapes: Shapes = read_shapes(name_or_path, **hub_options)
    if packed.are_packed(shapes):
        sizes = read_tensors(name_or_path, lambda name: name.endswith(packed.SIZES), **hub_options)
        shapes = packed.plain_shapes(shapes, sizes)
    translated = packaging.translate(
        fields, {ours: shape for name, shape in shapes.items() if (ours := our_name(name))}
    )
    warn_of_contradictions(str(name_or_path), fields, translated)
    return translated


def load_tensors(name_or_path: str | os.PathLike, fields: dict[str, Any], **hub_options: Any) -> dict[str, Tensor]:
    """Return the tensors of a drafter in a foreign packaging, under our names; `fields` are its `config.json`'s."""
    stored = packed.unpack(read_tensors(name_or_path, **hub_options), fields)
    return _with_marks({ours: x for name, x in stored.items() if (ours := our_name(name))})


def load_gguf(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a drafter in a GGUF file, under our names."""
    return _with_marks(gguf.read(file))


def _with_marks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a drafter's tensors, with the marks of a reduced vocabulary: some leave out what follows from the ids."""
    ids = tensors.get("d2t")
    if ids is not None:
        tensors["d2t"] = ids.long()
        vocabulary = tensors.get("markov_head.markov_w1.weight")
        if "t2d" not in tensors and vocabulary is not None:
            marked = torch.zeros(len(vocabulary), dtype=torch.bool)
            chosen = tensors["d2t"] + torch.arange(len(ids))
            marked[chosen[(chosen >= 0) & (chosen < len(marked))]] = True
            tensors["t2d"] = marked
    return tensors


def describe_unread(fields: dict[str, Any]) -> str | None:
    """Return whose drafter the fields of a `config.json` tell of, where its layout is not read, or None."""
    kind = fields.get("speculators_model_type")
    if isinstance(kind, str):
        return f"a drafter of the kind {kind!r} in speculators' layout"
    architectures = fields.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    names.append(str(fields.get("model_type")))
    if fields.get("model_type") == "mistral_large4" or any(name.startswith("MistralLarge4") for name in names):
        return "the DSpark module inside a Mistral checkpoint (`mtp_dspark.*`)"
    marked = [name for name in names if any(mark in name.lower() for mark in _MARKS)]
    if not marked or fields.get("model_type") == "dspark":
        return None
    whose = next((whose for part, whose in _KNOWN_ELSEWHERE if any(part in name.lower() for name in names)), "another")
    return f"a DSpark drafter in {whose} layout ({', '.join(marked)})"
