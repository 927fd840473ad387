"""Generate text through a pipeline with a drafter loaded by name.

    python examples/pipeline.py TARGET DRAFTER

TARGET and DRAFTER are folders or hub names; the drafter's folder carries the target's tokenizer.
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers import pipeline

# registers the drafter's model type, so that the pipeline finds it by name
import dspark_hf  # noqa: F401


def main() -> None:
    """Answer one prompt and say how many tokens a pass of the target yielded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()

    generator: Any = pipeline("text-generation", model=arguments.target, assistant_model=arguments.drafter)
    result = generator(arguments.prompt, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(result[0]["generated_text"])
    statistics = generator.assistant_model.last_statistics
    print(f"tau {statistics.tau:.2f} tokens per round, {statistics.num_accepted} drafts accepted")


if __name__ == "__main__":
    main()
