"""Draw the picture of the first page: an answer, coloured by who gave each token.

    python -m benchmarks.answer_picture --output docs/images/answer.svg

A real answer of a packaged target with its shipped drafter, greedy, fp32, whole blocks in every round, so that the
same picture comes out again.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from dspark_hf.demo.packaged import PACKAGED_MODELS, converted_target, shipped_drafter
from dspark_hf.files import write_whole
from dspark_hf.loading import load_drafter, load_target, load_tokenizer
from dspark_hf.pieces import TextPieces
from dspark_hf.prompts import encode_prompt, user_turn
from dspark_hf.terminal.display import STYLES, legend, sources_of

PROMPT = "Write a Python function that returns the largest of a list of numbers, and show how to call it."
# rich's own picture without the fonts that it would load from elsewhere
FORMAT = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, monospace; }}
.{unique_id}-matrix {{ font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-family: system-ui, sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def draw(target_folder: str, drafter_folder: str, title: str, max_new_tokens: int) -> str:
    """Return the picture of an answer to `PROMPT` as SVG."""
    target, tokenizer = load_target(target_folder, dtype="fp32"), load_tokenizer(target_folder)
    drafter = load_drafter(drafter_folder, dtype=torch.float32)
    prompt = encode_prompt(user_turn(PROMPT), tokenizer)[None].to(target.device)
    output = target.generate(
        prompt,
        assistant_model=drafter,
        scheduler="fixed",
        do_sample=False,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
    )
    statistics = output.statistics
    pieces, answer = TextPieces(tokenizer), Text()
    new = output.sequences[0, prompt.shape[1] :].tolist()
    for token_id, source in zip(new, statistics.token_sources[0], strict=True):
        answer.append(pieces.add(token_id), style=STYLES[source])
    console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(answer)
    console.print()
    console.print(legend(sources_of(drafter)))
    console.print(Text(f"{len(new)} tokens in {statistics.num_target_passes} passes of the target", style="dim"))
    return console.export_svg(title=title, code_format=FORMAT, unique_id="answer")


def main() -> None:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PACKAGED_MODELS, default="smollm2")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--output", type=Path, default=Path("docs/images/answer.svg"))
    arguments = parser.parse_args()
    model = PACKAGED_MODELS[arguments.model]
    folders = str(converted_target(arguments.model)), str(shipped_drafter(model))
    picture = draw(*folders, title=model.title, max_new_tokens=arguments.max_new_tokens)
    write_whole(arguments.output, picture.encode())
    print(f"{arguments.output}: {len(picture)} characters")


if __name__ == "__main__":
    main()
