import math
from io import BytesIO

import pytest
import torch
from torch import nn

from lit_sigsoftmax.backbones import RecurrentBackbone, TransformerBackbone
from lit_sigsoftmax.backbones.transformer import CausalSelfAttention, rotary_tables, rotate

VOCAB, HIDDEN, BATCH, TIME = 20, 16, 3, 8
RECURRENT = ["lstm", "gru"]
TRANSFORMER = ["rotary", "learned"]
VARIANTS = RECURRENT + TRANSFORMER
CLASSES = [RecurrentBackbone, TransformerBackbone]


def build(variant, seed=0, num_layers=2, **kwargs):
    torch.manual_seed(seed)
    if variant in RECURRENT:
        return RecurrentBackbone(VOCAB, HIDDEN, num_layers, cell=variant, **kwargs)
    return TransformerBackbone(VOCAB, HIDDEN, num_layers, num_heads=2, positions=variant, **kwargs)


def sharpen(backbone):
    """Larger weights in float64, so that a real dependence is far above rounding error."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.5)
    return backbone.double().eval()


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def tokens():
    return torch.randint(VOCAB, (BATCH, TIME), generator=torch.Generator().manual_seed(1))


# Every backbone


def test_shapes_and_attributes(variant, tokens):
    backbone = build(variant)
    hidden, state = backbone(tokens)
    assert hidden.shape == (BATCH, TIME, HIDDEN)
    assert (backbone.vocab_size, backbone.hidden_size) == (VOCAB, HIDDEN)
    assert backbone.embedding.weight.shape == (VOCAB, HIDDEN)
    assert (state is None) == (variant in TRANSFORMER)


def test_state_is_one_nest_per_layer(tokens):
    _, lstm_state = build("lstm", num_layers=3)(tokens)
    _, gru_state = build("gru", num_layers=3)(tokens)
    assert [tuple(tensor.shape for tensor in layer) for layer in lstm_state] == 3 * [2 * ((1, BATCH, HIDDEN),)]
    assert [h.shape for h in gru_state] == 3 * [(1, BATCH, HIDDEN)]


def test_a_token_changes_its_own_hidden_vector_and_none_before(variant, tokens):
    backbone = sharpen(build(variant))
    hidden, _ = backbone(tokens)
    for t in range(TIME):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        other, _ = backbone(changed)
        torch.testing.assert_close(other[:, :t], hidden[:, :t], atol=1e-12, rtol=0)
        # ... and every one after it, in every sequence
        assert ((other[:, t:] - hidden[:, t:]).abs().amax(-1) > 1e-6).all()


def test_order_of_the_context_matters(variant):
    backbone = sharpen(build(variant, num_layers=1))  # in a deeper transformer the causal mask alone tells some order
    hidden, _ = backbone(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))  # the same tokens before and at the last place
    assert (hidden[0, -1] - hidden[1, -1]).abs().max() > 1e-3


def test_sequences_of_a_batch_are_independent(variant, tokens):
    backbone = build(variant).eval()
    hidden, _ = backbone(tokens)
    for row in range(BATCH):
        alone, _ = backbone(tokens[row : row + 1])
        torch.testing.assert_close(alone[0], hidden[row], atol=1e-6, rtol=0)


def test_gradients_reach_every_parameter(variant, tokens):
    backbone = build(variant, dropout=0.1)
    hidden, _ = backbone(tokens)
    (hidden * torch.randn_like(hidden)).sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_seed_fixes_initial_weights_and_dropout_masks(variant, tokens):
    first, second, other = (build(variant, seed, dropout=0.5) for seed in (7, 7, 8))
    for name, weight in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight), name
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(first(tokens)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_evaluation_drops_nothing(variant, tokens):
    dropping, plain = build(variant, dropout=0.5).eval(), build(variant, dropout=0.0).train()
    torch.testing.assert_close(dropping(tokens)[0], plain(tokens)[0], atol=1e-6, rtol=0)


def test_bfloat16_autocast_is_finite_and_close(variant, tokens):
    backbone = build(variant, dropout=0.0)
    expected, state = backbone(tokens)
    expected, _ = backbone(tokens, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = backbone(tokens)
        hidden, _ = backbone(tokens, state)
    hidden.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())
    assert (hidden.float() - expected).square().mean() < 1e-3 * expected.square().mean()


def test_state_dict_round_trip(variant, tokens):
    source, target = build(variant, seed=1).eval(), build(variant, seed=2).eval()
    file = BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(target(tokens)[0], source(tokens)[0])


@pytest.mark.parametrize("backbone_class", CLASSES)
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_layers"])
def test_sizes_are_checked(backbone_class, name):
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
        backbone_class(**{"vocab_size": VOCAB, name: 0})


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize(
    ("backbone_class", "name"),
    [
        (RecurrentBackbone, "dropout"),
        (RecurrentBackbone, "input_dropout"),
        (RecurrentBackbone, "embedding_dropout"),
        (TransformerBackbone, "dropout"),
    ],
)
def test_probabilities_are_checked(backbone_class, name, p):
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\), got {p}"):
        backbone_class(VOCAB, **{name: p})


# Recurrent backbones


@pytest.mark.parametrize("cell", RECURRENT)
def test_two_segments_with_carried_state_equal_one(cell):
    backbone = build(cell, dropout=0.5).eval()
    tokens = torch.randint(VOCAB, (BATCH, 2 * TIME))
    whole, final_state = backbone(tokens)
    first, state = backbone(tokens[:, :TIME])
    second, state = backbone(tokens[:, TIME:], state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(state, final_state, atol=1e-6, rtol=0)
    assert (backbone(tokens[:, TIME:])[0] - second).abs().max() > 1e-3  # the state is used


@pytest.mark.parametrize("cell", RECURRENT)
def test_state_is_attached_to_the_graph(cell, tokens):
    backbone = build(cell)
    _, state = backbone(torch.zeros_like(tokens))  # only here is type 0 read
    hidden, _ = backbone(tokens.clamp(min=1), state)
    hidden.sum().backward()
    assert backbone.embedding.weight.grad[0].abs().max() > 0


@pytest.mark.parametrize(("cell", "reference"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_without_dropout_equals_torch_stack_of_layers(cell, reference, tokens):
    backbone = build(cell, num_layers=3)
    stack = reference(HIDDEN, HIDDEN, num_layers=3, batch_first=True)
    stack.load_state_dict(
        {
            name.replace("_l0", f"_l{i}"): weight
            for i, layer in enumerate(backbone.layers)
            for name, weight in layer.state_dict().items()
        }
    )
    hidden, _ = backbone(tokens)
    torch.testing.assert_close(hidden, stack(backbone.embedding(tokens))[0], atol=1e-6, rtol=0)


def test_recurrent_initial_weights():
    backbone = RecurrentBackbone(500, 100)
    assert 0.099 < backbone.embedding.weight.abs().max() <= 0.1
    for layer in backbone.layers:
        for weight in layer.parameters():
            assert 0.09 < weight.abs().max() <= 0.1  # 1 / sqrt(100)


def layer_inputs(backbone, tokens):
    """What every recurrent layer is given, and the hidden vectors, for one forward pass."""
    seen = []
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in backbone.layers]
    hidden, _ = backbone(tokens)
    for handle in handles:
        handle.remove()
    return [*seen, hidden]


def assert_locked(x, p):
    """Dropped features of x (B, T, C) are the same at every step, about a share p, and differ between sequences."""
    dropped = x == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert (dropped[:, 0].float().mean() - p).abs() < 0.05
    assert not torch.equal(dropped[0, 0], dropped[1, 0])


@pytest.mark.parametrize("cell", RECURRENT)
def test_dropout_is_locked_over_time_between_layers_and_on_the_output(cell):
    torch.manual_seed(0)
    backbone = RecurrentBackbone(VOCAB, 200, cell=cell, dropout=0.4)
    tokens = torch.randint(VOCAB, (BATCH, TIME))
    first, between, output = layer_inputs(backbone, tokens)
    assert torch.equal(first, backbone.embedding(tokens))
    assert_locked(between, p=0.4)
    assert_locked(output, p=0.4)
    assert not torch.equal(between[:, 0] == 0, output[:, 0] == 0)
    assert not torch.equal(output == 0, backbone(tokens)[0] == 0)  # a new mask for every call


def test_input_dropout_is_locked_over_time_and_rescaled():
    torch.manual_seed(0)
    backbone = RecurrentBackbone(VOCAB, 200, input_dropout=0.4)
    tokens = torch.randint(VOCAB, (BATCH, TIME))
    x, _, output = layer_inputs(backbone, tokens)
    assert_locked(x, p=0.4)
    torch.testing.assert_close(x, backbone.embedding(tokens) / 0.6 * (x != 0))
    assert (output != 0).all()


def test_locked_dropout_keeps_the_expectation():
    torch.manual_seed(0)
    backbone = RecurrentBackbone(VOCAB, HIDDEN, num_layers=1, dropout=0.25)
    tokens = torch.randint(VOCAB, (1, TIME)).expand(20_000, TIME)  # 20,000 masks of one sequence
    with torch.no_grad():
        dropped = backbone(tokens)[0].mean(dim=0)
        expected = backbone.eval()(tokens[:1])[0][0]
    # The standard error of the ratio is sqrt(p / (1 - p) / 20,000) = 0.004.
    torch.testing.assert_close(dropped / expected, torch.ones_like(expected), atol=0.02, rtol=0)


def test_embedding_dropout_removes_whole_types_and_rescales():
    torch.manual_seed(0)
    backbone = RecurrentBackbone(1000, HIDDEN, embedding_dropout=0.3)
    tokens = torch.arange(1000).repeat(2, 2)  # every type four times
    x = layer_inputs(backbone, tokens)[0].view(4, 1000, HIDDEN)
    removed = (x == 0).all(dim=-1)  # (4, 1000)
    assert torch.equal(removed, removed[:1].expand_as(removed))
    assert (removed[0].float().mean() - 0.3).abs() < 0.06  # four standard errors
    torch.testing.assert_close(x[0][~removed[0]], backbone.embedding.weight[~removed[0]] / 0.7)
    again = layer_inputs(backbone, tokens)[0].view(4, 1000, HIDDEN)
    assert not torch.equal((again == 0).all(dim=-1), removed)
    assert torch.equal(layer_inputs(backbone.eval(), tokens)[0], backbone.embedding(tokens))


def test_cell_is_checked():
    with pytest.raises(ValueError, match=r"^cell must be one of lstm, gru, got 'rnn'"):
        RecurrentBackbone(VOCAB, cell="rnn")


def test_state_of_another_depth_is_an_error(tokens):
    _, state = build("lstm", num_layers=3)(tokens)
    with pytest.raises(ValueError, match="longer"):
        build("lstm", num_layers=2)(tokens, state)


# Transformer


def rotate_by_complex_numbers(x):
    """RoFormer's rotation, pair j of position t by t / 10,000^(2 j / hs), of x (B, nh, T, hs) in float64."""
    time, size = x.shape[-2:]
    turn = torch.tensor([[t / 10_000 ** (2 * j / size) for j in range(size // 2)] for t in range(time)]).double()
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


@pytest.mark.parametrize("rotary", [True, False])
def test_attention_equals_explicit_masked_softmax(rotary):
    torch.manual_seed(0)
    heads, size = 2, HIDDEN // 2
    attention = CausalSelfAttention(HIDDEN, heads, dropout=0.5).double().eval()
    x = torch.randn(BATCH, TIME, HIDDEN, dtype=torch.float64)
    q, k, v = (x @ w.T for w in attention.qkv.weight.split(HIDDEN))  # (B, T, C) each
    q, k, v = (y.view(BATCH, TIME, heads, size).transpose(1, 2) for y in (q, k, v))  # (B, nh, T, hs) each
    if rotary:
        q, k = rotate_by_complex_numbers(q), rotate_by_complex_numbers(k)
    logits = q @ k.transpose(-1, -2) / math.sqrt(size)  # (B, nh, T, T)
    future = torch.ones(TIME, TIME, dtype=torch.bool).triu(diagonal=1)
    y = logits.masked_fill(future, -math.inf).softmax(dim=-1) @ v
    expected = y.transpose(1, 2).flatten(2) @ attention.projection.weight.T
    rotation = rotary_tables(TIME, size, x.device) if rotary else None
    torch.testing.assert_close(attention(x, rotation), expected, atol=1e-6 if rotary else 1e-12, rtol=0)


def test_rotary_logits_depend_on_distance_alone():
    torch.manual_seed(0)
    length, size = 200, 8
    tables = rotary_tables(length, size, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, size, dtype=torch.float64)
    everywhere = (1, 1, length, size)  # the same query and key at every position
    logits = rotate(q.expand(everywhere), *tables) @ rotate(k.expand(everywhere), *tables).transpose(-1, -2)
    by_distance = []
    for distance in range(length):
        diagonal = logits[0, 0].diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
        by_distance.append(diagonal[0])
    torch.testing.assert_close(by_distance[0], (q * k).sum())  # not rotated at distance 0
    assert torch.stack(by_distance).std() > 0.1


def test_rotary_tables_keep_their_precision_in_a_bfloat16_program():
    torch.set_default_dtype(torch.bfloat16)
    try:
        cos, sin = rotary_tables(1000, 8, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert abs(cos[999, 0].item() - math.cos(999)) < 1e-4
    assert abs(sin[999, 0].item() - math.sin(999)) < 1e-4


def test_learned_positions_stop_at_max_length():
    backbone = build("learned", max_length=TIME)
    assert backbone(torch.zeros(1, TIME, dtype=torch.long))[0].shape == (1, TIME, HIDDEN)
    with pytest.raises(ValueError, match=f"{TIME + 1} tokens is longer than max_length={TIME}"):
        backbone(torch.zeros(1, TIME + 1, dtype=torch.long))


def test_rotary_positions_have_no_limit():
    hidden, _ = build("rotary", max_length=TIME).eval()(torch.zeros(1, 10 * TIME, dtype=torch.long))
    assert hidden.isfinite().all()


def test_transformer_initial_weights():
    torch.manual_seed(0)
    backbone = TransformerBackbone(500, 128, num_layers=8, positions="learned", max_length=100)
    for name, weight in backbone.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones(128)), name
        else:
            expected = 0.02 / 4 if "projection" in name else 0.02  # sqrt(2 * 8 layers) = 4
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name


def test_transformer_dropout_changes_every_call(tokens):
    backbone = build("rotary", dropout=0.5)
    assert not torch.equal(backbone(tokens)[0], backbone(tokens)[0])


@pytest.mark.parametrize("positions", TRANSFORMER)
def test_transformer_compiles_as_one_graph(positions, tokens):
    backbone = build(positions).eval()
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens)[0], backbone(tokens)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "^num_heads must be at least 1, got 0"),
        ({"max_length": 0}, "^max_length must be at least 1, got 0"),
        ({"positions": "sine"}, "^positions must be rotary or learned, got 'sine'"),
        ({"hidden_size": 10, "num_heads": 4}, "^num_heads must divide hidden_size, got 4 heads for 10"),
        ({"hidden_size": 9, "num_heads": 3}, "^rotary positions need an even hidden_size / num_heads, got 9 / 3"),
    ],
)
def test_transformer_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransformerBackbone(VOCAB, **arguments)
