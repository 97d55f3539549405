import copy
import itertools
import math
import random
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from references import probabilities
from torch import nn

from lit_sigsoftmax import LanguageModel
from lit_sigsoftmax.activations import activation_spec, available_activations, get_activation
from lit_sigsoftmax.backbones import RecurrentBackbone, TransformerBackbone
from lit_sigsoftmax.data import Corpus, CorpusDataModule
from lit_sigsoftmax.faults import TrainingError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(LeafSpec|many workers|log_every_n_steps|ModelCheckpoint|carries no state)"
)

HIDDEN = 8
WORDS = ["<eos>", "a", "b", "c", "d", "e", "f"]
VOCAB = len(WORDS)


def text(length, seed):
    words = random.Random(seed)
    return [words.choice(WORDS) for _ in range(length)]


class TinyData(CorpusDataModule):
    """Random words: 12 training segments of 4 streams by default."""

    def load_corpus(self):
        return Corpus.from_tokens("tiny", WORDS + text(240 - VOCAB, 0), text(83, 1), text(101, 2))


class PlainGRU(nn.Module):
    """A user's own backbone, which knows nothing of this library."""

    def __init__(self, vocab_size=VOCAB, hidden_size=HIDDEN):
        super().__init__()
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)

    def forward(self, tokens, state=None):
        return self.gru(self.embedding(tokens), state)


class RunningMean(nn.Module):
    """A user's own backbone without state, which returns the hidden vectors alone."""

    def __init__(self):
        super().__init__()
        self.vocab_size, self.hidden_size = VOCAB, HIDDEN
        self.embedding = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return x.cumsum(1) / torch.arange(1, tokens.size(1) + 1).unsqueeze(-1)


BACKBONES = {
    "lstm": lambda: RecurrentBackbone(VOCAB, HIDDEN, 1, dropout=0.2, input_dropout=0.2, embedding_dropout=0.1),
    "transformer": lambda: TransformerBackbone(VOCAB, HIDDEN, 2, num_heads=2),
    "gru": PlainGRU,
    "stateless": RunningMean,
}
LAYERS = [("softmax", 1), ("sigsoftmax", 3)]

every_backbone = pytest.mark.parametrize("kind", BACKBONES)
every_layer = pytest.mark.parametrize(("activation", "n_experts"), LAYERS)


def build(kind="lstm", *args, seed=0, cls=LanguageModel, **kwargs):
    torch.manual_seed(seed)
    return cls(BACKBONES[kind](), *args, **kwargs)


def sharp(model):
    """Larger weights in float64, so that a real dependence is far above rounding error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.7)
    return model.double().eval()


@pytest.fixture
def trainer(tmp_path):
    def make(**kwargs):
        return Trainer(
            **{
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "num_sanity_val_steps": 0,
                "default_root_dir": tmp_path,
                **kwargs,
            }
        )

    return make


def batch(*shape, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, shape, generator=generator), torch.randint(VOCAB, shape, generator=generator)


# The distribution


@every_backbone
@every_layer
def test_log_prob_is_causal(kind, activation, n_experts):
    """A token changes the prediction made at its position and none made before."""
    model = sharp(build(kind, activation=activation, n_experts=n_experts))
    tokens, _ = batch(3, 6)
    log_p, _ = model.log_prob(tokens)
    assert log_p.shape == (3, 6, VOCAB)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3, 6).double())
    for t in range(6):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        other, _ = model.log_prob(changed)
        torch.testing.assert_close(other[:, :t], log_p[:, :t], atol=1e-12, rtol=0)
        assert ((other[:, t] - log_p[:, t]).abs().amax(-1) > 1e-4).all()


@every_backbone
@every_layer
def test_training_loss_equals_a_hand_computation(kind, activation, n_experts, trainer):
    """The mean over the first batch of -log p(target), from the log-probabilities of a copy without dropout."""
    model = build(kind, activation=activation, n_experts=n_experts)
    for module in model.modules():
        for name in ("dropout", "input_dropout", "embedding_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    data = TinyData(batch_size=4, bptt=9)
    tokens, target = next(iter(data.train_dataloader()))
    log_p, _ = copy.deepcopy(model).eval().log_prob(tokens)
    expected = -log_p.gather(-1, target.unsqueeze(-1)).mean()
    run = trainer(max_steps=1, limit_train_batches=1, limit_val_batches=0)
    run.fit(model, data)
    torch.testing.assert_close(run.callback_metrics["train/loss"], expected)
    torch.testing.assert_close(run.callback_metrics["train/perplexity"].float(), expected.exp())


def test_log_prob_is_the_output_layer_on_the_backbone():
    model = build("gru", activation="sigsoftmax").eval()
    tokens, _ = batch(2, 5)
    hidden, state = model.backbone(tokens)
    log_p, next_state = model.log_prob(tokens)
    expected = probabilities(hidden @ model.head.weight.T + model.head.bias, model.head.activation).log()
    torch.testing.assert_close(log_p.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(next_state, state)
    whole, _ = model.log_prob(torch.cat([tokens, tokens], dim=1))
    torch.testing.assert_close(model.log_prob(tokens, state)[0], whole[:, 5:])


@pytest.mark.parametrize("activation", available_activations())
@pytest.mark.parametrize("n_experts", [1, 3])
def test_a_uniform_model_costs_log_vocab_size(activation, n_experts, trainer):
    model = build("gru", activation=activation, n_experts=n_experts)
    nn.init.zeros_(model.head.weight)
    run = trainer()
    run.test(model, TinyData(test_batch_size=3, bptt=10), verbose=False)
    assert math.isclose(run.callback_metrics["test/loss"], math.log(VOCAB), rel_tol=1e-6)
    assert math.isclose(run.callback_metrics["test/perplexity"], VOCAB, rel_tol=1e-6)


class OneBatch(TinyData):
    def load_corpus(self):
        tokens = [*WORDS[1:], *WORDS, *text(12, 9)]  # the first, from <eos>, is not <eos>: positions are relative
        return Corpus.from_tokens("one batch", tokens, tokens, tokens)


class Fast(LanguageModel):
    """A user's optimizer."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@every_layer
