"""`dspark-hf data`, from its options to a file of conversations: cheap checks first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from dspark_hf.data.collection import Collection, CollectionPlan, Collector
from dspark_hf.data.server import ServerWriter
from dspark_hf.data.sources import (
    HeldOut,
    ListedPrompts,
    PromptSource,
    SelfWrittenPrompts,
    for_base_model,
    open_prompts,
    read_dataset,
)
from dspark_hf.data.writers import DEFAULT_SAMPLINGS, LocalWriter, Sampling, Writer
from dspark_hf.journal import Journal
from dspark_hf.loading import check_dtype, load_drafter, load_target, load_tokenizer, read_drafter_config
from dspark_hf.prompts import Prompt, encode_prompt, has_chat_template, read_prompts


@dataclass(frozen=True)
class DataOptions:
    """What to collect, from what, and who writes it.

    Args:
        target: folder or hub name of the target; with `server`, only its tokenizer is loaded.
        output: the file of conversations; self-written prompts go to `<output>.prompts`.
        prompts: file of prompts. Without it and `dataset`, the target writes its own.
        dataset: name of a dataset of prompts.
        subset: the dataset's configuration.
        split: the dataset's split.
        column: the dataset's column.
        openings: texts that self-written prompts start with.
        exclude: files of prompts that must not be trained on.
        num_conversations: size of the collection; None answers all prompts.
        samplings: sampling settings, in turns.
        samples_per_prompt: answers to each prompt.
        max_new_tokens: longest answer.
        max_prompt_tokens: longest self-written user turn; length of a base model's prompts that are cut or written.
        batch_size: prompts at once; with `server`, requests at once.
        drafter: folder or hub name of a drafter that speeds the target up.
        server: address of an OpenAI-compatible server of the target.
        model: name the server knows the target by; default `target`.
        server_token_ids: whether to ask the server for token ids, which vLLM tells.
        dtype: `"auto"`, `"fp32"`, `"bf16"` or `"fp16"`.
        device: `"auto"` or a device.
        seed: seed of everything that is sampled.
        shows_progress: whether to show a bar.

    Raises:
        ValueError: if options contradict each other, or a file is not there.
    """

    target: str
    output: Path
    prompts: Path | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    column: str = "prompt"
    openings: tuple[str, ...] = ()
    exclude: tuple[Path, ...] = ()
    num_conversations: int | None = None
    samplings: tuple[Sampling, ...] = DEFAULT_SAMPLINGS
    samples_per_prompt: int = 1
    max_new_tokens: int = 512
    max_prompt_tokens: int = 256
    batch_size: int = 32
    drafter: str | None = None
    server: str | None = None
    model: str | None = None
    server_token_ids: bool = False
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    shows_progress: bool = True

    def __post_init__(self) -> None:
        self._check_source()
        self._check_writer()
        self._check_files()
        for name in ("num_conversations", "samples_per_prompt", "max_new_tokens", "max_prompt_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}. Raise it.")

    @property
    def is_self_written(self) -> bool:
        """Whether the target writes the prompts too."""
        return self.prompts is None and self.dataset is None

    def _check_source(self) -> None:
        if self.prompts is not None and self.dataset is not None:
            raise ValueError(
                f"`--prompts` and `--dataset` must not be given together, got {str(self.prompts)!r} and "
                f"{self.dataset!r}. Leave one out; a second run may add to the same output."
            )
        if self.openings and not self.is_self_written:
            raise ValueError(
                f"`--opening` must be given for prompts that the target writes, got {self.openings[0]!r} beside "
                f"`--prompts` or `--dataset`. Leave one of the two out."
            )
        if self.is_self_written and self.num_conversations is None:
            raise ValueError(
                "`--num-conversations` must be given when the target writes its own prompts, got none, and they never "
                "end. Say how many, or give `--prompts` or `--dataset`."
            )
        if self.samples_per_prompt > 1 and all(sampling.is_greedy for sampling in self.samplings):
            raise ValueError(
                f"`--samples-per-prompt` must be 1 with greedy decoding alone, got {self.samples_per_prompt}, which "
                "would all be the same. Add a `--sampling`."
            )

    def _check_writer(self) -> None:
        if self.server is not None and self.drafter is not None:
            raise ValueError(
                f"`--drafter` must be left out with `--server`, got {self.drafter!r}. Give it to the server."
            )
        if self.server is None and self.model is not None:
            raise ValueError(
                f"`--model` must come with `--server`, got {self.model!r} alone. Name the target instead."
            )
        check_dtype(self.dtype)

    def _check_files(self) -> None:
        for option, path in (("--prompts", self.prompts), *(("--exclude", path) for path in self.exclude)):
            if path is not None and not path.is_file():
                raise ValueError(f"`{option}` must be a file, got {str(path)!r}, which is none. Correct the path.")
            if path is not None and path.resolve() == self.output.resolve():
                raise ValueError(f"`--output` must be another file than `{option}`, got {str(path)!r}. Rename it.")
        if self.output.is_dir():
            raise ValueError(f"`--output` must be a file, got the folder {str(self.output)!r}. Name a file in it.")


@dataclass(frozen=True)
class CollectionResult:
    """How a run ended.

    Args:
        num_conversations: conversations in the file.
        num_new: those that this run added.
        num_too_long: prompts left out, since they and their answer do not fit in the target's positions.
        is_complete: whether the plan is met, rather than out of prompts.
        num_refused: prompts left out, since the server refused them.
        last_refusal: the last of them and what the server said, in words.
    """

    num_conversations: int
    num_new: int
    num_too_long: int
    is_complete: bool
    num_refused: int = 0
    last_refusal: str = ""


def collect(options: DataOptions) -> CollectionResult:
    """Collect conversations; a run that was interrupted is continued by the same call.

    Raises:
        ValueError: if the target, the prompts or the output are not what they must be.
        InUseError: if another run writes to the output.
        NoNewPromptsError: if the target keeps writing the same prompts.
        ServerError: if the server cannot be used.
    """
    with ExitStack() as stack:
        collection = stack.enter_context(Collection(options.output, target_name(options)))
        num_before = len(collection)
        tokenizer = load_tokenizer(options.target)
        held_out = HeldOut(options.exclude)
        # before the target: a wrong file is told at once
        listed = None if options.is_self_written else _listed_prompts(options, tokenizer, held_out)
        journal = None
        if listed is None:
            journal = stack.enter_context(open_prompts(options.output.with_name(options.output.name + ".prompts")))
        writer = _make_writer(options, tokenizer)
        source: PromptSource = listed or _self_written(options, writer, tokenizer, journal, held_out)
        plan = CollectionPlan(
            num_conversations=options.num_conversations,
            samplings=options.samplings,
            samples_per_prompt=options.samples_per_prompt,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
        )
        num_expected = None if listed is None else len(listed) * options.samples_per_prompt
        collector = Collector(
            collection, source, writer, plan, shows_progress=options.shows_progress, num_expected=num_expected
        )
        is_complete = collector.run()
        return CollectionResult(
            num_conversations=len(collection),
            num_new=len(collection) - num_before,
            num_too_long=0 if listed is None else listed.num_dropped,
            is_complete=is_complete,
            num_refused=getattr(writer, "num_refused", 0),
            last_refusal=getattr(writer, "last_refusal", ""),
        )


def target_name(options: DataOptions) -> str:
    """Return the name that conversations note: the server's model, or the folder's or the hub's name."""
    if options.server is not None:
        return options.model or options.target
    folder = Path(options.target)
    return folder.resolve().name if folder.is_dir() else options.target


