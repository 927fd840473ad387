"""The default beside every single way in a fresh process: five prompts, 64 tokens each, nothing learnt beforehand.

    python -m benchmarks.first_minute --recordings build/first_minute

Drafts behind every position of greedy texts are recorded once for each set and kept in the folder, and so are the
costs of passes and drafts; all ways then replay these, with noise. **Times are simulated**, what is drafted, accepted
and learnt is not. Sets: questions, chat, code to complete and to edit, text to copy, random tokens, and the questions
once more with a drafter that is always wrong and does not look it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import loading
from benchmarks.loads import random_prompts
from benchmarks.lookup import make_sets
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from benchmarks.recordings import (
    CONTEXT,
    DISTURBANCE,
    DISTURBED,
    Clock,
    Text,
    fewer_right,
    load_texts,
    record,
    replay,
    save_texts,
)
from benchmarks.replay import REPEATS, with_error
from dspark_hf import LookupAssistant
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.fast_passes import fast_passes
from dspark_hf.generation.scheduling import AdaptiveScheduler, CallInfo, FixedScheduler, Scheduler, reset_learned_state
from dspark_hf.generation.scheduling.costs import workload
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable
from dspark_hf.generation.targets.adapter import TargetAdapter

HOPELESS = "questions, a hopeless drafter"
PLAIN, DEFAULT = "plain", "default"
NUM_PROMPTS, LENGTH = 5, 64
LONGEST_LOOKUP = Drafter.longest_lookup


@dataclass(frozen=True)
class Way:
    """How a process decodes: its scheduler, and how many drafts are made and looked up at most."""

    scheduler: Callable[[], Scheduler]
    num_drafts: int
    num_looked_up: int


WAYS = {
    PLAIN: Way(FixedScheduler, 0, 0),
    "fixed 3": Way(FixedScheduler, 3, 0),
    "fixed 5": Way(FixedScheduler, 5, 0),
    "fixed 7": Way(FixedScheduler, 7, 0),
    "lookup": Way(AdaptiveScheduler, 0, LONGEST_LOOKUP),
    "all lookups": Way(FixedScheduler, 0, LONGEST_LOOKUP),
    DEFAULT: Way(AdaptiveScheduler, 7, LONGEST_LOOKUP),
}


def speed(
    way: Way, target: TargetAdapter, drafter: Drafter, texts: Sequence[Text], end: int | None, clock: Clock
) -> float:
    """Return tokens per second of a fresh process over the texts, each up to its `end` token."""
    reset_learned_state()
    used = drafter if way.num_drafts or not way.num_looked_up else LookupAssistant()
    call = CallInfo(target, used, 1, way.num_drafts or way.num_looked_up, CONTEXT)
    written = [
        replay(
            way.scheduler().start(call),
            [text],
            _length(text, end),
            clock,
            way.num_drafts,
            longest_lookup=way.num_looked_up,
        )
        for text in texts
    ]
    return sum(one.num_tokens for one in written) / sum(one.seconds for one in written)


def _length(text: Text, end: int | None) -> int:
    ids = text.token_ids[:LENGTH]
    return ids.index(end) + 1 if end in ids else LENGTH


def ratios(
    target: TargetAdapter,
    drafter: Drafter,
    texts: Sequence[Text],
    end: int | None,
    costs: CostTable,
    noise: float,
    num_sessions: int,
) -> dict[str, list[float]]:
    """Return the speed of every way by that of plain decoding, session by session."""
    found: dict[str, list[float]] = {}
    usable = [text for text in texts if _length(text, end) > 1]
    for seed in range(num_sessions):
        chosen = random.Random(seed).sample(usable, min(NUM_PROMPTS, len(usable)))
        speeds = {
            name: speed(way, target, drafter, chosen, end, Clock(costs, noise, random.Random(seed)))
            for name, way in WAYS.items()
        }
        for name, value in speeds.items():
            found.setdefault(name, []).append(value / speeds[PLAIN])
    return found


def row_of(name: str, found: Mapping[str, list[float]]) -> str:
    """Return a set's line of the table."""
    others = [way for way in WAYS if way != DEFAULT]
    best = max(others, key=lambda way: mean(found[way]))
    default = found[DEFAULT]
    cells = [f"{mean(found[way]):.2f}" for way in others if way != PLAIN]
    against = mean(default) / mean(found[best])
    return f"| {name} | {' | '.join(cells)} | {with_error(default)} | {min(default):.2f} | {against:.3f} ({best}) |"


def head() -> list[str]:
    """Return the head of the table."""
    names = [name for name in WAYS if name not in (PLAIN, DEFAULT)]
    return [
        f"| set | {' | '.join(names)} | default | its slowest session | default / the best other |",
        f"| --- | {' | '.join('---:' for _ in names)} | ---: | ---: | ---: |",
    ]


def rates_of(sets: Mapping[str, Sequence[Text]], block_size: int) -> list[float]:
    """Return how often each draft is accepted if those before it are, behind every position of the texts."""
    blocks = [block for texts in sets.values() for text in texts for block in text.blocks]
    return [
        round(sum(block.num_right > place for block in blocks) / max(sum(b.num_right >= place for b in blocks), 1), 3)
        for place in range(block_size)
    ]


