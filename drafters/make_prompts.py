"""Compose the user turns that a drafter's training text answers: questions, code to work on, text to work on.

    python drafters/make_prompts.py --questions gsm8k_train.jsonl --chats drafters/text/smollm2.jsonl \\
        --output runs/prompts.jsonl --left-out runs/left_out.jsonl

Drafters fail first where an answer repeats what it was given, so most prompts ask for that: code to complete, mend,
change or copy, text to rewrite, shorten, correct or copy. Code are functions of this Python's standard library (PSF
licence version 2, Copyright Python Software Foundation: keep that note with the text), text are passages of the chats.
With `--base-model`, for a target that continues texts and answers nobody: questions in the forms that invite an
answer, and beginnings of functions and passages.
The same files, Python version and seed give the same prompts. `kind` says what a line is; readers ignore it.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from dspark_hf.files import write_whole

# of 8,000; --count scales them
SHARES = {
    "question": 2300,
    "write": 500,
    "complete": 800,
    "mend": 800,
    "explain": 700,
    "change code": 500,
    "copy code": 650,
    "rewrite": 450,
    "shorten": 350,
    "correct": 450,
    "copy text": 350,
    "copy a part": 150,
}
# of 4,200, for base models
BASE_SHARES = {"question": 2600, "continue code": 700, "continue text": 900}
# not what users write
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "site-packages"}
SKIPPED |= {"ensurepip", "tkinter", "distutils", "_pydecimal.py", "__pycache__"}
# characters and lines of a function, characters of a passage: short enough for a small target
CODE_LENGTHS, CODE_LINES, PASSAGE_LENGTHS = range(150, 801), range(5, 27), range(100, 701)

WRITE = (
    "Write a Python function `{name}`: {what}",
    "Implement a function called {name} in Python. {what}",
    "How would you write `{name}` in Python? It should do this: {what}",
    "Write Python code for this: {what}",
)
COMPLETE = (
    "Complete this Python function.",
    "Finish the following Python code.",
    "Continue this function; repeat the given part first.",
    "Fill in the rest of this function:",
)
MEND = (
    "There is a bug in this Python function. Find it and write the corrected function.",
    "This code does not work. Fix it and show the whole function.",
    "Correct the mistake in this code:",
    "Please debug this function and give me the fixed version.",
)
EXPLAIN = (
    "Explain what this Python function does.",
    "What does this code do?",
    "Explain the following code step by step.",
    "Describe in one paragraph what this function returns.",
    "Add comments to this function that explain each step.",
)
CHANGE = (
    "Rename the function `{name}` to `{name}_new` and change nothing else.",
    "Add type hints to this function and keep the rest as it is.",
    "Add a docstring to this function and keep the code as it is.",
    "Rewrite this function with clearer variable names.",
    "Add error handling to this function.",
    "Add a print statement to the start of this function and repeat the rest.",
)
COPY = (
    "Repeat this {kind} exactly, without any change.",
    "Copy the following {kind} word for word.",
    "Write the {kind} below again, exactly as it is.",
    "Output this {kind} unchanged:",
    "Print the following {kind} verbatim.",
)
REWRITE = (
    "Rewrite this text in a formal style.",
    "Rewrite the following in simple words.",
    "Rephrase this text.",
    "Make this text sound friendlier.",
    "Rewrite this as a list of bullet points.",
    "Turn this into a short email.",
    "Rewrite this text in the past tense.",
)
SHORTEN = (
    "Shorten this text.",
    "Summarize the following in one sentence.",
    "Make this text half as long.",
    "What are the main points of this text?",
    "Give this text a title and a one-line summary.",
)
CORRECT = (
    "Correct the spelling and grammar of this text.",
    "Fix the mistakes in the following text and change nothing else.",
    "Proofread this:",
    "Please correct this text.",
)
COPY_PART = (
    "Repeat only the first sentence of this text.",
    "Quote the most important sentence of this text.",
    "Repeat this text and put the key words in bold.",
    "List the nouns in this text.",
    "Copy this text, one sentence on each line.",
)
# what a base model continues with an answer
ANSWERABLE = (
    "Question: {question}\nAnswer:",
    "Question: {question}\nAnswer:",
    "Q: {question}\nA:",
    "Problem: {question}\nSolution:",
    "{question}\n",
    "{question}",
)
# one of them makes a bug
SWAPS = (
    ("==", "!="),
    ("<=", "<"),
    (" + 1", " - 1"),
    (" not ", " "),
    (" and ", " or "),
    ("is None", "is not None"),
    ("):\n", ")\n"),
    ("return ", "retrun "),
    ("self.", "slef."),
    ("[0]", "[1]"),
    (" < ", " > "),
    (" in ", " not in "),
    ("True", "False"),
)


@dataclass(frozen=True)
class PythonFunction:
    """A function's source, its docstring's first paragraph (may be empty) and its name."""

    code: str
    what: str
    name: str


def main() -> None:
    """Write the prompts, and the questions that are left for other uses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", required=True, type=Path, help="JSON Lines with `turns`, such as GSM8K's")
    parser.add_argument("--chats", required=True, type=Path, action="append", help="`user` and `assistant`; repeat")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--left-out", type=Path, help="where the last 500 questions go, to calibrate on")
    parser.add_argument("--count", type=int, help="default: 8,000, or for base models 4,200")
    parser.add_argument("--base-model", action="store_true", help="the target has no chat template")
    parser.add_argument("--seed", type=int, default=20261129)
    arguments = parser.parse_args()
    chats = list(chain.from_iterable(map(read, arguments.chats)))
    questions = [record["turns"][0] for record in read(arguments.questions)]
    rng = random.Random(arguments.seed)
    prompts, left = compose(questions, chats, arguments.count, rng, for_base_model=arguments.base_model)
    write(arguments.output, ({"turns": [text], "kind": kind} for kind, text in prompts))
    if arguments.left_out is not None:
        write(arguments.left_out, ({"turns": [question]} for question in left))
    print(len(prompts), dict(Counter(kind for kind, _ in prompts)))


