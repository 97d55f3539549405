import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_sigsoftmax.data import IGNORE_INDEX, Segments, eval_streams, shard, train_streams

EOS_ID = 7


def text(n):
    """N distinct tokens, none of them <eos>."""
    return torch.arange(100, 100 + n, dtype=torch.int32)


def predictions(segments):
    """The (input, target) pairs that count, stream by stream, in order."""
    rows = [[] for _ in segments.input]
    for inputs, targets in segments:
        for row, xs, ys in zip(rows, inputs.tolist(), targets.tolist(), strict=True):
            row += [(x, y) for x, y in zip(xs, ys, strict=True) if y != IGNORE_INDEX]
    return rows


@given(n=st.integers(1, 60), n_streams=st.integers(1, 12), bptt=st.integers(1, 20))
def test_training_predicts_every_token_once_but_the_remainder(n, n_streams, bptt):
    n_streams = min(n, n_streams)
    tokens = text(n)
    streams = train_streams(tokens, n_streams, EOS_ID)
    assert streams[0].dtype == streams[1].dtype == torch.int32
    kept = n // n_streams * n_streams
    pairs = [pair for row in predictions(Segments(*streams, bptt)) for pair in row]
    assert [y for _, y in pairs] == tokens[:kept].tolist()
    assert [x for x, _ in pairs] == [EOS_ID, *tokens[: kept - 1].tolist()]


