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

from benchmarks.pages import FOLDER
from benchmarks.provenance import describe_run
from dspark_hf import DeepseekV4DSparkConfig, DeepseekV4DSparkForCausalLM, DSparkAssistantModel
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.modeling.deepseek_v4.cache import DeepseekV4DSparkCache
from dspark_hf.modeling.deepseek_v4.estimation.formats import CacheFormat
from dspark_hf.modeling.deepseek_v4.estimation.kv_cache import count_kv_cache
from dspark_hf.modeling.deepseek_v4.estimation.reading import model_from_fields

CONTEXTS = "4096,32768,131072,524288,1048576"
NUM_DRAFTS = 7
# tokens of the passes that are timed: one that is decoded, an anchor with its drafts
WIDTHS = {"token": 1, "verify": NUM_DRAFTS + 1}
ROUND = "DSpark round"
TITLES = {"token": "1 token, ms", "verify": f"{NUM_DRAFTS + 1} tokens, ms", ROUND: f"{ROUND}, ms"}
# parts of the theory that grow with the context
GROWING = ("CSA entries", "CSA indexer keys", "HCA entries")
Clock = Literal["processor", "wall"]


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


def theory(config: DeepseekV4DSparkConfig, context: int, dtype: torch.dtype = torch.float32) -> KVBytes:
    """Return what `dspark-hf estimate` counts for a cache of this configuration.

    With `cache_dtype="fp8"` entries and windows are counted as released, the indexer's keys with
    `indexer_dtype="fp4"`.
    """
    shape = model_from_fields("small", config.to_released_dict()).shape
    formats = {torch.float32: CacheFormat.fp32, torch.bfloat16: CacheFormat.bf16}
    parts = count_kv_cache(shape, context, 1, formats[dtype]).parts
    released = count_kv_cache(shape, context, 1, CacheFormat.released).parts
    keys = (released if config.indexer_dtype == "fp4" else parts)["CSA indexer keys"]
    parts = {**(released if config.cache_dtype == "fp8" else parts), "CSA indexer keys": keys}
    growing = sum(part.num_bytes for name, part in parts.items() if name in GROWING)
    return KVBytes(growing, sum(part.num_bytes for part in parts.values()) - growing)


def check_rounds(statistics: SpeculationStatistics) -> None:
    """Raise a `RuntimeError` unless every round made all its drafts, but for the last, which have room for fewer."""
    missing = NUM_DRAFTS * statistics.num_rounds - statistics.num_drafted
    # a round that may write r tokens makes at most r - 1 drafts
    if statistics.num_verified != statistics.num_drafted or missing > sum(range(NUM_DRAFTS + 1)):
        raise RuntimeError(
            f"`num_drafted` must be {NUM_DRAFTS} a round, all of them verified, got {statistics}. These are no full "
            "rounds: look at the scheduler."
        )


class Ours:
    """A `DeepseekV4DSparkForCausalLM` and how its cache is filled, used and taken back."""

    name = "dspark_hf"

    def __init__(self, config: DeepseekV4DSparkConfig, dtype: torch.dtype = torch.float32):
        self.config, self.dtype = config, dtype
        self.model: Any = DeepseekV4DSparkForCausalLM(config).eval()
        for name, parameter in self.model.named_parameters():
            # as loading does
            if parameter.is_floating_point() and not any(
                part in name for part in self.model._keep_in_fp32_modules_strict
            ):
                parameter.data = parameter.data.to(dtype)
        self.drafter = DSparkAssistantModel.from_target(self.model, block_size=NUM_DRAFTS, markov_rank=16)

    def new_cache(self) -> Any:
        return DeepseekV4DSparkCache(self.config, self.dtype)

    def length(self, cache: Any) -> int:
        return cache.get_seq_length()

    def run(self, token_ids: Tensor, cache: Any) -> None:
        self.model(token_ids, cache=cache, logits_to_keep=min(token_ids.shape[1], NUM_DRAFTS + 1))

    def take_back(self, cache: Any, num_tokens: int) -> None:
        cache.crop(-num_tokens)

    def rounds(self, cache: Any, num_tokens: int) -> int:
        """Generate `num_tokens` behind those in a copy of the cache; return the rounds that took."""
        token_ids = torch.zeros(1, cache.get_seq_length() + 1, dtype=torch.long)
        # the default scheduler soon stops asking a random drafter
        options: dict[str, Any] = {"assistant_model": self.drafter, "scheduler": "fixed", "do_sample": False}
        self.model.generate(token_ids, max_new_tokens=num_tokens, **{CACHE_KEY: copy.deepcopy(cache)}, **options)
        statistics = self.drafter.last_statistics
        assert statistics is not None
        check_rounds(statistics)
        return statistics.num_rounds

    def add_random(self, cache: Any, num_tokens: int) -> None:
        """Let the cache look as if it had seen `num_tokens` more; windows keep the vectors they hold."""
        before = cache.get_seq_length()
        for layer, ratio in enumerate(self.config.compress_ratios):
            store = cache.store(layer)
            for part, size in ((store.compressed, self.config.head_dim), (store.index, self.config.index_head_dim)):
                if part is not None:
                    first, end = before // ratio, (before + num_tokens) // ratio
                    part.entries.write(torch.randn(1, end - first, size).to(self.dtype), torch.tensor([first]), end)
        cache.finish(cache.begin([num_tokens], num_tokens, torch.device("cpu")), num_tokens)

    def num_bytes(self, cache: Any) -> KVBytes:
        stores = [cache.store(layer) for layer in range(self.config.num_hidden_layers)]
        compressed = [part for store in stores for part in (store.compressed, store.index) if part is not None]
        entries = sum(part.entries.num_bytes for part in compressed)
        return KVBytes(entries, cache.num_bytes - entries)


