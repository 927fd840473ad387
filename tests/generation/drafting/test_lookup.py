"""Where the latest tokens of a text stood before, and what is believed of what followed."""

from __future__ import annotations

import random

import pytest
import torch

from dspark_hf.generation.drafting.chances import MatchChances
from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.drafting.lookup import Lookups, NoContext, Offer, TextIndex, with_lookups


def _places(text: list[int], size: int) -> list[int]:
    """Return the places behind which the last `size` tokens stood before."""
    return [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]] if size else []


def _length_at(text: list[int], place: int) -> int:
    """Return how many tokens before `place` are those at the end."""
    length = 0
    while length < place and text[place - 1 - length] == text[-1 - length]:
        length += 1
    return length


@pytest.mark.parametrize("vocab_size", [2, 4, 12])
@pytest.mark.parametrize("min_match", [1, 2, 3])
def test_match_is_what_a_search_through_the_text_finds(vocab_size, min_match):
    """A match is missed, or is none, or is shorter than one that the index must know."""
    draw = random.Random(vocab_size)
    index, text = TextIndex(min_match), []
    for _ in range(300):
        new = [draw.randrange(vocab_size) for _ in range(draw.choice((1, 1, 1, 2, 5)))]
        text += new
        index.extend(new)
        found = max((size for size in (1, 2, 4) if _places(text, size * min_match)), default=0) * min_match
        assert index.match_length >= found
        assert (index.match_length > 0) == (found > 0)
        if found:
            # it stood there, and goes on as it did there
            assert any(
                _length_at(text, place) >= min(index.match_length, 32)
                and index.continuation(3) == (text[place:] * 3)[:3]
                for place in _places(text, found)
            )
        if found and index.match_length <= 4 * min_match:
            # longer ones may have been followed from there on
            latest, *before = reversed(_places(text, found))
            assert index.is_disputed == any(text[place] != text[latest] for place in before[:1])


def test_single_token_that_stood_before_is_offered():
    """What repeats behind one token alone is passed over, which Transformers' own lookup drafts."""
    (offer,) = Lookups([[5, 6, 7, 5]], MatchChances()).offers([2])
    assert offer.token_ids == (6, 7)


def test_places_that_disagree_make_a_match_less_sure():
    """A word that goes on otherwise each time is believed in as much as one that always goes on the same."""
    chances, sure = MatchChances(), MatchChances()
    lookups = Lookups([[1, 2, 8, 1, 3, 9, 1], [1, 2, 8, 1, 2, 9, 1], [1, 2, 9, 1]], chances)
    disputed, agreed, single = (offer.chances for offer in lookups.offers([2] * 3))
    assert disputed[0] < agreed[0] == single[0]
    # a draft that is accepted settles it
    assert disputed[1:] == agreed[1:]
    lookups.select_rows([0])
    lookups.read([[7]])
    assert chances.of_drafts(1, 2) == sure.of_drafts(1, 2)
    assert chances.of_drafts(1, 1, is_disputed=True) < sure.of_drafts(1, 1, is_disputed=True)


def test_latest_place_counts():
    """A text goes on as it did long ago instead of as it did just now."""
    index = TextIndex()
    index.extend([1, 2, 7, 1, 2, 8, 1, 2])
    assert index.continuation(1) == [8]


def test_match_is_followed_to_any_length():
    """A match ends with the longest sequence that is indexed."""
    index, part = TextIndex(), list(range(100))
    index.extend(part)
    for token in part[:90]:
        index.extend([token])
    assert index.match_length == 90
    assert index.continuation(5) == [90, 91, 92, 93, 94]


def test_text_that_repeats_itself_goes_on_repeating():
    """What could be drafted of a text that repeats itself ends where the text ends."""
    index = TextIndex()
    index.extend([9, 1, 2, 3, 1, 2, 3, 1, 2])
    assert index.continuation(7) == [3, 1, 2, 3, 1, 2, 3]


def test_equal_hashes_of_different_tokens_are_no_match(monkeypatch):
    """A collision of hashes passes for a match."""
    index = TextIndex()
    monkeypatch.setattr("dspark_hf.generation.drafting.lookup.hash", lambda _: 0, raising=False)
    index.extend([1, 2, 3, 4, 5, 6])
    assert index.match_length == 0
    assert index.continuation(3) == []


