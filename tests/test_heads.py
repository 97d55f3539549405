from io import BytesIO

import pytest
import torch
from references import mixture, press_rank, probabilities
from torch import nn

from lit_sigsoftmax import OutputHead
from lit_sigsoftmax.activations import available_activations, get_activation
from lit_sigsoftmax.functional import log_normalize

HIDDEN, VOCAB, EXPERTS = 6, 11, [1, 2, 4]
WIKITEXT2 = 33_278  # types

every_head = pytest.mark.parametrize(("name", "n_experts"), [(a, k) for a in available_activations() for k in EXPERTS])


class Power(nn.Module):
    """An output activation with a parameter, drawn at random."""

    def __init__(self, exponent=None):
        super().__init__()
        self.exponent = nn.Parameter(torch.rand(()) + 0.5 if exponent is None else torch.tensor(exponent))

    def forward(self, z):
        return self.exponent * z + nn.functional.logsigmoid(z)


def doubled(z):
    return 2 * z


def build(name, n_experts=1, seed=0, scale=1.0, **kwargs):
    """A head in float64 whose parameters are all random, with logits and latent values of about unit size."""
    torch.manual_seed(seed)
    head = OutputHead(HIDDEN, VOCAB, name, n_experts, **kwargs).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=scale / HIDDEN**0.5 if parameter.dim() == 2 else 0.5)
    return head


def tokens(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, HIDDEN, dtype=torch.float64, generator=generator)
    return hidden, torch.randint(VOCAB, shape, generator=generator)


def exact(head, hidden):
    """The head's probabilities by the formula of its definition, (N, V) float64."""
    if head.n_experts == 1:
        return probabilities(hidden @ head.weight.T + head.bias, head.activation)
    projections = zip(head.latent.weight.split(head.hidden_size), head.latent.bias.split(head.hidden_size), strict=True)
    return mixture(hidden, head.weight, head.bias, head.prior.weight, projections, head.activation)


# The distribution


