"""What drafts that branch would gain: trees over the Markov head beside chains, at the costs of passes here.

    python -m benchmarks.trees --processor-time

Greedy texts are written once, and behind every token of them the most probable paths of the drafter's block are kept,
with what the text says of each. Chains and trees of all sizes then replay the texts: how far each round gets is real,
**times are added up** from measured passes, drafts and steps of the head. A chain's pass is the one that `generate`
runs for one row, a tree's is the ragged target's, with its mask, and its path is kept. Counted in favour of trees: the
loop's own bookkeeping costs nothing, and the head runs for those paths alone whose children are in the tree.

K slots, n proposable tokens, D hidden, w paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log, sqrt
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig

from benchmarks import loading
from benchmarks.loads import make_load, num_new_tokens
from benchmarks.lookup import make_sets
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from benchmarks.recordings import CONTEXT
from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like
from dspark_hf.generation.drafting.chances import MatchChances
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.drafting.lookup import Lookups
from dspark_hf.generation.fast_passes import fast_passes
from dspark_hf.generation.scheduling.costs import workload
from dspark_hf.generation.scheduling.costs.table import CostCurves
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.ragged import RaggedTarget
from dspark_hf.generation.targets.ragged_cache import RaggedCache

# tokens that a tree has at most; with the anchor, a pass of 24
MOST = 23
SIZES = (2, 3, 5, 7, 9, 11, 15, MOST)
# a path less probable than that, by the drafter, is left out
LEASTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
PATHS = (1, 2, 4, 8, 16)
REPEATS = 7
# a looked-up draft that is reached and accepted more rarely is left out
LEAST_LOOKUP = 0.3


@dataclass(frozen=True)
class Node:
    """A draft at the end of its path: the path's probability, its length, and whether the text goes that way."""

    log_prob: float
    depth: int
    is_right: bool


@dataclass(frozen=True)
class Block:
    """The block behind a token: its chain of best drafts, and its most probable paths, the best first."""

    chain: tuple[Node, ...]
    tree: tuple[Node, ...]


@dataclass(frozen=True)
class Text:
    """What a target wrote behind a prompt, and the blocks behind its first tokens."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Policy:
    """Which drafts are verified: a tree's or a chain's, so many at most, none on a path less probable than `least`."""

    is_tree: bool
    most: int
    least: float

    def choose(self, block: Block) -> Sequence[Node]:
        """Return the drafts of a round."""
        nodes = (block.tree if self.is_tree else block.chain)[: self.most]
        floor = log(self.least) if self.least else float("-inf")
        return [node for node in nodes if node.log_prob >= floor]


CHAINS = [Policy(False, most, least) for most in range(1, 8) for least in LEASTS]
TREES = [Policy(True, most, least) for most in SIZES for least in LEASTS]


@dataclass(frozen=True)
class Costs:
    """Seconds of passes by width, of a whole block's drafts, and of a step of the head: a chain's, w paths'."""

    passes: CostCurves
    tree_passes: CostCurves
    drafts: float
    chain_step: float
    path_steps: CostCurves

    def round(self, nodes: Sequence[Node], *, is_tree: bool, num_slots: int) -> float:
        """Return the seconds of drafting and verifying."""
        seconds = self.drafts
        if not is_tree:
            seconds += self.verify(1 + len(nodes))
        else:
            seconds += self.tree_passes.at(1, CONTEXT, 1 + len(nodes))
            depths = [node.depth for node in nodes]
            paths = [1, *(depths.count(depth) for depth in range(1, num_slots))]
            seconds += sum(self.path_steps.at(1, CONTEXT, count) for count in paths if count)
            seconds -= num_slots * self.chain_step
        return seconds

    def verify(self, width: int) -> float:
        """Return the seconds of a pass."""
        return self.passes.at(1, CONTEXT, width)