def test_overfits_one_batch(kind, activation, n_experts, trainer):
    torch.manual_seed(0)
    backbones = {
        "lstm": lambda: RecurrentBackbone(VOCAB, 32, 1),
        "transformer": lambda: TransformerBackbone(VOCAB, 32, 1, num_heads=2, dropout=0.0),
    }
    model = Fast(backbones[kind](), activation=activation, n_experts=n_experts)
    run = trainer(max_epochs=80, limit_val_batches=0)
    run.fit(model, OneBatch(batch_size=1, bptt=25))
    assert run.callback_metrics["train/loss"] < 0.1


# Carried state


class Traced(RecurrentBackbone):
    """Remembers the states that it was given and gave back."""

    def __init__(self):
        super().__init__(VOCAB, HIDDEN, 1, cell="gru")
        self.calls = []

    def forward(self, tokens, state=None):
        hidden, next_state = super().forward(tokens, state)
        self.calls.append((self.training, state, next_state))
        return hidden, next_state

    def epochs(self, training):
        """The calls of a stage, cut where the state was fresh."""
        epochs = []
        for stage, state, next_state in self.calls:
            if stage == training:
                if state is None:
                    epochs.append([])
                epochs[-1].append((state, next_state))
        return epochs


def assert_carried(epoch):
    """Every segment but the first starts from the state in which the last one ended, without its gradient."""
    for (_, (before,)), ((after,), _) in itertools.pairwise(epoch):
        assert torch.equal(before, after)
        assert not after.requires_grad


def test_state_is_carried_detached_and_fresh_in_every_epoch(trainer):
    model = LanguageModel(Traced())
    trainer(max_epochs=3).fit(model, TinyData(batch_size=4, eval_batch_size=2, bptt=10))
    training, validation = model.backbone.epochs(True), model.backbone.epochs(False)
    assert [len(epoch) for epoch in training] == [6, 6, 6]
    assert [len(epoch) for epoch in validation] == [5, 5, 5]
    for epoch in training + validation:
        assert_carried(epoch)
    assert all(next_state[0].requires_grad for epoch in training for _, next_state in epoch)


def test_training_state_survives_a_validation_in_the_middle_of_an_epoch(trainer):
    model = LanguageModel(Traced())
    trainer(max_epochs=1, val_check_interval=2).fit(model, TinyData(batch_size=4, eval_batch_size=2, bptt=10))
    assert [len(epoch) for epoch in model.backbone.epochs(False)] == [5, 5, 5]
    (epoch,) = model.backbone.epochs(True)
    assert len(epoch) == 6
    assert_carried(epoch)


