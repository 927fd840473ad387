"""Say what a drafter's file says twice, and not the same: one of the two has to be taken, and may be the wrong one.

What cannot both be true is an error, where the file is read; here is what can be passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from transformers.utils import logging

_LOGGER = logging.get_logger(__name__)

_SECTIONS = ("dspark_config", "dflash_config", "transformer_layer_config")
# keys that are read from wherever they stand
_ANYWHERE = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "num_target_layers",
    "sample_from_anchor",
    "sts_temperatures",
)
# fields that the shapes of the tensors tell, whatever a file says
_FROM_SHAPES = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "draft_vocab_size",
    "vocab_size",
    "num_hidden_layers",
)


def warn_of_contradictions(name: str, fields: Mapping[str, Any], translated: Mapping[str, Any]) -> None:
    """Warn once of each thing that the fields of a `config.json` say otherwise than what was taken from it."""
    for found in _contradictions(fields, translated):
        _LOGGER.warning_once(f"The drafter in {name!r} contradicts itself: {found}. Ask its maker which one is meant.")


def _contradictions(fields: Mapping[str, Any], translated: Mapping[str, Any]) -> Iterator[str]:
    for key in _ANYWHERE:
        said = dict(_places(fields, key))
        if any(value != next(iter(said.values())) for value in said.values()):
            places = ", ".join(f"`{place}` is {value!r}" for place, value in said.items())
            yield f"{places}, and the first of them is taken"
    for key in _FROM_SHAPES:
        taken = translated.get(key)
        if key == "draft_vocab_size" and taken is None:
            taken = translated.get("vocab_size")
        # without a Markov head there is no kind of it
        if key == "markov_head_type" and not translated.get("markov_rank"):
            continue
        for place, value in _places(fields, key):
            if value != taken:
                yield f"`{place}` is {value!r}, and its tensors are those of {taken!r}, which is taken"
    names = dict(_target_names(fields))
    # folders and the hub agree in the last part at best
    if len({PurePosixPath(value).name.lower() for value in names.values()}) > 1:
        yield ", ".join(f"`{place}` names the target {value!r}" for place, value in names.items())


def _places(fields: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """Give where a key stands, and what it says there, in the order in which it is read."""
    places: list[tuple[str, Any]] = [(f"dspark_{key}", fields.get(f"dspark_{key}"))]
    for section in _SECTIONS:
        inner = fields.get(section)
        places.append((f"{section}.{key}", inner.get(key) if isinstance(inner, Mapping) else None))
    places.append((key, fields.get(key)))
    return ((place, value) for place, value in places if value is not None)


def _target_names(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    inner = fields.get("speculators_config")
    verifier = inner.get("verifier") if isinstance(inner, Mapping) else None
    said = {
        "base_model_name_or_path": fields.get("base_model_name_or_path"),
        "speculators_config.verifier.name_or_path": verifier.get("name_or_path")
        if isinstance(verifier, Mapping)
        else None,
    }
    return ((place, value) for place, value in said.items() if isinstance(value, str) and value)
