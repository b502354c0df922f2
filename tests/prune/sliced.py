"""Networks whose units are slices of any tensors, with descriptions written by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from catode.structures.description import CONSUMER, PRODUCER, TIED, Attribute, Block, Site, Slice


def made(path: str, norm: bool = False, bias: bool = False, role: str = PRODUCER, offset: int = 0, each: int = 1):
    """Slices of what a layer computes, or of a norm."""
    names = ("weight", "bias") if bias else ("weight",)
    names = ("weight", "bias", "running_mean", "running_var") if norm else names
    return tuple(Slice(f"{path}.{name}", 0, role, offset, each) for name in names)


def read(path: str, dim: int = 1, offset: int = 0, each: int = 1):
    """The slice of what a layer reads."""
    return (Slice(f"{path}.weight", dim, CONSUMER, offset, each),)


class Described(nn.Module):
    """A network with a description."""

    def structures(self):
        return list(self.blocks_())


class Inverted(nn.Module):
    """MobileNet's inverted residual with squeeze and excitation: expand, depthwise, excite, project."""

    def __init__(self, width=6, hidden=8, squeeze=3):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depth, self.bn2 = (
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
        )
        self.fc1, self.fc2 = nn.Conv2d(hidden, squeeze, 1), nn.Conv2d(squeeze, hidden, 1)
        self.project, self.bn3 = nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        y = F.silu(self.bn1(self.expand(x)))
        y = F.silu(self.bn2(self.depth(y)))
        y = y * self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.drop(self.bn3(self.project(y)))


def inverted_sites(name, hidden=8, squeeze=3):
    wide = made(f"{name}.expand") + made(f"{name}.bn1", norm=True, role=TIED)
    wide += made(f"{name}.depth", role=TIED) + made(f"{name}.bn2", norm=True, role=TIED)
    wide += read(f"{name}.fc1") + made(f"{name}.fc2", bias=True) + read(f"{name}.project")
    narrow = made(f"{name}.fc1", bias=True) + read(f"{name}.fc2")
    return (
        Site(f"{name}.expand", hidden, (), (), parts=wide),
        Site(f"{name}.fc1", squeeze, (), (), parts=narrow),
    )


def members(module: nn.Module, name: str) -> tuple[str, ...]:
    return tuple(f"{name}.{child}" for child, part in module.named_children() if any(True for _ in part.parameters()))


class MobileNet(Described):
    """Two inverted residuals."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Sequential(Inverted(), Inverted()),
            nn.Linear(6, 5),
        )

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))

    def blocks_(self):
        for name in ("body.0", "body.1"):
            branch = members(self.get_submodule(name), name)
            yield Block(name, f"{name}.bn3", inverted_sites(name), module=name, addend="drop", branch=branch)


class Concatenated(Described):
    """DenseNet: each layer reads everything before it; nothing is residual."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)
        self.one, self.norm1 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(10)
        self.two, self.norm2 = nn.Conv2d(10, 5, 3, padding=1), nn.BatchNorm2d(15)
        self.fc = nn.Linear(15, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.one(F.relu(self.norm0(x)))], 1)
        x = torch.cat([x, self.two(F.relu(self.norm1(x)))], 1)
        return self.fc(F.relu(self.norm2(x)).mean((2, 3)))

    def blocks_(self):
        free = tuple(Slice(f"norm0.{name}", 0, TIED) for name in ("running_mean", "running_var"))
        stem = made("stem", bias=True) + free + read("one") + read("two") + read("fc")
        stem += made("norm1", norm=True, role=TIED) + made("norm2", norm=True, role=TIED)
        one = made("one", bias=True) + made("norm1", norm=True, role=TIED, offset=6) + read("two", offset=6)
        one += made("norm2", norm=True, role=TIED, offset=6) + read("fc", offset=6)
        two = made("two", bias=True) + made("norm2", norm=True, role=TIED, offset=10) + read("fc", offset=10)
        yield Block(
            "all",
            "",
            (
                Site("stem", 6, (), (), parts=stem),
                Site("one", 4, (), (), parts=one),
                Site("two", 5, (), (), parts=two),
            ),
            removable=False,
        )


