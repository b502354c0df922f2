"""Which losses are taken, and which are refused in one line before anything is changed."""

from __future__ import annotations

import itertools
from collections import OrderedDict, UserDict
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from catode.prune.pruner import Pruner
from catode.train.models import DenseResNet

CLASSES = 10
EXAMPLE = torch.zeros(1, 1, 8, 8)


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    model = DenseResNet(64, CLASSES, blocks=2, width=16, hidden=8).train()
    if dropout:
        for block in model.blocks:
            block.out.register_forward_hook(lambda module, args, output: F.dropout(output, dropout, module.training))
    return model


def make(loss=None, model=None, **changes):
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    given = dict(nu=0.5, steps=300, warmup=10, memory=50, check_every=20, rate_ratio=0.05, probe_size=12)
    return model, optimizer, Pruner(model, EXAMPLE, optimizer=optimizer, loss=loss, **given | changes)


def batches(number, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        yield (
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )


def step(pruner, optimizer, loss, batch=None, **given):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return pruner.step(batch, **given)


def state_of(pruner):
    own = pruner.state
    return own.done, own.time, own.keep_prob.tolist(), len(own.draws.rows), own.evidence.curvature.count.tolist()


def refused(run, pruner, match, kind=ValueError):
    before = state_of(pruner)
    with pytest.raises(kind, match=match) as caught:
        run()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert state_of(pruner) == before


def ce(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


WEIGHTS = torch.linspace(0.05, 0.9, CLASSES)
SEPARABLE = {
    "cross entropy": ce,
    "class weights": lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=WEIGHTS),
    "ignore_index": lambda m, b: F.cross_entropy(m(b[0]), torch.where(b[1] > 6, -100, b[1])),
    "label smoothing": lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1),
    "bce": lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]) - 7, F.one_hot(b[1], CLASSES).float()),
    "mse": lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], CLASSES).float()),
    "tenth": lambda m, b: 0.1 * F.cross_entropy(m(b[0]), b[1]),
    "auxiliary": lambda m, b: 0.5 * F.cross_entropy(z := m(b[0]), b[1]) + 0.01 * z.square().mean(),
    "distillation": lambda m, b: (
        16 * F.kl_div((m(b[0]) / 4).log_softmax(1), (b[0].flatten(1)[:, :10]).softmax(1), reduction="batchmean")
    ),
    "two views": lambda m, b: F.cross_entropy(m(b[0]), b[1]) + (m(b[0] + 0.1) - m(b[0])).square().mean(),
    "two views, joined": lambda m, b: consistent(m(torch.cat([b[0], b[0] + 0.1])), b[1]),
    "pseudo-labels": lambda m, b: F.cross_entropy(m(b[0]), torch.no_grad()(m)(b[0] + 0.1).argmax(1)),
}


def consistent(z, y):
    first, second = z.chunk(2)
    return F.cross_entropy(first, y) + (first - second).square().mean()


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_mean_of_losses_of_single_examples_is_taken(name, micro_batches):
    loss = SEPARABLE[name]
    model, optimizer, pruner = make(loss)
    for x, y in batches(30):
        optimizer.zero_grad()
        for batch in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            (loss(model, batch) / micro_batches).backward()
        optimizer.step()
        pruner.step(batch)
    assert not pruner._capture.checked
    evidence = pruner.state.evidence
    assert (evidence.curvature.count > 0).all() and np.isfinite(evidence.benefit).all()


class ClassesFirst(DenseResNet):
    def forward(self, x):
        return super().forward(x).T