@every_head
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_probabilities_of_a_large_vocabulary_sum_to_one(name, n_experts, scale):
    torch.manual_seed(0)
    head = OutputHead(64, WIKITEXT2, name, n_experts)
    hidden, target = torch.randn(3, 64), torch.tensor([0, 17, WIKITEXT2 - 1])
    with torch.no_grad():
        head.weight.normal_(std=scale / 8)
        log_p, nll = head.log_prob(hidden), head.nll(hidden, target)
    assert log_p.shape == (3, WIKITEXT2)
    assert log_p.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(log_p.double().exp().sum(-1), torch.ones(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(nll, -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), atol=2e-5, rtol=1e-6)


@every_head
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_equals_the_oracle(name, n_experts, scale):
    head = build(name, n_experts, scale=scale)
    hidden, target = tokens(40)
    expected = exact(head, hidden).log()
    torch.testing.assert_close(head.log_prob(hidden), expected)
    torch.testing.assert_close(head.nll(hidden, target), -expected[torch.arange(40), target])


@every_head
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_shapes(name, n_experts, shape):
    head = build(name, n_experts)
    hidden, target = tokens(*shape)
    log_p, nll = head.log_prob(hidden), head.nll(hidden, target)
    assert log_p.shape == (*shape, VOCAB)
    assert nll.shape == shape
    torch.testing.assert_close(nll, -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(log_p.reshape(-1, VOCAB), exact(head, hidden.reshape(-1, HIDDEN)).log())


@pytest.mark.parametrize("name", available_activations())
def test_one_expert_is_the_plain_layer(name):
    head = build(name)
    hidden, _ = tokens(7)
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    assert torch.equal(head.log_prob(hidden), log_normalize(logits, head.activation))
    assert dict(head.named_parameters(recurse=False)).keys() == {"weight", "bias"}
    assert dict(head.named_children()).keys() <= {"activation"}  # no projections


@pytest.mark.parametrize("name", available_activations())
def test_equal_experts_are_one_expert_of_the_latent_vector(name):
    head = build(name, 4)
    with torch.no_grad():
        for part in (head.latent.weight, head.latent.bias):
            part.copy_(part[:HIDDEN].repeat(4, *(1 for _ in part.shape[1:])))
    hidden, _ = tokens(7)
    latent = torch.tanh(head.latent(hidden)[:, :HIDDEN])
    expected = log_normalize(nn.functional.linear(latent, head.weight, head.bias), head.activation)
    torch.testing.assert_close(head.log_prob(hidden), expected)


@pytest.mark.parametrize("name", available_activations())
def test_a_mixture_breaks_the_rank_of_softmax(name):
    head = build(name, 2)
    hidden, _ = tokens(200)
    assert press_rank(head.log_prob(hidden)) == VOCAB > HIDDEN + 1


@every_head
def test_without_bias(name, n_experts):
    head = build(name, n_experts, bias=False)
    hidden, target = tokens(5)
    assert head.bias is None
    log_p = head.log_prob(hidden)
    torch.testing.assert_close(head.nll(hidden, target), -log_p[torch.arange(5), target])
    head.bias = nn.Parameter(torch.zeros(VOCAB, dtype=torch.float64))
    torch.testing.assert_close(log_p, exact(head, hidden).log())


@every_head
def test_bfloat16(name, n_experts):
    """Autocast and bfloat16 weights: float32 nats, close to float64's."""
    reference = build(name, n_experts, scale=0.5)
    with torch.no_grad():
        reference.bias.fill_(1.0)  # where relu is smooth
    hidden, target = tokens(30)
    expected = reference.nll(hidden, target)
    head = build(name, n_experts).float()
    head.load_state_dict(reference.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = head.log_prob(hidden.float()), head.nll(hidden.float(), target)
    autocast[1].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    head.bfloat16()
    for log_p, nll in (autocast, (head.log_prob(hidden.bfloat16()), head.nll(hidden.bfloat16(), target))):
        assert log_p.dtype == nll.dtype == torch.float32
        assert log_p.isfinite().all()
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(30), atol=1e-5, rtol=0)
        assert (nll - expected).abs().mean() < 0.02


# Gradients


@every_head
def test_gradcheck(name, n_experts):
    head = build(name, n_experts)
    hidden, target = tokens(4)
    target[1] = -100
    hidden.requires_grad_()
    inputs = (hidden, *head.parameters())  # gradcheck varies them in place
    assert torch.autograd.gradcheck(lambda *_: head.nll(hidden, target), inputs)
    assert torch.autograd.gradcheck(lambda *_: head.log_prob(hidden)[:2, :3], inputs)


@every_head
def test_ignored_targets_cost_exactly_nothing(name, n_experts):
    head = build(name, n_experts)
    hidden, target = tokens(2, 3)
    expected = head.nll(hidden, target)
    target[0, 1] = target[1, 2] = -100
    counted = target != -100
    hidden.requires_grad_()
    nll = head.nll(hidden, target)
    assert (nll[~counted] == 0).all()
    torch.testing.assert_close(nll[counted], expected[counted])
    nll.sum().backward()
    assert (hidden.grad[~counted] == 0).all()
    assert (hidden.grad[counted] != 0).any(-1).all()
    head.zero_grad()
    head.nll(hidden, torch.full_like(target, -100)).sum().backward()
    assert all((parameter.grad == 0).all() for parameter in head.parameters())


@pytest.mark.parametrize("n_experts", [1, 3])
def test_a_module_activation_is_trained(n_experts):
    head = OutputHead(HIDDEN, VOCAB, Power(1.5), n_experts).double()
    hidden, target = tokens(4)
    assert torch.autograd.gradcheck(lambda _: head.nll(hidden, target), head.activation.exponent)
    assert "activation.exponent" in dict(head.named_parameters())


@pytest.mark.parametrize("name", available_activations())
@pytest.mark.parametrize("n_experts", EXPERTS)
def test_gradients_stay_finite_at_large_logits(name, n_experts):
    head = build(name, n_experts, scale=1000.0).float()
    hidden, target = tokens(30)
    hidden = hidden.float().requires_grad_()
    nll = head.nll(hidden, target)
    nll.sum().backward()
    assert nll.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (hidden, *head.parameters()))


# The paired design: one seed, the same draws for every head

LAYERS = [(a, k) for a in [*available_activations(), Power] for k in EXPERTS]


@pytest.mark.parametrize(("activation", "n_experts"), LAYERS)
def test_weight_and_later_draws_do_not_depend_on_the_layer(activation, n_experts):
    torch.manual_seed(3)
    head, later = OutputHead(HIDDEN, VOCAB, activation, n_experts), torch.rand(5)
    torch.manual_seed(3)
    plain, expected = OutputHead(HIDDEN, VOCAB), torch.rand(5)
    assert torch.equal(head.weight, plain.weight)
    assert torch.equal(later, expected)


@pytest.mark.parametrize(("activation", "n_experts"), LAYERS)
def test_a_seed_fixes_the_whole_head_and_another_changes_it(activation, n_experts):
    heads = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        heads.append(OutputHead(HIDDEN, VOCAB, activation, n_experts).state_dict())
    first, second, other = heads
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if key.endswith("weight"))