def compose(
    questions: Sequence[str],
    chats: Sequence[dict[str, Any]],
    count: int | None,
    rng: random.Random,
    *,
    for_base_model: bool = False,
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return about `count` prompts as kind and text, in random order and without repetition, and unused questions.

    None for `count` is the number that the shares are of.
    Questions that `chats` answer are left out altogether.
    """
    answered = {bare(chat["user"]) for chat in chats}
    free = [question for question in questions if bare(question) not in answered]
    rng.shuffle(free)
    free, left = free[:-500], free[-500:]
    functions, passages = find_functions(), find_passages(chats, rng)
    if not functions or not passages or not free:
        raise SystemExit("Nothing to make prompts of: give chats with paragraphs, and more than 500 new questions.")
    rng.shuffle(functions)
    rng.shuffle(passages)
    shares, make = (BASE_SHARES, _beginnings) if for_base_model else (SHARES, _makers)
    makers, all_shares = make(functions, passages, free, rng), sum(shares.values())
    count = all_shares if count is None else count
    prompts: dict[str, str] = {}
    for kind, share in shares.items():
        wanted, found = round(share * count / all_shares), 0
        # some bugs cannot be put in, and some texts come twice; questions may be few
        for _ in range(4 * wanted):
            text = next(makers[kind], None) if found < wanted else None
            if text and text not in prompts:
                prompts[text] = kind
                found += 1
    mixed = [(kind, text) for text, kind in prompts.items()]
    rng.shuffle(mixed)
    return mixed, left


def _makers(
    functions: Sequence[PythonFunction], passages: Sequence[str], questions: Sequence[str], rng: random.Random
) -> dict[str, Iterator[str | None]]:
    """Return for every kind what gives its prompts, one after another; None where one cannot be made."""
    code, text = cycle(functions), cycle(passages)
    documented = [one for one in functions if len(one.what) > 30]

    def about(said: Sequence[str], of: Callable[[PythonFunction], str]) -> Iterator[str | None]:
        return (ask(said, fenced(of(one)), rng, name=one.name, kind="code") for one in code)

    def with_text(said: Sequence[str], of: Callable[[str], str] = str) -> Iterator[str | None]:
        return (ask(said, of(one), rng, kind="text") for one in text)

    bugs = ((one, broken) for one in code if (broken := break_code(one.code, rng)) is not None)
    return {
        "question": iter(questions),
        "write": (rng.choice(WRITE).format(name=one.name, what=one.what) for one in documented),
        "complete": about(COMPLETE, lambda one: cut(one.code, rng)),
        "mend": (ask(MEND, fenced(broken), rng, name=one.name) for one, broken in bugs),
        "explain": about(EXPLAIN, lambda one: one.code),
        "change code": about(CHANGE, lambda one: one.code),
        "copy code": about(COPY, lambda one: one.code),
        "rewrite": with_text(REWRITE),
        "shorten": with_text(SHORTEN),
        "correct": with_text(CORRECT, lambda passage: misspell(passage, rng)),
        "copy text": with_text(COPY),
        "copy a part": with_text(COPY_PART),
    }


def _beginnings(
    functions: Sequence[PythonFunction], passages: Sequence[str], questions: Sequence[str], rng: random.Random
) -> dict[str, Iterator[str | None]]:
    """Return the same for what a base model continues."""
    return {
        "question": (rng.choice(ANSWERABLE).format(question=one) for one in questions),
        "continue code": (cut(one.code, rng) + "\n" for one in cycle(functions)),
        "continue text": ("".join(sentences_of(one)[: rng.randint(1, 3)]) for one in cycle(passages)),
    }


def ask(said: Sequence[str], content: str, rng: random.Random, **words: str) -> str:
    """Return one of the instructions and the content, mostly in this order."""
    instruction = rng.choice(said).format(**words)
    return f"{instruction}\n\n{content}" if rng.random() < 0.8 else f"{content}\n\n{instruction}"


def fenced(code: str) -> str:
    """Return code as Markdown shows it."""
    return f"```python\n{code}\n```"


def cut(code: str, rng: random.Random) -> str:
    """Return the first third to two thirds of a function's lines."""
    lines = code.split("\n")
    return "\n".join(lines[: rng.randint(max(2, len(lines) // 3), max(3, 2 * len(lines) // 3))])


def break_code(code: str, rng: random.Random) -> str | None:
    """Return the code with one bug, or None if none of `SWAPS` fits."""
    fitting = [swap for swap in SWAPS if swap[0] in code]
    if not fitting:
        return None
    old, new = rng.choice(fitting)
    place = rng.choice([match.start() for match in re.finditer(re.escape(old), code)])
    return code[:place] + new + code[place + len(old) :]


def misspell(text: str, rng: random.Random) -> str:
    """Return the text with every ninth word or so wrong: letters swapped or lost, small, or twice."""
    words = text.split(" ")
    for index in rng.sample(range(len(words)), min(len(words), max(2, len(words) // 9))):
        word, kind = words[index], rng.random()
        if len(word) > 3 and kind < 0.6:
            place = rng.randrange(1, len(word) - 1)
            swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
            word = swapped if kind < 0.3 else word[:place] + word[place + 1 :]
        else:
            word = word.lower().rstrip(".,") if kind < 0.85 else f"{word} {word}"
        words[index] = word
    return " ".join(words)


def find_functions() -> list[PythonFunction]:
    """Return the functions of this Python's standard library that are of a size to work on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, PythonFunction] = {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        for function in _functions_of(tree, source.split("\n")):
            found.setdefault(function.code, function)
    return list(found.values())


def _functions_of(tree: ast.Module, lines: Sequence[str]) -> Iterator[PythonFunction]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or (node.name.startswith("__") and node.name != "__init__"):
            continue
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if len(code) in CODE_LENGTHS and code.count("\n") + 1 in CODE_LINES and code.isascii():
            what = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            yield PythonFunction(code, what, node.name)


def find_passages(chats: Iterable[dict[str, Any]], rng: random.Random) -> list[str]:
    """Return passages of two to six sentences of what the chats say, without code."""
    found: dict[str, None] = {}
    paragraphs = (
        part for chat in chats for text in (chat["assistant"], chat["user"]) for part in re.split(r"\n\s*\n", text)
    )
    for paragraph in paragraphs:
        passage = "".join(sentences_of(paragraph.strip())[: rng.randint(2, 6)]).strip()
        if len(passage) in PASSAGE_LENGTHS and "```" not in passage:
            found[passage] = None
    return list(found)


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text, each with the space before it."""
    return re.findall(r"[^.!?]+[.!?]", text)


def bare(text: str) -> str:
    """Return a text without case, punctuation and spacing."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file."""
    # `splitlines` would also split at characters that texts hold
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_whole(path, "".join(lines).encode("utf-8"))


if __name__ == "__main__":
    main()
