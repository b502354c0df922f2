"""What has to be refused, and why; what must not be mistaken; the example's and the patterns' bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from catode.prune.describe.trace import describe
from catode.prune.describe.trace.verifying import verify
from catode.structures.description import CONSUMER, PRODUCER, TIED

IMAGE = torch.zeros(1, 3, 8, 8)


class Between(nn.Module):
    """``last(function(first(x)))`` with a safe width behind, so that there is something to describe."""

    def __init__(self, function, first: nn.Module | None = None, last: nn.Module | None = None):
        super().__init__()
        self.first = first or nn.Conv2d(3, 8, 3, padding=1)
        self.function = function if isinstance(function, nn.Module) else None
        self.last = last or nn.Conv2d(8, 6, 3, padding=1)
        self.calls = [function]  # no second name of the module
        self.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.last(self.calls[0](self.first(x)))).mean((2, 3)))


def reasons(model: nn.Module, example=IMAGE) -> dict[str, str]:
    """First reason of each width of a model that is refused."""
    found: dict[str, str] = {}
    for refusal in describe(model, example).refused:
        found.setdefault(refusal.name, refusal.reason)
    return found


class Normed(nn.Module):
    """Global response norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.norm(dim=(2, 3), keepdim=True)
        return x * (size / size.mean(1, keepdim=True))


