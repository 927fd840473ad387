"""Ask DeepSeek-V4 one question: the answer as it is written, then in its parts, and what DSpark brings.

    python examples/deepseek_v4_inference.py deepseek-ai/DeepSeek-V4-Flash-0731 --mode think-max --compare

Without the weights: `dspark-hf tiny-v4 --output tiny`, and `tiny` for the name. It answers nonsense, by the same code.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

from jinja2 import TemplateError
from transformers import TextStreamer

from dspark_hf import DeepseekV4DSparkForCausalLM
from dspark_hf.loading import load_tokenizer
from dspark_hf.modeling.deepseek_v4.chat import (
    DEFAULT_RELEASE,
    REASONING_EFFORTS,
    parse_response,
    set_chat_template,
)

# the names on the model's page
MODES = {"non-think": "none", "think-high": "high", "think-max": "max"}


def main() -> None:
    """Load, ask, and answer once or, to compare, twice."""
    arguments = make_parser().parse_args()
    effort = arguments.reasoning_effort or MODES.get(arguments.mode)
    try:
        tokenizer = load_tokenizer(arguments.target)
        # released tokenizers have no template, and do not tell their release
        set_chat_template(tokenizer, arguments.release)
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": arguments.prompt}],
            tools=arguments.tools,
            reasoning_effort=effort,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        options = ("dtype", "keep_quantized", "cache_dtype", "indexer_dtype", "device_map", "offload_folder")
        target = DeepseekV4DSparkForCausalLM.from_pretrained(
            arguments.target, **{name: getattr(arguments, name) for name in options}
        )
        ways = [False, True] if arguments.compare else [arguments.dspark]
        # read before the clock starts
        drafter: Any = target.dspark if any(ways) else None
    except (OSError, ValueError, TemplateError) as error:
        raise SystemExit(f"Error: {error}") from error

    inputs = inputs.to(target.device)
    if arguments.compare:
        # the first pass is a slow one: weights are read, kernels built
        target.generate(**inputs, max_new_tokens=1)
    texts = []
    for use_dspark in ways:
        print("\nDSpark" if use_dspark else "\nPlain")
        start = perf_counter()
        output = target.generate(
            **inputs,
            use_dspark=use_dspark,
            max_new_tokens=arguments.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True) if arguments.stream else None,
            do_sample=arguments.temperature != 0,
            temperature=arguments.temperature or None,
        )
        seconds, token_ids = perf_counter() - start, output[0, inputs["input_ids"].shape[1] :]
        tau = f", tau {drafter.last_statistics.tau:.2f} tokens per round" if use_dspark else ""
        print(f"{len(token_ids)} tokens, {len(token_ids) / seconds:.2f} tokens/s with the prefill{tau}")
        texts.append(tokenizer.decode(token_ids, skip_special_tokens=False))
    if arguments.compare and arguments.temperature == 0:
        print("\nThe texts are", "identical" if texts[0] == texts[1] else "different, as near-ties allow")
    if not arguments.stream:
        print(texts[-1])
    show(texts[-1], is_thinking=effort != "none")


def show(text: str, *, is_thinking: bool) -> None:
    """Print the parts of an answer, its reasoning as a number."""
    try:
        response = parse_response(text, is_thinking=is_thinking)
    except ValueError as error:
        print(f"\nNot parsed: {error}")
        print("A checkpoint with random weights, as `dspark-hf tiny-v4` writes, answers noise, which has no form.")
        return
    print(f"\nReasoning: {len(response.reasoning or '')} characters\nContent: {response.content}")
    for call in response.tool_calls:
        print(f"Tool call: {call.name} {call.arguments}")


def read_tools(path: str) -> Any:
    """Return the content of a JSON file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be a JSON file, got {path!r}. Correct it. ({error})") from error


def make_parser() -> argparse.ArgumentParser:
    """Return the options; what `from_pretrained` takes has its names and defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("target", help="folder or hub name of a checkpoint in the released layout")
    parser.add_argument("--prompt", default="Which is larger, 9.9 or 9.11?")
    parser.add_argument("--tools", type=read_tools, help="JSON file: a list of tools' schemas in OpenAI's form")
    releases = f"the checkpoint's: {', '.join(REASONING_EFFORTS)}; default: {DEFAULT_RELEASE}"
    parser.add_argument("--release", default=DEFAULT_RELEASE, help=releases)
    thinking = parser.add_mutually_exclusive_group()
    thinking.add_argument("--mode", choices=MODES, help="how to think; default: as the release does unasked")
    thinking.add_argument("--reasoning-effort", help="an effort by the release's own name, such as low")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; default: 0, greedy")
    parser.add_argument("--stream", action=switch, default=True, help="print the text as it is written")
    parser.add_argument("--dspark", action=switch, default=True, help="draft with the module in the checkpoint")
    parser.add_argument("--compare", action="store_true", help="answer plainly, then with DSpark")
    parser.add_argument("--dtype", help="auto, bfloat16 or float32; default: as stored")
    parser.add_argument("--keep-quantized", action=switch, help="FP8 and FP4 stay so; default: without --dtype")
    parser.add_argument("--cache-dtype", help="fp8 for a smaller cache; default: the target's dtype")
    parser.add_argument("--indexer-dtype", help="fp4 for the released indexer; default: the target's dtype")
    parser.add_argument("--device-map", default="auto", help="auto (default), cpu, cuda:0 ...")
    parser.add_argument("--offload-folder", help="for dequantised weights that fit on the disk only")
    return parser


if __name__ == "__main__":
    main()