@dataclass
class Replayed:
    """Tokens, seconds and rounds of each text."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)

    def speed(self, without: int | None = None) -> float:
        """Return tokens per second, of all texts or of all but one."""
        kept = [place for place in range(len(self.tokens)) if place != without]
        return sum(self.tokens[place] for place in kept) / sum(self.seconds[place] for place in kept)

    @property
    def tau(self) -> float:
        """Tokens per round."""
        return sum(self.tokens) / sum(self.rounds)


def grow(
    base: Tensor, hidden_states: Tensor, anchor_id: int, markov_head: Any, token_ids: Tensor, most: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Return the `most` most probable paths of a block, with their log-probabilities, the best first.

    Takes `base` logits `(K, n)`, `hidden_states` `(K, D)`, and the proposable `token_ids` `(n,)`. Paths grow slot by
    slot, all of them together; a path that is not among the best so far has no descendant that is.
    """
    found: list[tuple[float, tuple[int, ...]]] = []
    level = [(0.0, ())]
    state = markov_head.initial_state(hidden_states[:1])
    previous = torch.tensor([anchor_id], device=base.device)
    for slot in range(len(base)):
        states = hidden_states[slot].expand(len(previous), -1)
        latent, state = markov_head.step(previous, states, state)
        log_probs = (base[slot] + markov_head.project(latent)).float().log_softmax(-1)
        log_probs = log_probs + torch.tensor([one for one, _ in level], device=base.device)[:, None]
        best = log_probs.flatten().topk(min(most, log_probs.numel()))
        parents, places = best.indices // base.shape[1], best.indices % base.shape[1]
        ids = token_ids[places]
        children = [
            (value, (*level[parent][1], token))
            for value, parent, token in zip(best.values.tolist(), parents.tolist(), ids.tolist(), strict=True)
        ]
        found = sorted([*found, *children], key=lambda one: -one[0])[:most]
        kept = [place for place, child in enumerate(children) if child[0] >= found[-1][0]]
        if not kept:
            break
        level = [children[place] for place in kept]
        previous = ids[kept]
        state = None if state is None else state[parents[kept]]
    return found


def _judged(paths: Sequence[tuple[float, tuple[int, ...]]], text: Sequence[int]) -> tuple[Node, ...]:
    return tuple(Node(value, len(path), list(path) == list(text[: len(path)])) for value, path in paths)


def _chain(
    base: Tensor, hidden_states: Tensor, anchor_id: int, head: Any, token_ids: Tensor
) -> list[tuple[float, tuple[int, ...]]]:
    """Return the prefixes of the chain of best drafts, with their log-probabilities."""
    previous, path, total = torch.tensor([anchor_id], device=base.device), [], 0.0
    state, found = head.initial_state(hidden_states[:1]), []
    for slot in range(len(base)):
        latent, state = head.step(previous, hidden_states[slot : slot + 1], state)
        value, place = (base[slot] + head.project(latent)[0]).float().log_softmax(-1).max(-1)
        previous = token_ids[place][None]
        total += float(value)
        path.append(int(previous))
        found.append((total, tuple(path)))
    return found


@torch.no_grad()
def record(target: Any, drafter: DSparkAssistantModel, prompts: Sequence[Tensor], length: int) -> list[Text]:
    """Return greedy texts of at most `length` tokens, and the blocks behind all of their tokens but the last."""
    load = make_load(prompts, 0, target.device, {"do_sample": False})
    output = target.generate(
        load.token_ids, attention_mask=load.attention_mask, max_new_tokens=length, **load.options
    )[:, load.token_ids.shape[1] :]
    texts = []
    for prompt, new in zip(prompts, output, strict=True):
        count = num_new_tokens(new[None], target.generation_config.eos_token_id)
        ids = torch.cat([prompt.to(new.device), new[:count]])
        with TargetAdapter(target, drafter.target_layer_ids) as adapter:
            target(ids[None])
            states = adapter.pop_context_hidden_states()
            blocks = _blocks(drafter, adapter, states, ids, range(len(prompt), len(ids) - drafter.block_size))
        texts.append(Text(tuple(prompt.tolist()), tuple(new[:count].tolist()), tuple(blocks)))
    return [text for text in texts if text.blocks]