class AlongChannels(nn.Module):
    """Efficient channel attention: a convolution along the channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1))).transpose(1, 2).unsqueeze(-1)


@pytest.mark.parametrize(
    "function, words",
    [
        (nn.GroupNorm(1, 8), "group norm"),
        (lambda x: F.layer_norm(x.transpose(1, 3), (8,)).transpose(1, 3), "layer norm"),
        (nn.LocalResponseNorm(3), "pool"),
        (lambda x: x.softmax(1), "softmax over it in the network itself"),
        (lambda x: x - x.amax(1, keepdim=True), "amax"),
        (Normed(), "mean over it in `function`"),
        (AlongChannels(), "a convolution along it in `function.conv`"),
        (lambda x: x.flip(1), "flip"),
        (lambda x: x[:, torch.arange(7, -1, -1)], "looked up"),
        (lambda x: x[:, ::2].repeat(1, 2, 1, 1), "step"),
    ],
)
def test_operations_over_the_units_are_named(function, words):
    assert words in reasons(Between(function))["first"]


def test_groups_of_a_group_norm_are_units():
    blocks = describe(Between(nn.GroupNorm(4, 8)), IMAGE)
    site = next(site for block in blocks for site in block.sites if site.name == "first")
    assert site.width == 4 and {part.each for part in site.parts} == {2}
    assert {(a.module, a.name): a.each for a in site.attributes}["function", "num_groups"] == 1
    assert verify(Between(nn.GroupNorm(4, 8)), blocks, IMAGE).deviation < 1e-8


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_weight_that_is_computed_refuses_what_it_reads(norm):
    model = Between(F.relu, last=norm(nn.Conv2d(8, 6, 3, padding=1)))
    assert "first" in reasons(model)


def test_a_weight_that_is_computed_makes_no_units():
    """A weight norm by rows could be cut with its units; the pruner follows no parametrization."""
    model = Between(F.relu, first=parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1)))
    found = describe(model, IMAGE)
    assert not any("first" in part.tensor for block in found for site in block.sites for part in site.parts)
    assert any("`first` computes it from other parameters" in str(refusal) for refusal in found.refused)


def test_depthwise_filters_are_tied_and_groups_are_rewritten():
    deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, affine=False), nn.ReLU())
    model = Between(deep)
    blocks = describe(model, IMAGE)
    site = next(site for block in blocks for site in block.sites if site.name == "first")
    roles = {part.tensor: part.role for part in site.parts}
    assert roles["first.weight"] == PRODUCER and roles["last.weight"] == CONSUMER
    assert roles["function.0.weight"] == roles["function.1.running_var"] == TIED
    names = {(a.module, a.name) for a in site.attributes}
    assert {("function.0", "groups"), ("function.0", "in_channels"), ("function.0", "out_channels")} <= names
    assert ("function.1", "num_features") in names
    assert verify(model, blocks, IMAGE).deviation < 1e-8


def test_sums_that_go_into_a_batch_norm_are_marked():
    model = Between(F.relu, last=nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)))
    sites = {site.name: site.normalised for block in describe(model, IMAGE) for site in block.sites}
    assert sites == {"first": True, "last.0": False, "head.0": False}


def test_a_weight_used_outside_of_its_module_is_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(F.relu(F.linear(self.a(x), self.b.weight)))

    found = reasons(Functional(), torch.zeros(2, 3))
    assert "`b.weight` used outside of its own module's call" in found["a"]
    assert "b" not in found


def test_a_module_used_twice_on_its_own_output_is_no_width():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.b(self.a(x))))))))

    assert "made and read by `b.weight`" in reasons(Twice(), torch.zeros(2, 3))["a"]


def test_a_module_used_on_two_paths_ties_them():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(F.relu(self.a(x))) * self.c(F.relu(self.b(x)))

    model = Shared()
    blocks = describe(model, torch.zeros(2, 3))
    (site,) = blocks[0].sites
    assert {part.tensor for part in site.parts} == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight"}
    assert verify(model, blocks, torch.zeros(2, 3)).deviation < 1e-8


def test_shared_parameters_are_cut_under_every_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(F.relu(self.a(x))) + self.d(F.relu(self.b(x)))

    (site,) = describe(Tied(), torch.zeros(2, 3))[0].sites
    assert {part.tensor for part in site.parts} >= {"a.weight", "b.weight", "c.weight", "d.weight"}
    assert {a.module for a in site.attributes} == {"a", "b", "c", "d"}


def test_a_tied_embedding_is_left_whole():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.table(tokens)
            return self.head(x + self.down(F.gelu(self.up(x))))

    blocks = describe(Text(), torch.zeros(2, 5, dtype=torch.long))
    assert [(site.name, site.width) for block in blocks for site in block.sites] == [("up", 12)]


def test_a_width_written_into_the_code_is_refused():
    found = reasons(Between(lambda x: x.view(-1, 8, 64).transpose(1, 2).reshape(-1, 8, 8, 8).transpose(1, 3)))
    assert "written into" in found["first"] or "fails without some units" in found["first"]


def test_a_number_of_parts_written_into_the_code_leaves_units_of_a_channel_of_each_part():
    blocks = describe(Between(lambda x: x.reshape(len(x), 4, -1, 8, 8).flatten(1, 2)), torch.zeros(2, 3, 8, 8))
    site = next(site for block in blocks for site in block.sites if site.name == "first")
    assert site.width == 2
    assert [part.offset for part in site.parts if part.tensor == "last.weight"] == [0, 2, 4, 6]


def test_a_head_size_from_the_stream_is_refused_not_cut_in_silence():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.proj = 4, nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, n, c = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
            return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))

    model = nn.Sequential(nn.Linear(5, 12), Heads(), nn.Linear(12, 2))
    blocks = describe(model, torch.zeros(2, 6, 5))
    assert [(block.module, len(block.sites)) for block in blocks] == [("1", 0)]
    assert any(refusal.units == 4 and "`1`" in refusal.reason for refusal in blocks.refused)


class Residual(nn.Module):
    """``x + inner(x)`` around a layer, or another residual module."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def layers(width: int = 6) -> nn.Sequential:
    """A hidden width."""
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6))


def test_of_nested_branches_the_inner_ones_are_found():
    model = nn.Sequential(
        nn.Linear(3, 6), Residual(nn.Sequential(nn.Linear(6, 6), Residual(layers(5)))), nn.Linear(6, 2)
    )
    blocks = describe(model, torch.zeros(2, 3))
    assert [block.module for block in blocks if block.removable] == ["1.inner.1"]
    assert any(r.kind == "branch" and "holds the branch" in r.reason for r in blocks.refused)
    assert verify(model, blocks, torch.zeros(2, 3)).deviation < 1e-8


def test_an_activation_behind_the_last_affine_moves_the_gate():
    inner = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6), nn.Sigmoid())
    model = nn.Sequential(nn.Linear(3, 6), Residual(inner), nn.Linear(6, 2))
    blocks = describe(model, torch.zeros(2, 3))
    assert blocks[0].output == "1.inner" and blocks[0].addend == "inner"
    assert verify(model, blocks, torch.zeros(2, 3)).deviation < 1e-8