class Grouped(nn.Module):
    """ResNeXt's bottleneck: a unit is a group."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + x)


class ResNeXt(Described):
    """Two of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Sequential(Grouped(), Grouped()),
            nn.Linear(6, 5),
        )

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))

    def blocks_(self):
        for name in ("body.0", "body.1"):
            parts = made(f"{name}.conv1", each=3) + made(f"{name}.bn1", norm=True, role=TIED, each=3)
            parts += made(f"{name}.conv2", role=TIED, each=2) + made(f"{name}.bn2", norm=True, role=TIED, each=2)
            parts += read(f"{name}.conv3", each=2)
            branch = members(self.get_submodule(name), name)
            site = Site(f"{name}.conv2", 4, (), (), parts=parts)
            yield Block(f"{name}/branch", f"{name}.bn3", (site,), module=name, addend="bn3", branch=branch)


class VGG(Described):
    """Nothing but units, and a flatten."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(5 * 4, 7), nn.ReLU(), nn.Dropout(0.0), nn.Linear(7, 5))

    def forward(self, x):
        return self.classifier(self.pool(self.features(x)).flatten(1))

    def blocks_(self):
        chain = (
            ("features.0", "features.3", 6, 1),
            ("features.3", "classifier.0", 5, 4),
            ("classifier.0", "classifier.3", 7, 1),
        )
        for one, other, width, each in chain:
            parts = made(one, bias=True) + read(other, each=each)
            yield Block(one, "", (Site(one, width, (), (), parts=parts),), removable=False)


class UpDown(nn.Module):
    """A branch that reads through a transposed convolution, whose weight has the shape (in, out, ...)."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(6, 7, 2, stride=2), nn.ConvTranspose2d(7, 5, 2, stride=2)
        self.out = nn.Conv2d(5, 6, 1)

    def forward(self, x):
        return x + self.out(F.gelu(self.up(F.gelu(self.down(x)))))


class Transposed(Described):
    """One of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 6, 3, padding=1), UpDown(), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))

    def blocks_(self):
        first = made("body.down", bias=True) + read("body.up", dim=0)
        second = (Slice("body.up.weight", 1, PRODUCER), Slice("body.up.bias", 0, PRODUCER), *read("body.out"))
        sites = (Site("body.down", 7, (), (), parts=first), Site("body.up", 5, (), (), parts=second))
        yield Block("body", "body.out", sites, module="body", addend="out", branch=("body.down", "body.up", "body.out"))


class Scale(nn.Module):
    """A LayerScale."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Depth(nn.Module):
    """Stochastic depth."""

    def forward(self, x):
        return x * torch.bernoulli(torch.full((len(x), 1, 1), 0.9, dtype=x.dtype)) / 0.9 if self.training else x