def test_training_perplexity_is_of_all_tokens_of_the_epoch(trainer):
    """Also with a validation in its middle: the sums of the stages are apart."""
    losses = []

    class Recording(LanguageModel):
        def token_nll(self, batch, stage):
            nll = super().token_nll(batch, stage)
            losses.extend(nll.detach().flatten().tolist() if stage == "train" else [])
            return nll

    run = trainer(max_epochs=1, val_check_interval=2)
    run.fit(build(cls=Recording), TinyData(batch_size=4, bptt=16))
    assert len(losses) == 240
    mean = sum(losses) / len(losses)
    assert math.isclose(run.callback_metrics["train/perplexity"], math.exp(mean), rel_tol=1e-6)


# Exact evaluation


def score(model, trainer, **data):
    """The logged test loss, and the number of tokens that it is the mean of."""
    run = trainer()
    run.test(model, TinyData(**data), verbose=False)
    loss = float(run.callback_metrics["test/loss"])
    assert math.isclose(run.callback_metrics["test/perplexity"], math.exp(loss), rel_tol=1e-6)
    return loss, int(model.nll["test_nll"].tokens)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@every_layer
def test_evaluation_does_not_depend_on_the_segment_length(kind, activation, n_experts, trainer):
    model = build(kind, activation=activation, n_experts=n_experts)
    trainer(max_epochs=1, limit_val_batches=0).fit(model, TinyData(bptt=5))
    corpus = TinyData().corpus
    stream = torch.cat([torch.tensor([corpus.vocabulary.eos_id]), corpus.test]).long()
    model.eval()  # dropout is on in training
    log_p = model.log_prob(stream[None, :-1])[0].detach()
    expected = -float(log_p[0].double()[torch.arange(101), stream[1:]].mean())
    for bptt in (3, 10, 50, 1000):
        loss, tokens = score(model, trainer, test_batch_size=1, bptt=bptt)
        assert math.isclose(loss, expected, abs_tol=1e-6)
        assert tokens == 101
    first, second = (score(model, trainer, test_batch_size=4, bptt=bptt)[0] for bptt in (3, 50))
    assert math.isclose(first, second, abs_tol=1e-6)


@pytest.mark.parametrize("streams", [1, 2, 7, 100, 101])
def test_every_token_is_counted_once_at_any_number_of_streams(streams, trainer):
    model = build("stateless")
    nn.init.constant_(model.head.bias[1:3], 5.0)  # so that tokens cost differently
    run = trainer()
    run.validate(model, TinyData(eval_batch_size=min(streams, 83), bptt=10), verbose=False)
    assert int(model.nll["val_nll"].tokens) == 83
    _, tokens = score(model, trainer, test_batch_size=streams, bptt=10)
    assert tokens == 101


def test_overlapping_windows_are_for_models_without_state(trainer):
    with pytest.raises(TrainingError, match=r"data\.context_min is 4.*set data\.context_min to 0"):
        trainer().test(build("lstm"), TinyData(context_min=4), verbose=False)
    with pytest.warns(UserWarning, match=r"carries no state and data\.context_min is 0"):
        trainer().test(build("transformer"), TinyData(), verbose=False)
    losses = [trainer().test(build("transformer"), TinyData(context_min=200, bptt=b), verbose=False) for b in (5, 30)]
    assert losses[0][0]["test/loss"] == pytest.approx(losses[1][0]["test/loss"], rel=1e-6)


