"""What a decoded token of DeepSeek-V4 costs as the context grows to a million tokens, and what the KV cache takes.

python -m benchmarks.deepseek_v4_context

A small random model with Flash's window, ratios and index_topk, and all its widths, heads and experts divided by one
number; Transformers' own class beside it. Caches are filled by running a random prompt through the model in chunks;
where that takes too long, with random entries of the right shapes, and then one context is measured both ways.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

from benchmarks.overhead import FOLDER
from benchmarks.provenance import describe_run
from dspark_hf import DeepseekV4DSparkConfig, DeepseekV4DSparkForCausalLM
from dspark_hf.estimation.formats import CacheFormat
from dspark_hf.estimation.kv_cache import count_kv_cache
from dspark_hf.estimation.reading import model_from_fields
from dspark_hf.generation.integration import CACHE_KEY
from dspark_hf.modeling.deepseek_v4.cache import DeepseekV4DSparkCache

CONTEXTS = "4096,32768,131072,524288,1048576"
Clock = Literal["processor", "wall"]
# a decoded token, and an anchor with seven drafts
WIDTHS = (1, 8)
# parts of the theory that grow with the context
GROWING = ("CSA entries", "CSA indexer keys", "HCA entries")


def small_config(divisor: int, ratios: Sequence[int] = (0, 4, 128), **fields: Any) -> DeepseekV4DSparkConfig:
    """Return Flash's configuration with widths, heads and experts divided, and a layer per ratio."""
    small: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 4096 // divisor,
        "moe_intermediate_size": 2048 // divisor,
        "num_hidden_layers": len(ratios),
        "compress_ratios": list(ratios),
        "num_attention_heads": 64 // divisor,
        "head_dim": 512 // divisor,
        "qk_rope_head_dim": 64 // divisor,
        "q_lora_rank": 1024 // divisor,
        "o_groups": max(8 // divisor, 1),
        "o_lora_rank": 1024 // divisor,
        "n_routed_experts": 256 // divisor,
        "num_hash_layers": 1,
        "index_n_heads": 64 // divisor,
        "index_head_dim": 128 // divisor,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "eos_token_id": None,
    }
    return DeepseekV4DSparkConfig(**{**small, **fields})


@dataclass(frozen=True)
class KVBytes:
    """Bytes of one sequence's cache: the entries that grow with the context, and all the rest."""

    entries: int
    rest: int

    @property
    def total(self) -> int:
        """Both."""
        return self.entries + self.rest


def theory(config: DeepseekV4DSparkConfig, context: int) -> KVBytes:
    """Return what `dspark-hf estimate` counts for a cache in fp32."""
    shape = model_from_fields("small", config.to_released_dict()).shape
    parts = count_kv_cache(shape, context, 1, CacheFormat.fp32).parts
    growing = sum(part.num_bytes for name, part in parts.items() if name in GROWING)
    return KVBytes(growing, sum(part.num_bytes for part in parts.values()) - growing)


class Ours:
    """A `DeepseekV4DSparkForCausalLM` and how its cache is filled, used and taken back."""

    name = "dspark_hf"

    def __init__(self, config: DeepseekV4DSparkConfig):
        self.config = config
        self.model = DeepseekV4DSparkForCausalLM(config).eval()

    def new_cache(self) -> Any:
        return DeepseekV4DSparkCache(self.config)

    def length(self, cache: Any) -> int:
        return cache.get_seq_length()

    def run(self, token_ids: Tensor, cache: Any) -> None:
        self.model(token_ids, cache=cache, logits_to_keep=min(token_ids.shape[1], max(WIDTHS)))

    def take_back(self, cache: Any, num_tokens: int) -> None:
        cache.crop(-num_tokens)

    def add_random(self, cache: Any, num_tokens: int) -> None:
        """Let the cache look as if it had seen `num_tokens` more; windows keep the vectors they hold."""
        before = cache.get_seq_length()
        for layer, ratio in enumerate(self.config.compress_ratios):
            store = cache.store(layer)
            for part, size in ((store.compressed, self.config.head_dim), (store.index, self.config.index_head_dim)):
                if part is not None:
                    first, end = before // ratio, (before + num_tokens) // ratio
                    part.entries.write(torch.randn(1, end - first, size), torch.tensor([first]), end)
        cache.finish(cache.begin([num_tokens], num_tokens, torch.device("cpu")), num_tokens)

    def num_bytes(self, cache: Any) -> KVBytes:
        stores = [cache.store(layer) for layer in range(self.config.num_hidden_layers)]
        compressed = [part for store in stores for part in (store.compressed, store.index) if part is not None]
        entries = sum(part.entries.num_bytes for part in compressed)
        return KVBytes(entries, cache.num_bytes - entries)