@pytest.mark.parametrize(
    ("loss", "taken"),
    [
        (lambda m, b: F.cross_entropy(m(b[0]).T, b[1]), True),
        (lambda m, b: F.cross_entropy(m(b[0]).T @ m(b[0]), torch.arange(len(b[1]))), False),
    ],
)
def test_outputs_may_count_the_examples_in_another_dimension(loss, taken):
    torch.manual_seed(0)
    model, optimizer, pruner = make(loss, ClassesFirst(64, CLASSES, blocks=2, width=16, hidden=8).train())
    (batch,) = batches(1)
    if taken:
        step(pruner, optimizer, loss(model, batch), batch)
        assert not pruner._capture.checked
    else:
        refused(lambda: step(pruner, optimizer, loss(model, batch), batch), pruner, "compares examples")


def info_nce(model, batch):
    z = F.normalize(model(batch[0]))
    other = F.normalize(model(batch[0] + 0.1))
    return F.cross_entropy(z @ other.T / 0.1, torch.arange(len(z)))


def nt_xent(model, batch):
    """Both views in one call."""
    z = F.normalize(model(torch.cat([batch[0], batch[0] + 0.1])))
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(z) // 2))


class BatchHardTriplet:
    def __call__(self, model, batch):
        z, y = model(batch[0]), batch[1]
        distance, same = torch.cdist(z, z, p=1), y[:, None] == y[None]
        far, near = (distance * same).amax(1), (distance + 1e6 * same).amin(1)
        return F.relu(far - near + 5.0).mean()


def dice(model, batch):
    chances, target = model(batch[0]).sigmoid(), F.one_hot(batch[1], CLASSES)
    return 1 - (2 * (chances * target).sum() / (chances.sum() + target.sum()))


@pytest.mark.parametrize(
    ("loss", "name"),
    [(info_nce, "info_nce"), (nt_xent, "nt_xent"), (BatchHardTriplet(), "BatchHardTriplet"), (partial(dice), "dice")],
)
def test_a_loss_that_compares_examples_is_refused_by_its_name(loss, name):
    model, optimizer, pruner = make(loss)
    (batch,) = batches(1)
    refused(lambda: step(pruner, optimizer, loss(model, batch), batch), pruner, f"got {name}, which compares examples")


def test_a_loss_without_second_derivative_needs_other_estimators():
    def margin(model, batch):
        return F.multi_margin_loss(model(batch[0]), batch[1])

    model, optimizer, pruner = make(margin)
    (batch,) = batches(1)
    refused(
        lambda: step(pruner, optimizer, margin(model, batch), batch),
        pruner,
        r'twice differentiable .* Choose estimator="paired" and',
    )
    model, optimizer, pruner = make(margin, estimator="paired")
    for _ in range(30):
        step(pruner, optimizer, margin(model, batch), batch)
    measured = pruner.state.evidence.benefit[~pruner.inventory.is_layer]
    assert np.isfinite(measured).any() and np.nanmax(np.abs(measured)) > 0


# --- the loss given against the loss trained on ----------------------------------------------------------------------