def _listed_prompts(options: DataOptions, tokenizer: Any, held_out: HeldOut) -> ListedPrompts:
    is_chat = has_chat_template(tokenizer)
    if options.prompts is not None:
        name, prompts = options.prompts.name, read_prompts(options.prompts)
    else:
        assert options.dataset is not None
        name = options.dataset
        prompts = read_dataset(
            name, column=options.column, split=options.split, subset=options.subset, is_chat=is_chat
        )
    wanted: list[Prompt] = [prompt for prompt in prompts if prompt not in held_out]
    if not wanted:
        raise ValueError(
            f"`--prompts` or `--dataset` must hold prompts that `--exclude` does not name, got {len(prompts)} prompts "
            "that are all excluded. Give others."
        )
    if not is_chat:
        wanted = [for_base_model(prompt, tokenizer, options.max_prompt_tokens) for prompt in wanted]
    return ListedPrompts(wanted, name, _fits(options, tokenizer))


def _fits(options: DataOptions, tokenizer: Any) -> Callable[[Prompt], bool]:
    limit = getattr(_target_config(options), "max_position_embeddings", None)
    return lambda prompt: limit is None or len(encode_prompt(prompt, tokenizer)) + options.max_new_tokens <= limit


def _target_config(options: DataOptions) -> Any:
    try:
        return AutoConfig.from_pretrained(options.target).get_text_config()
    except (OSError, ValueError):
        # with a server, a tokenizer alone will do
        return None


def _self_written(
    options: DataOptions, writer: Writer, tokenizer: Any, journal: Journal | None, held_out: HeldOut
) -> SelfWrittenPrompts:
    assert journal is not None
    return SelfWrittenPrompts(
        writer,
        tokenizer,
        journal,
        openings=options.openings,
        max_tokens=options.max_prompt_tokens,
        seed=options.seed,
        is_wanted=lambda prompt: prompt not in held_out,
    )


def _make_writer(options: DataOptions, tokenizer: Any) -> Writer:
    if options.server is None:
        return _load_writer(options, tokenizer)
    writer = ServerWriter(
        options.server,
        target_name(options),
        num_workers=options.batch_size,
        asks_for_token_ids=options.server_token_ids,
        vocab_size=getattr(_target_config(options), "vocab_size", None),
    )
    writer.check()
    return writer


def _load_writer(options: DataOptions, tokenizer: Any) -> LocalWriter:
    if options.drafter is not None:
        read_drafter_config(options.drafter)
    target = load_target(options.target, dtype=options.dtype, device=options.device)
    drafter = None
    if options.drafter is not None:
        drafter = load_drafter(options.drafter, dtype=target.dtype).to(target.device)
    return LocalWriter(target, tokenizer, drafter=drafter, batch_size=options.batch_size)
