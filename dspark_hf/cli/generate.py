"""`dspark-hf generate`: one answer, as it is accepted."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from dspark_hf.cli import options
from dspark_hf.cli.hints import say_next


def generate(
    model: options.ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="What to answer; default, and -: standard input.")] = None,
    drafter: options.DrafterOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = "auto",
    scheduler: options.SchedulerOption = None,
    num_drafts: options.NumDraftsOption = None,
    system: options.SystemOption = None,
    template_option: options.TemplateOption = None,
    thinking: options.ThinkingOption = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the text as it is, without template.", rich_help_panel=options.PROMPT),
    ] = False,
    max_new_tokens: options.MaxNewTokensOption = 512,
    temperature: options.TemperatureOption = 0.0,
    top_p: options.TopPOption = 1.0,
    seed: options.SeedOption = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Answer again without drafts, and compare.", rich_help_panel=options.OUTPUT),
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Answer a prompt, tokens coloured by who gave them; into a pipe goes the text alone."""
    # imported here, so that the help is instant
    from dspark_hf.cli.answering import Asked, check_sampling, describe, open_speaker, open_tokenizer, read_prompt
    from dspark_hf.console import quiet_transformers, say
    from dspark_hf.prompts import Prompt, encode_prompt
    from dspark_hf.terminal.chat import Chat
    from dspark_hf.terminal.conversation import Conversation
    from dspark_hf.terminal.display import legend, sources_of
    from dspark_hf.terminal.replies import Writing
    from dspark_hf.terminal.template import read_template_options

    console, notes = Console(), Console(stderr=True)
    try:
        if raw and (system is not None or template_option or thinking is not None):
            raise ValueError("`--raw` must come without what a chat template is told, got both. Leave out one.")
        check_sampling(temperature, top_p, seed)
        asked = Asked(model, drafter, dtype.value, device, options.value_of(scheduler), num_drafts)
        text = read_prompt(prompt)
        folder, tokenizer = open_tokenizer(asked, notes)
        template_options = read_template_options(tokenizer, template_option or (), thinking)
        conversation = Conversation(tokenizer, system, template_options)
        token_ids = encode_prompt(Prompt(text=text), tokenizer) if raw else conversation.encode(text)
        writing = Writing(max_new_tokens, temperature, top_p, seed, asked.scheduler, asked.num_drafts)
        speaker = open_speaker(asked, folder, tokenizer, writing, notes)
        if console.is_terminal and not as_json:
            say(notes, describe(speaker, asked))
            notes.print(legend(sources_of(speaker.drafter)))
        with quiet_transformers():
            chat = Chat(speaker, conversation, console, notes, as_json=as_json)
            reply = chat.answer(token_ids)
            if plain:
                chat.compare()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if reply.ended_by == "interrupt":
        raise typer.Exit(130)
    if console.is_terminal and not as_json:
        say_next(notes, "chat", model, *(() if drafter is None else ("--drafter", drafter)))