def train(
    pruner,
    model,
    optimizer,
    loss,
    size=32,
    micro=(32,),
    whole=False,
    number=4,
    divide=None,
    autocast=False,
    scale=1.0,
    **given,
):
    for x, y in batches(number, size):
        optimizer.zero_grad()
        for batch in zip(x.split(list(micro)), y.split(list(micro)), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss(model, batch)
            (scale * value / (len(micro) if divide is None else divide)).backward()
        optimizer.step()
        pruner.step((x, y) if whole else batch, **given)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("micro", [(32,), (16, 16), (8, 8, 8, 8), (12, 20), (5, 9, 18)], ids=str)
def test_the_loss_that_is_trained_on_is_taken(micro, dropout, autocast, whole, per_example):
    model, optimizer, pruner = make(ce, network(dropout=dropout), per_example=per_example)
    train(pruner, model, optimizer, ce, micro=micro, autocast=autocast, whole=whole)
    assert not pruner._capture.checked and pruner.state.done == 4


@pytest.mark.parametrize("given", [ce, None])
@pytest.mark.parametrize("micro", [(32,), (16, 16), (8, 8, 8, 8)], ids=str)
def test_a_loss_scale_must_be_told(micro, given):
    model, optimizer, pruner = make(given)
    train(pruner, model, optimizer, ce, micro=micro, scale=1024.0, grad_scale=torch.tensor(1024.0))
    model, optimizer, pruner = make(given)
    match, kind = ("1.02e\\+03 times", ValueError) if given else ("loss scale", RuntimeError)
    refused(lambda: train(pruner, model, optimizer, ce, micro=micro, scale=1024.0), pruner, match, kind)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("whole", [False, True])
def test_micro_batches_must_be_divided_by_their_number(k, whole):
    model, optimizer, pruner = make(ce)
    run = partial(train, pruner, model, optimizer, ce, micro=(32 // k,) * k, divide=1, whole=whole)
    refused(run, pruner, f"is {k} times it. Divide micro-batches")


OTHERS = {
    "tenth": lambda m, b: 0.1 * F.cross_entropy(m(b[0]), b[1]),
    "auxiliary": lambda m, b: 0.5 * F.cross_entropy(z := m(b[0]), b[1]) + 0.01 * z.square().mean(),
    "smoothing": lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1),
    "weights": lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=WEIGHTS),
    "bce": lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]) - 7, F.one_hot(b[1], CLASSES).float()),
    "mse": lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], CLASSES).float()),
    "other labels": lambda m, b: F.cross_entropy(m(b[0]), (b[1] + 1) % CLASSES),
    "two calls": lambda m, b: (F.cross_entropy(m(b[0]), b[1]) + F.cross_entropy(m(b[0] + 0.1), b[1])) / 2,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("micro", [(32,), (16, 16)], ids=str)
def test_another_loss_is_refused_and_taken_when_given(name, micro):
    model, optimizer, pruner = make(ce)
    refused(lambda: train(pruner, model, optimizer, OTHERS[name], micro=micro), pruner, "trained on")
    if name not in ("two calls", "other labels"):
        model, optimizer, pruner = make(None)
        refused(
            lambda: train(pruner, model, optimizer, OTHERS[name], micro=micro), pruner, "must be given", RuntimeError
        )
    model, optimizer, pruner = make(OTHERS[name])
    train(pruner, model, optimizer, OTHERS[name], micro=micro)
    assert pruner.state.done == 4


def augmented(model, batch):
    return F.cross_entropy(model(batch[0] + 0.5 * torch.randn_like(batch[0])), batch[1])


def flipped_by_numpy(model, batch):
    return F.cross_entropy(model(batch[0].flip(3) if np.random.random() < 0.5 else batch[0]), batch[1])


def mixup(model, batch):
    share, order = float(np.random.beta(1.0, 1.0)), torch.randperm(len(batch[0]))
    z = model(share * batch[0] + (1 - share) * batch[0][order])
    return share * F.cross_entropy(z, batch[1]) + (1 - share) * F.cross_entropy(z, batch[1][order])


@pytest.mark.parametrize("loss", [augmented, flipped_by_numpy, mixup])
@pytest.mark.parametrize("seed", range(3))
def test_random_numbers_of_the_loss_itself_are_its_own(loss, seed):
    model, optimizer, pruner = make(loss)
    torch.manual_seed(seed)
    np.random.seed(seed)
    train(pruner, model, optimizer, loss)
    assert not pruner._capture.checked
    model, optimizer, pruner = make(loss)
    refused(lambda: train(pruner, model, optimizer, loss, scale=8.0), pruner, "times it")


def test_a_check_draws_no_random_numbers_of_the_users():
    states = []
    for checked in (True, False):
        model, optimizer, pruner = make(augmented)
        pruner._capture.checked = checked
        torch.manual_seed(0)
        np.random.seed(0)
        train(pruner, model, optimizer, augmented, number=1)
        states.append((torch.rand(3).tolist(), np.random.random(3).tolist(), pruner.keep_prob.tolist()))
    assert states[0] == states[1]