@pytest.mark.parametrize("stage", ["train", "val", "test", "predict"])
def test_token_nll_needs_no_trainer(stage):
    model, (tokens, target) = build("gru"), batch(2, 6)
    whole = model.token_nll((tokens, target), stage)
    model = build("gru")
    parts = [model.token_nll((tokens[:, half], target[:, half]), stage) for half in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_validation_and_test_log_loss_and_perplexity(trainer):
    model, run = build(), trainer(max_epochs=2)
    data = TinyData(bptt=20)
    run.fit(model, data)
    names = {"train/loss", "train/perplexity", "val/loss", "val/perplexity"}
    assert names <= set(run.callback_metrics)
    logged = float(run.callback_metrics["val/loss"])
    (again,) = run.validate(model, data, verbose=False)
    assert math.isclose(again["val/loss"], logged, rel_tol=1e-9)
    (tested,) = run.test(model, data, verbose=False)
    assert set(tested) == {"test/loss", "test/perplexity"}


def test_predict_gives_the_log_probability_of_every_target(trainer):
    model, data, run = build("gru", activation="sigsoftmax"), TinyData(test_batch_size=2, bptt=10), trainer()
    predicted = torch.cat([log_p.flatten() for log_p in run.predict(model, data)])
    loss, tokens = score(model, trainer, test_batch_size=2, bptt=10)
    assert len(predicted) == 102  # one ignored place, worth zero
    assert math.isclose(-float(predicted.double().sum()) / tokens, loss, abs_tol=1e-6)
    again = torch.cat([log_p.flatten() for log_p in run.predict(model, data)])
    assert torch.equal(predicted, again)  # the state is fresh


# Checkpoints


class Bend(nn.Module):
    """An output activation with arguments and a parameter."""

    def __init__(self, at=1.0, power=1.0):
        super().__init__()
        self.at, self.power = nn.Parameter(torch.tensor(at)), power

    def forward(self, z):
        return self.power * z + nn.functional.logsigmoid(z - self.at)


def doubled(z):
    return 2 * z


SPECS = [
    *available_activations(),
    f"{__name__}.doubled",
    f"{__name__}.Bend",
    {"class_path": f"{__name__}.Bend", "init_args": {"at": -0.5, "power": 2.0}},
]


@pytest.fixture
def trained(tmp_path, trainer):
    """Train a model for one step and save it: the path of the checkpoint."""

    def train(model):
        run = trainer(max_steps=1, limit_val_batches=0)
        run.fit(model, TinyData(bptt=10))
        path = tmp_path / "model.ckpt"
        run.save_checkpoint(path)
        model.eval()
        return path

    return train


def log_probs(model):
    return model.eval().log_prob(batch(3, 6)[0])[0]


def load(path, cls=LanguageModel, kind="lstm", **kwargs):
    torch.manual_seed(99)
    return cls.load_from_checkpoint(path, backbone=BACKBONES[kind](), weights_only=True, **kwargs)


@pytest.mark.parametrize("activation", [*SPECS, get_activation("sigsoftmax"), doubled, Bend], ids=str)
@pytest.mark.parametrize("n_experts", [1, 3])
def test_checkpoint_comes_back_as_it_was(activation, n_experts, trained):
    """From a specification, and from a callable that a name or path leads back to."""
    model = build(activation=activation, n_experts=n_experts)
    path = trained(model)
    loaded = load(path)
    assert loaded.head.activation_spec == model.head.activation_spec == activation_spec(activation)
    assert type(loaded.head.activation) is type(model.head.activation)
    assert loaded.head.n_experts == n_experts
    assert torch.equal(log_probs(loaded), log_probs(model))
    if activation != "softmax":
        with pytest.raises(ValueError, match="softmax"):
            load(path, activation="softmax")


@pytest.mark.parametrize("spec", [s for s in SPECS if s != "softmax"], ids=str)
def test_a_trainer_refuses_the_checkpoint_of_another_layer(spec, trained, trainer):
    path = trained(build(activation=spec))
    for run in (
        lambda m: trainer().test(m, TinyData(), ckpt_path=path),
        lambda m: trainer(max_steps=2).fit(m, TinyData(), ckpt_path=path),
    ):
        with pytest.raises(ValueError, match="another output layer") as caught:
            run(build())
        assert str(spec) in str(caught.value)
        assert "'softmax'" in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "other", "named"),
    [
        ({"activation": "sigsoftmax"}, {"activation": "sigmoid"}, ["'sigsoftmax'", "'sigmoid'"]),
        ({"n_experts": 3}, {"n_experts": 4}, ["n_experts 3", "4"]),
        ({"n_experts": 1}, {"n_experts": 3}, ["n_experts 1", "3"]),
        ({"tie_weights": False}, {"vocab_size": VOCAB + 4}, [f"vocab_size {VOCAB}", f"{VOCAB + 4}"]),
        ({"tie_weights": False}, {"tie_weights": True}, ["tie_weights False", "True"]),
    ],
)
def test_loading_into_another_layer_names_both(saved, other, named, trained):
    path = trained(build(**saved))
    with pytest.raises(ValueError, match="another output layer") as caught:
        load(path, **other)
    assert all(words in str(caught.value) for words in named)