class Attention(nn.Module):
    """Heads in one projection, with a bias for each."""

    def __init__(self, width=6, heads=4, size=3, tokens=9):
        super().__init__()
        self.num_heads, self.size = heads, size
        self.qkv, self.proj = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)
        self.table = nn.Parameter(torch.randn(heads, tokens, tokens))

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), -1, 3, self.num_heads, self.size).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(2, 3)) * self.size**-0.5 + self.table).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class GLU(nn.Module):
    """Llama's MLP: two layers make its units."""

    def __init__(self, width=6, hidden=8):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Encoder(nn.Module):
    """Two branches: attention, and an MLP."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.scale1, self.depth1 = nn.LayerNorm(6), Attention(), Scale(6), Depth()
        self.norm2, self.mlp, self.depth2 = nn.LayerNorm(6), GLU(), Depth()
        self.gamma = nn.Parameter(0.5 * torch.ones(6))

    def forward(self, x):
        x = x + self.depth1(self.scale1(self.attn(self.norm1(x))))
        y = self.depth2(self.gamma * self.mlp(self.norm2(x)))
        y += x
        return y


class Transformer(Described):
    """Patches of 4x4, two encoders."""

    def __init__(self):
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, 6, 4, 4), nn.Parameter(torch.randn(1, 9, 6))
        self.body, self.norm, self.fc = nn.ModuleList([Encoder(), Encoder()]), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.body:
            x = block(x)
        return self.fc(self.norm(x).mean(1))

    def blocks_(self):
        for name in ("body.0", "body.1"):
            heads = tuple(
                Slice(f"{name}.attn.qkv.{t}", 0, PRODUCER, 12 * i, 3) for i in range(3) for t in ("weight", "bias")
            )
            heads += (Slice(f"{name}.attn.table", 0, TIED), *read(f"{name}.attn.proj", each=3))
            site = Site(f"{name}.heads", 4, (), (), parts=heads, attributes=(Attribute(f"{name}.attn", "num_heads"),))
            branch = (f"{name}.norm1", f"{name}.attn", f"{name}.scale1")
            yield Block(f"{name}.attn", f"{name}.scale1", (site,), module=name, addend="depth1", branch=branch)
            units = made(f"{name}.mlp.gate") + made(f"{name}.mlp.up") + read(f"{name}.mlp.down")
            site = Site(f"{name}.mlp.gate", 8, (), (), parts=units)
            branch = (f"{name}.norm2", f"{name}.mlp", f"{name}.gamma")
            yield Block(f"{name}.mlp", f"{name}.mlp.down", (site,), module=name, addend="depth2", branch=branch)


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight has the shape (in, out)."""

    def __init__(self, width_in, nf):
        super().__init__()
        self.nf, self.weight, self.bias = (
            nf,
            nn.Parameter(0.3 * torch.randn(width_in, nf)),
            nn.Parameter(torch.zeros(nf)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Queries(nn.Module):
    """Grouped queries: two for every head of keys and values."""

    def __init__(self, width=6, heads=3, size=2):
        super().__init__()
        self.heads, self.kv_heads, self.size = 2 * heads, heads, size
        self.q, self.o = nn.Linear(width, 2 * heads * size), nn.Linear(2 * heads * size, width)
        self.k, self.v = nn.Linear(width, heads * size), nn.Linear(width, heads * size)

    def forward(self, x):
        q = self.q(x).view(len(x), -1, self.heads, self.size).transpose(1, 2)
        k, v = (part(x).view(len(x), -1, self.kv_heads, self.size).transpose(1, 2) for part in (self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Grouped queries, and an MLP of `Conv1D` in the layer itself."""

    def __init__(self, width=6):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Queries()
        self.norm2, self.c_fc, self.c_proj = nn.LayerNorm(width), Conv1D(width, 7), Conv1D(7, width)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return torch.add(x, self.c_proj(F.gelu(self.c_fc(self.norm2(x)))))


class Decoder(Described):
    """One of them."""

    def __init__(self):
        super().__init__()
        self.patches, self.body, self.fc = nn.Conv2d(3, 6, 4, 4), Layer(), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.body(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    def blocks_(self):
        q, k, v, o = (f"body.attn.{name}" for name in "qkvo")
        heads = made(q, bias=True, each=4) + made(k, bias=True, each=2) + made(v, bias=True, each=2)
        numbers = (Attribute("body.attn", "heads", 2), Attribute("body.attn", "kv_heads"))
        site = Site("body.attn", 3, (), (), parts=heads + read(o, each=4), attributes=numbers)
        branch = ("body.norm", "body.attn")
        yield Block("attention", o, (site,), module="body", addend="attn", branch=branch)
        units = (Slice("body.c_fc.weight", 1, PRODUCER), *made("body.c_fc", bias=True)[1:], *read("body.c_proj", dim=0))
        site = Site("body.c_fc", 7, (), (), parts=units, attributes=(Attribute("body.c_fc", "nf"),))
        branch = tuple(f"body.{name}" for name in ("norm2", "c_fc", "c_proj"))
        yield Block("mlp", "body.c_proj", (site,), module="body", addend="c_proj", branch=branch)


class Pair(nn.Module):
    """An attention that returns two things, as Hugging Face's do."""

    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, states, mask=None):
        return self.inner(states), None


class Untraceable(nn.Module):
    """Hugging Face's form of a layer, which takes whatever it is given and branches on it."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(6), Pair()
        self.norm2, self.mlp, self.gamma = nn.LayerNorm(6), GLU(), nn.Parameter(0.5 * torch.ones(6))

    def forward(self, states, *args, **kwargs):
        residual = states
        states, _ = self.attn(states=self.norm1(states), mask=None if not args else args[0])
        states = residual + states
        if any(float(part.detach().sum()) > 1e9 for part in (states,)):
            states = states.clamp(max=1e9)
        return states + self.gamma * self.mlp(self.norm2(states))


class Foreign(Described):
    """Two of them."""

    def __init__(self):
        super().__init__()
        self.patches, self.body, self.fc = (
            nn.Conv2d(3, 6, 4, 4),
            nn.Sequential(Untraceable(), Untraceable()),
            nn.Linear(6, 5),
        )

    def forward(self, x):
        return self.fc(self.body(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    def blocks_(self):
        for name in ("body.0", "body.1"):
            inner = f"{name}.attn.inner"
            heads = tuple(
                Slice(f"{inner}.qkv.{t}", 0, PRODUCER, 12 * i, 3) for i in range(3) for t in ("weight", "bias")
            )
            heads += (Slice(f"{inner}.table", 0, TIED), *read(f"{inner}.proj", each=3))
            site = Site(inner, 4, (), (), parts=heads, attributes=(Attribute(inner, "num_heads"),))
            absent = ((f"{name}.norm1", 0), (f"{name}.attn", 2))
            branch = (f"{name}.norm1", f"{name}.attn")
            yield Block(f"{name}.attn", f"{inner}.proj", (site,), module=name, absent=absent, branch=branch)
            units = made(f"{name}.mlp.gate") + made(f"{name}.mlp.up") + read(f"{name}.mlp.down")
            site = Site(f"{name}.mlp", 8, (), (), parts=units)
            absent = ((f"{name}.norm2", 0), (f"{name}.mlp", 0))
            branch = (f"{name}.norm2", f"{name}.mlp", f"{name}.gamma")
            yield Block(f"{name}.mlp", f"{name}.mlp.down", (site,), module=name, absent=absent, branch=branch)


class Shared(Described):
    """A width that a branch and what comes after it read; it stays when the branch goes."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 6, 3, padding=1), Fork(), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))

    def blocks_(self):
        inner = made("body.one", bias=True) + read("body.two")
        branch = ("body.one", "body.two")
        site = Site("body.one", 7, (), (), parts=inner)
        yield Block("branch", "body.two", (site,), module="body", addend="two", branch=branch)
        parts = made("body.wide", bias=True) + read("body.one") + read("body.side")
        yield Block("rest", "", (Site("wide", 8, (), (), parts=parts),), removable=False)


class Fork(nn.Module):
    """``side(y) + two(relu(one(y)))`` with ``y = relu(wide(x))``."""

    def __init__(self):
        super().__init__()
        self.wide, self.side = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.one, self.two = nn.Conv2d(8, 7, 3, padding=1), nn.Conv2d(7, 4, 1)

    def forward(self, x):
        y = F.relu(self.wide(x))
        return self.side(y) + self.two(F.relu(self.one(y)))


class Torch(nn.Module):
    """torchvision's encoder: its attention returns two things, and reads the weight of its last layer without calling it."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x):
        y = self.norm(x)
        y, _ = self.attn(y, y, y, need_weights=False)
        x = y + x
        return x + self.mlp(self.norm2(x))


class Encoded(Described):
    """Two of them."""

    def __init__(self):
        super().__init__()
        self.patches, self.body, self.fc = nn.Conv2d(3, 6, 4, 4), nn.Sequential(Torch(), Torch()), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.body(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    def blocks_(self):
        for name in ("body.0", "body.1"):
            branch = (f"{name}.norm", f"{name}.attn")
            ends = dict(output=f"{name}.attn.out_proj", reader=f"{name}.attn")
            yield Block(f"{name}.attn", sites=(), module=name, addend="getitem", branch=branch, **ends)
            units = made(f"{name}.mlp.0", bias=True) + read(f"{name}.mlp.2")
            site = Site(f"{name}.mlp", 8, (), (), parts=units)
            branch = (f"{name}.norm2", f"{name}.mlp")
            yield Block(f"{name}.mlp", f"{name}.mlp.2", (site,), module=name, addend="mlp", branch=branch)


IMAGES = (2, 3, 12, 12)
NETWORKS = {
    "inverted residuals with squeeze and excitation": MobileNet,
    "concatenation": Concatenated,
    "grouped convolutions": ResNeXt,
    "no branches": VGG,
    "a width that a branch reads, too": Shared,
    "a transposed convolution": Transposed,
    "attention and GLU": Transformer,
    "modules that cannot be traced": Foreign,
    "torch's own attention": Encoded,
    "grouped queries and weights of shape (in, out)": Decoder,
}