def test_a_mixed_batch_must_be_given_mixed():
    def soft(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def mixed(x, y):
        order = torch.randperm(len(x))
        labels = F.one_hot(y, CLASSES).float()
        return 0.7 * x + 0.3 * x[order], 0.7 * labels + 0.3 * labels[order]

    model, optimizer, pruner = make(soft)
    (batch,) = batches(1)
    made = mixed(*batch)
    refused(
        lambda: step(pruner, optimizer, soft(model, made), batch),
        pruner,
        "`batch` must be what the model was trained on",
    )
    model, optimizer, pruner = make(soft)
    for x, y in batches(3):
        made = mixed(x, y)
        step(pruner, optimizer, soft(model, made), made)


def test_another_batch_is_refused():
    model, optimizer, pruner = make(ce)
    one, other = batches(2)
    refused(lambda: step(pruner, optimizer, ce(model, one), other), pruner, "`batch` must be")
    model, optimizer, pruner = make(ce)
    part = one[0][:20], one[1][:20]
    refused(lambda: step(pruner, optimizer, ce(model, one), part), pruner, "`loss` must fit the batch")


def test_a_loss_may_come_and_go_with_its_size():
    """A step whose gradients are infinite tells nothing; the next one is looked at."""
    model, optimizer, pruner = make(ce)
    one, other = batches(2)
    optimizer.zero_grad()
    (ce(model, one) * torch.inf).backward()
    pruner.step(one, skipped=True)
    assert pruner._capture.checked
    step(pruner, optimizer, ce(model, other), other)
    assert not pruner._capture.checked


# --- batches and outputs of any form ---------------------------------------------------------------------------------


class Named(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


@dataclass(frozen=True)
class Made:
    image: torch.Tensor
    label: torch.Tensor
    source: list[str]


class Encoding(UserDict):
    """As tokenizers' batches are: a mapping that is no dict, with attributes."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class ModelOutput(OrderedDict):
    """As Hugging Face's models return: an ordered dict whose entries are fields of a dataclass, too."""

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self):
        make, _, *rest = super().__reduce__()
        return make, tuple(getattr(self, field.name) for field in fields(self)), *rest


@dataclass
class Classified(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class Plain:
    logits: torch.Tensor
    note: str = "none"


class Forms(DenseResNet):
    """Takes and returns what it is told to."""

    returns = "logits"

    def forward(self, image, scale=1.0, label=None, **_):
        z = super().forward(scale * image)
        if self.returns == "logits":
            return z
        if self.returns == "dict":
            return {"out": z, "name": "x"}
        if self.returns == "tuple":
            return z, None, image.mean()
        if self.returns == "dataclass":
            return Plain(z)
        loss = None if label is None else F.cross_entropy(z, label)
        if self.returns == "namespace":
            return SimpleNamespace(loss=loss, logits=z)
        return Classified(loss, z, (image.flatten(1), z / 2))


def forms(returns="logits"):
    torch.manual_seed(0)
    model = Forms(64, CLASSES, blocks=2, width=16, hidden=8).train()
    model.returns = returns
    return model


def thetas(loss, returns, form, trained=None, number=30):
    """Thetas when batches have a form; `trained` computes the loss from the model and a batch of that form."""
    model, optimizer, pruner = make(loss, forms(returns), rate_ratio=0.2)
    for x, y in batches(number):
        batch = form(x, y)
        step(pruner, optimizer, (trained or loss)(model, batch), None if loss is None else batch)
    assert (pruner.keep_prob < 1).any()
    return pruner.keep_prob


TAKEN = {
    "two arguments": (lambda m, b: F.cross_entropy(m(b[0], 2.0), b[1]), "logits", lambda x, y: (x / 2, y)),
    "keyword": (lambda m, b: F.cross_entropy(m(image=b[0]), b[1]), "logits", lambda x, y: [x, y]),
    "dict": (
        lambda m, b: F.cross_entropy(m(b["image"])["out"], b["label"]),
        "dict",
        lambda x, y: {"image": x, "label": y, "source": ["a"] * len(y), "step": torch.tensor(3)},
    ),
    "named tuple": (lambda m, b: F.cross_entropy(m(b.image)[0], b.label), "tuple", Named),
    "dataclass": (
        lambda m, b: F.cross_entropy(m(b.image).logits, b.label) + (len(b.source) != len(b.label)),
        "dataclass",
        lambda x, y: Made(x, y, ["a"] * len(y)),
    ),
    "encoding": (
        lambda m, b: F.cross_entropy(m(b.image).logits, b["label"]),
        "own",
        lambda x, y: Encoding(image=x, label=y),
    ),
    "own loss, given": (lambda m, b: m(**b).loss, "own", lambda x, y: Encoding(image=x, label=y)),
    "attributes": (
        lambda m, b: F.cross_entropy(m(b.image).logits, b.label),
        "namespace",
        lambda x, y: SimpleNamespace(image=x, label=y),
    ),
}


@pytest.fixture(scope="module")
def usual():
    return thetas(ce, "logits", lambda x, y: (x, y))


@pytest.mark.parametrize("name", TAKEN)
def test_batches_and_outputs_of_any_form(name, usual):
    np.testing.assert_allclose(thetas(*TAKEN[name]), usual, atol=2e-5)


@pytest.mark.parametrize(
    ("returns", "trained"),
    [
        ("logits", ce),
        ("logits", lambda m, b: F.cross_entropy(m(image=b[0] / 2, scale=2.0), b[1])),
        ("own", lambda m, b: m(**{"image": b[0], "label": b[1]}).loss),
        ("own", lambda m, b: m(b[0], label=b[1])["loss"]),
        ("namespace", lambda m, b: m(b[0], 1.0, b[1]).loss),
    ],
)
def test_no_loss_is_needed_for_labels_and_for_models_that_return_their_own(returns, trained, usual):
    np.testing.assert_allclose(thetas(None, returns, lambda x, y: (x, y), trained), usual, atol=2e-5)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda m, b: 0.5 * m(b[0], label=b[1]).loss, "is 0.5 times it"),
        (lambda m, b: (out := m(b[0], label=b[1])).loss + out.logits.square().mean(), "more is trained on"),
    ],
)
def test_a_models_own_loss_must_be_all_that_is_trained_on(loss, match):
    (batch,) = batches(1)
    model, optimizer, pruner = make(None, forms("own"))
    refused(lambda: step(pruner, optimizer, loss(model, batch)), pruner, match)
    model, optimizer, pruner = make(loss, forms("own"))
    for batch in batches(6):
        step(pruner, optimizer, loss(model, batch), batch)