class Native:
    """Transformers' own class of the same configuration; its cache cannot be taken back, so it grows a little."""

    name = "Transformers"
    dtype = torch.float32

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
        self.model(token_ids, **{CACHE_KEY: cache}, logits_to_keep=min(token_ids.shape[1], NUM_DRAFTS + 1))

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
class Times:
    """Milliseconds on the processor and by the wall clock."""

    processor: float
    wall: float


@dataclass
class Place:
    """One model at one context: its cache, how that was filled, and for everything timed the median of every round."""

    way: Ours | Native
    context: int
    filled_by: str
    cache: Any
    kv_bytes: KVBytes
    # of the chunk that ended here, in ms per token
    prefill: float | None
    rounds: dict[str, list[Times]] = field(default_factory=lambda: {kind: [] for kind in TITLES})

    def ms(self, kind: str, clock: Clock = "processor") -> list[float]:
        """Return the milliseconds of every round."""
        return [getattr(one, clock) for one in self.rounds[kind]]

    def growth(self, kind: str, first: Place, clock: Clock = "processor") -> list[float]:
        """Return the ratios to another place, round by round, sorted."""
        pairs = zip(self.ms(kind, clock), first.ms(kind, clock), strict=True)
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
    """Time everything at all places in turns; fills their rounds. One more round comes first and is thrown away."""
    for number in track(range(num_rounds + 1), "Measuring", transient=True):
        # another place goes first each time
        first = number % len(places)
        for place in [*places[first:], *places[:first]]:
            times = {kind: _time_passes(place, width, num_passes) for kind, width in WIDTHS.items()}
            if isinstance(place.way, Ours):
                times[ROUND] = _time_rounds(place.way, place.cache, num_passes)
            if number:
                for kind, taken in times.items():
                    place.rounds[kind].append(taken)


def _time_passes(place: Place, width: int, count: int) -> Times:
    """Return the medians of `count` passes over `width` tokens, each taken back."""
    taken = []
    for _ in range(count):
        token_ids = torch.randint(place.way.config.vocab_size, (1, width))
        begin = _now()
        place.way.run(token_ids, place.cache)
        taken.append(_since(begin))
        place.way.take_back(place.cache, width)
    return Times(median(one.processor for one in taken), median(one.wall for one in taken))


def _time_rounds(way: Ours, cache: Any, count: int) -> Times:
    """Return the time of a full round: what `count` more tokens take, hardly any of them a draft that was right.

    What a call costs but once, and its last rounds, which have room for fewer drafts, are in both calls.
    """
    begin = _now()
    few_rounds = way.rounds(cache, NUM_DRAFTS + 1)
    few, begin = _since(begin), _now()
    num_rounds = way.rounds(cache, NUM_DRAFTS + 1 + count) - few_rounds
    many = _since(begin)
    return Times((many.processor - few.processor) / num_rounds, (many.wall - few.wall) / num_rounds)


def _now() -> Times:
    return Times(1000 * time.process_time(), 1000 * time.perf_counter())


def _since(begin: Times) -> Times:
    now = _now()
    return Times(now.processor - begin.processor, now.wall - begin.wall)


def time_table(places: Sequence[Place]) -> list[str]:
    """Return the Markdown table of times, one line a place."""
    heads = " | ".join(f"{title} | growth" for title in TITLES.values())
    lines = [f"| | context | cache filled by | {heads} |", f"| --- | ---: | --- |{' ---: |' * 2 * len(TITLES)}"]
    for place in places:
        first = next(one for one in places if one.way is place.way)
        cells = []
        for kind, rounds in place.rounds.items():
            growth = place.growth(kind, first)
            cells.append(f"{median(place.ms(kind)):.1f}" if rounds else "")
            cells.append(f"**{median(growth):.2f}** ({growth[0]:.2f} to {growth[-1]:.2f})" if rounds else "")
        lines.append(f"| {place.way.name} | {place.context:,} | {place.filled_by} | {' | '.join(cells)} |")
    return lines