@given(
    n=st.integers(1, 60),
    n_streams=st.integers(1, 12),
    bptt=st.integers(1, 20),
    context=st.integers(0, 30),
    world_size=st.integers(1, 6),
)
def test_evaluation_predicts_every_token_once(n, n_streams, bptt, context, world_size):
    n_streams = min(n, n_streams)
    tokens = text(n)
    streams = eval_streams(tokens, n_streams, EOS_ID)
    ranks = [
        Segments(*shard(streams, rank, world_size, exact=True), bptt, context=context) for rank in range(world_size)
    ]
    rows = [row for segments in ranks for row in predictions(segments) if row]
    assert len(rows) == n_streams
    assert {len(row) for row in rows} <= {n // n_streams, n // n_streams + 1}
    pairs = [pair for row in rows for pair in row]
    assert [y for _, y in pairs] == tokens.tolist()
    assert [x for x, _ in pairs] == [EOS_ID, *tokens[:-1].tolist()]
    assert len({(len(segments), len(list(segments))) for segments in ranks}) == 1
    sizes = [len(segments.input) for segments in ranks]
    assert max(sizes) - min(sizes) <= 1


@given(length=st.integers(1, 60), bptt=st.integers(1, 20), context=st.integers(0, 30))
def test_context_is_seen_and_not_predicted_again(length, bptt, context):
    streams = train_streams(text(2 * length), 2, EOS_ID)
    position = 0
    for inputs, targets in Segments(*streams, bptt, context=context):
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape
        assert inputs.shape[1] <= context + bptt
        predicted = (targets[0] != IGNORE_INDEX).nonzero()[:, 0].tolist()
        for seen in predicted:
            assert seen >= min(context, position)
            # what it sees are the inputs right before it
            assert torch.equal(inputs[:, : seen + 1], streams[0][:, position - seen : position + 1].long())
            position += 1
    assert position == length


def test_segments_by_hand():
    tokens = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32)
    streams = eval_streams(tokens, 2, 0)
    assert streams[0].tolist() == [[0, 1, 2], [3, 4, 0]]
    assert streams[1].tolist() == [[1, 2, 3], [4, 5, IGNORE_INDEX]]
    (first, second) = Segments(*streams, 2, context=1)
    assert [part.tolist() for part in first] == [[[0, 1], [3, 4]], [[1, 2], [4, 5]]]
    assert [part.tolist() for part in second] == [[[1, 2], [4, 0]], [[IGNORE_INDEX, 3], [IGNORE_INDEX, IGNORE_INDEX]]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_segment_is_a_copy(dtype):
    streams = [part.to(dtype) for part in train_streams(text(12), 2, EOS_ID)]
    before = [part.clone() for part in streams]
    for inputs, targets in Segments(*streams, 2, context=3):
        inputs.zero_()
        targets.zero_()
    assert all(torch.equal(a, b) for a, b in zip(streams, before, strict=True))


@pytest.mark.parametrize("cut", [train_streams, eval_streams])
@pytest.mark.parametrize("n_streams", [0, 6])
def test_a_number_of_streams_that_cannot_be_is_refused(cut, n_streams):
    with pytest.raises(ValueError, match=rf"5 tokens cannot be cut into {n_streams} streams.*data.batch_size"):
        cut(text(5), n_streams, EOS_ID)


@pytest.mark.parametrize(("bptt", "context"), [(0, 0), (1, -1)])
def test_segments_refuse_impossible_lengths(bptt, context):
    with pytest.raises(ValueError, match=f"bptt={bptt} and context={context}"):
        Segments(*train_streams(text(4), 2, EOS_ID), bptt, context=context)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_training_streams_are_shared_out_in_blocks(world_size):
    streams = train_streams(text(40), 4, EOS_ID)
    shards = [shard(streams, rank, world_size, exact=False) for rank in range(world_size)]
    for whole, parts in zip(streams, zip(*shards, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)
        assert len({len(part) for part in parts}) == 1


def test_an_uneven_training_share_is_refused():
    with pytest.raises(ValueError, match=r"data.batch_size.*4 do not divide over 3 devices.*trainer.devices"):
        shard(train_streams(text(40), 4, EOS_ID), 0, 3, exact=False)


def test_a_rank_without_a_stream_takes_the_same_steps():
    streams = eval_streams(text(10), 2, EOS_ID)
    idle = [part for part in (shard(streams, rank, 3, exact=True) for rank in range(3)) if (part[1] < 0).all()]
    assert len(idle) == 1
    assert idle[0][0].shape == idle[0][1].shape == (1, 5)


# The position


def numbered(n_segments=5):
    return Segments(*train_streams(text(2 * n_segments), 2, EOS_ID), bptt=1)


def firsts(iterable):
    return [int(targets[0, 0]) - 100 for _, targets in iterable]


def test_every_epoch_starts_at_the_beginning():
    segments = numbered()
    assert firsts(segments) == firsts(segments) == [0, 1, 2, 3, 4]


def test_an_epoch_that_is_left_early_does_not_shorten_the_next():
    segments = numbered()
    for _ in zip(range(5), segments, strict=False):  # as Lightning does: len() items are taken, and no StopIteration
        pass
    assert firsts(segments) == [0, 1, 2, 3, 4]


def test_iterators_do_not_disturb_each_other():
    segments = numbered()
    one, two = iter(segments), iter(segments)
    assert firsts([next(one), next(one), next(two)]) == [0, 1, 0]


@pytest.mark.parametrize("taken", range(6))
def test_resume_goes_on_after_the_last_segment_given_out(taken):
    segments = numbered()
    iterator = iter(segments)
    given_out = [next(iterator) for _ in range(taken)]
    state = segments.state_dict()
    assert state["position"] == taken
    resumed = numbered()
    resumed.load_state_dict(state)
    rest = firsts(resumed)
    assert rest == (list(range(taken, 5)) if taken < 5 else [0, 1, 2, 3, 4])
    if taken < 5:
        assert firsts(given_out) + rest == [0, 1, 2, 3, 4]
    assert firsts(resumed) == [0, 1, 2, 3, 4]


def test_the_position_survives_a_save_before_the_first_segment():
    segments = numbered()
    segments.load_state_dict({"position": 3, "n_segments": 5})
    assert segments.state_dict() == {"position": 3, "n_segments": 5}
    iter(segments)  # an iterator that nobody advances
    assert firsts(segments) == [3, 4]


def test_a_position_within_another_cut_is_refused():
    with pytest.raises(ValueError, match=r"after segment 3 of 5, but the training data now has 4 segments.*data.bptt"):
        numbered(4).load_state_dict({"position": 3, "n_segments": 5})


def test_a_finished_epoch_of_another_cut_is_a_fresh_start():
    segments = numbered(4)
    segments.load_state_dict({"position": 5, "n_segments": 5})
    assert firsts(segments) == [0, 1, 2, 3]