def test_a_models_own_loss_may_not_mix_examples():
    class Own(Forms):
        def forward(self, image, **_):
            z = DenseResNet.forward(self, image)
            return SimpleNamespace(loss=info_nce(lambda z: z, (z,)), logits=z)

    torch.manual_seed(0)
    model, optimizer, pruner = make(None, Own(64, CLASSES, blocks=2, width=16, hidden=8).train())
    (batch,) = batches(1)
    refused(lambda: step(pruner, optimizer, model(batch[0]).loss), pruner, "the model's own, which compares examples")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "match", "kind"),
    [
        (lambda x, y: None, "must be given the batch", ValueError),
        (lambda x, y: (x, y[:5]), "first dimension counts the examples; got first dimensions \\[5, 32\\]", ValueError),
        (lambda x, y: (x, y, torch.ones(10)), "first dimensions \\[10, 32\\]", ValueError),
        (lambda x, y: (x.numpy(), y), "got a ndarray in it", TypeError),
        (lambda x, y: (object(), x, y), "got a object in it", TypeError),
        (lambda x, y: {}, "first dimensions \\[\\]", ValueError),
    ],
)
def test_a_batch_that_is_none(batch, match, kind):
    model, optimizer, pruner = make(ce)
    (made,) = batches(1)
    refused(lambda: step(pruner, optimizer, ce(model, made), batch(*made)), pruner, match, kind)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), "must return a scalar tensor.*shape \\(32,\\)"),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]).item(), "must return a scalar tensor.*got float"),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]).detach(), "must depend on what the model returns"),
        (lambda m, b: F.cross_entropy(m(b[0]).detach(), b[1]), "must depend on what the model returns"),
        (lambda m, b: next(m.parameters()).square().mean(), "must depend on what the model returns"),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]) * torch.nan, "must be finite"),
        (lambda m, b: F.cross_entropy(m(b[0]).missing, b[1]), "must fit the batch.*AttributeError"),
        (lambda m, b: F.cross_entropy(m(b[0]), b[7]), "must fit the batch.*IndexError"),
        (lambda m, b: F.cross_entropy(m.fc(m(b[0])), b[1]), "must fit the batch"),
    ],
)
def test_a_loss_that_is_none(loss, match):
    model, optimizer, pruner = make(loss)
    (batch,) = batches(1)
    refused(lambda: step(pruner, optimizer, ce(model, batch), batch), pruner, match)