def costs_of(path: Path, packaged: Any) -> CostTable:
    """Return the costs of one row that a file holds, measured here if there is none."""
    if not path.exists():
        widths = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
        models = packaged.target, packaged.drafter
        with TargetAdapter(packaged.target, packaged.drafter.target_layer_ids) as target, fast_passes(*models):
            timer = workload.StepTimer(target, packaged.drafter)
            steps: list[tuple[Callable[[int, int, int], float], str, int]]
            steps = [(timer.verify_seconds, f"v{width}", width) for width in widths]
            steps += [(timer.draft_seconds, f"d{count}", count) for count in (1, 3, 5, 7)]
            times = workload.measure(
                steps,
                lambda step: step[0](1, CONTEXT, step[2]),
                repeats=REPEATS,
                advance=lambda: None,
                is_doubtful=lambda _: False,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({name: seconds for (_, name, _), seconds in times.items()}), encoding="utf-8")
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    verify, draft = (
        CostCurves({(1, CONTEXT, int(name[1:])): value for name, value in found.items() if name[0] == kind})
        for kind in "vd"
    )
    return CostTable(verify, draft)


def main(
    recordings: Annotated[Path, typer.Option(help="Folder where recordings and costs are kept.")],
    prompts: loading.PromptsFile = loading.PROMPTS,
    model: loading.PackagedName = "smollm2",
    dtype: loading.DtypeName = "bf16",
    costs: Annotated[str, typer.Option(help="Dtypes whose costs count, comma-separated.")] = "bf16,fp32",
    num_prompts: Annotated[int, typer.Option(min=NUM_PROMPTS, help="Texts of a set that are recorded.")] = 8,
    sessions: Annotated[int, typer.Option(min=2, help="Fresh processes.")] = 8,
    noises: Annotated[str, typer.Option(help="Standard deviations of a step's time, as shares.")] = "0.05,0.3",
    processor_time: loading.ProcessorTime = False,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = FOLDER / "results" / "first_minute.md",
) -> None:
    """Record what is not recorded yet, replay, print the tables and write them to a file."""
    console = Console()
    workload.perf_counter = loading.choose_clock(processor_time=processor_time)  # type: ignore[attr-defined]
    packaged = loading.load_packaged(model, dtype)
    encoded = make_sets(packaged, prompts, num_prompts)
    encoded["random tokens"] = random_prompts(num_prompts, packaged.tokenizer.vocab_size, seed=0)
    sets: dict[str, list[Text]] = {}
    for name, batch in encoded.items():
        path = recordings / f"{model}-{dtype}-{name.replace(' ', '-')}.json"
        if not path.exists():
            with console.status(f"recording {name}"):
                save_texts(record(packaged.target, packaged.drafter, batch, LENGTH), path)
        sets[name] = load_texts(path)
    rates = rates_of({name: texts for name, texts in sets.items() if name != "random tokens"}, 7)
    sets[HOPELESS] = fewer_right(sets["questions"], 0.0)
    target = TargetAdapter(packaged.target, packaged.drafter.target_layer_ids)
    end, shown = packaged.tokenizer.eos_token_id, packaged.drafter.accept_rates
    lines = [
        f"# The first minute: {packaged.title}",
        "",
        f"Real drafts behind greedy texts ({dtype}), **times are simulated** at the costs below, with noise; "
        f"{DISTURBED:.0%} of the steps take {DISTURBANCE} times as long. Speed, plain = 1, means over {sessions} "
        f"fresh processes ± standard error; each writes {NUM_PROMPTS} texts of up to {LENGTH} tokens, one row, and "
        "starts with nothing learnt. `lookup` is the default without a drafter, `all lookups` takes every offer.",
        "",
        f"How often each draft is accepted if those before it are, over all sets but the last two: {rates}",
        "",
        *describe_run(),
    ]
    for of in costs.split(","):
        loaded = packaged if of == dtype else None
        path = recordings / f"{model}-costs-{of}.json"
        table = costs_of(path, loaded or (None if path.exists() else loading.load_packaged(model, of)))
        for noise in map(float, noises.split(",")):
            lines += ["", f"## Costs of {of}, noise of {noise:.0%}", "", *head()]
            for name, texts in sets.items():
                # an untrained drafter was not evaluated either
                packaged.drafter.config.accept_rates = None if name == HOPELESS else shown
                with console.status(f"{of}, {noise}, {name}"):
                    found = ratios(target, packaged.drafter, texts, end, table, noise, sessions)
                lines.append(row_of(name, found))
        unit = table.verify_seconds(1, 1, CONTEXT)
        shares = [table.verify_seconds(1, width, CONTEXT) / unit for width in (2, 4, 8, 16)]
        shares.append(table.draft_seconds(1, 7, CONTEXT) / unit)
        passes = "passes over 2, 4, 8 and 16 tokens, and 7 drafts"
        lines += ["", f"A plain step = 1, {passes}: {', '.join(f'{share:.2f}' for share in shares)}."]
    console.print(write_page(lines, output), markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
