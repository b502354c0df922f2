"""The Gauss-Newton curvature of any loss against exact enumeration: Jacobians and second derivatives in full."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from catode.prune.gated.gates import Gates
from catode.prune.measure.curvature import Curvature, couples_examples, second_derivative
from catode.prune.measure.probes import Probe
from catode.structures.description import Block, Site
from catode.structures.inventory import Inventory

CLASSES, WIDTHS = 4, (2, 3)
LAYERS = len(WIDTHS)
SIZE = LAYERS + sum(WIDTHS)
DRAW = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
Pair = namedtuple("Pair", ["main", "auxiliary"])


@dataclass
class Output:
    """What a model with a loss of its own returns: the loss, and what it comes from."""

    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


class Branch(nn.Module):
    def __init__(self, hidden, layer):
        super().__init__()
        self.hidden, self.out = layer(4, hidden), layer(hidden, 4)

    def forward(self, x):
        return x + self.out(F.relu(self.hidden(x)))

    def shortcut_only(self):
        return nn.Identity()


class Net(nn.Module):
    """Two branches on vectors, on tokens (B, T, 4), or on images (B, 4, H, W)."""

    def __init__(self, images=False, returns="logits"):
        super().__init__()
        layer = (lambda a, b: nn.Conv2d(a, b, 1)) if images else nn.Linear
        self.branches = nn.Sequential(*(Branch(w, layer) for w in WIDTHS))
        self.fc, self.aux, self.returns = layer(4, CLASSES), layer(4, 3), returns

    def forward(self, x, y=None):
        first = self.branches[0](x)
        last = self.branches[1](first)
        z = self.fc(last)
        if self.returns == "heads":
            return {"main": z, "heads": Pair(z, self.aux(first))}
        if self.returns == "own loss":
            return Output(F.cross_entropy(z, y, weight=WEIGHTS), z, (first, last))
        if self.returns == "hidden":
            return Output(None, z, (first, last))
        return z.reshape(-1, CLASSES) if self.returns == "flat" else z

    def structures(self):
        names = [f"branches.{i}" for i in range(LAYERS)]
        return [
            Block(n, f"{n}.out", (Site(f"s{i}", w, (f"{n}.hidden",), (f"{n}.out",)),))
            for i, (n, w) in enumerate(zip(names, WIDTHS, strict=True))
        ]


WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
TEACHER = torch.randn(6, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def rare(y):
    """Several labels for each example; all of them rare."""
    return F.one_hot(y, CLASSES).double()


def focal(loss):
    return loss * (1 - (-loss).exp()) ** 2


# name: input's shape, what the model returns, the loss of what it returns
CASES = {
    "cross entropy": ((6, 4), "logits", lambda z, y: F.cross_entropy(z, y)),
    "class weights": ((6, 4), "logits", lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS)),
    "ignore_index": ((6, 4), "logits", lambda z, y: F.cross_entropy(z, torch.where(y == 1, -100, y))),
    "label smoothing": ((6, 4), "logits", lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2)),
    "soft targets": ((6, 4), "logits", lambda z, y: F.cross_entropy(z, TEACHER.softmax(1))),
    "bce": ((6, 4), "logits", lambda z, y: F.binary_cross_entropy_with_logits(z, rare(y))),
    "rare positives": ((6, 4), "logits", lambda z, y: F.binary_cross_entropy_with_logits(z - 5.0, rare(y))),
    "mse": ((6, 4), "logits", lambda z, y: F.mse_loss(z, TEACHER)),
    "mse after softmax": ((6, 4), "logits", lambda z, y: F.mse_loss(z.softmax(1), rare(y))),
    "distillation": (
        (6, 4),
        "logits",
        lambda z, y: 16 * F.kl_div((z / 4).log_softmax(1), (TEACHER / 4).softmax(1), reduction="batchmean"),
    ),
    "focal": ((6, 4), "logits", lambda z, y: focal(F.cross_entropy(z, y, reduction="none")).mean()),
    "indefinite": ((6, 4), "logits", lambda z, y: (z[:, 0] * z[:, 1] - z[:, 2].square()).mean()),
    "tokens": ((3, 5, 4), "logits", lambda z, y: F.cross_entropy(z.view(-1, CLASSES), y.view(-1))),
    "some tokens": (
        (3, 5, 4),
        "logits",
        lambda z, y: F.cross_entropy(z.view(-1, CLASSES), torch.where(y == 2, -100, y).view(-1)),
    ),
    "shifted tokens": (
        (3, 5, 4),
        "logits",
        lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, CLASSES), y[:, 1:].reshape(-1)),
    ),
    "flat tokens": ((3, 5, 4), "flat", lambda z, y: F.cross_entropy(z, y.view(-1))),
    "segmentation": ((2, 4, 3, 2), "logits", lambda z, y: F.cross_entropy(z, y)),
    "two heads": (
        (6, 4),
        "heads",
        lambda z, y: F.cross_entropy(z["main"], y) + 0.3 * F.cross_entropy(z["heads"].auxiliary, y % 3),
    ),
    "penalty on what is hidden": (
        (6, 4),
        "hidden",
        lambda z, y: F.cross_entropy(z.logits, y) + 0.2 * z.hidden[0].square().mean(),
    ),
    "own loss": ((6, 4), "own loss", None),
}


def case(name, dtype=torch.float64):
    torch.manual_seed(1)
    shape, returns, loss = CASES[name]
    model = Net(images=len(shape) == 4, returns=returns).to(dtype)
    x = 1.5 * torch.randn(shape, dtype=torch.float64).to(dtype)
    places = shape[:1] + shape[2:] if len(shape) == 4 else shape[:-1]
    y = torch.randint(CLASSES, places)
    gates = Gates(model, Inventory(model.structures()))
    gates.install([True] * LAYERS, [torch.tensor([2, 3]), torch.tensor([4, 5, 6])])
    gates.draw = DRAW.clone().requires_grad_()

    def evaluate(model):
        return model(x, y).loss if loss is None else loss(model(x), y)

    return model, gates, x, y, loss, evaluate


def arguments(output):
    """Tensors that a loss reads, one row for each example."""
    if isinstance(output, Output):
        return [output.logits, *(output.hidden if output.loss is None else ())]
    return [output["main"], output["heads"].auxiliary] if isinstance(output, dict) else [output]


def exact(name):
    """sum_e J_e' H_ee J_e, J from the definition of a gate, H from the loss alone."""
    model, _, x, y, loss, _ = case(name)
    plain = dict(model.named_parameters())
    images = x.dim() == 4

    def apply(part, x):
        weight, bias = plain[f"{part}.weight"], plain[f"{part}.bias"]
        return F.conv2d(x, weight, bias) if images else F.linear(x, weight, bias)

    def outputs(x, xi):
        """What the model returns for one example, in one vector."""
        first, hidden = LAYERS, []
        for i, width in enumerate(WIDTHS):
            units = F.relu(apply(f"branches.{i}.hidden", x))
            gate = xi[first : first + width]
            units = units * (gate.view(1, -1, 1, 1) if images else gate)
            x = x + xi[i] * apply(f"branches.{i}.out", units)
            hidden.append(x)
            first += width
        z = apply("fc", x)
        return {
            "heads": lambda: [z, apply("aux", hidden[0])],
            "hidden": lambda: [z, *hidden],
        }.get(model.returns, lambda: [z])()

    def value(*parts):
        if model.returns == "heads":
            return loss({"main": parts[0], "heads": Pair(*parts)}, y)
        if model.returns == "hidden":
            return loss(Output(None, parts[0], parts[1:]), y)
        if model.returns == "own loss":
            return F.cross_entropy(parts[0], y, weight=WEIGHTS)
        return loss(parts[0].reshape(-1, CLASSES) if model.returns == "flat" else parts[0], y)

    whole = [
        torch.cat(parts).detach() for parts in zip(*(outputs(x[e : e + 1], DRAW) for e in range(len(x))), strict=True)
    ]
    second = torch.autograd.functional.hessian(value, tuple(whole))
    found = torch.zeros(SIZE, dtype=torch.float64)
    for e in range(len(x)):
        jacobians = torch.autograd.functional.jacobian(lambda xi, e=e: tuple(outputs(x[e : e + 1], xi)), DRAW)
        jacobians = [j.reshape(-1, SIZE) for j in jacobians]
        for a, row in zip(jacobians, second, strict=True):
            for b, h in zip(jacobians, row, strict=True):
                n, m = len(a), len(b)
                h = h.reshape(len(x), n, len(x), m)[e, :, e]
                found += (a * (h @ b)).sum(0)
    return found