def _blocks(
    drafter: DSparkAssistantModel, adapter: TargetAdapter, states: Tensor, ids: Tensor, places: range
) -> list[Block]:
    if not places:
        return []
    size = drafter.block_size
    anchors = torch.tensor([list(places)], device=ids.device)
    # what the head would say of the text itself is not asked for: only the backbone's states count
    previous = ids[anchors[..., None].expand(-1, -1, size)]
    hidden = drafter(states, ids[anchors], anchors, previous, adapter).hidden_states[0]
    base = drafter.draft_head(adapter)(hidden)
    known = drafter.draft_token_ids
    token_ids = torch.arange(base.shape[-1], device=ids.device) if known is None else known
    head = drafter.markov_head
    found = []
    for row, place in enumerate(places):
        text, anchor = ids[place + 1 : place + 1 + size].tolist(), int(ids[place])
        chain = _chain(base[row], hidden[row], anchor, head, token_ids)
        tree = grow(base[row], hidden[row], anchor, head, token_ids, MOST)
        found.append(Block(_judged(chain, text), _judged(tree, text)))
    return found


def replay(texts: Sequence[Text], policy: Policy | None, costs: Costs, *, looks_up: bool) -> Replayed:
    """Return what the texts take, drafted by that policy, None for not at all.

    With `looks_up` a round takes what stood in the text before if more of it is expected to be accepted than the
    drafter's rounds have given in the text so far.
    """
    replayed = Replayed()
    for text in texts:
        lookups = Lookups([[*text.prompt, text.token_ids[0]]], MatchChances())
        place, seconds, rounds, gained, drafted = 0, 0.0, 0, 0, 0
        while place < len(text.blocks):
            offers = lookups.offers([Drafter.longest_lookup]) if looks_up else []
            if offers and offers[0].expected(Drafter.longest_lookup) > (gained / drafted if drafted else 1.0):
                count = sum(chance >= LEAST_LOOKUP for chance in offers[0].survival())
                accepted = _num_right(offers[0].token_ids[:count], text.token_ids[place + 1 :])
                seconds += costs.verify(1 + count)
            elif policy is None:
                accepted = 0
                seconds += costs.verify(1)
            else:
                block = text.blocks[place]
                nodes = policy.choose(block)
                accepted = max((node.depth for node in nodes if node.is_right), default=0)
                seconds += costs.round(nodes, is_tree=policy.is_tree, num_slots=len(block.chain))
                gained, drafted = gained + accepted, drafted + 1
            lookups.read([text.token_ids[place + 1 : place + 2 + accepted]])
            place += 1 + accepted
            rounds += 1
        replayed.tokens.append(place)
        replayed.seconds.append(seconds)
        replayed.rounds.append(rounds)
    return replayed


def _num_right(drafts: Sequence[int], text: Sequence[int]) -> int:
    pairs = enumerate(zip(drafts, text, strict=False))
    return next((place for place, (draft, token) in pairs if draft != token), min(len(drafts), len(text)))


def gain(ours: Replayed, theirs: Replayed) -> tuple[float, float]:
    """Return one speed by the other, and the standard error that leaving out single texts tells of (jackknife)."""
    count = len(ours.tokens)
    parts = [ours.speed(place) / theirs.speed(place) for place in range(count)] if count > 1 else []
    middle = sum(parts) / max(len(parts), 1)
    error = sqrt((count - 1) / count * sum((part - middle) ** 2 for part in parts)) if parts else float("nan")
    return ours.speed() / theirs.speed(), error