class Native:
    """Transformers' own class of the same configuration; its cache cannot be taken back, so it grows a little."""

    name = "Transformers"

    def __init__(self, config: DeepseekV4DSparkConfig):
        self.config = config
        native = DeepseekV4Config(**config.to_released_dict())
        native._attn_implementation, native._experts_implementation = "eager", "eager"
        self.model = DeepseekV4ForCausalLM(native).eval()

    def new_cache(self) -> Any:
        return DynamicCache(config=self.model.config)

    def length(self, cache: Any) -> int:
        return cache.get_seq_length()

    def run(self, token_ids: Tensor, cache: Any) -> None:
        self.model(token_ids, **{CACHE_KEY: cache}, logits_to_keep=min(token_ids.shape[1], max(WIDTHS)))

    def take_back(self, cache: Any, num_tokens: int) -> None:
        pass

    def add_random(self, cache: Any, num_tokens: int) -> None:
        """As in `Ours`; the context is a multiple of all ratios, so that no token waits to be compressed."""
        for layer, ratio in zip(cache.layers, self.config.compress_ratios, strict=False):
            layer.cumulative_length += num_tokens
            if ratio:
                for part, entries in list(layer.compressed_kv.items()):
                    layer.update_compressor_states(part, torch.randn(1, num_tokens // ratio, entries.shape[-1]))

    def num_bytes(self, cache: Any) -> KVBytes:
        entries, rest = 0, 0
        for layer in cache.layers:
            named = [getattr(layer, name, {}) for name in ("buffer_kv", "buffer_gate", "overlap_kv", "overlap_gate")]
            small = [layer.keys, *(tensor for part in named for tensor in part.values() if tensor is not None)]
            entries += sum(tensor.nbytes for tensor in getattr(layer, "compressed_kv", {}).values())
            # slices of what was concatenated last: their own bytes are counted
            rest += sum(tensor.numel() * tensor.element_size() for tensor in small)
            if layer.values.data_ptr() != layer.keys.data_ptr():
                rest += layer.values.numel() * layer.values.element_size()
        return KVBytes(entries, rest)


@dataclass(frozen=True)
class PassTime:
    """Milliseconds of one pass, on the processor and by the wall clock."""

    processor: float
    wall: float


@dataclass
class Place:
    """One model at one context: its cache, how that was filled, and the times of passes, one list per round."""

    way: Ours | Native
    context: int
    filled_by: str
    cache: Any
    kv_bytes: KVBytes
    # of the chunk that ended here, in ms per token
    prefill: float | None
    rounds: dict[int, list[list[PassTime]]] = field(default_factory=lambda: {width: [] for width in WIDTHS})

    def ms(self, width: int, clock: Clock = "processor") -> list[float]:
        """Return the median of every round, in ms."""
        return [median(getattr(one, clock) for one in passes) for passes in self.rounds[width]]

    def growth(self, width: int, first: Place, clock: Clock = "processor") -> list[float]:
        """Return the ratios to another place, round by round, sorted."""
        pairs = zip(self.ms(width, clock), first.ms(width, clock), strict=True)
        return sorted(ours / theirs for ours, theirs in pairs)


def fill(
    way: Ours | Native,
    contexts: Sequence[int],
    prompt_limit: int,
    chunk: int,
    report: Callable[[str], None] = print,
) -> Iterator[Place]:
    """Yield a place for every context: filled by a prompt up to `prompt_limit` tokens, with random entries beyond.

    The longest context within the limit comes both ways if any is beyond it.
    """
    within = [context for context in contexts if context <= prompt_limit]
    beyond = [context for context in contexts if context > prompt_limit]
    cache, last = way.new_cache(), 0.0
    started = time.perf_counter()
    for context in within:
        while (length := way.length(cache)) < context:
            token_ids = torch.randint(way.config.vocab_size, (1, min(chunk, context - length)))
            begin = time.perf_counter()
            way.run(token_ids, cache)
            last = 1000 * (time.perf_counter() - begin) / token_ids.shape[1]
        report(f"{way.name}: {context} tokens filled after {time.perf_counter() - started:.0f} s")
        kept = copy.deepcopy(cache)
        yield Place(way, context, "prompt", kept, way.num_bytes(kept), last)
    if not beyond:
        return
    cache = way.new_cache()
    way.run(torch.randint(way.config.vocab_size, (1, contexts[0])), cache)
    for context in [*within[-1:], *beyond]:
        way.add_random(cache, context - way.length(cache))
        kept = copy.deepcopy(cache)
        yield Place(way, context, "random entries", kept, way.num_bytes(kept), None)


def measure(places: Sequence[Place], num_rounds: int, num_passes: int) -> None:
    """Time passes at all places in turns; fills their rounds. One more round comes first and is thrown away."""
    for number in track(range(num_rounds + 1), "Measuring", transient=True):
        # another place goes first each time
        first = number % len(places)
        for place in [*places[first:], *places[:first]]:
            for width in WIDTHS:
                taken = [_time_pass(place, width) for _ in range(num_passes)]
                if number:
                    place.rounds[width].append(taken)


def _time_pass(place: Place, width: int) -> PassTime:
    token_ids = torch.randint(place.way.config.vocab_size, (1, width))
    begin = time.process_time(), time.perf_counter()
    place.way.run(token_ids, place.cache)
    taken = PassTime(1000 * (time.process_time() - begin[0]), 1000 * (time.perf_counter() - begin[1]))
    place.way.take_back(place.cache, width)
    return taken


def time_table(places: Sequence[Place]) -> list[str]:
    """Return the Markdown table of times, one line a place."""
    heads = [f"pass of {width}, ms | growth (rounds)" for width in WIDTHS]
    lines = [f"| | context | cache filled by | {' | '.join(heads)} |", f"| --- | ---: | --- |{' ---: |' * 4}"]
    for place in places:
        first = next(one for one in places if one.way is place.way)
        cells = []
        for width in WIDTHS:
            growth = place.growth(width, first)
            spread = f"**{median(growth):.2f}** ({growth[0]:.2f} to {growth[-1]:.2f})" if place is not first else "1"
            cells += [f"{median(place.ms(width)):.1f}", spread]
        lines.append(f"| {place.way.name} | {place.context:,} | {place.filled_by} | {' | '.join(cells)} |")
    return lines


def wall_clock(places: Sequence[Place]) -> str:
    """Return a sentence with the growth from the first place to the last by the wall clock."""
    first, last = places[0], places[-1]
    growths = [f"{median(last.growth(width, first, 'wall')):.2f} for a pass of {width}" for width in WIDTHS]
    span = f"from {first.context:,} to {last.context:,}"
    return f"By the wall clock, {first.way.name} grows {span} by {' and '.join(growths)}."


def bytes_table(places: Sequence[Place]) -> list[str]:
    """Return the Markdown table of KV bytes against the theory, one line a context."""
    lines = [
        "| | context | entries, KiB | in theory | windows and pending tokens, KiB | in theory | all, against theory |",
        "| --- |" + " ---: |" * 6,
    ]
    seen = set()
    for place in places:
        if (place.way.name, place.context) in seen:
            continue
        seen.add((place.way.name, place.context))
        held, expected = place.kv_bytes, theory(place.way.config, place.context)
        numbers = (held.entries, expected.entries, held.rest, expected.rest)
        cells = " | ".join(f"{number / 1024:,.1f}" for number in numbers)
        lines.append(
            f"| {place.way.name} | {place.context:,} | {cells} | **{held.total / expected.total - 1:+.2%}** |"
        )
    return lines


def main(
    contexts: Annotated[str, typer.Option(help="Comma-separated multiples of 128, ascending.")] = CONTEXTS,
    prompt_limit: Annotated[int, typer.Option(help="Longest context that is filled by a prompt.")] = 1 << 20,
    native_prompt_limit: Annotated[int, typer.Option(help="The same for Transformers' class.")] = 1 << 15,
    divisor: Annotated[int, typer.Option(help="What Flash's widths are divided by.")] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    passes: Annotated[int, typer.Option(min=1, help="Passes of each width per round and context.")] = 5,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prefill pass.")] = 1024,
    output: Annotated[Path, typer.Option(help="Where the tables go.")] = FOLDER / "deepseek_v4_context.md",
) -> None:
    """Measure, print the tables and write them to a file."""
    torch.manual_seed(0)
    # the processor's time is that of all threads
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    config = small_config(divisor)
    sizes = [int(context) for context in contexts.split(",")]
    began = time.perf_counter()
    ours = list(fill(Ours(config), sizes, prompt_limit, chunk))
    # its scores are of the size chunk x heads x context
    native = list(fill(Native(config), sizes, native_prompt_limit, min(chunk, 512)))
    measure([*ours, *native], rounds, passes)
    speeds = [f"{place.prefill:.2f} at {place.context:,}" for place in ours if place.prefill is not None]
    lines = [
        "# DeepSeek-V4 at long contexts",
        "",
        f"A random model, Flash with every width and all heads and experts divided by {divisor}: hidden size "
        f"{config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}, {config.index_n_heads} "
        f"indexer heads of {config.index_head_dim}, {config.n_routed_experts} experts. As in Flash: window "
        f"{config.sliding_window}, ratios, `index_topk` {config.index_topk}. Layers with ratios "
        f"{config.compress_ratios}: window only, CSA, HCA. fp32, one sequence.",
        "",
        *describe_run(),
        "",
        "## Time",
        "",
        f"Time on the processor, one thread: the machine may be shared. Medians of {rounds} rounds of {passes} "
        "passes; models and contexts take turns. A pass of 1 decodes a token, a pass of "
        f"{WIDTHS[1]} verifies {WIDTHS[1] - 1} drafts. Growth: against the shortest context, the median of the "
        "rounds' ratios, with the lowest and the highest. A context that is there twice shows whether it matters how "
        "the cache was filled.",
        "",
        "",
        *time_table([*ours, *native]),
        "",
        wall_clock(ours),
        wall_clock(native),
        "",
        f"Prefill of dspark_hf in chunks of {chunk}, ms per token: {', '.join(speeds)}; everything took "
        f"{(time.perf_counter() - began) / 60:.0f} minutes.",
        "",
        "## KV cache",
        "",
        "Bytes allocated, against what `dspark-hf estimate` counts. What dspark_hf holds beyond the theory is room "
        f"for entries to come, at most 1/128 of them or 16, and {config.max_rollback} more tokens in windows and "
        "pending tokens, so that drafts can be taken back.",
        "",
        *bytes_table([*ours, *native]),
    ]
    text = "\n".join(lines) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
