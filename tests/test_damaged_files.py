"""Damaged files of every kind we read end in one sentence that names the file, or are passed over.

The table below holds what is read; the mutators damage it in ways that disks, downloads, editors and people do. All is
drawn from a seed: a variant that fails is found again by its number.
"""

from __future__ import annotations

import json
import random
import signal
import string
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_hf.data.collection import Collection
from dspark_hf.data.sources import open_prompts
from dspark_hf.demo.packaged import UnavailableError, convert_gguf
from dspark_hf.demo.tiny import write_tiny_pair
from dspark_hf.evaluation.recording import Recording
from dspark_hf.evaluation.records import Answer, RoundRecord
from dspark_hf.generation.scheduling.costs.storing import ProfileKey, load_profile, save_profile
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.loading import load_drafter, read_drafter_config
from dspark_hf.prompts import read_prompts
from dspark_hf.training.checkpoints import last_whole_checkpoint
from dspark_hf.training.conversations import read_conversations
from dspark_hf.training.states import StateCache
from tests.tiny import VOCAB_SIZE, tiny_target
from tests.training.test_checkpoints import _checkpoint
from tests.training.tiny_tokenizer import tiny_tokenizer

SECONDS = 10
NUM_QUICK, NUM_SLOW = 20, 110

KEY = ProfileKey("Model", "float32", "Some CPU", "sdpa")
STATES = torch.arange(9)


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a whole one is made, and what reads it.

    `read` raises one of `errors`, or returns; `is_right` says whether what it returned can be what was in the file.
    `is_passed_over`: it must not raise at all.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    is_right: Callable[[Any], bool] = lambda result: True
    errors: tuple[type[Exception], ...] = (ValueError,)
    is_passed_over: bool = False


