"""Whether a profile that is known beforehand makes the default faster than costs it learns while decoding.

    python -m benchmarks.profile_worth

Real drafts are replayed at the costs of a results page, as in `benchmarks.replay`: with nothing known of costs, with a
true profile, and with the profile that was once stored on a busy machine. **Times are simulated.**
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from benchmarks.loading import PROMPTS, PackagedName, load_packaged
from benchmarks.pages import FOLDER
from benchmarks.recordings import CONTEXT, record
from benchmarks.replay import Session, speed_of, with_error
from dspark_hf.generation.scheduling import AdaptiveScheduler, FixedScheduler
from dspark_hf.generation.scheduling.costs.online import OnlineCosts
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.prompts import encode_prompt, read_prompts

# what was stored by chance on a busy machine, a plain step of 147 ms being 1
BUSY = {1: 1.0, 2: 264 / 147, 3: 303 / 147, 4: 234 / 147, 6: 186 / 147, 8: 138 / 147}
# share of the drafter's time that does not depend on the number of drafts
FIXED_SHARE = 0.5


def costs_of(page: Path) -> CostTable:
    """Return the costs in the table at the end of a results page."""
    lines = page.read_text(encoding="utf-8").split("## Costs")[1].splitlines()
    rows = [[float(cell) for cell in line.strip("| ").split("|")] for line in lines if line[:3].strip("| ").isdigit()]
    verify = {(int(row[0]), CONTEXT, width): cost for row in rows for width, cost in enumerate(row[1:-1], start=1)}
    draft = {
        (int(row[0]), CONTEXT, count): row[-1] * (FIXED_SHARE + (1 - FIXED_SHARE) * count / (len(row) - 3))
        for row in rows
        for count in range(1, len(row) - 2)
    }
    return CostTable(CostCurves(verify), CostCurves(draft))


def main(
    model: PackagedName = "smollm2",
    rows: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4,8",
    length: Annotated[int, typer.Option(min=8, help="New tokens of a row.")] = 64,
    batches: Annotated[int, typer.Option(min=1, help="Batches of a session.")] = 5,
    sessions: Annotated[int, typer.Option(min=2, help="Sessions, each with nothing learnt.")] = 12,
) -> None:
    """Print the speed against plain decoding, of all batches and of the first."""
    packaged = load_packaged(model, "fp32")
    drafter: Any = packaged.drafter
    target = TargetAdapter(packaged.target, drafter.target_layer_ids)
    encoded = [encode_prompt(prompt, packaged.tokenizer).flatten() for prompt in read_prompts(PROMPTS, 48)]
    texts = record(packaged.target, drafter, encoded, length)
    costs = costs_of(FOLDER / "results" / f"replay-{model}-fp32.md")
    plain_steps = {point[0]: cost for point, cost in costs.verify.points.items() if point[2] == 1}
    busy = CostTable(
        CostCurves(
            {
                (count, CONTEXT, width): cost * share
                for count, cost in plain_steps.items()
                for width, share in BUSY.items()
            }
        ),
        costs.draft,
    )
    typer.echo("| rows | costs known beforehand | all batches | first batch |\n| ---: | :--- | ---: | ---: |")
    for num_rows in map(int, rows.split(",")):
        session = Session(target, drafter, texts, num_rows, batches, length, costs, 0.05)
        plain = [session.run(FixedScheduler(), seed, 0) for seed in range(sessions)]
        for name, profile in {"none": None, "a true profile": costs, "a busy machine's": busy}.items():
            runs = [
                session.run(AdaptiveScheduler(costs=OnlineCosts(profile)), seed, drafter.block_size)
                for seed in range(sessions)
            ]
            whole = [speed_of(one) / speed_of(other) for one, other in zip(runs, plain, strict=True)]
            first = mean(speed_of(one[:1]) / speed_of(other[:1]) for one, other in zip(runs, plain, strict=True))
            typer.echo(f"| {num_rows} | {name} | {with_error(whole)} | {first:.3f} |")


if __name__ == "__main__":
    typer.run(main)