def test_loading_into_another_vocabulary_names_both(trained):
    path = trained(build("gru"))
    with pytest.raises(ValueError, match=f"vocab_size {VOCAB}.*{VOCAB + 4}"):
        LanguageModel.load_from_checkpoint(path, backbone=PlainGRU(vocab_size=VOCAB + 4))


def custom_activations():
    return {"lambda": lambda z: 3 * z, "module": Bend(0.5)}


@pytest.mark.parametrize("kind", custom_activations())
def test_custom_activation_must_be_handed_over_again(kind, trained, trainer):
    log_g = custom_activations()[kind]
    model = build(activation=log_g)
    path = trained(model)
    with pytest.raises(ValueError, match=r"custom callable.*activation=\.\.\."):
        load(path)
    with pytest.raises(ValueError, match=r"another output layer.*custom.*'softmax'"):
        load(path, activation="softmax")
    with pytest.raises(ValueError, match=r"another output layer.*custom.*'softmax'"):
        trainer().test(build(), TinyData(), ckpt_path=path)
    assert torch.equal(log_probs(load(path, activation=log_g)), log_probs(model))


def test_a_function_of_a_script_is_taken_when_imported_from_it(trained, monkeypatch):
    """Trained by ``python train.py``, as ``__main__.doubled``; evaluated with ``from train import doubled``."""
    monkeypatch.setattr(doubled, "__module__", "__main__")
    model = build(activation=doubled)
    assert model.head.activation_spec == {"custom": "__main__.doubled"}
    path = trained(model)
    monkeypatch.undo()
    assert torch.equal(log_probs(load(path, activation=doubled)), log_probs(model))


def test_a_lambda_is_taken_wherever_it_is_written(trained):
    def elsewhere():
        return lambda z: 3 * z

    model = build(activation=lambda z: 3 * z)
    path = trained(model)
    assert torch.equal(log_probs(load(path, activation=elsewhere())), log_probs(model))


def test_a_subclass_with_its_own_hook_still_refuses_another_layer(trained, trainer):
    """Lightning's users do not call super() in hooks that do nothing in LightningModule."""

    class WithHook(LanguageModel):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["note"] = "mine"

    path = trained(build(activation="sigsoftmax", cls=WithHook))
    with pytest.raises(ValueError, match=r"'sigsoftmax'.*'softmax'"):
        trainer().test(build(cls=WithHook), TinyData(), ckpt_path=path)
    assert load(path, WithHook).head.activation_spec == "sigsoftmax"