@torch.no_grad()
def measure_costs(packaged: loading.Packaged) -> Costs:
    """Return what passes, drafts and steps of the head cost here, one row, behind `CONTEXT` tokens."""
    drafter: Any = packaged.drafter
    with TargetAdapter(packaged.target, drafter.target_layer_ids) as adapter, fast_passes(packaged.target, drafter):
        timer = workload.StepTimer(adapter, drafter)
        base = torch.randn(drafter.config.num_draft_logits).to(drafter.dtype)
        states = torch.randn(max(PATHS), drafter.config.hidden_size).to(drafter.dtype)
        head = drafter.markov_head

        def step(count: int) -> Tensor:
            previous = torch.arange(count) % adapter.vocab_size
            latent, _ = head.step(previous, states[:count], head.initial_state(states[:count]))
            logits: Tensor = base + head.project(latent)
            return logits

        def path_step(_: int, __: int, count: int) -> float:
            def run() -> None:
                log_probs = step(count).float().log_softmax(-1).flatten()
                log_probs.topk(min(MOST, len(log_probs))).values.tolist()

            return workload.timed(run, lambda: None)

        def chain_step(_: int, __: int, ___: int) -> float:
            return workload.timed(lambda: step(1).argmax(-1), lambda: None)

        ragged = RaggedTarget(
            adapter,
            torch.zeros(1, 1, dtype=torch.long),
            GenerationConfig(),
            {CACHE_KEY: empty_cache_like(adapter.model)},
            widest=1,
        )

        def tree_pass(_: int, __: int, width: int) -> float:
            assert isinstance(ragged.cache, RaggedCache)
            ragged.cache.pretend_length(CONTEXT)
            ids = (torch.arange(width) * 7919 % adapter.vocab_size)[None]
            parents = torch.tensor([(place + 1) // 2 - 1 for place in range(width)])

            def run() -> None:
                ragged.verify(ids, parents).logits.argmax(-1).tolist()
                ragged.keep([[place for place in (0, 2, 5) if place < width]])

            return workload.timed(run, lambda: None)

        steps: list[Any] = [(timer.verify_seconds, "pass", width) for width in WIDTHS]
        steps += [(tree_pass, "tree", width) for width in WIDTHS]
        steps += [(timer.draft_seconds, "drafts", drafter.block_size), (chain_step, "chain", 1)]
        steps += [(path_step, "paths", count) for count in PATHS]
        times = workload.measure(steps, lambda one: one[0](1, CONTEXT, one[2]), repeats=REPEATS)
    by_kind: dict[str, dict[tuple[int, int, int], float]] = {}
    for (_, kind, size), seconds in times.items():
        by_kind.setdefault(kind, {})[1, CONTEXT, size] = seconds
    [drafts], [chain] = by_kind["drafts"].values(), by_kind["chain"].values()
    return Costs(CostCurves(by_kind["pass"]), CostCurves(by_kind["tree"]), drafts, chain, CostCurves(by_kind["paths"]))


def best(
    texts: Sequence[Text], policies: Sequence[Policy], costs: Costs, *, looks_up: bool
) -> tuple[Policy, Replayed]:
    """Return the fastest policy, and what the texts take with it."""
    tried = [(policy, replay(texts, policy, costs, looks_up=looks_up)) for policy in policies]
    return max(tried, key=lambda one: one[1].speed())


def row_of(name: str, texts: Sequence[Text], costs: Costs, *, looks_up: bool) -> str:
    """Return a set's line of the table."""
    plain = replay(texts, None, costs, looks_up=False)
    chain, of_chain = best(texts, CHAINS, costs, looks_up=looks_up)
    cells = [f"{of_chain.speed() / plain.speed():.2f} ({_describe(chain)})", f"{of_chain.tau:.2f}"]
    for most in (7, 15, MOST):
        allowed = [policy for policy in TREES if policy.most <= most]
        tree, of_tree = best(texts, allowed, costs, looks_up=looks_up)
        ratio, error = gain(of_tree, of_chain)
        cells += [f"{ratio - 1:+.1%} ± {error:.1%} ({_describe(tree)})", f"{of_tree.tau:.2f}"]
    return f"| {name} | {' | '.join(cells)} |"


def _describe(policy: Policy) -> str:
    return f"{policy.most}, {policy.least:g}"


def taus(sets: Mapping[str, Sequence[Text]]) -> list[str]:
    """Return the table of accepted lengths by size, which no cost goes into."""
    # any will do
    flat = CostCurves({(1, CONTEXT, 1): 1.0})
    costs = Costs(flat, flat, 1.0, 1.0, flat)
    chains = [Policy(False, most, 0.0) for most in (3, 5, 7)]
    trees = [Policy(True, most, 0.0) for most in (3, 5, 7, 11, 15, MOST)]
    names = [f"{'tree' if one.is_tree else 'chain'} of {one.most}" for one in (*chains, *trees)]
    lines = [f"| set | {' | '.join(names)} |", f"| --- | {' | '.join('---:' for _ in names)} |"]
    for name, texts in sets.items():
        found = [replay(texts, policy, costs, looks_up=False).tau for policy in (*chains, *trees)]
        lines.append(f"| {name} | {' | '.join(f'{one:.2f}' for one in found)} |")
    return lines


def cost_lines(costs: Costs, num_slots: int) -> list[str]:
    """Return the tables of costs, in plain steps."""
    unit = costs.verify(1)
    lines = [f"| pass over | {' | '.join(map(str, WIDTHS))} |", f"| --- | {' | '.join('---:' for _ in WIDTHS)} |"]
    for name, curve in (("chain", costs.passes), ("tree", costs.tree_passes)):
        lines.append(f"| {name} | {' | '.join(f'{curve.at(1, CONTEXT, width) / unit:.2f}' for width in WIDTHS)} |")
    steps = [f"{costs.path_steps.at(1, CONTEXT, count) / unit:.3f}" for count in PATHS]
    drafts = f"{num_slots} drafts {costs.drafts / unit:.2f}, of which a step of the head {costs.chain_step / unit:.3f}"
    return [*lines, "", f"{drafts}; a tree's over {', '.join(map(str, PATHS))} paths {', '.join(steps)}."]


HEAD = [
    "| set | best chain, plain = 1 | tau | best tree of up to 7 / best chain | tau | of up to 15 | tau "
    f"| of up to {MOST} | tau |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
]


def main(
    prompts: loading.PromptsFile = loading.PROMPTS,
    model: loading.PackagedName = "smollm2",
    dtype: loading.DtypeName = "bf16",
    costs: Annotated[str, typer.Option(help="Dtypes whose costs count, comma-separated.")] = "bf16,fp32",
    sets: Annotated[str, typer.Option(help="Comma-separated.")] = "questions,chat,code completion",
    num_prompts: Annotated[int, typer.Option(min=2, help="Texts of a set that are recorded.")] = 6,
    length: Annotated[int, typer.Option(min=16, help="New tokens of a text at most.")] = 128,
    processor_time: loading.ProcessorTime = False,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = FOLDER / "results" / "trees.md",
) -> None:
    """Record, replay, print the tables and write them to a file."""
    console = Console()
    workload.perf_counter = loading.choose_clock(processor_time=processor_time)  # type: ignore[attr-defined]
    packaged = loading.load_packaged(model, dtype)
    encoded = make_sets(packaged, prompts, num_prompts)
    recorded: dict[str, list[Text]] = {}
    for name in sets.split(","):
        with console.status(f"recording {name}"):
            recorded[name] = record(packaged.target, packaged.drafter, encoded[name], length)
    counts = {name: sum(len(text.blocks) for text in texts) for name, texts in recorded.items()}
    lines = [
        f"# Trees beside chains: {packaged.title}",
        "",
        f"Real drafts behind greedy texts ({dtype}; questions from `{prompts.name}`); **times are added up** from the "
        "costs below, one row. A tree of N holds the N most probable paths of a block; in brackets, how many drafts "
        "at most and how probable each path at least, the fastest of all that were tried on these very texts, for "
        "chains and trees alike. In favour of trees: the loop's bookkeeping costs nothing. Errors: leaving out "
        "single texts. Rounds of `generate` itself: [drafts that branch](branching.md).",
        "",
        f"Blocks: {', '.join(f'{count} of {name}' for name, count in counts.items())}.",
        "",
        *describe_run(),
        "",
        "## Tokens per round, all drafts verified",
        "",
        *taus(recorded),
    ]
    for of in costs.split(","):
        with console.status(f"costs, {of}"):
            table = measure_costs(packaged if of == dtype else loading.load_packaged(model, of))
        lines += ["", f"## Costs of {of}", "", "A plain step = 1.", ""]
        lines += cost_lines(table, packaged.drafter.block_size)
        for looks_up, title in ((False, "The drafter alone"), (True, "Beside lookups")):
            lines += ["", f"{title}:", "", *HEAD]
            lines += [row_of(name, texts, table, looks_up=looks_up) for name, texts in recorded.items()]
    console.print(write_page(lines, output), markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
