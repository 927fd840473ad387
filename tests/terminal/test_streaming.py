"""Text as it comes: no piece is lost, broken or given to the wrong source."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark_hf.pieces import TextPieces
from dspark_hf.terminal.streaming import SourceStreamer
from tests.terminal.speaking import NEW_TOKENS, speaker, word_tokenizer

TEXT = "naïve  漢字\n\t👩‍👩‍👧 x"


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _spaces_tokenizer() -> PreTrainedTokenizerFast:
    # as SentencePiece's: a space that begins a text is no part of it
    words = ["▁one", "▁two", "▁three", "s"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_pieces_make_the_text(kind):
    """A character of several tokens is shown broken, or a space between words is lost."""
    tokenizer = _bytes_tokenizer() if kind == "bytes" else _spaces_tokenizer()
    token_ids = tokenizer(TEXT).input_ids if kind == "bytes" else [0, 1, 3, 1, 2, 0]
    pieces = TextPieces(tokenizer)
    shown = [pieces.add(token_id) for token_id in token_ids]
    whole = tokenizer.decode(token_ids)
    assert "".join(shown) == whole
    assert whole == (TEXT if kind == "bytes" else "one twos two three one")
    assert not any("\ufffd" in piece for piece in shown)
    # the control: token by token the text is another
    assert "".join(tokenizer.decode([token_id]) for token_id in token_ids) != whole


def test_a_special_token_takes_no_space_away():
    """Words around a special token, which is not shown, stick together."""
    tokenizer = word_tokenizer()
    pieces = TextPieces(tokenizer)
    assert "".join(map(pieces.add, [0, 9, 0, 0, 10, 11])) == "w9 w10 w11"


def test_half_a_character_at_the_end_is_shown():
    """A text that is cut within a character ends before it in the terminal, and not in the output."""
    tokenizer = _bytes_tokenizer()
    token_ids = tokenizer("a漢").input_ids[:-1]
    shown: list[str] = []
    streamer = SourceStreamer(tokenizer, lambda piece, source: shown.append(piece))
    streamer.put(torch.tensor([[1, 2]]))
    for token_id in token_ids:
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert "".join(shown) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("is_assisted", [True, False])
def test_each_piece_has_its_source(is_assisted):
    """What the target wrote itself is coloured as a draft, or a draft as what was looked up."""
    one, shown = speaker(), []
    prompt = torch.tensor([9, 10, 11, 9, 10])
    reply = one.reply(prompt, lambda piece, source: shown.append((piece.strip(), source)), is_assisted=is_assisted)
    plain = one.target.generate(prompt[None], max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
    assert reply.token_ids == plain
    assert [piece for piece, _ in shown] == one.tokenizer.decode(plain).split()
    assert [source for _, source in shown] == reply.sources
    if is_assisted:
        assert reply.sources == one.drafter.last_statistics.token_sources[0]
        assert len(set(reply.sources)) > 1
    else:
        assert set(reply.sources) == {"target"} and reply.tau is None