@pytest.mark.parametrize("kind", ["lambda", "module"])
def test_hyperparameters_are_plain_data(kind):
    """What checkpoints hold and loggers write."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Lightning advises to leave a module out, which would lose it
        model = build(activation=custom_activations()[kind])
    for hparams in (model.hparams, model.hparams_initial):
        assert hparams["activation"] == model.head.activation_spec
        plain = {"vocab_size", "activation", "n_experts", "tie_weights", "bias", "loss_backend", "on_nonfinite_loss"}
        assert set(hparams) == plain


def test_checkpoint_is_data(trained):
    content = torch.load(trained(build(activation="sigsoftmax", n_experts=3)), weights_only=True)
    assert {"activation": "sigsoftmax", "n_experts": 3}.items() <= content["hyper_parameters"].items()


def test_a_checkpoint_cannot_run_code(trained, tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    path = trained(build())
    content = torch.load(path, weights_only=True)
    torch.save({**content, "extra": Payload()}, path)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        LanguageModel.load_from_checkpoint(path, backbone=BACKBONES["lstm"]())
    assert not (tmp_path / "made").exists()


# Construction


def test_the_output_layer_may_be_tied_or_not():
    tied, untied = build(), build(tie_weights=False)
    assert tied.head.weight is tied.backbone.embedding.weight
    assert untied.head.weight is not untied.backbone.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) == sum(p.numel() for p in tied.parameters()) + VOCAB * HIDDEN


def test_vocab_size_is_the_backbones_or_given():
    assert build("gru").head.vocab_size == VOCAB
    assert build("gru", vocab_size=VOCAB + 2, tie_weights=False).head.vocab_size == VOCAB + 2


@every_backbone
def test_backbone_weights_and_later_draws_do_not_depend_on_the_layer(kind):
    """The paired design."""
    draws = []
    for activation, n_experts in LAYERS:
        model = build(kind, activation=activation, n_experts=n_experts, tie_weights=False)
        draws.append([*model.backbone.state_dict().values(), model.head.weight, torch.rand(3)])
    for first, second in zip(*draws, strict=True):
        assert torch.equal(first, second)


def without(name):
    backbone = PlainGRU()
    delattr(backbone, name)
    return backbone


def test_backbone_without_hidden_size():
    with pytest.raises(ValueError, match="PlainGRU needs an attribute hidden_size"):
        LanguageModel(without("hidden_size"))


def test_backbone_without_vocab_size():
    with pytest.raises(ValueError, match="vocabulary size is unknown: give vocab_size, or PlainGRU an attribute"):
        LanguageModel(without("vocab_size"))
    assert LanguageModel(without("vocab_size"), vocab_size=VOCAB).head.vocab_size == VOCAB


def test_tying_without_an_embedding():
    with pytest.raises(ValueError, match=r"tie_weights needs PlainGRU\.embedding.*set tie_weights to false"):
        LanguageModel(without("embedding"))
    LanguageModel(without("embedding"), tie_weights=False)


def test_tying_of_unequal_sizes():
    backbone = PlainGRU()
    backbone.embedding = nn.Embedding(VOCAB, HIDDEN + 1)
    with pytest.raises(ValueError, match=rf"\({VOCAB}, {HIDDEN + 1}\).*\({VOCAB}, {HIDDEN}\).*tie_weights to false"):
        LanguageModel(backbone)


def test_unknown_activation_and_sizes_are_refused():
    with pytest.raises(ValueError, match="unknown output activation 'sofmax'"):
        build(activation="sofmax")
    with pytest.raises(ValueError, match="n_experts is at least 1, not 0"):
        build(n_experts=0)


# Subclasses


class Penalised(LanguageModel):
    """A user's penalty in training, with an argument of its own."""

    def __init__(self, backbone, penalty=1.0, **kwargs):
        super().__init__(backbone, **kwargs)
        self.penalty = penalty

    def token_nll(self, batch, stage):
        nll = super().token_nll(batch, stage)
        return nll + self.penalty if stage == "train" else nll


def test_a_subclass_overrides_the_token_loss(trainer):
    losses = []
    for kwargs in ({}, {"cls": Penalised, "penalty": 3.0}):
        run = trainer(max_steps=1, limit_train_batches=1)
        run.fit(build("gru", activation="sigsoftmax", **kwargs), TinyData())
        losses.append((run.callback_metrics["train/loss"], run.callback_metrics["val/loss"]))
    (plain, plain_val), (penalised, penalised_val) = losses
    torch.testing.assert_close(penalised, plain + 3)
    torch.testing.assert_close(penalised_val, plain_val)


def test_a_subclass_keeps_its_argument_in_the_checkpoint(trained):
    path = trained(build("gru", cls=Penalised, penalty=3.0, activation="sigsoftmax", n_experts=2))
    loaded = load(path, Penalised, "gru")
    assert loaded.penalty == 3
    assert (loaded.head.activation_spec, loaded.head.n_experts) == ("sigsoftmax", 2)


def test_a_subclass_overrides_the_optimizer(trainer):
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(build(cls=Fast), TinyData())
    assert [type(optimizer) for optimizer in run.optimizers] == [torch.optim.Adam]
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(build(), TinyData())
    assert [type(optimizer) for optimizer in run.optimizers] == [torch.optim.AdamW]


def test_ignored_targets_do_not_count_in_the_training_loss(trainer):
    """A segment's loss is the mean over the targets that count."""

    class Gaps(TinyData):
        def train_dataloader(self):
            segments = super().train_dataloader()
            segments.target = segments.target.clone()
            segments.target[:, ::2] = -100
            return segments

    data = Gaps(batch_size=4, bptt=10)
    tokens, target = next(iter(data.train_dataloader()))
    model = build("gru")
    log_p, _ = copy.deepcopy(model).log_prob(tokens)
    counted = target != -100
    expected = -log_p[counted].gather(-1, target[counted].unsqueeze(-1)).mean()
    run = trainer(max_steps=1, limit_train_batches=1, limit_val_batches=0)
    run.fit(model, data)
    torch.testing.assert_close(run.callback_metrics["train/loss"], expected)