def test_keep_protects_modules_and_what_they_hold():
    model = nn.Sequential(nn.Linear(3, 6), Residual(layers(5)), Residual(layers(7)), nn.Linear(6, 2))
    blocks = describe(model, torch.zeros(2, 3), keep=["1.inner.*"])
    assert [block.module for block in blocks] == ["2"]
    assert sum("kept by '1.inner.*'" in refusal.reason for refusal in blocks.refused) == 2


def test_least_is_by_site():
    model = nn.Sequential(nn.Linear(3, 6), Residual(layers(5)), Residual(layers(7)), nn.Linear(6, 2))
    assert describe(model, torch.zeros(2, 3), least={"*.inner.0": 4}).least == {"1.inner.0": 4, "2.inner.0": 4}


class Branching(nn.Module):
    """A forward pass that depends on its numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(y if y.sum() > 0 else -y)


PLAIN = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: describe(PLAIN, torch.zeros(2, 4)), r"`example` must be an input that the network runs on; `0` fails"),
        (lambda: describe(PLAIN, "image"), r"`example` must hold a tensor"),
        (lambda: describe(PLAIN, torch.zeros(2, 3, device="meta")), r"`example` must be on the network's device cpu"),
        (
            lambda: describe(PLAIN, torch.zeros(2, 3), keep="0"),
            r"`keep` must be a list of patterns.*Write keep=\['0'\]",
        ),
        (lambda: describe(PLAIN, torch.zeros(2, 3), keep=["layer*"]), r"`keep` must hold patterns of module paths"),
        (lambda: describe(PLAIN, torch.zeros(2, 3), least={"0": 0}), r"must be an integer of at least 1"),
        (lambda: describe(nn.Linear(3, 2), torch.zeros(2, 3)), r"`model` must have a branch or a width that can go"),
        (lambda: describe(Branching(), torch.zeros(2, 3)), r"must not depend on the numbers.*structures\(\)"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_half_precision_and_the_model_stay_as_they_are():
    model = (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).to(torch.bfloat16).train()
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = describe(model, IMAGE.to(torch.bfloat16))
    assert [site.width for site in blocks[0].sites] == [8]
    assert model.training and all(part.training for part in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Scale(nn.Module):
    """A number for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.view(1, -1, 1, 1)


class Pooled(nn.Module):
    """A branch without a product: pooling, scaled."""

    def __init__(self, shared: bool):
        super().__init__()
        self.norm, self.pool, self.scale = nn.GroupNorm(1, 6), nn.AvgPool2d(3, 1, 1), Scale(6)
        self.up, self.down, self.other = nn.Conv2d(6, 9, 1), nn.Conv2d(9, 6, 1), self.scale if shared else Scale(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.scale(self.pool(self.norm(x)))
        return x + self.other(torch.tanh(self.down(self.up(x).relu())))


def test_a_branch_that_ends_in_a_scale_is_gated_there_unless_it_shares_it():
    def model(shared: bool) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 6, 1), Pooled(shared), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    own, shared = model(False), model(True)
    blocks = describe(own, IMAGE)
    assert [block.output for block in blocks if block.removable] == ["1.scale", "1.other"]
    assert verify(own, blocks, IMAGE).deviation < 1e-12
    found = describe(shared, IMAGE)
    assert not [block for block in found if block.removable]
    assert sum(refusal.kind == "branch" for refusal in found.refused) == 2


def test_what_runs_in_train_mode_alone_stays():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3)
            self.helper = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))

        def forward(self, x: torch.Tensor):
            x = self.stem(x)
            out = self.down(F.relu(self.up(x)))
            return (out, self.helper(x)) if self.training else out

    found = describe(Auxiliary(), torch.zeros(2, 4))
    assert {site.name for block in found for site in block.sites} == {"stem", "up"}
    assert [refusal.reason for refusal in found.refused if refusal.name == "helper.0"] == [
        "it runs in train mode alone"
    ]


def test_a_branch_with_a_recurrent_layer_goes_with_the_states_that_nobody_reads():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.rnn, self.out = nn.LayerNorm(6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.out(self.rnn(self.norm(x))[0])

    model = nn.Sequential(nn.Linear(4, 6), Recurrent(), nn.Linear(6, 3))
    blocks = describe(model, torch.zeros(2, 7, 4))
    (block,) = [block for block in blocks if block.removable]
    assert block.branch == ("1.norm", "1.out", "1.rnn")
    assert verify(model, blocks, torch.zeros(2, 7, 4)).deviation < 1e-12