@pytest.mark.parametrize("loss", [ce, None])
def test_a_model_in_eval_mode_and_steps_without_backward_passes(loss):
    model, optimizer, pruner = make(loss)
    (batch,) = batches(1)
    refused(lambda: pruner.step(batch), pruner, "must follow a backward pass", RuntimeError)
    model.eval()
    refused(lambda: step(pruner, optimizer, ce(model, batch), batch), pruner, "model in eval mode", RuntimeError)
    model.train()
    with torch.no_grad():
        ce(model, batch)
    refused(lambda: pruner.step(batch), pruner, "must follow a backward pass", RuntimeError)
    step(pruner, optimizer, ce(model, batch), batch)
    refused(lambda: pruner.step(batch), pruner, "must follow a backward pass", RuntimeError)
    optimizer.zero_grad()
    ce(model, batch).backward()
    optimizer.step()
    model.eval()  # whose probes would see no gate
    refused(lambda: pruner.step(batch), pruner, "must be in train mode at step", RuntimeError)
    model.train()
    pruner.step(batch)


class ShiftsItsInput(DenseResNet):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


@pytest.mark.parametrize("given", [ce, None])
def test_a_model_that_changes_its_input_is_refused(given):
    torch.manual_seed(0)
    model, optimizer, pruner = make(given, ShiftsItsInput(64, CLASSES, blocks=2, width=16, hidden=8).train())
    (batch,) = batches(1)
    refused(lambda: step(pruner, optimizer, ce(model, batch), batch), pruner, "`batch` must stay as the model saw it")


