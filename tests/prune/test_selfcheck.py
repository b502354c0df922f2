"""The self-check: true descriptions pass it whatever the network holds, and each way to be wrong is told in one line."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import catode
from benchmarks.prunability.models import declare_operators
from catode.prune.describe.costs import count
from catode.prune.describe.executed import Uncounted
from catode.prune.describe.trace.describing import describe
from catode.prune.pruner import Pruner
from catode.prune.selfcheck import Unchecked, check
from catode.structures.description import Block, Site
from catode.train.models import Architecture, DenseResNet, ResNet, build

IMAGE = torch.zeros(1, 3, 16, 16)


class Branch(nn.Module):
    """``shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))``, with a place for whatever a test changes."""

    def __init__(self, shortcut: nn.Module | None = None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def inner(self, x):
        return self.conv2(F.relu(self.bn1(self.conv1(x))))

    def forward(self, x):
        return self.shortcut(x) + self.bn2(self.inner(x))

    def shortcut_only(self):
        return self.shortcut


class Net(nn.Module):
    """A stem, two branches and a classifier; `describe` changes the true description."""

    def __init__(self, branch=Branch, describe=lambda blocks: blocks):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(branch(), branch())
        self.fc, self.describe = nn.Linear(6, 5), describe

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))

    def structures(self):
        blocks = []
        for name in ("blocks.0", "blocks.1"):
            site = Site(f"{name}.conv1", 8, (f"{name}.conv1", f"{name}.bn1"), (f"{name}.conv2",))
            blocks.append(Block(name, f"{name}.bn2", (site,), (f"{name}.shortcut",)))
        return self.describe(blocks)


def change(number=1, site=None, **changes):
    """A description with other fields of one block, or of its site."""

    def changed(blocks):
        block = blocks[number]
        sites = (dataclasses.replace(block.sites[0], **site),) if site else block.sites
        blocks[number] = dataclasses.replace(block, **{"sites": sites, **changes})
        return blocks

    return changed


# true descriptions


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (DenseResNet(64, 10), torch.zeros(2, 1, 8, 8)),
        (build("resnet20", in_channels=3, classes=10), IMAGE),
        (ResNet(Architecture("bottleneck", (1, 2), 4, "B", "cifar"), 3, 10), IMAGE),
        (ResNet(Architecture("basic", (1, 1), 4, "B", "imagenet"), 3, 10), IMAGE),
        (Net(), (IMAGE,)),
        (Net(), {"x": IMAGE}),
    ],
    ids=["dense", "resnet20", "bottlenecks", "projections", "tuple", "mapping"],
)
def test_true_descriptions_agree_to_rounding_and_nothing_is_changed(model, example):
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = check(model, example)
    assert found.difference < 1e-12 and not found.notes and found.seconds > 0
    assert found.copied_bytes <= 3 * found.model_bytes
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert str(found).startswith("self-check: differences up to ") and "\n" not in str(found)


def test_a_foreign_network_with_two_sites_and_biases_passes(bottleneck_net):
    assert check(bottleneck_net(), torch.zeros(1, 1, 8, 8)).difference < 1e-12


def test_branches_that_begin_at_zero_hide_nothing():
    def zero():
        branch = Branch()
        nn.init.zeros_(branch.bn2.weight)
        return branch

    assert check(Net(zero), IMAGE).difference < 1e-12
    with pytest.raises(ValueError, match=r"^site `blocks.1.conv1`"):
        check(Net(zero, change(site={"producers": ("blocks.1.conv1",)})), IMAGE)


def test_dropout_and_stochastic_depth_are_left_out():
    class Random(Branch):
        def forward(self, x):
            kept = torch.rand(len(x), 1, 1, 1) < 0.5 if self.training else 1.0
            return self.shortcut(x) + kept * self.bn2(F.dropout(self.inner(x), 0.5, self.training))

    found = check(Net(Random), IMAGE)
    assert found.difference < 1e-12 and "random in train mode" in found.notes[0]


# descriptions that lie


class Other(Branch):
    """Its branch ends in something that does not map 0 to 0."""

    def forward(self, x):
        return self.shortcut(x) + torch.sigmoid(self.bn2(self.inner(x)))


class Functional(Branch):
    def inner(self, x):
        return F.conv2d(F.relu(self.bn1(self.conv1(x))), self.conv2.weight, padding=1)


class Twice(Branch):
    def inner(self, x):
        return self.conv2(F.relu(self.bn1(self.conv1(x)))) + self.conv2(x.repeat(1, 2, 1, 1)[:, :8])


class Hidden(Branch):
    """Its units are read a second time, by what the description does not name."""

    def __init__(self):
        super().__init__()
        self.also = nn.Conv2d(8, 6, 1)

    def inner(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return self.conv2(y) + self.also(y)


class Mixing(Branch):
    """The units of a site are mixed by a softmax."""

    def inner(self, x):
        return self.conv2(self.bn1(self.conv1(x)).softmax(1))


class Depthwise(Branch):
    def __init__(self):
        super().__init__()
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def inner(self, x):
        return self.conv2(F.relu(self.depth(self.bn1(self.conv1(x)))))


class Nothing(Branch):
    """Without a method for what is left."""

    shortcut_only = None


class Wrong(Branch):
    """Its shortcut has weights, but what is left does not have them."""

    def __init__(self):
        super().__init__(nn.Conv2d(6, 6, 1))

    def shortcut_only(self):
        return nn.Identity()


class Useless(Branch):
    """Returns its shortcut alone."""

    def forward(self, x):
        return self.shortcut(x) + 0.0 * self.bn2(self.inner(x))


def normed():
    branch = Branch()
    weight_norm(branch.conv2)
    return branch


def shared():
    branch = Branch()
    branch.conv2.weight = SHARED
    return branch


SHARED = nn.Parameter(torch.randn(6, 8, 3, 3))
depthwise = change(site={"producers": ("blocks.1.conv1", "blocks.1.bn1", "blocks.1.depth")})
LIES = {
    "an inner norm as output": (
        Branch,
        change(output="blocks.1.bn1"),
        r"block `blocks\.1`.*output `blocks\.1\.bn1`.*differs",
    ),
    "an output that is not linear": (Other, None, r"^block `blocks\.0` must be its shortcut_only.*`blocks\.0\.bn2`"),
    "no shortcut_only": (Nothing, None, r"^block `blocks\.0` must have a method shortcut_only"),
    "a shortcut_only that is none": (Wrong, None, r"^block `blocks\.0` must be its shortcut_only"),
    "no consumers": (
        Branch,
        change(site={"consumers": ()}),
        r"^site `blocks\.1\.conv1` .*that reads.*`consumers`",
    ),
    "no producers": (
        Branch,
        change(site={"producers": ()}),
        r"^site `blocks\.1\.conv1` .*that makes.*`producers`",
    ),
    "reversed blocks": (
        Branch,
        lambda blocks: blocks[::-1],
        r"order of the forward pass; got `blocks\.1` before `blocks\.0`",
    ),
    "a missing norm": (
        Branch,
        change(site={"producers": ("blocks.1.conv1",)}),
        r"^site `blocks\.1\.conv1`.*fails at `blocks\.1\.bn1`",
    ),
    "a block named twice": (Branch, lambda blocks: [*blocks, blocks[0]], r"each block once; got `blocks\.0` twice"),
    "a weight used functionally": (
        Functional,
        None,
        r"modules that run when the model is called; `blocks\.0\.conv2` does not",
    ),
    "a depthwise producer": (Depthwise, depthwise, r"^site `blocks\.1\.conv1`.*`blocks\.1\.depth` is a grouped one"),
    "a module used twice": (Twice, None, r"^block `blocks\.0` must run.*`blocks\.0\.conv2` runs 2 times"),
    "a second reader": (Hidden, None, r"^site `blocks\.0\.conv1`.*fails at `blocks\.0\.also`"),
    "a softmax over the units": (Mixing, None, r"^site `blocks\.0\.conv1`.*differs by"),
    "weight norm": (normed, None, r"^site `blocks\.0\.conv1`.*`blocks\.0\.conv2` computes it from other parameters"),
    "a shared consumer": (shared, None, r"`blocks\.0\.conv2\.weight` is `blocks\.1\.conv2\.weight` too"),
    "a gate without effect": (Useless, None, r"^the gate of block `blocks\.0` must change"),
    "a module of another block": (
        Branch,
        change(site={"consumers": ("blocks.0.conv2",)}),
        r"consumer once; got `blocks\.0\.conv2`",
    ),
    "a module that stays": (
        Branch,
        change(fixed=("blocks.1.conv2",)),
        r"branch of `blocks\.1` alone; got `blocks\.1\.conv2`",
    ),
    "a name that is not there": (
        Branch,
        change(output="blocks.1.bn3"),
        r"names `blocks\.1\.bn3`.*`output` of block `blocks\.1`",
    ),
    "a norm as consumer": (Branch, change(site={"consumers": ("blocks.1.bn1",)}), r"`blocks\.1\.bn1` is a BatchNorm2d"),
    "no blocks": (Branch, lambda blocks: [], r"at least one block"),
}


@pytest.mark.parametrize(("branch", "describe", "message"), LIES.values(), ids=LIES)
def test_a_description_that_lies_is_refused_in_one_line(branch, describe, message):
    torch.manual_seed(0)
    model = Net(branch, describe or (lambda blocks: blocks))
    before = {name: id(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message) as error:
        Pruner(model, IMAGE, optimizer=optimizer, nu=1.0, steps=100)
    assert "\n" not in str(error.value)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_check_can_be_left_out():
    model = Net(Wrong)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert Pruner(model, IMAGE, optimizer=optimizer, nu=1.0, steps=100, self_check=False).self_check is None
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert Pruner(model, IMAGE, optimizer=optimizer, nu=1.0, steps=100).self_check.difference < 1e-12


# models that can be checked roughly, or not at all


def test_single_precision_inside_is_said_and_allowed_for():
    class Single(Branch):
        def inner(self, x):
            return super().inner(x).float().to(x.dtype)

    found = check(Net(Single), IMAGE)
    assert found.difference < 1e-4 and "torch.float32" in found.notes[0]
    with pytest.raises(ValueError, match=r"^site `blocks.1.conv1`"):
        check(Net(Single, change(site={"producers": ("blocks.1.conv1",)})), IMAGE)


def test_a_model_that_does_not_run_in_double_precision_is_checked_in_its_own():
    class Fixed(Net):
        def forward(self, x):
            return super().forward(x + torch.ones(1).float().mean() * 0).matmul(torch.eye(5))

    found = check(Fixed(), IMAGE)
    assert found.difference < 1e-4 and found.notes[0].startswith("checked in torch.float32")


def test_what_cannot_be_copied_or_is_never_the_same_is_told():
    class Uncopied(Net):
        def __deepcopy__(self, memo):
            raise RuntimeError("holds a socket")

    class Noisy(Net):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    patched = Net()
    patched.blocks.forward = partial(patched.blocks.forward)  # a copy would call this one's blocks
    for model, reason in (
        (patched, "a copy would share the forward() that was put into `blocks`"),
        (Uncopied(), "cannot be copied (RuntimeError: holds a socket)"),
        (Noisy(), "something else each time"),
    ):
        with pytest.warns(Unchecked, match="not checked") as said:
            found = check(model, IMAGE)
        assert reason in found.notes[0] and reason in str(said[0].message) and "\n" not in found.notes[0]


def test_no_warning_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(Net(), IMAGE)


class Recurrent(nn.Module):
    """A recurrent layer over embedded tokens, and an MLP behind its last step."""

    def __init__(self, kind=nn.LSTM, **given):
        super().__init__()
        self.table, self.rnn = nn.Embedding(11, 8), kind(8, 16, batch_first=True, **given)
        out = 16 * (2 if given.get("bidirectional") else 1)
        self.mlp = nn.Sequential(nn.Linear(out, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x):
        return self.mlp(self.rnn(self.table(x))[0][:, -1])


@pytest.mark.parametrize("kind, matrices", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("given", [{}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False}])
def test_recurrent_layers_are_counted_and_stay(kind, matrices, given):
    model, tokens = Recurrent(kind, **given), torch.zeros(2, 5, dtype=torch.long)
    sides = 2 if given.get("bidirectional") else 1
    macs = sides * 5 * matrices * 16 * (8 + 16) + (5 * matrices * 16 * 32 if given.get("num_layers") else 0)
    assert count(model, tokens).macs == macs + 16 * sides * 12 + 12 * 4
    blocks = catode.describe(model, tokens)
    assert [site.name for block in blocks for site in block.sites] == ["mlp.0"]
    assert check(model, tokens, blocks).difference < 1e-10


def test_an_operation_that_is_not_counted_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(6, 5)

        def forward(self, x):
            return self.own(x) if x.dtype == torch.float64 else (self.own.weight * x[:, None]).sum(-1)

    model = nn.Sequential(Odd(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(
        ValueError, match=r"^`model` must run operations whose MACs are counted; `0.own` \(Linear\)"
    ) as told:
        check(model, torch.zeros(4, 6), catode.describe(model, torch.zeros(4, 6)))
    assert "in torch.float64" in str(told.value) and "\n" not in str(told.value)


class Mixed(nn.Module):
    """A linear layer and another operation on what it returns, shape (N, 6)."""

    def __init__(self, mix, out=6):
        super().__init__()
        self.mix, self.own, self.weight = mix, nn.Linear(6, 6), nn.Parameter(torch.randn(out, 6))

    def forward(self, x):
        return self.mix(self.own(x), self.weight)


@pytest.mark.parametrize(
    "mix, macs",
    [
        (lambda x, w: x @ w[0], 6),
        (lambda x, w: torch.addmv(x[:, 0], x, w[0]), 6),
        (lambda x, w: x + w @ w[0] + w[1].dot(w[0]), 0),  # once for all examples, as spectral norms do
        (lambda x, w: torch.cdist(x, w), 36),
        (lambda x, w: torch.cdist(x.repeat(9, 1), w.repeat(9, 1)), 9 * 9 * 36),
        (lambda x, w: torch.cdist(x, w, p=1.0), 36),
        (lambda x, w: x + torch.addbmm(torch.zeros(6, 6), w.expand(3, 6, 6), w.expand(3, 6, 6)).sum(), 3 * 216 / 4),
        (lambda x, w: x + torch.linalg.vector_norm(w), 0),
        (lambda x, w: torch.linalg.cross(x[:, :3], x[:, 3:]), 0),
    ],
)
def test_products_with_vectors_are_counted_and_what_multiplies_nothing_is_free(mix, macs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count(Mixed(mix), torch.zeros(4, 6)).macs == 36 + macs


def test_a_product_with_a_single_learned_vector_is_counted():
    assert count(Mixed(lambda x, w: x @ w[0], out=1), torch.zeros(4, 6)).macs == 36 + 6
    assert count(torch.nn.utils.spectral_norm(nn.Linear(6, 5)), torch.zeros(4, 6)).macs == 30
    assert count(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), torch.zeros(4, 6)).macs == 30


@torch.library.custom_op("catode_tests::product", mutates_args=())
def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


@torch.library.custom_op("catode_tests::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


product.register_fake(lambda x, weight: x @ weight.T)
product.register_autograd(lambda context, gradient: (gradient, None))
halved.register_fake(torch.empty_like)
halved.register_autograd(lambda context, gradient: gradient / 2)


@pytest.mark.parametrize(
    "mix, name",
    [
        (lambda x, w: torch.fft.rfft(x).abs(), "_fft_r2c"),
        (lambda x, w: torch.fft.fft(x).real, "_fft_"),
        (lambda x, w: x + F.pdist(w).sum(), "_pdist_forward"),
        (lambda x, w: x + torch.linalg.inv(w + 9 * torch.eye(6, dtype=w.dtype))[0, 0], "linalg_inv_ex"),
        (lambda x, w: x + torch.linalg.cholesky(w @ w.T + torch.eye(6, dtype=w.dtype))[0, 0], "linalg_cholesky_ex"),
        (lambda x, w: F.bilinear(x, x, w.expand(5, 6, 6)), "_trilinear"),
        (lambda x, w: product(x, w), "catode_tests"),
    ],
    ids=["rfft", "fft", "pdist", "inverse", "cholesky", "bilinear", "another library's"],
)
def test_products_that_nothing_counts_are_named(mix, name):
    odd, example = Mixed(mix), torch.randn(4, 6)
    said = rf"leave out what `{{}}` \(Mixed\) executes by \S*{name}\S*, which is not counted and has no price"
    with pytest.warns(Uncounted, match=said.format("Mixed")):
        count(odd, example)
    model = nn.Sequential(odd, nn.Linear(odd(example).shape[1], 7), nn.ReLU(), nn.Linear(7, 3))
    blocks = catode.describe(model, example)
    with pytest.warns(Uncounted, match=said.format("0")) as told:
        assert check(model, example, blocks).difference < 1e-8
    assert len([one for one in told if one.category is Uncounted]) == 1 and "\n" not in str(told[0].message)


def test_an_operation_of_another_library_without_a_parameter_is_free():
    model = nn.Sequential(Mixed(lambda x, w: halved(x)), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
    example = torch.randn(4, 6)
    assert check(model, example, catode.describe(model, example)).difference < 1e-10


class DropsRows(nn.Module):
    """Stochastic depth: whole examples of a branch are left out, seldom."""

    def forward(self, x):
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.99)) if self.training else x


def test_stochastic_depth_is_noticed_even_if_it_drops_nothing():
    """A cut network draws other numbers than the gated one, so that only its norms can be compared in train mode."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = nn.Conv2d(6, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.drop = DropsRows()

        def forward(self, x):
            return x + self.drop(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())))

    model = nn.Sequential(Dropping(), Dropping(), nn.Flatten(), nn.Linear(192, 4))
    found = check(model, torch.zeros(1, 3, 8, 8), describe(model, torch.zeros(1, 3, 8, 8)))
    assert found.notes == ("random in train mode: there, only the batch norms were checked",)
    assert found.difference < 1e-8