def wall_clock(places: Sequence[Place]) -> str:
    """Return a sentence with the growth from the first place to the last by the wall clock."""
    first, last = places[0], places[-1]
    growths = [
        f"{title} {median(last.growth(kind, first, 'wall')):.2f}"
        for kind, title in TITLES.items()
        if last.rounds[kind]
    ]
    span = f"from {first.context:,} to {last.context:,}"
    return f"Growth of {first.way.name} {span} by the wall clock: {'; '.join(growths).replace(', ms', '')}."


def bytes_table(places: Sequence[Place]) -> list[str]:
    """Return the Markdown table of KV bytes against the theory, one line a context."""
    lines = [
        "| | stored as | context | entries, KiB | in theory | windows and pending tokens, KiB | in theory "
        "| all, against theory |",
        "| --- | --- |" + " ---: |" * 6,
    ]
    # a context that is there twice has the same bytes twice
    for place in {(id(place.way), place.context): place for place in places}.values():
        dtype = place.way.dtype
        held, expected = place.kv_bytes, theory(place.way.config, place.context, dtype)
        numbers = (held.entries, expected.entries, held.rest, expected.rest)
        cells = " | ".join(f"{number / 1024:,.1f}" for number in numbers)
        stored = str(dtype).removeprefix("torch.")
        if place.way.config.cache_dtype:
            stored += ", entries in FP8"
        if place.way.config.indexer_dtype:
            stored += ", indexer keys in FP4"
        lines.append(
            f"| {place.way.name} | {stored} | {place.context:,} | {cells} "
            f"| **{held.total / expected.total - 1:+.2%}** |"
        )
    return lines


def main(
    contexts: Annotated[str, typer.Option(help="Comma-separated multiples of 128, ascending.")] = CONTEXTS,
    prompt_limit: Annotated[int, typer.Option(help="Longest context that is filled by a prompt.")] = 1 << 17,
    native_prompt_limit: Annotated[int, typer.Option(help="The same for Transformers' class.")] = 1 << 15,
    divisor: Annotated[int, typer.Option(help="What Flash's widths are divided by.")] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    passes: Annotated[int, typer.Option(min=1, help="Of each kind, per round and context.")] = 5,
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
    way = Ours(config)
    ours = list(fill(way, sizes, prompt_limit, chunk))
    # its scores are of the size chunk x heads x context
    native = list(fill(Native(config), sizes, native_prompt_limit, min(chunk, 512)))
    measure([*ours, *native], rounds, passes)
    small_caches = [
        list(
            fill(
                Ours(small_config(divisor, cache_dtype=cache, indexer_dtype=keys), torch.bfloat16),
                sizes,
                sizes[0],
                chunk,
            )
        )[-1]
        for cache, keys in ((None, None), ("fp8", None), ("fp8", "fp4"))
    ]
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
        "Time on the processor, one thread, since the machine may be shared. 1 token: a decoding step. "
        f"{NUM_DRAFTS + 1} tokens: a pass that verifies {NUM_DRAFTS} drafts. DSpark round: such a pass, drafting with "
        f'a random drafter of {len(way.drafter.layers)} stages, and all around it, with `scheduler="fixed"`: every '
        f"such round made and verified its {NUM_DRAFTS} drafts. Medians of {rounds} rounds, "
        f"of {passes} passes each, in which models and contexts take turns. Growth: against the shortest context, the "
        "median of the rounds' ratios, with the lowest and the highest. A context that is there twice shows whether "
        "it matters how its cache was filled.",
        "",
        *time_table([*ours, *native]),
        "",
        wall_clock(ours),
        wall_clock(native),
        "",
        f"Prefill of dspark_hf in chunks of {chunk}, ms per token by the wall clock: {', '.join(speeds)}. Everything "
        f"took {(time.perf_counter() - began) / 60:.0f} minutes.",
        "",
        "## KV cache",
        "",
        "Bytes allocated, against what `dspark-hf estimate` counts. What dspark_hf holds beyond the theory is room "
        f"for entries to come, at most 1/128 of them or 16, and {config.max_rollback} more tokens in windows and "
        'pending tokens, so that drafts can be taken back. With `cache_dtype="fp8"` alone the indexer\'s keys stay in '
        'bf16; with `indexer_dtype="fp4"` they are stored in FP4, as the released code rounds them.',
        "",
        *bytes_table([*ours, *native, *small_caches]),
    ]
    text = "\n".join(lines) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
