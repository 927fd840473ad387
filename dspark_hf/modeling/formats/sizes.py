"""Whether a drafter's tensors have the sizes that its configuration asks for, said before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dspark_hf.modeling.formats import packed
from dspark_hf.modeling.formats.reading import Shapes, our_name
from dspark_hf.modeling.formats.tensors import find_file

# what Transformers calls files of weights that `read_shapes` does not look for
ELSEWHERE = ("variant", "use_safetensors")


def check_sizes(
    shapes: Shapes, expected: Shapes, name_or_path: str | os.PathLike, hub_options: Mapping[str, Any]
) -> None:
    """Raise a `ValueError` that names tensor, file and both shapes, if one of `shapes` is not the `expected` one.

    Names are ours; what is in one of the two alone is passed over.
    """
    wrong = [name for name in expected if name in shapes and tuple(shapes[name]) != tuple(expected[name])]
    if not wrong:
        return
    name, more = wrong[0], len(wrong) - 1
    file = find_file(name_or_path, lambda stored: our_name(packed.plain_name(stored)) == name, **hub_options)
    raise ValueError(
        "`pretrained_model_name_or_path` must hold tensors of the sizes that follow from the drafter's configuration, "
        f"got `{name}` of {tuple(shapes[name])} instead of {tuple(expected[name])} in {str(file or name_or_path)!r}"
        + (f", and {more} more" if more else "")
        + ". Save the drafter anew, or fetch that file again."
    )
