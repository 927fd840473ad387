"""Accepted length of sampled blocks verified at once, against token by token, on the very same blocks.

    python -m benchmarks.block_verification

Counted, not timed: real sampled runs, and for each of their blocks the expected number of accepted drafts under either
rule. So the difference has no noise of its own but that of the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from torch import Tensor

from benchmarks.loading import PROMPTS, DtypeName, PackagedName, PromptsFile, load_packaged
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf.generation import decoding, verification
from dspark_hf.prompts import encode_prompt, read_prompts


def expected_at_once(draft_ids: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Return the expected number `(B,)` of accepted drafts `(B, K)`, all of them verified at once.

    At least k are accepted unless no place from k on is chosen.
    """
    stops = verification.stop_chances(
        verification.prefix_weights(draft_ids, draft_probs, target_probs),
        draft_ids,
        draft_probs,
        target_probs,
        torch.full((len(draft_ids),), draft_ids.shape[1], device=draft_ids.device),
    )
    never_from = (1 - stops[:, 1:].double()).flip(1).cumprod(1)
    return (1 - never_from).sum(1)


def expected_by_token(draft_ids: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Return the same where each draft is accepted or rejected for itself."""
    num_drafts = draft_ids.shape[1]
    p_draft = draft_probs.gather(-1, draft_ids[..., None]).squeeze(-1).double()
    p_target = target_probs[:, :num_drafts].gather(-1, draft_ids[..., None]).squeeze(-1).double()
    return (p_target / p_draft).clamp_max(1.0).cumprod(1).sum(1)


@contextmanager
def recorded() -> Iterator[list[tuple[float, float]]]:
    """Give a list that fills with both expectations, at once and token by token, of every row of every round."""
    blocks: list[tuple[float, float]] = []

    def verify(
        draft_ids: Tensor,
        draft_probs: Tensor,
        target_probs: Tensor,
        num_verified: Tensor,
        is_certain: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        pair = [rule(draft_ids, draft_probs, target_probs) for rule in (expected_at_once, expected_by_token)]
        blocks.extend(zip(pair[0].tolist(), pair[1].tolist(), strict=True))
        return verification.verify(draft_ids, draft_probs, target_probs, num_verified, is_certain)

    # the name that the loop calls
    with patch.object(decoding, "verify", verify):
        yield blocks


def main(
    model: PackagedName = "smollm2",
    dtype: DtypeName = "fp32",
    prompts: PromptsFile = PROMPTS,
    num_prompts: Annotated[int, typer.Option(min=2)] = 24,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 96,
    output: Annotated[Path, typer.Option(help="Where the table goes.")] = FOLDER / "results" / "block_verification.md",
) -> None:
    """Sample at three temperatures, print the table and write it to a file."""
    packaged = load_packaged(model, dtype)
    texts = read_prompts(prompts, num_prompts)
    lines = [
        "# Sampled blocks verified at once",
        "",
        f"{packaged.title}, {dtype}, {packaged.drafter.block_size} drafts in every round, the first {len(texts)} "
        f"prompts, {max_new_tokens} new tokens at most. Expected tokens a round (with the bonus token), of the same "
        "blocks; the error is that of the mean over prompts.",
        "",
        *describe_run(),
        "",
        "| temperature | token by token | at once | gain |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for temperature in (0.6, 1.0, 1.3):
        per_prompt = []
        for text in texts:
            ids = encode_prompt(text, packaged.tokenizer).view(1, -1)
            with recorded() as blocks:
                packaged.target.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    assistant_model=packaged.drafter,
                    scheduler="fixed",
                    drafts="model",
                )
            if blocks:
                per_prompt.append([1 + mean(column) for column in zip(*blocks, strict=True)])
        lines.append(_row(temperature, per_prompt))
    print(write_page(lines, output))


def _row(temperature: float, per_prompt: list[list[float]]) -> str:
    at_once, by_token = (mean(column) for column in zip(*per_prompt, strict=True))
    gains = [one / other - 1 for one, other in per_prompt]
    error = stdev(gains) / len(gains) ** 0.5
    return f"| {temperature} | {by_token:.3f} | {at_once:.3f} | {100 * mean(gains):+.1f}% ± {100 * error:.1f} |"


if __name__ == "__main__":
    typer.run(main)
