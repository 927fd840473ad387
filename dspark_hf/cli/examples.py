"""What stands at the end of each command's help: lines that can be typed as they are, but for names of files."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("dspark-hf demo", "dspark-hf demo --model gemma --num-prompts 3 --dtype fp32"),
    "generate": (
        'dspark-hf generate smollm2 "Name three colours."',
        "dspark-hf generate MODEL --drafter DRAFTER --temperature 0.7 --seed 1 < question.txt",
        'dspark-hf generate MODEL "Name three colours." --json',
    ),
    "chat": (
        "dspark-hf chat smollm2",
        'dspark-hf chat MODEL --drafter DRAFTER --system "Answer in one sentence."',
        "dspark-hf chat MODEL --no-thinking --json < questions.txt",
    ),
    "serve": (
        "dspark-hf serve smollm2",
        "dspark-hf serve MODEL --drafter DRAFTER --port 9000 --max-rows 16",
    ),
    "data": (
        "dspark-hf data --target TARGET --output talks.jsonl --num-conversations 2000",
        "dspark-hf data --target TARGET --prompts questions.jsonl --output talks.jsonl",
    ),
    "train": (
        "dspark-hf train --target TARGET --data talks.jsonl --output run",
        "dspark-hf train --target TARGET --data talks.jsonl --output run --preset paper",
    ),
    "calibrate": ("dspark-hf calibrate --target TARGET --drafter run/drafter --prompts others.jsonl",),
    "profile": (
        "dspark-hf profile --target TARGET --drafter run/drafter",
        "dspark-hf profile --target TARGET --rows 1,4 --figure costs.png",
    ),
    "export": ("dspark-hf export run/drafter --to speculators --output exported",),
    "estimate": ("dspark-hf estimate deepseek-ai/DeepSeek-V4-Flash --context 131072",),
    "tiny-v4": ("dspark-hf tiny-v4 --output tiny --experts fp8",),
    "eval": (
        "dspark-hf eval --target TARGET --drafter run/drafter questions.jsonl",
        "dspark-hf eval --target TARGET --drafter new --baseline old questions.jsonl",
    ),
    "doctor": (
        "dspark-hf doctor TARGET run/drafter",
        "dspark-hf doctor TARGET run/drafter --no-costs --json",
    ),
    "lm-eval": (
        "dspark-hf lm-eval --model dspark-hf --model_args pretrained=TARGET,drafter=auto --tasks gsm8k",
        "dspark-hf lm-eval ls tasks",
    ),
    "version": ("dspark-hf version",),
}


def epilog(command: str) -> str:
    """Return the examples of a command, as the end of its help."""
    # a blank line keeps two examples apart, single line breaks would be joined
    return "\n\n".join(("Examples:", *EXAMPLES[command]))