def drawn(name, number=600, curved=None, dtype=torch.float64):
    model, gates, x, _, _, evaluate = case(name, dtype)
    generator, curved = torch.Generator().manual_seed(0), curved or Curvature()
    probe = Probe(model, gates, evaluate, len(x), generator, curved=curved)
    return torch.stack([probe.curvature() for _ in range(number)]).double(), curved


SOFTMAX = ("cross entropy", "class weights", "ignore_index", "label smoothing", "soft targets", "tokens", "some tokens")
SOFTMAX += ("shifted tokens", "flat tokens", "segmentation", "own loss")


@pytest.mark.parametrize("name", CASES)
def test_law_the_curvature_of_any_loss_has_the_exact_mean(name):
    right = exact(name)
    draws, curved = drawn(name)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - right).abs() <= 4.5 * error + 1e-6 * right.abs().max()).all(), (
        draws.mean(0),
        right,
        error,
    )
    assert right.abs().max() > 1e-4 and (error < 0.25 * right.abs().max()).all()
    assert (curved.classes is not None) == (name in SOFTMAX)


@pytest.mark.parametrize("name", ["cross entropy", "bce", "tokens", "distillation"])
def test_in_sixteen_bits_it_has_the_same_mean(name):
    right = exact(name)
    draws, curved = drawn(name, dtype=torch.bfloat16)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - right).abs() <= 4.5 * error + 0.05 * right.abs().max()).all(), (draws.mean(0), right)
    assert (curved.classes is not None) == (name in SOFTMAX)


