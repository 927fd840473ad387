"""The demo from loading to the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dspark_hf.console import quiet_transformers, say
from dspark_hf.demo.comparison import Answer, Comparison, answer, encode_prompt
from dspark_hf.demo.packaged import PACKAGED_MODELS, converted_target, shipped_drafter
from dspark_hf.demo.printing import DRAFT_STYLE, piece_printer, print_results
from dspark_hf.demo.prompts import DEMO_PROMPTS
from dspark_hf.demo.streaming import TimedStreamer
from dspark_hf.loading import load_drafter, load_target, load_tokenizer, read_drafter_config
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel


@dataclass(frozen=True)
class DemoOptions:
    """What to run.

    Args:
        model: a packaged model, a key of `PACKAGED_MODELS`.
        target: folder or hub name of another target than the packaged one.
        drafter: folder or hub name of another drafter than the one in `drafters/`.
        dtype: `"fp32"` or `"bf16"`, for target and drafter.
        max_new_tokens: length of an answer.
        num_prompts: how many of the prompts to ask.
        num_runs: how often every prompt is answered each way; the first time is shown, the others are timed only.
    """

    model: str = "smollm2"
    target: str | None = None
    drafter: str | None = None
    dtype: str = "fp32"
    max_new_tokens: int = 96
    num_prompts: int = 4
    num_runs: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.num_prompts <= len(DEMO_PROMPTS):
            raise ValueError(
                f"`--num-prompts` must lie in [1, {len(DEMO_PROMPTS)}], got {self.num_prompts}. Lower it: there are "
                "no more."
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
    is_exact = options.dtype == "fp32"
    print_results(console, comparisons, is_exact=is_exact)
    return not is_exact or all(comparison.is_identical for comparison in comparisons)


class _Demo:
    """A loaded pair of models."""

    def __init__(self, options: DemoOptions, console: Console):
        self._options = options
        self._console = console
        self._tokenizer, self._target, self._drafter = self._load()

    def _load(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, DSparkAssistantModel]:
        options, model = self._options, PACKAGED_MODELS[self._options.model]
        # asked for first: without a drafter there is nothing to convert a target for
        drafter_folder = str(options.drafter or shipped_drafter(model))
        read_drafter_config(drafter_folder)
        with self._console.status("Loading the models (the first time, the target's weights are converted) ..."):
            target_folder = str(options.target or converted_target(options.model))
            tokenizer = load_tokenizer(target_folder)
            target = load_target(target_folder, dtype=options.dtype, device="cpu")
            drafter = load_drafter(drafter_folder, dtype=target.dtype)
        say(self._console, f"target   {options.target or model.title}, {options.dtype}, from {target_folder}")
        say(self._console, f"drafter  up to {drafter.block_size} drafts a round, from {drafter_folder}")
        return tokenizer, target, drafter

    def run(self) -> list[Comparison]:
        """Answer every prompt both ways, in turns."""
        all_inputs = [encode_prompt(self._tokenizer, prompt) for prompt in DEMO_PROMPTS[: self._options.num_prompts]]
        for assistance in self._ways():
            answer(self._target, all_inputs[0], max_new_tokens=8, **assistance)
        comparisons = [
            self._show(number, prompt, inputs)
            for number, (prompt, inputs) in enumerate(zip(DEMO_PROMPTS, all_inputs, strict=False), start=1)
        ]
        repeats = [
            (comparison, inputs)
            for _ in range(self._options.num_runs - 1)
            for comparison, inputs in zip(comparisons, all_inputs, strict=True)
        ]
        for comparison, inputs in track(repeats, "Timing again", console=self._console, transient=True):
            self._repeat(comparison, inputs)
        return comparisons

    def _ways(self) -> Sequence[dict[str, Any]]:
        return {}, {"assistant_model": self._drafter}

    def _show(self, number: int, prompt: str, inputs: Any) -> Comparison:
        console, comparison = self._console, Comparison()
        console.rule(f"prompt {number}", style="dim")
        console.print(Text(prompt, style="bold"))
        console.print("\nplain", style="dim")
        comparison.plain.append(self._answer(inputs, TimedStreamer(self._tokenizer, piece_printer(console))))
        console.print("\n")
        console.print(Text.assemble(("DSpark: accepted drafts are ", "dim"), ("green", DRAFT_STYLE)))
        streamer = TimedStreamer(self._tokenizer, piece_printer(console), self._origins)
        comparison.assisted.append(self._answer(inputs, streamer, assistant_model=self._drafter))
        console.print("\n")
        return comparison

    def _repeat(self, comparison: Comparison, inputs: Any) -> None:
        for answers, assistance in zip((comparison.plain, comparison.assisted), self._ways(), strict=True):
            answers.append(self._answer(inputs, None, **assistance))

    def _answer(self, inputs: Any, streamer: TimedStreamer | None, **assistance: Any) -> Answer:
        # what the drafter remembers of the call before would colour this one
        self._drafter.last_statistics = None
        options = {"max_new_tokens": self._options.max_new_tokens, **assistance}
        return answer(self._target, inputs, streamer=streamer, **options)

    def _origins(self) -> Sequence[bool]:
        statistics = self._drafter.last_statistics
        return [] if statistics is None else statistics.origins[0]
