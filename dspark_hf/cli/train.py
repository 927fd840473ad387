"""`dspark-hf train`: a drafter for any causal LM, from conversations that model wrote."""

import shlex
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_hf.cli.options import Dtype, as_given, packaged_folder

if TYPE_CHECKING:
    from dspark_hf.training.conversations import Conversation
    from dspark_hf.training.trainer import DSparkTrainer


class Preset(str, Enum):
    """Size and schedule of what is left open."""

    paper = "paper"
    small = "small"


class MarkovHead(str, Enum):
    """Kind of sequential head."""

    vanilla = "vanilla"
    gated = "gated"
    rnn = "rnn"
    none = "none"


class Optimizer(str, Enum):
    """Optimiser of the hidden matrices."""

    muon = "muon"
    adamw = "adamw"


class Quantization(str, Enum):
    """How the frozen target's weights are held."""

    none = "none"
    int8 = "8bit"
    nf4 = "4bit"


# a drafter below is hardly ever right
_USEFUL_TAU = 1.05
_BLOCK_SIZE = 7
# the panels of the help
_DRAFTER = "Drafter"
_SCHEDULE = "Schedule"
_EVALUATION = "Evaluation"
_MEMORY = "Memory and speed"
_MACHINE = "Number formats and devices"


def train(
    target: Annotated[
        str, typer.Option(help="Folder or hub name of the model to draft for.", callback=packaged_folder)
    ],
    data: Annotated[list[Path], typer.Option(help="Conversations from `dspark-hf data`; repeat for several files.")],
    output: Annotated[Path, typer.Option(help="Folder of checkpoints, logs and, in `drafter`, the result.")],
    preset: Annotated[Preset, typer.Option(help="What is not given below: the paper's drafter, or a small one.")] = (
        Preset.small
    ),
    drafter: Annotated[
        str | None, typer.Option(help="Begin with this drafter, of any packaging, instead of a fresh one.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Drafter layers; --drafter may grow.", rich_help_panel=_DRAFTER)
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Drafts per round; else 7.", rich_help_panel=_DRAFTER)
    ] = None,
    markov_head: Annotated[
        MarkovHead | None,
        typer.Option(help="none is a plain DFlash drafter; else vanilla.", rich_help_panel=_DRAFTER),
    ] = None,
    markov_rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the Markov head.", rich_help_panel=_DRAFTER)
    ] = None,
    target_layers: Annotated[
        str | None, typer.Option(help="Target layers to read, such as 9,19,28.", rich_help_panel=_DRAFTER)
    ] = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option(min=0, help="Propose only this many frequent tokens; 0 for all.", rich_help_panel=_DRAFTER),
    ] = None,
    warm_start: Annotated[
        bool | None, typer.Option(help="Start from the target's last layers.", rich_help_panel=_DRAFTER)
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.", rich_help_panel=_SCHEDULE)] = 2000,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences per device and pass.", rich_help_panel=_SCHEDULE)
    ] = 1,
    accumulate: Annotated[int, typer.Option(min=1, help="Passes per step.", rich_help_panel=_SCHEDULE)] = 4,
    anchors: Annotated[
        int | None, typer.Option(min=1, help="Blocks per sequence and step.", rich_help_panel=_SCHEDULE)
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=8, help="Longer conversations are cut, in tokens.", rich_help_panel=_SCHEDULE)
    ] = 2048,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Peak learning rate.", rich_help_panel=_SCHEDULE)
    ] = None,
    optimizer: Annotated[
        Optimizer, typer.Option(help="muon also uses AdamW where Muon does not fit.", rich_help_panel=_SCHEDULE)
    ] = (Optimizer.muon),
    num_held_out: Annotated[
        int, typer.Option("--held-out", min=1, help="Conversations kept for evaluation.", rich_help_panel=_EVALUATION)
    ] = 40,
    every: Annotated[
        int, typer.Option(min=1, help="Steps between evaluations and checkpoints.", rich_help_panel=_EVALUATION)
    ] = 200,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many evaluations without a better tau.", rich_help_panel=_EVALUATION),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(help="Stop for now after this time; the same command goes on.", rich_help_panel=_SCHEDULE),
    ] = None,
    confidence_only: Annotated[
        bool,
        typer.Option(
            "--confidence-only",
            help="Train only --drafter's confidence head, on text new to it.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(min=0, help="What it will be used at; 0 (greedy): --confidence-only.", rich_help_panel=_SCHEDULE),
    ] = 1.0,
    state_cache_gb: Annotated[
        float | None,
        typer.Option(metavar="GB", min=0, help="Disk for the target's states; 0: none.", rich_help_panel=_MEMORY),
    ] = None,
    bf16: Annotated[bool, typer.Option(help="Multiply in bf16; weights stay fp32.", rich_help_panel=_MACHINE)] = True,
    dtype: Annotated[
        Dtype, typer.Option(help="What the frozen target computes in; auto is its own.", rich_help_panel=_MACHINE)
    ] = Dtype.bf16,
    target_device: Annotated[
        str, typer.Option(help="Device of the target; auto is the drafter's.", rich_help_panel=_MACHINE)
    ] = "auto",
    quantization: Annotated[
        Quantization, typer.Option(help="Hold the target in bitsandbytes' 8 or 4 bit.", rich_help_panel=_MACHINE)
    ] = (Quantization.none),
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_MEMORY)
    ] = False,
    compile_loss: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile loss and drafter: a minute first, then faster.", rich_help_panel=_MEMORY
        ),
    ] = False,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Log to TensorBoard in the output folder.", rich_help_panel=_EVALUATION),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and blocks.", rich_help_panel=_SCHEDULE)] = 0,
) -> None:
    """Train a drafter. A run that was interrupted goes on when the same command is given again.

    Several GPUs: accelerate launch -m dspark_hf train ...
    """
    # imported here, so that the help is instant
    from transformers import set_seed

    from dspark_hf.generation.targets.adapter import TargetAdapter
    from dspark_hf.loading import load_drafter, load_target, load_tokenizer, read_drafter_config
    from dspark_hf.modeling.from_target import check_servable
    from dspark_hf.modeling.growing import grow_drafter
    from dspark_hf.training.adapting import adapt_drafter
    from dspark_hf.training.checkpoints import RESULT, check_output, check_same_drafter
    from dspark_hf.training.forecast import Forecast
    from dspark_hf.training.recipe import PRESETS, build_drafter, save_trained
    from dspark_hf.training.trainer import DSparkTrainer

    chosen = dict(PRESETS[preset.value])
    given = {
        "layers": layers,
        "markov_rank": markov_rank,
        "draft_vocab": draft_vocab,
        "warm_start": warm_start,
        "anchors": anchors,
        "learning_rate": learning_rate,
        "state_cache_gb": state_cache_gb,
    }
    chosen.update({name: value for name, value in given.items() if value is not None})
    try:
        check_output(output)
        layer_ids = _layer_ids(target_layers)
        if drafter is not None:
            _check_stays(
                block_size=block_size, markov_head=markov_head, markov_rank=markov_rank, warm_start=warm_start
            )
            read_drafter_config(drafter)
        arguments = _arguments(
            output,
            chosen,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            drafter_optimizer=optimizer.value,
            eval_steps=every,
            save_steps=every,
            early_stopping_patience=patience,
            max_minutes=max_minutes,
            confidence_only=confidence_only,
            temperature=temperature,
            bf16=bf16,
            **({"gradient_checkpointing": True} if gradient_checkpointing else {}),
            compile_loss=compile_loss,
            compile_drafter=compile_loss,
            report_to="tensorboard" if tensorboard else "none",
            seed=seed,
        )
        tokenizer = load_tokenizer(target)
        model = load_target(
            target,
            dtype=dtype.value,
            device=str(arguments.device) if target_device == "auto" else target_device,
            quantization=quantization.value,
        )
        training, held_out = _read(data, tokenizer, max_length, num_held_out, _vocab_size(model))
        set_seed(seed)
        if drafter is not None:
            # with it, an open choice is that of the drafter
            start = load_drafter(drafter, dtype="float32")
            start = grow_drafter(
                start,
                num_hidden_layers=layers,
                target_layer_ids=layer_ids,
                num_target_layers=TargetAdapter(check_servable(model)).num_layers,
            )
            start = adapt_drafter(start, model, training, draft_vocab=draft_vocab)
        else:
            start = build_drafter(
                model,
                training,
                layers=chosen["layers"],
                markov_head=(markov_head or MarkovHead.vanilla).value,
                markov_rank=chosen["markov_rank"],
                block_size=block_size or _BLOCK_SIZE,
                draft_vocab=chosen["draft_vocab"] or None,
                warm_start=chosen["warm_start"],
                target_layer_ids=layer_ids,
            )
        check_same_drafter(output, start.config)
        trainer = DSparkTrainer(start, model, arguments, training, held_out, processing_class=tokenizer)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    try:
        before = None if drafter is None else _tau_before(trainer)
        forecast = Forecast(
            start,
            trainer.target,
            training,
            partial(typer.echo, err=True),
            max_minutes=max_minutes,
            start=before,
        )
        if drafter is None or before is not None:
            trainer.add_callback(forecast)
        trainer.train()
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. The same command goes on from the newest checkpoint in {output}, if any.", err=True)
        raise typer.Exit(130) from None
    if trainer.is_world_process_zero():
        save_trained(trainer, output / RESULT)
        typer.echo(describe_result(target, output / RESULT, trainer.best_tau, expected=forecast.tau, before=before))


