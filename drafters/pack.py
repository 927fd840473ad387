"""Put a trained drafter into this folder, small enough for a repository.

    python drafters/pack.py runs/smollm2/drafter drafters/smollm2-135m-instruct \\
        --target HuggingFaceTB/SmolLM2-135M-Instruct

Weights are stored in bf16 with four of their seven mantissa bits, the rest zero: the files have the usual format and
size, git packs them to about 60%, and the rounding (1.3% of a weight, root mean square) costs no accepted drafts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from dspark_hf import DSparkAssistantModel
from dspark_hf.files import write_whole

MANTISSA_BITS = 4
MAX_TOKENIZER_BYTES = 4_000_000
# written anew
LEFT_OUT = ("config.json", "model.safetensors")
# what is known of a drafter that lies here already stands in it
CARD = "README.md"


def main() -> None:
    """Round, save, and copy what belongs beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="folder of a trained, calibrated drafter")
    parser.add_argument("folder", type=Path, help="where it goes; what else lies there stays")
    parser.add_argument("--target", help="hub name of the target, where it was trained on a folder's")
    arguments = parser.parse_args()
    drafter = DSparkAssistantModel.from_pretrained(arguments.trained, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(round_mantissa(parameter, MANTISSA_BITS))
    if arguments.target:
        # nobody else has that folder, and the weights in it may be those of a quantised file
        drafter.config.base_model_name_or_path, drafter.config.target_fingerprint = arguments.target, None
    has_card = (arguments.folder / CARD).is_file()
    drafter.save_pretrained(arguments.folder)
    files = [path for path in arguments.trained.iterdir() if path.is_file()]
    # a tokenizer of this size would outweigh the drafter; the target brings its own
    is_heavy = any(path.name == "tokenizer.json" and path.stat().st_size > MAX_TOKENIZER_BYTES for path in files)
    for path in files:
        belongs_to_tokenizer = "tokenizer" in path.name or path.suffix == ".jinja"
        is_left_out = path.name in LEFT_OUT or (is_heavy and belongs_to_tokenizer) or (has_card and path.name == CARD)
        if not is_left_out:
            write_whole(arguments.folder / path.name, path.read_bytes())


def round_mantissa(tensor: Tensor, num_bits: int) -> Tensor:
    """Return a bf16 tensor rounded to `num_bits` of its 7 mantissa bits, ties to even."""
    bits = tensor.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    dropped = 7 - num_bits
    bits = bits + ((bits >> dropped) & 1) + (1 << (dropped - 1)) - 1
    return (bits >> dropped << dropped).to(torch.int16).view(torch.bfloat16)


if __name__ == "__main__":
    main()