def _lines(name: str, *records: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder / name

    return make


def _copied(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_tiny_pair(folder)
        return folder / "drafter" / name

    return make


def _profile(folder: Path) -> Path:
    table = CostTable(CostCurves({(1, 128, 1): 0.01, (1, 128, 8): 0.02}), CostCurves({(1, 128, 7): 0.004}))
    return save_profile(KEY, "drafter", table, {"date": "2026-01-01"}, folder)


def _are_costs(table: CostTable | None) -> bool:
    if table is None:
        return True
    return all(0 < cost < float("inf") and min(point) >= 1 for point, cost in table.verify.points.items())


def _recorded(folder: Path) -> Path:
    recording = Recording(folder, {"a": 1})
    answer = Answer(((3, 4),), 0.5, (RoundRecord(4, 4, 1, 2, (0.5, 0.25, 0.5, 0.5)),))
    for index in range(2):
        recording.add(("set", 0.0, False, index), {"plain": [answer], "drafter": [answer]})
    recording.close()
    return recording.path


def _read_recorded(path: Path) -> None:
    Recording(path.parent, {"a": 1}).close()


def _state(folder: Path) -> Path:
    _checkpoint(folder, 2)
    return _checkpoint(folder, 4) / "trainer_state.json"


def _cache(folder: Path) -> StateCache:
    return StateCache(folder, TargetAdapter(tiny_target(), [0]), dtype=torch.float32, max_bytes=10**9)


def _states(folder: Path) -> Path:
    _cache(folder).put(STATES, (torch.ones(9, 32).bfloat16(), torch.ones(9, 32).bfloat16(), torch.ones(9)))
    return next(folder.rglob("*.safetensors"))


def _are_states(states: tuple[torch.Tensor, ...] | None) -> bool:
    return states is None or [tuple(one.shape) for one in states] == [(9, 32), (9, 32), (9,)]


def _gguf(folder: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in (
        *(("block_count", 1), ("context_length", 64), ("embedding_length", 32), ("feed_forward_length", 32)),
        *(("head_count", 2), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-5), ("vocab_size", 16)),
        *(
            ("rope_freq_base", 1e4),
            ("tokenizer_model", "gpt2"),
            ("token_types", [1] * 16),
            ("token_merges", ["a b", "a c"]),
        ),
        *(("bos_token_id", 1), ("eos_token_id", 2), ("unk_token_id", 0)),
    ):
        getattr(writer, f"add_{name}")(value)
    writer.add_token_list(
        [b"<unk>", b"<s>", b"</s>", b"ab", b"ac", *(one.encode() for one in string.ascii_lowercase[:11])]
    )
    shapes = {"token_embd": (16, 32), "output": (16, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}": (32, 32) for part in ("gate", "up", "down")}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _convert(path: Path) -> None:
    (path.parent / "converted").mkdir(exist_ok=True)
    convert_gguf(path, path.parent / "converted", "Reinstall it.")


CONVERSATION = {"prompt": "w9 w10", "completion": "w11 w12", "completion_ids": [9, 10, 11], "finished": True}
KINDS = {
    "prompts": Kind(
        _lines("prompts.jsonl", {"turns": ["w9"]}, {"messages": [{"role": "user", "content": "w10"}]}, {"user": "w8"}),
        read_prompts,
        lambda prompts: all(isinstance(str(prompt), str) for prompt in prompts),
    ),
    "conversations": Kind(
        _lines(
            "data.jsonl",
            CONVERSATION,
            {"user": "w9", "assistant": "w10 w11", "finished": False},
            {"messages": [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w10 w11"}]},
        ),
        lambda path: read_conversations(path, tiny_tokenizer(), vocab_size=VOCAB_SIZE),
        lambda found: all(0 <= int(one.input_ids.min()) <= int(one.input_ids.max()) < VOCAB_SIZE for one in found),
    ),
    "collection": Kind(
        _lines(
            "chats.jsonl", *({**CONVERSATION, "sampling": "1.0", "source": f"{n}", "target": "t"} for n in range(3))
        ),
        lambda path: Collection(path, "t").close(),
    ),
    "written prompts": Kind(
        _lines("chats.jsonl.prompts", {"turns": ["w9"], "round": 0}, {"turns": ["w10"], "round": 1}),
        lambda path: open_prompts(path).close(),
    ),
    "profile": Kind(
        _profile, lambda path: load_profile(KEY, "drafter", path.parent), _are_costs, errors=(), is_passed_over=True
    ),
    "evaluation": Kind(_recorded, _read_recorded),
    "checkpoint": Kind(
        _state,
        lambda path: last_whole_checkpoint(path.parent.parent),
        lambda found: found is not None,
        errors=(),
        is_passed_over=True,
    ),
    "states": Kind(
        _states, lambda path: _cache(path.parent.parent).get(STATES), _are_states, errors=(), is_passed_over=True
    ),
    "drafter's weights": Kind(_copied("model.safetensors"), lambda path: load_drafter(str(path.parent))),
    "drafter's index": Kind(_copied("model.safetensors.index.json"), lambda path: load_drafter(str(path.parent))),
    "drafter's configuration": Kind(_copied("config.json"), lambda path: read_drafter_config(str(path.parent))),
    "GGUF": Kind(_gguf, _convert, errors=(UnavailableError,)),
}

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        10**12,
        10**30,
        float("inf"),
        float("nan"),
        "",
        "x",
        "\ud800",
        "\x1b]0;a\x07",
        "a" * 300,
    ),
    *([], [[]], {}, {"a": 1}, ["x"], [None], "../../etc/passwd"),
)


def _json_places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _json_places(inner)


def _damage_json(text: bytes, draw: random.Random) -> bytes:
    value = json.loads(text)
    holder, key = draw.choice(list(_json_places(value)) or [([value], 0)])
    if draw.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = draw.choice(ODD)
    return json.dumps(value).encode()


def _field(content: bytes, draw: random.Random) -> bytes:
    """Put something odd in the place of one field: of the file, of one of its lines, or of its header."""
    if content[8:9] == b"{":
        length = int.from_bytes(content[:8], "little")
        header = _damage_json(content[8 : 8 + length], draw)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    try:
        return _damage_json(content, draw)
    except (ValueError, IndexError):
        lines = content.splitlines(keepends=True)
    try:
        place = draw.randrange(len(lines))
        lines[place] = _damage_json(lines[place], draw) + b"\n"
    except (ValueError, IndexError):
        return _flip(content, draw)
    return b"".join(lines)


def _flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    # the first bytes say what follows
    for _ in range(draw.choice([1, 4, 40])):
        changed[int(len(changed) * draw.random() ** 3)] = draw.randrange(256)
    return bytes(changed)


def _zero(content: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(content) + 1), draw.choice([1, 8, 512, 1 << 20])
    return (content[:start] + b"\0" * length + content[start + length :])[: len(content)]


def _twice(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    return content[:start] + content[max(start - 40, 0) :]


MUTATORS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_field,) * 8,
    *(_flip,) * 3,
    lambda content, draw: content[: draw.randrange(len(content) + 1)],
    lambda content, draw: b"",
    lambda content, draw: content + draw.randbytes(draw.choice([1, 50, 5000])),
    lambda content, draw: draw.randbytes(draw.choice([3, 30, 3000])),
    lambda content, draw: draw.choice([b"[", b'{"a":', b"[[{"]) * 100_000,
    lambda content, draw: draw.choice([b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html><html>"]),
    lambda content, draw: b"\xff\xfe" + content.decode("latin-1").encode("utf-16-le"),
    lambda content, draw: draw.choice([b"1e999", b"1" * 5000, b"null", b'"x"', b"[1]", b"{}"]),
    _zero,
    _twice,
)


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _judge(kind: Kind, path: Path, damaged: bytes) -> str | None:
    """Return what is wrong with how a damaged file is taken, or None."""
    path.write_bytes(damaged)
    try:
        with _time_limit():
            result = kind.read(path)
    except kind.errors as error:
        message = str(error)
        # the folder is the name of a model
        is_named = path.name in message or str(path.parent) in message
        if not is_named or not message.startswith("`") or len(message) > 1000:
            return f"unclear: {type(error).__name__}: {message[:300]}"
        if path.read_bytes() != damaged:
            return "changed, and refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    else:
        if not kind.is_right(result):
            return f"wrongly loaded: {result!r:.200}"
    return None


def _faults(name: str, folder: Path, count: int) -> dict[int, str]:
    """Return what is wrong, by the number of the variant."""
    kind, faults = KINDS[name], {}
    first = folder / "first"
    first.mkdir()
    path = kind.make(first)
    whole = path.read_bytes() if path.exists() else b'{"weight_map": {"fc.weight": "model.safetensors"}}'
    for number in range(count):
        draw = random.Random(f"{name} {number}")
        damaged = draw.choice(MUTATORS)(whole, draw)
        found = _judge(kind, path, damaged)
        if found is not None:
            faults[number] = f"{found} <- {damaged[:120]!r}"
        if not path.exists():
            # a damaged checkpoint has been moved away
            path = kind.make(folder / f"{number}")
    return faults


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_named_or_passed_over(name: str, tmp_path: Path) -> None:
    """A cut, odd or foreign file ends in a stack of calls, hangs, or is taken for what it is not."""
    assert _faults(name, tmp_path, NUM_QUICK) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files_are_named_or_passed_over(name: str, tmp_path: Path) -> None:
    """As above, of more than a thousand variants; and none takes two gigabytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _faults(name, tmp_path, NUM_SLOW) == {}
    # kilobytes, but for macOS
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 2 << 30


@pytest.mark.parametrize("name", KINDS)
def test_whole_files_are_read(name: str, tmp_path: Path) -> None:
    """What the variants are made of is not read either, so that they show nothing."""
    kind = KINDS[name]
    path = kind.make(tmp_path)
    result = kind.read(path)
    assert kind.is_right(result)
    if kind.is_passed_over:
        assert result is not None


def test_an_unclear_error_is_noticed(tmp_path: Path) -> None:
    """The judge finds nothing unclear, whatever is raised."""

    def fail(path: Path) -> None:
        raise ValueError("invalid literal")

    path = _lines("data.jsonl", CONVERSATION)(tmp_path)
    for read, message in ((fail, "unclear"), (lambda path: {}["a"], "KeyError"), (lambda path: None, "wrongly")):
        assert message in str(_judge(Kind(_profile, read, lambda result: False), path, b"x"))
