"""The demo from loading to the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from dspark_hf.console import printable, progress_bar, quiet_transformers, say
from dspark_hf.demo.comparison import Answer, Comparison, answer, encode_prompt
from dspark_hf.demo.dtypes import choose_dtype, measure_bf16
from dspark_hf.demo.packaged import PACKAGED_MODELS, converted_target, shipped_drafter
from dspark_hf.demo.printing import print_results
from dspark_hf.demo.prompts import DEMO_PROMPTS, MOST_PROMPTS
from dspark_hf.loading import load_drafter, load_target, load_tokenizer, read_drafter_config
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.terminal.display import ReplyView, legend, sources_of
from dspark_hf.terminal.parting import Parting, find_parting
from dspark_hf.terminal.streaming import SourceStreamer


@dataclass(frozen=True)
class DemoOptions:
    """What to run.

    Args:
        model: a packaged model, a key of `PACKAGED_MODELS`.
        target: folder or hub name of another target than the packaged one.
        drafter: folder or hub name of another drafter than the one in `drafters/`.
        dtype: `"fp32"` or `"bf16"`, for target and drafter; `"auto"` measures which is faster here.
        max_new_tokens: length of an answer.
        num_prompts: how many prompts of each kind to ask.
        num_runs: how often every prompt is answered each way; the first time is shown, the others are timed only.
    """

    model: str = "smollm2"
    target: str | None = None
    drafter: str | None = None
    dtype: str = "auto"
    max_new_tokens: int = 96
    num_prompts: int = 1
    num_runs: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.num_prompts <= MOST_PROMPTS:
            raise ValueError(
                f"`--num-prompts` must lie in [1, {MOST_PROMPTS}], got {self.num_prompts}. Lower it: there are no "
                "more of each kind."
            )
        if self.target is not None and self.drafter is None:
            raise ValueError(
                f"`--target` must come with its drafter, got {self.target!r} alone. Pass the drafter with `--drafter`."
            )


def run_demo(options: DemoOptions, console: Console) -> bool:
    """Run the demo. Returns whether all texts are what they must be: identical in fp32, whatever they are in bf16.

    Raises:
        UnavailableError: if the packaged model or its drafter is not there.
        ValueError: if a model that was named cannot be read.
    """
    with quiet_transformers():
        demo = _Demo(options, console)
        comparisons = demo.run()
        partings = [demo.parting(comparison) for comparison in comparisons]
    print_results(console, comparisons, demo.describe(partings), is_exact=demo.is_exact)
    return not demo.is_exact or all(comparison.is_identical for comparison in comparisons)


class _Demo:
    """A loaded pair of models."""

    def __init__(self, options: DemoOptions, console: Console):
        self._options = options
        self._console = console
        self._tokenizer, self._target, self._drafter = self._load()

    @property
    def is_exact(self) -> bool:
        """Whether the target's arithmetic does not depend on the number of tokens per pass."""
        return str(self._target.dtype) == "torch.float32"

    def _load(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, DSparkAssistantModel]:
        options, model = self._options, PACKAGED_MODELS[self._options.model]
        # asked for first: without a drafter there is nothing to convert a target for
        drafter_folder = str(options.drafter or shipped_drafter(model))
        read_drafter_config(drafter_folder)
        with self._console.status("Loading the models (the first time, the target's weights are converted) ..."):
            target_folder = str(options.target or converted_target(options.model))
            tokenizer = load_tokenizer(target_folder)
            dtype, why = self._dtype(target_folder)
            target = load_target(target_folder, dtype=dtype, device="cpu")
            drafter = load_drafter(drafter_folder, dtype=target.dtype)
        say(self._console, f"target   {options.target or model.title}, {dtype}{why}, from {target_folder}")
        say(self._console, f"drafter  up to {drafter.block_size} drafts a round, from {drafter_folder}")
        return tokenizer, target, drafter

    def _dtype(self, folder: str) -> tuple[str, str]:
        """Return the dtype, and why it is that one."""
        if self._options.dtype != "auto":
            return self._options.dtype, ""
        gain = measure_bf16(AutoConfig.from_pretrained(folder).get_text_config(decoder=True))
        return choose_dtype(gain), f" (bf16 passes are {gain:.2f} times as fast as fp32 here)"

    def run(self) -> list[Comparison]:
        """Answer every prompt both ways, in turns."""
        chosen = [(kind, text) for kind, texts in DEMO_PROMPTS.items() for text in texts[: self._options.num_prompts]]
        all_inputs = [encode_prompt(self._tokenizer, text) for _, text in chosen]
        for assistance in self._ways():
            answer(self._target, all_inputs[0], max_new_tokens=8, **assistance)
        comparisons = [self._show(*one, inputs) for one, inputs in zip(chosen, all_inputs, strict=True)]
        with progress_bar(self._console) as progress:
            repeats = self._options.num_runs - 1
            task = progress.add_task("Timing again", total=repeats * len(comparisons))
            for _ in range(repeats):
                for comparison in comparisons:
                    self._repeat(comparison)
                    progress.advance(task)
        return comparisons

    def parting(self, comparison: Comparison) -> Parting | None:
        """Return where the plain and the assisted text part, if they do."""
        first, second = (answers[0].token_ids for answers in (comparison.plain, comparison.assisted))
        return find_parting(self._target, comparison.inputs["input_ids"][0], first, second)

    def describe(self, partings: Sequence[Parting | None]) -> list[str]:
        """Return for each comparison where its texts part, or nothing."""
        return ["" if one is None else printable(one.describe(self._tokenizer)) for one in partings]

    def _ways(self) -> Sequence[dict[str, Any]]:
        return {}, {"assistant_model": self._drafter}

    def _show(self, kind: str, prompt: str, inputs: Any) -> Comparison:
        console, comparison = self._console, Comparison(kind, inputs)
        console.rule(kind, style="dim")
        console.print(Text(prompt, style="bold"))
        console.print("\nplain", style="dim")
        comparison.plain.append(self._stream(inputs))
        console.print(Text("\nDSpark: ", style="dim").append_text(legend(sources_of(self._drafter))))
        comparison.assisted.append(self._stream(inputs, assistant_model=self._drafter))
        console.print()
        return comparison

    def _stream(self, inputs: Any, **assistance: Any) -> Answer:
        with ReplyView(self._console) as view:
            return self._answer(inputs, SourceStreamer(self._tokenizer, view.show, self._sources), **assistance)

    def _repeat(self, comparison: Comparison) -> None:
        for answers, assistance in zip((comparison.plain, comparison.assisted), self._ways(), strict=True):
            answers.append(self._answer(comparison.inputs, None, **assistance))

    def _answer(self, inputs: Any, streamer: SourceStreamer | None, **assistance: Any) -> Answer:
        # what the drafter remembers of the call before would colour this one
        self._drafter.last_statistics = None
        options = {"max_new_tokens": self._options.max_new_tokens, **assistance}
        return answer(self._target, inputs, streamer=streamer, **options)

    def _sources(self) -> Sequence[str]:
        statistics = self._drafter.last_statistics
        return [] if statistics is None else statistics.token_sources[0]