def _tau_before(trainer: "DSparkTrainer") -> float | None:
    """Return the held-out tau that an existing drafter has, or had when the run that goes on began."""
    from transformers import TrainerState

    from dspark_hf.training.forecast import tau_before

    checkpoint = trainer.newest_checkpoint()
    if checkpoint is not None:
        return tau_before(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history)
    tau = float(trainer.evaluate()["eval_expected_tau"])
    if trainer.is_world_process_zero():
        typer.echo(f"The drafter's held-out tau on this text: {tau:.2f} (teacher-forced).", err=True)
    return tau


def describe_result(
    target: str, folder: Path, tau: float, *, expected: float | None = None, before: float | None = None
) -> str:
    """Return what there is now, what its tau means, what it was expected to be, and what to do next."""
    lines = [
        f"Saved: {folder}",
        f"Held-out tau {tau:.2f}, teacher-forced: tokens that a pass of the target would yield, were every block "
        "begun in the held-out text. What decoding yields is usually more: eval measures it.",
    ]
    if before is not None:
        lines.append(f"It was {before:.2f} before.")
    if expected is not None and tau > 0:
        lines.append(f"The forecast was {expected:.2f}, {abs(expected / tau - 1):.0%} off.")
    if tau < _USEFUL_TAU:
        lines.append(
            "1.00 is what decoding yields without a drafter: this one is of no use yet. Train on, or on more text."
        )
    options = f"--target {shlex.quote(as_given(target))} --drafter {shlex.quote(str(folder))}"
    lines.append(f"Next: dspark-hf eval {options} questions.jsonl")
    lines.append(f"or, where confidence matters, first: dspark-hf calibrate {options} --prompts others.jsonl")
    return "\n".join(lines)