def test_a_batch_whose_memory_is_used_again_before_the_step_is_refused():
    model, optimizer, pruner = make()
    for number, (x, y) in enumerate(batches(3)):
        ce(model, (x, y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number < 2:
            pruner.step()
    x.zero_()
    with pytest.raises(ValueError, match="`batch` must stay as the model saw it"):
        pruner.step()


def test_outputs_that_the_loop_changes_in_place_are_not_taken_for_the_models():
    """Classes that are left out: not recognised at the first step, refused later, and right as a loss that is given."""

    def few(model, batch):
        z = model(batch[0])
        z[:, 7:] = -1e9
        return F.cross_entropy(z, batch[1] % 7)

    def elsewhere(model, batch):
        z = torch.cat([model(batch[0])[:, :7], torch.full((len(batch[1]), 3), -1e9)], 1)
        return F.cross_entropy(z, batch[1] % 7)

    (batch,) = batches(1)
    model, optimizer, pruner = make()
    refused(lambda: step(pruner, optimizer, few(model, batch)), pruner, "`loss` must be given", RuntimeError)
    model, optimizer, pruner = make()
    for number, batch in enumerate(batches(3)):
        if number < 2:
            step(pruner, optimizer, ce(model, batch))
    with pytest.raises(ValueError, match="`batch` must stay as the model saw it, and what it returned"):
        step(pruner, optimizer, few(model, batch))
    ends = []
    for loss in (few, elsewhere):
        model, optimizer, pruner = make(loss)
        for batch in batches(40):
            step(pruner, optimizer, loss(model, batch), batch)
        ends.append(pruner.state.evidence.benefit)
    np.testing.assert_allclose(*ends, rtol=1e-4, atol=1e-7)
    assert ends[0].any()


def test_outputs_that_a_loss_divides_in_place_are_seen_as_the_model_gave_them():
    def halved(model, batch):
        return F.cross_entropy(model(batch[0]).div_(2.0), batch[1])

    model, optimizer, pruner = make(halved)
    for batch in batches(3):
        step(pruner, optimizer, halved(model, batch), batch)
    assert pruner.state.done == 3


class Keeps(DenseResNet):
    """Whose features somebody reads, as a hook for distillation does."""

    def forward(self, x):
        self.features = self.blocks(self.stem(x.flatten(1)))
        return self.fc(F.relu(self.norm(self.features)))


class Returns(Keeps):
    def forward(self, x):
        z = super().forward(x)
        return z, self.features


def with_features(model, batch):
    z = model(batch[0])
    z, features = z if isinstance(z, tuple) else (z, model.features)
    return F.cross_entropy(z, batch[1]) + 0.3 * features.square().mean()


def seeded(kind):
    torch.manual_seed(0)
    return kind(64, CLASSES, blocks=2, width=16, hidden=8).train()


PAIRED = dict(estimator="paired", layer_estimator="paired")


def test_a_loss_that_reads_the_models_inside_is_taken_where_all_of_it_is_measured():
    """Not recognised as the cross-entropy that is one part of it; given, its curvature would be that of the same part."""
    (batch,) = batches(1)
    for loss, changes, message in (
        (None, {}, "got a gradient that came to the model's inside by another way"),
        (None, PAIRED, "got a gradient that came to the model's inside by another way"),
        (ce, PAIRED, "while the one given reads what the model returns alone"),
        (with_features, {}, "got one that reads the model's inside, too"),
    ):
        model, optimizer, pruner = make(loss, seeded(Keeps), **changes)
        run = lambda m=model, o=optimizer, p=pruner: step(p, o, with_features(m, batch), batch)  # noqa: E731
        refused(run, pruner, message)
    ends = []
    for kind in (Keeps, Returns):
        model, optimizer, pruner = make(with_features, seeded(kind), **PAIRED)
        for batch in batches(60):
            step(pruner, optimizer, with_features(model, batch), batch)
        ends.append(pruner.state.evidence.benefit)
    np.testing.assert_allclose(*ends, rtol=1e-4, atol=1e-6)
    assert ends[0].any()


@pytest.mark.parametrize("given", [ce, None])
def test_a_model_with_random_numbers_of_its_own_is_not_held_against_what_it_returns_again(given):
    class Noisy(DenseResNet):
        generator = torch.Generator().manual_seed(0)

        def forward(self, x):
            return super().forward(x + torch.randn(x.shape, generator=self.generator))

    model, optimizer, pruner = make(given, seeded(Noisy))
    for batch in batches(3):
        step(pruner, optimizer, ce(model, batch), batch)
    assert pruner.state.done == 3


@pytest.mark.parametrize("how", [torch.no_grad, None])
def test_units_that_no_gradient_comes_back_to_need_another_estimator(how):
    """A part of the model without gradients, or behind a detach(): its units would seem to be worth nothing."""

    class Cut(DenseResNet):
        def forward(self, x):
            with torch.set_grad_enabled(how is None):
                x = self.blocks[:1](self.stem(x.flatten(1)))
            return self.fc(F.relu(self.norm(self.blocks[1:](x.detach()))))

    (batch,) = batches(1)
    model, optimizer, pruner = make(ce, seeded(Cut))
    match = (
        "`model` must run the modules that read units with gradients"
        if how
        else "none comes to those of `blocks.0.hidden`"
    )
    refused(lambda: step(pruner, optimizer, ce(model, batch), batch), pruner, match)
    model, optimizer, pruner = make(ce, seeded(Cut), initial_keep_prob=0.9, **PAIRED)
    for batch in batches(40):
        step(pruner, optimizer, ce(model, batch), batch)
    assert pruner.state.evidence.benefit[2:10].any()  # of the units behind


def test_outputs_that_are_not_finite_are_refused():
    """Every probe would be left out as one of a step that went wrong."""

    class Masked(DenseResNet):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.arange(CLASSES) == 9, -torch.inf)

    ((x, y),) = batches(1)
    for loss in (None, ce):
        model, optimizer, pruner = make(loss, seeded(Masked))
        run = lambda m=model, o=optimizer, p=pruner: step(p, o, ce(m, (x, y % 9)), (x, y % 9))  # noqa: E731
        refused(run, pruner, "`model` must return finite numbers")


TWICE = pytest.mark.parametrize(
    ("given", "match", "kind"), [(ce, "is 2 times it", ValueError), (None, "must be given", RuntimeError)]
)


@TWICE
def test_backward_twice(given, match, kind):
    (batch,) = batches(1)
    model, optimizer, pruner = make(given)
    loss = ce(model, batch)
    loss.backward(retain_graph=True)

    def run():
        loss.backward()
        optimizer.step()
        pruner.step(batch)

    refused(run, pruner, match, kind)


@pytest.mark.parametrize("given", [ce, None])
def test_sam(given):
    """Two forward and backward passes for one step, of which one counts."""
    (batch,) = batches(1)
    model, optimizer, pruner = make(given)
    ce(model, batch).backward()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * p.grad
    again = lambda: step(pruner, optimizer, ce(model, batch), batch)  # noqa: E731
    refused(again, pruner, "weights that changed between two of them, as SAM does", RuntimeError)


def test_a_step_for_each_micro_batch_is_refused():
    """Gradients of several draws of the gates would add up; losses are not divided, or the first one would be refused."""
    model, optimizer, pruner = make()
    first, second = batches(2)
    ce(model, first).backward()
    pruner.step()
    ce(model, second).backward()
    optimizer.step()
    refused(pruner.step, pruner, "must be called once for each step of the optimizer", RuntimeError)


def test_a_model_called_by_its_parts():
    model, optimizer, pruner = make(ce)
    x, y = next(batches(1))

    def parts(x):
        return model.fc(model.blocks(model.stem(x.flatten(1))))

    refused(
        lambda: step(pruner, optimizer, F.cross_entropy(parts(x), y), (x, y)),
        pruner,
        "must be called itself",
        RuntimeError,
    )


def test_an_optimizer_that_never_steps():
    model, _, pruner = make(ce)
    other = torch.optim.SGD(model.parameters(), lr=0.05)
    data = batches(200)
    for x, y in itertools.islice(data, 99):
        step(pruner, other, ce(model, (x, y)), (x, y))
    refused(
        lambda: step(pruner, other, ce(model, (x, y)), (x, y)),
        pruner,
        "`optimizer` must be the one whose step\\(\\) is called",
        RuntimeError,
    )


def test_another_models_optimizer():
    model, other = network(), network(1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    with pytest.raises(ValueError, match="`optimizer` must hold the model's parameters") as caught:
        Pruner(model, EXAMPLE, optimizer=optimizer, nu=0.5, steps=100)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not optimizer._optimizer_step_post_hooks