def test_norms_over_single_pixels_of_small_images_are_no_false_alarm():
    """Two numbers that are nearly the same are blown up by a batch norm in train mode, here beyond the tolerance."""
    declare_operators()
    model = pytest.importorskip("torchvision").models.mobilenet_v2(num_classes=10)
    example = torch.zeros(1, 3, 32, 32)
    assert check(model, example, describe(model, example)).difference < 1e-8


class Cosine(nn.Module):
    def forward(self, x):
        return x.cos()


def two_layers(act, norm=True):
    middle = [nn.BatchNorm1d(12)] if norm else []
    return nn.Sequential(nn.Linear(6, 12), *middle, act, nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "act", [nn.Sigmoid(), nn.Softplus(), Cosine(), nn.Hardsigmoid()], ids=lambda a: type(a).__name__
)
def test_dead_channels_that_would_come_back_to_life_are_refused_before_training(act, norm):
    model, example = two_layers(act, norm), torch.randn(8, 6)
    blocks = catode.describe(model, example)
    assert check(model, example, blocks).difference < 1e-10
    with pytest.raises(
        ValueError, match=r"^`width_multiple` must be 1 where .* behind site `0`, .*; got 8\. Pass width_multiple=1"
    ) as told:
        check(model, example, blocks, padded=8)
    assert "\n" not in str(told.value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`width_multiple` must be 1"):
        Pruner(model, example, optimizer=optimizer, nu=1.0, steps=200, width_multiple=8)
    Pruner(model, example, optimizer=optimizer, nu=1.0, steps=200)


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.GELU(), nn.Tanh(), nn.SiLU(), nn.PReLU(), nn.Hardswish()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("norm", [False, True])
def test_dead_channels_stay_dead_behind_what_maps_0_to_0(act, norm):
    model, example = two_layers(act, norm), torch.randn(8, 6)
    before = copy.deepcopy(model.state_dict())
    assert check(model, example, catode.describe(model, example), padded=8).difference < 1e-10
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "densenet121", "vit_b_16"])
def test_dead_channels_stay_dead_in_networks_of_torchvision(name):
    declare_operators()
    models = pytest.importorskip("torchvision", reason="needs the extra `models`").models
    sizes = (
        dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32) if "vit" in name else {}
    )
    model = models.VisionTransformer(**sizes) if sizes else models.get_model(name, num_classes=10)
    example = torch.zeros(2, 3, 32, 32)
    check(model, example, catode.describe(model, example), padded=8)
