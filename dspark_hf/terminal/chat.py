"""A chat: questions, answers that stream, and commands that begin with a slash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dspark_hf.console import print_table, printable, say
from dspark_hf.terminal.asking import Ask
from dspark_hf.terminal.conversation import Conversation
from dspark_hf.terminal.display import ReplyView, legend, sources_of
from dspark_hf.terminal.parting import find_parting
from dspark_hf.terminal.replies import SOURCE_NAMES, Reply, Speaker

# what each command is followed by, and what it does
COMMANDS = {
    "/plain": ("", "the last question again, without a drafter: the same text?"),
    "/stats": ("", "what the drafts of this chat came to"),
    "/system": ("[TEXT]", "show the system prompt, or set it from the next question on; - is none"),
    "/clear": ("", "forget all turns; the system prompt stays"),
    "/save": ("FILE", "write the conversation as JSON"),
    "/load": ("FILE", "go on with a saved conversation"),
    "/help": ("", "these lines"),
    "/quit": ("", "end the chat, as Ctrl-D does"),
}


class Chat:
    """Answer questions one after another, each in the light of those before.

    Args:
        speaker: who answers.
        conversation: what has been said.
        console: where answers go.
        notes: where everything else goes: where answers go into a pipe, a console of standard error.
        as_json: write each answer as a line of JSON, once it is whole.
    """

    def __init__(
        self, speaker: Speaker, conversation: Conversation, console: Console, notes: Console, *, as_json: bool = False
    ) -> None:
        self._speaker, self._conversation = speaker, conversation
        self._console, self._notes = console, notes
        self._as_json = as_json
        self._replies: list[Reply] = []
        self._last_prompt: Tensor | None = None

    def run(self, ask: Ask) -> bool:
        """Answer until there are no more questions. Returns whether every question was answered."""
        is_fine = True
        while True:
            try:
                line = ask().strip()
            except EOFError:
                return is_fine
            except KeyboardInterrupt:
                self._say("Ctrl-D or /quit ends the chat.")
                continue
            if line == "/quit":
                return is_fine
            if not line:
                continue
            try:
                self.take(line)
            except (ValueError, OSError) as error:
                self._fail(str(error))
                is_fine = False

    def take(self, line: str) -> None:
        """Answer a question, or obey a command; two slashes begin a question that begins with one.

        Raises:
            ValueError: if the command is none, or the question cannot be asked.
            OSError: if a file cannot be written.
        """
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.partition(" ")
            self._command(name)(rest.strip())
        else:
            self._answer(line[1:] if line.startswith("//") else line)

    def _command(self, name: str) -> Callable[[str], None]:
        if name not in COMMANDS or name == "/quit":
            raise ValueError(
                f"a line that begins with a slash must be a command, got {name!r}. /help lists them; a question that "
                "begins with a slash begins with two."
            )
        commands: dict[str, Callable[[str], None]] = {
            "/plain": self.compare,
            "/stats": self._tell,
            "/system": self._instruct,
            "/clear": self._clear,
            "/save": self._save,
            "/load": self._load,
            "/help": self._help,
        }
        return commands[name]

    def answer(self, prompt: Tensor) -> Reply:
        """Return the answer to a prompt `(T,)`, after showing it; the conversation stays as it is."""
        reply = self._show(prompt)
        if reply.token_ids:
            self._last_prompt = prompt
            self._replies.append(reply)
        return reply

    def _answer(self, question: str) -> None:
        reply = self.answer(self._conversation.encode(question))
        if reply.token_ids:
            self._conversation.add(question, reply.text)

    def _show(self, prompt: Tensor, *, is_assisted: bool = True) -> Reply:
        if self._as_json:
            reply = self._speaker.reply(prompt, lambda piece, source: None, is_assisted=is_assisted)
            write_line(self._console, reply.to_json())
            return reply
        with ReplyView(self._console, self._speaker.note) as view:
            reply = self._speaker.reply(prompt, view.show, is_assisted=is_assisted)
        self._say(str(reply))
        return reply

    def compare(self, _: str = "") -> None:
        """Answer the last question without a drafter, and say whether the text is the same."""
        if self._last_prompt is None:
            raise ValueError("/plain must follow an answer, got no question so far. Ask one.")
        prompt, assisted = self._last_prompt, self._replies[-1]
        plain = self._show(prompt, is_assisted=False)
        if plain.token_ids:
            ratio = assisted.speed / plain.speed
            verdict = compare_texts(self._speaker, prompt, plain, assisted)
            self._say(f"{verdict} With drafts {ratio:.2f} times as fast.")

    def _tell(self, _: str) -> None:
        calls = [reply.statistics for reply in self._replies if reply.statistics is not None]
        if not calls:
            raise ValueError("/stats must follow an answer, got no question so far. Ask one.")
        rows = []
        for source in sources_of(self._speaker.drafter)[1:]:
            counts = [one.by_source[source] for one in calls]
            drafted, verified, accepted = (
                sum(getattr(one, name) for one in counts) for name in ("num_drafted", "num_verified", "num_accepted")
            )
            rows.append((SOURCE_NAMES[source], str(drafted), str(verified), str(accepted)))
        print_table(self._notes, "Drafts", ("by", "made", "checked", "accepted"), rows, num_labels=1)
        num_rounds = sum(one.num_rounds for one in calls)
        num_tokens = sum(len(reply.token_ids) for reply in self._replies)
        seconds = sum(reply.seconds for reply in self._replies)
        tau = sum(one.num_committed for one in calls) / max(num_rounds, 1)
        answers = "1 answer" if len(calls) == 1 else f"{len(calls)} answers"
        self._say(f"{answers}, {num_tokens} tokens; tau {tau:.2f}; {num_tokens / seconds:.1f} tokens/s")
        self._say(f"the last one: {calls[-1]}")

    def _instruct(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "-" else text
        system = self._conversation.system
        self._say("No system prompt but the template's own." if system is None else f"System prompt: {system}")

    def _clear(self, _: str) -> None:
        self._conversation.turns = []
        self._say("Forgotten.")

    def _save(self, name: str) -> None:
        path = _file(name, "/save")
        self._conversation.save(path)
        self._say(f"Saved: {path}")

    def _load(self, name: str) -> None:
        self._conversation.load(_file(name, "/load"))
        self._say(f"Loaded: {len(self._conversation.turns) // 2} questions with their answers.")

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, (argument, meaning) in COMMANDS.items():
            table.add_row(Text(f"{name} {argument}", style="bold"), Text(meaning))
        self._notes.print(table)
        self._say("Ctrl-C stops an answer; Alt-Enter begins a new line; // begins a question with a slash.")

    def _fail(self, message: str) -> None:
        if self._as_json:
            # whoever sends lines counts the answers
            write_line(self._console, {"error": message})
        else:
            self._say(message)

    def _say(self, text: str) -> None:
        for line in text.splitlines():
            # what is not the model's answer stands back
            self._notes.print(Text(printable(line), style="dim"), highlight=False)


def greet(console: Console, speaker: Speaker, names: str) -> None:
    """Say who answers, which colour is whose, and how to get help."""
    say(console, names)
    console.print(legend(sources_of(speaker.drafter)))
    console.print(Text("/help lists commands; Ctrl-C stops an answer; Ctrl-D ends the chat.", style="dim"))


def compare_texts(speaker: Speaker, prompt: Tensor, plain: Reply, assisted: Reply) -> str:
    """Return whether two answers are the same, or where they part."""
    if not speaker.writing.is_greedy:
        return "Sampled texts follow the same distribution; they need not be the same."
    length = len(plain.token_ids) if plain.ended_by == "interrupt" else None
    other = len(assisted.token_ids) if assisted.ended_by == "interrupt" else None
    shorter = min((one for one in (length, other) if one is not None), default=None)
    first, second = plain.token_ids[:shorter], assisted.token_ids[:shorter]
    parting = find_parting(speaker.target, prompt, first, second)
    if parting is not None:
        return parting.describe(speaker.tokenizer)
    return "Identical text." if shorter is None else f"Identical as far as both go, {len(first)} tokens."


def write_line(console: Console, record: dict[str, Any]) -> None:
    """Write a line of JSON, in which no character commands a terminal."""
    console.file.write(json.dumps(record) + "\n")
    console.file.flush()


def _file(name: str, command: str) -> Path:
    if not name:
        raise ValueError(f"{command} must be followed by a file's name, got none. For example {command} talk.json.")
    return Path(name).expanduser()