def test_initial_values():
    head = OutputHead(100, 500, n_experts=3)
    assert 0.099 < head.weight.abs().max() <= 0.1
    assert (head.bias == 0).all()
    assert head.prior.bias is None
    assert (head.prior.weight.shape, head.latent.weight.shape) == ((3, 100), (300, 100))


# Use in a model


@every_head
def test_tied_to_an_embedding(name, n_experts):
    head, embedding = build(name, n_experts), nn.Embedding(VOCAB, HIDDEN).double()
    head.weight = embedding.weight
    hidden, target = tokens(5)
    torch.testing.assert_close(head.log_prob(hidden), exact(head, hidden).log())
    head.nll(hidden, target).sum().backward()
    assert embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("activation", "n_experts"), LAYERS)
def test_state_dict_round_trip(activation, n_experts):
    source, target = build(activation, n_experts, seed=1), build(activation, n_experts, seed=2)
    hidden, _ = tokens(5)
    assert not torch.equal(source.log_prob(hidden), target.log_prob(hidden))
    file = BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(source.log_prob(hidden), target.log_prob(hidden))


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "n_experts"])
@pytest.mark.parametrize("size", [0, -3])
def test_sizes_are_checked(name, size):
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "n_experts": 2, name: size}
    with pytest.raises(ValueError, match=f"{name} is at least 1, not {size}"):
        OutputHead(**sizes)


def test_activation_and_backend_are_checked():
    with pytest.raises(ValueError, match="unknown output activation 'sofmax'"):
        OutputHead(HIDDEN, VOCAB, "sofmax")
    with pytest.raises(ValueError, match="unknown loss backend 'fast'"):
        OutputHead(HIDDEN, VOCAB, backend="fast")


def test_the_choice_of_the_loss_is_visible():
    assert OutputHead(HIDDEN, VOCAB).loss_backend == "chunked"
    assert OutputHead(HIDDEN, VOCAB, backend="reference").loss_backend == "reference"


@pytest.mark.parametrize(
    ("activation", "spec", "name"),
    [
        *((a, a, a) for a in available_activations()),
        (get_activation("sigsoftmax"), "sigsoftmax", "sigsoftmax"),
        (doubled, f"{__name__}.doubled", f"{__name__}.doubled"),
        ("torch.nn.LogSigmoid", "torch.nn.LogSigmoid", "torch.nn.LogSigmoid"),
        ({"class_path": "torch.nn.LogSigmoid"}, {"class_path": "torch.nn.LogSigmoid"}, "torch.nn.LogSigmoid"),
        (nn.LogSigmoid(), {"custom": "LogSigmoid"}, "LogSigmoid"),
        (lambda z: z, {"custom": f"{__name__}.<lambda>"}, f"{__name__}.<lambda>"),
    ],
)
def test_name_and_specification(activation, spec, name):
    for n_experts in (1, 4):
        head = OutputHead(HIDDEN, VOCAB, activation, n_experts)
        assert head.name == f"{name} x{n_experts}"
        assert head.activation_spec == spec
        assert str(head.activation_spec) in repr(head)