def test_prompt_in_one_piece_or_token_by_token_is_the_same_text():
    """What a prompt offers depends on how it was read."""
    draw = random.Random(0)
    text = [draw.randrange(3) for _ in range(200)]
    whole, single = TextIndex(), TextIndex()
    whole.extend(text)
    for token in text:
        single.extend([token])
    assert whole.match_length == single.match_length > 0
    assert whole.continuation(8) == single.continuation(8)
    assert whole._places == single._places
    assert whole._before == single._before


def test_chances_follow_what_the_text_does():
    """A match that never goes on is believed in for ever."""
    chances = MatchChances()
    assert chances.of_drafts(2, 3) == tuple(sorted(chances.of_drafts(2, 3)))
    for _ in range(300):
        chances.learn(3, [True, False, True])
    three, four = chances.of_drafts(3, 2)
    assert three > 0.95 and four < 0.05
    # what stands behind the first surprise is of another match
    assert chances.of_drafts(5, 1) == MatchChances().of_drafts(5, 1)


def test_rows_learn_from_text_that_nobody_looked_up():
    """Chances are learned from verified drafts only, so that a source that is not asked can never recover."""
    chances = MatchChances()
    before = chances.of_drafts(2, 1, is_in_prompt=True)
    lookups = Lookups([[1, 2, 3, 1, 2]], chances)
    lookups.read([[3]])
    assert chances.of_drafts(2, 1, is_in_prompt=True) > before


def test_what_a_prompt_holds_is_less_sure_than_what_was_written():
    """A phrase of the prompt is believed in as much as a text that repeats itself, or one teaches about both."""
    chances = MatchChances()
    lookups = Lookups([[1, 2, 3, 4]], chances)
    lookups.read([[1, 2]])
    (given,) = lookups.offers([1])
    lookups.read([[9, 7, 8, 6, 7, 8]])
    (written,) = lookups.offers([1])
    assert (given.token_ids, written.token_ids) == ((3,), (6,))
    # the prompt's has ended at once, nothing is known of the other
    assert given.chances == MatchChances().of_drafts(2, 1, is_in_prompt=True)
    assert (
        written.chances == MatchChances().of_drafts(2, 1) > given.chances > chances.of_drafts(2, 1, is_in_prompt=True)
    )


def test_rows_that_leave_and_join_keep_their_texts():
    """A row is offered what another one's text held."""
    chances = MatchChances()
    lookups = Lookups([[1, 2, 3, 1, 2], [4, 5, 6, 4, 5], [7, 8]], chances)
    lookups.select_rows([2, 1])
    lookups.append_rows(Lookups([[9, 8, 7, 9, 8]], chances))
    lookups.read([[7, 8], [6], []])
    assert [offer.token_ids for offer in lookups.offers([2, 2, 3])] == [(7, 8), (4, 5), (7, 9, 8)]
    assert lookups.offers([0, 0, 0]) == []


def test_block_of_both_sources():
    """A row drafts what another source made, or counts as drawn what was not."""
    probs = torch.full((3, 2, 10), 0.1)
    drafted = DraftedBlock(torch.tensor([[1, 2], [3, 4], [5, 6]]), probs, torch.full((3, 2), 0.5))
    offers = [Offer(), Offer((7, 8, 9), (0.9, 0.8, 0.7)), Offer((1,), (0.2,))]
    block = with_lookups(drafted, offers, (0, 3, 0), torch.device("cpu"))
    assert block.token_ids.tolist() == [[1, 2, 0], [7, 8, 9], [5, 6, 0]]
    assert block.is_certain.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert torch.allclose(block.confidence, torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.8, 0.7], [0.5, 0.5, 0.0]]))
    assert block.chances.isnan().tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert (block.num_drafts, block.num_modelled_drafts) == (3, 2)
    alone = with_lookups(None, offers, (0, 2, 1), torch.device("cpu"))
    assert alone.token_ids.tolist() == [[0, 0], [7, 8], [1, 0]]
    assert (alone.probs, alone.num_modelled_drafts) == (None, 0)


def test_context_without_a_model():
    """Measuring what a drafter costs fails where there is none."""
    context = NoContext()
    context.extend(torch.empty(2, 3, 0), torch.zeros(2, 3), [3, 3])
    context.select_rows(torch.tensor([1]))
    context.append_rows(NoContext())
    block = context.draft(torch.tensor([4, 5]), torch.tensor([3, 3]), 2, lambda *_: None)
    assert block.token_ids.tolist() == [[4, 4], [5, 5]]
