"""`dspark-hf chat`: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dspark_hf.cli import options


def chat(
    model: options.ModelArgument,
    drafter: options.DrafterOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    scheduler: options.SchedulerOption = None,
    num_drafts: options.NumDraftsOption = None,
    system: options.SystemOption = None,
    template_option: options.TemplateOption = None,
    thinking: options.ThinkingOption = None,
    load: Annotated[
        Path | None, typer.Option(help="Go on with a conversation of /save.", rich_help_panel=options.PROMPT)
    ] = None,
    max_new_tokens: options.MaxNewTokensOption = 512,
    temperature: options.TemperatureOption = 0.0,
    top_p: options.TopPOption = 1.0,
    seed: options.SeedOption = None,
    history: Annotated[
        Path | None,
        typer.Option(
            help="File that remembers what you type; default: this chat alone.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Talk to a model, tokens coloured by who gave them. From a pipe, each line is a question."""
    # imported here, so that the help is instant
    from dspark_hf.cli.answering import Asked, check_sampling, describe, open_speaker, open_tokenizer
    from dspark_hf.console import quiet_transformers, say
    from dspark_hf.prompts import has_chat_template
    from dspark_hf.terminal.asking import open_asking
    from dspark_hf.terminal.chat import COMMANDS, Chat, greet
    from dspark_hf.terminal.conversation import Conversation
    from dspark_hf.terminal.replies import Writing
    from dspark_hf.terminal.template import read_template_options

    console, errors = Console(), Console(stderr=True)
    # in a terminal everything stands in one place; a pipe carries answers alone
    notes = console if console.is_terminal and not as_json else errors
    try:
        check_sampling(temperature, top_p, seed)
        asked = Asked(model, drafter, dtype.value, device, options.value_of(scheduler), num_drafts)
        folder, tokenizer = open_tokenizer(asked, errors)
        template_options = read_template_options(tokenizer, template_option or (), thinking)
        conversation = Conversation(tokenizer, system, template_options)
        if load is not None:
            conversation.load(load)
        writing = Writing(max_new_tokens, temperature, top_p, seed, asked.scheduler, asked.num_drafts)
        speaker = open_speaker(asked, folder, tokenizer, writing, errors)
        if not has_chat_template(tokenizer):
            say(notes, "This target has no chat template: it continues the text of all turns.")
        ask = open_asking(list(COMMANDS), history, lambda text: say(notes, text))
        if console.is_terminal and not as_json:
            greet(console, speaker, describe(speaker, asked))
        with quiet_transformers():
            is_fine = Chat(speaker, conversation, console, notes, as_json=as_json).run(ask)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if not is_fine:
        raise typer.Exit(1)