def test_what_is_indefinite_is_not_made_positive():
    assert (exact("indefinite") < -0.1).any()


def test_a_loss_that_turns_out_to_be_no_cross_entropy_is_measured_as_any():
    """At equal logits the second derivative of a distillation is that of a cross-entropy; later it is not."""
    curved = Curvature()
    curved.classes, curved._known = 1, True
    draws, _ = drawn("distillation", 2, curved)
    assert draws.isnan().all()
    curved.forget_softmax()
    assert drawn("distillation", 2, curved)[0].isfinite().all()


def test_examples_that_count_for_nothing_do_not_change_the_kind():
    """A part of a batch whose labels are all ignored has no loss: infinite, while NaN means another kind of loss."""
    model, gates, x, y, _, evaluate = case("ignore_index")
    curved, generator = Curvature(), torch.Generator().manual_seed(0)
    assert Probe(model, gates, evaluate, len(x), generator, curved=curved).curvature().isfinite().all()
    ignored = Probe(model, gates, lambda m: F.cross_entropy(m(x), y - y - 100), len(x), generator, curved=curved)
    assert ignored.curvature().isinf().all() and curved.classes == 1


def test_checkpointed_blocks_have_the_same_curvature():
    found = []
    for checkpointed in (False, True):
        model, gates, x, _, _, evaluate = case("bce")
        for branch in model.branches if checkpointed else ():
            plain = branch.forward
            branch.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
        found.append(Probe(model, gates, evaluate, len(x), torch.Generator().manual_seed(0)).curvature())
    torch.testing.assert_close(*found)


def test_outputs_that_hardly_matter_add_no_noise():
    """Of 200 labels, most are never seen: the spread stays far below that of vectors of one size."""
    torch.manual_seed(0)
    z = torch.cat([torch.zeros(8, 4), torch.full((8, 196), -12.0)], 1).double().requires_grad_()
    jacobian = torch.randn(8, 200, dtype=torch.float64)
    loss = F.binary_cross_entropy_with_logits(z, torch.zeros_like(z))
    generator, curved = torch.Generator().manual_seed(0), Curvature()

    def normal(like):
        return torch.empty_like(like).normal_(generator=generator)

    def spread(pairs):
        products = torch.stack([((jacobian * a).sum(1) * (jacobian * b).sum(1)).sum() for a, b in pairs])
        return products.mean(), products.std()

    pairs = [curved.pullbacks(loss, [z], normal) for _ in range(2000)]
    mean, noise = spread([(p.left[0], p.right[0]) for p in pairs])
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    plain = [normal(z) for _ in range(2000)]
    same, more = spread([(v, second_derivative([gradient], [z], [v])[0]) for v in plain])
    right = (z.sigmoid() * (1 - z.sigmoid()) * jacobian.square()).sum() / z.numel()
    assert abs(mean - right) < 5 * noise / 2000**0.5 and abs(same - right) < 5 * more / 2000**0.5
    assert noise < 0.35 * more


@pytest.mark.parametrize(
    ("layout", "loss", "mixes"),
    [
        ((6, 3), lambda z: F.cross_entropy(z, torch.arange(6) % 3), False),
        ((6, 3), lambda z: F.cross_entropy(z @ z.T, torch.arange(6)), True),
        ((12, 3), lambda z: (z[:6] - z[6:]).square().mean(), False),  # two views, one after the other
        ((12, 3), lambda z: (z[::2] - z[1::2]).square().mean(), False),  # two rows of every example
        ((12, 3), lambda z: (z @ z.T).square().mean(), True),
        ((6, 3), lambda z: z.abs().mean(), False),
    ],
)
def test_whether_a_loss_mixes_examples(layout, loss, mixes):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(layout, generator=generator, dtype=torch.float64).requires_grad_()
    assert couples_examples(loss(z), [z], 6, lambda like: torch.empty_like(like).normal_(generator=generator)) == mixes


def test_a_loss_that_does_not_depend_on_the_outputs_is_refused():
    z = torch.randn(4, 3, requires_grad=True)
    normal = torch.randn_like
    for loss in (torch.ones(()), (2 * torch.ones((), requires_grad=True))):
        with pytest.raises(ValueError, match="must depend on what the model returns"):
            Curvature().pullbacks(loss, [z], normal)