def _arguments(output: Path, chosen: dict[str, Any], **options: Any) -> Any:
    from dspark_hf.training.arguments import DSparkTrainingArguments

    return DSparkTrainingArguments(
        str(output),
        num_anchors=chosen["anchors"],
        learning_rate=chosen["learning_rate"],
        state_cache_gb=chosen["state_cache_gb"],
        eval_strategy="steps",
        save_total_limit=2,
        load_best_model_at_end=True,
        logging_steps=5,
        **options,
    )


def _read(
    data: list[Path], tokenizer: Any, max_length: int, num_held_out: int, vocab_size: int
) -> "tuple[list[Conversation], list[Conversation]]":
    """Return training and held-out conversations; every file gives its share of the latter."""
    from dspark_hf.training.conversations import read_conversations, split_held_out

    training: list[Conversation] = []
    held_out: list[Conversation] = []
    for path in data:
        if not path.is_file():
            raise ValueError(f"`--data` must be files, got {str(path)!r}, which is none. `dspark-hf data` writes one.")
        conversations = read_conversations(path, tokenizer, max_length=max_length, vocab_size=vocab_size)
        if len(conversations) < 2:
            raise ValueError(
                f"`--data` must hold at least 2 conversations a file, got {len(conversations)} in {str(path)!r}. "
                "Write more with `dspark-hf data`."
            )
        share = min(max(num_held_out // len(data), 1), len(conversations) // 2)
        kept, apart = split_held_out(conversations, share)
        training += kept
        held_out += apart
    return training, held_out


def _vocab_size(target: Any) -> int:
    return target.get_input_embeddings().num_embeddings


def _check_stays(**given: Any) -> None:
    """Raise a `ValueError` for a choice that an existing drafter has made."""
    for name, value in given.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"`{option}` must be left out with `--drafter`, got {getattr(value, 'value', value)}: it stays what "
                "that drafter has. Leave out `--drafter` for a new one."
            )


def _layer_ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"`--target-layers` must be numbers with commas between them, got {text!r}. For example 9,19,28."
        ) from error
