import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_sigsoftmax.data import EOS, UNK, Vocabulary


def test_ids_follow_the_first_appearance():
    vocabulary = Vocabulary.build(["the", "cat", "<eos>", "the", "dog", "<eos>"])
    assert vocabulary.tokens == ("the", "cat", EOS, "dog")
    assert (len(vocabulary), vocabulary.eos_id, vocabulary.unk_id) == (4, 2, None)
    assert "dog" in vocabulary
    assert "cow" not in vocabulary


def test_rare_types_become_unk():
    vocabulary = Vocabulary.build(["b", "a", "rare", "b", "a", "once", "<eos>"], min_count=2)
    assert vocabulary.tokens == ("b", "a", UNK, EOS)
    assert vocabulary.encode(["a", "rare", "never seen"]).tolist() == [1, 2, 2]
    assert Vocabulary.build(["a", EOS, "a", "rare"], min_count=2).tokens == ("a", EOS, UNK)  # a rare <eos> stays


def test_min_count_above_one_always_gives_unk():
    assert UNK in Vocabulary.build(["a", "a", "<eos>", "<eos>"], min_count=2)


def test_eos_is_there_even_if_the_text_has_none():
    assert Vocabulary.build(["a", "b"]).tokens == ("a", "b", EOS)


@given(st.lists(st.text(max_size=3)), st.integers(1, 3))
def test_encode_and_decode_are_inverse(tokens, min_count):
    vocabulary = Vocabulary.build(tokens, min_count)
    ids = vocabulary.encode(tokens)
    assert (ids.dtype, ids.shape) == (torch.int32, (len(tokens),))
    expected = [token if token in vocabulary else UNK for token in tokens]
    assert vocabulary.decode(ids) == expected
    assert vocabulary.decode(ids.tolist()) == expected
    if min_count == 1:
        assert expected == tokens


def test_an_unknown_token_without_unk_names_the_token_and_the_remedy():
    with pytest.raises(ValueError, match=r"'cow' is not in the vocabulary.*min_count=2"):
        Vocabulary([EOS, "cat"]).encode(["cat", "cow"])


@pytest.mark.parametrize(
    ("tokens", "message"), [(["a", EOS, "b", "b"], "'b' occurs more than once"), (["a", "b"], "must contain '<eos>'")]
)
def test_what_is_no_vocabulary_is_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(tokens)


def test_min_count_below_one_is_refused():
    with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
        Vocabulary.build(["a"], min_count=0)


def test_a_vocabulary_is_a_value():
    tokens = [EOS, "a"]
    vocabulary = Vocabulary(tokens)
    tokens.append("b")
    assert len(vocabulary) == 2
    assert vocabulary == pickle.loads(pickle.dumps(vocabulary))
    assert hash(vocabulary) == hash(Vocabulary([EOS, "a"]))
    assert vocabulary != Vocabulary(["a", EOS])
    with pytest.raises(AttributeError):
        vocabulary.tokens = ()
