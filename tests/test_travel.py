"""Compact networks of each kind travel: copies, pickles, state dicts, programs, compiled and in int8, with the same outputs."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import catode
from catode.prune.gated.cut import restrict
from catode.structures.inventory import Inventory

TOLERANCE = 1e-4


class SqueezeExcite(nn.Module):
    """Residual branch of a mobile network: expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depth = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.squeeze, self.excite = nn.Conv2d(hidden, 6, 1), nn.Conv2d(6, hidden, 1)
        self.project, self.norm3 = nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self.norm2(self.depth(F.relu6(self.norm1(self.expand(x))))))
        y = y * self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return x + self.norm3(self.project(y))


class Mobile(nn.Module):
    """A convolutional network with depthwise convolutions and squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(SqueezeExcite(8, 16) for _ in range(3)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Layer(nn.Module):
    """Attention with a fused qkv, and an MLP; causal for text."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.head_size, self.causal = heads, width // heads, causal
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, -1, self.head_size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(found.transpose(1, 2).reshape(batch, tokens, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Patches(nn.Module):
    """A vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(3, 16, 4, stride=4), nn.Parameter(0.1 * torch.randn(1, 4, 16))
        self.layers = nn.Sequential(Layer(16, 4, False), Layer(16, 4, False))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(tokens)).mean(1))


class Text(nn.Module):
    """A GPT-like model of characters, logits for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 16), nn.Embedding(6, 16)
        self.layers = nn.Sequential(Layer(16, 4, True), Layer(16, 4, True))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 11, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.layers(self.tokens(x) + places)))


KINDS = {
    "mobile": (Mobile, lambda n: torch.randn(n, 3, 8, 8)),
    "transformer": (Patches, lambda n: torch.randn(n, 3, 8, 8)),
    "text": (Text, lambda n: torch.randint(11, (n, 6))),
}


@pytest.fixture(scope="module", params=KINDS)
def compact(request):
    """A network without its second branch and about half its units: kind, network, record of its structure, inputs, outputs."""
    make, inputs = KINDS[request.param]
    torch.manual_seed(0)
    model, x = make(), inputs(3)
    blocks = catode.describe(model, inputs(2))
    inventory = Inventory(blocks)
    removable = np.flatnonzero(inventory.is_layer & inventory.removable)
    kept = np.random.default_rng(0).random(inventory.size) < 0.5
    kept[: inventory.layers] = True
    for units in inventory.units:
        kept[units[0]] = True
    kept[removable[1]] = False
    kept = inventory.close(kept)
    record = inventory.record(kept)
    restrict(model, blocks, record)
    with torch.no_grad():
        for _ in range(2):
            model(x)
    model.eval()
    whole = make()
    assert sum(p.numel() for p in model.parameters()) < 0.75 * sum(p.numel() for p in whole.parameters())
    assert any(site and len(site) for b in record.values() for site in b["sites"].values())
    with torch.no_grad():
        return request.param, model, record, x, model(x)


def pickled(kind, model, record, x):
    return pickle.loads(pickle.dumps(model))(x)


def copied(kind, model, record, x):
    return copy.deepcopy(model)(x)


def saved_whole(kind, model, record, x):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(x)


def into_the_class(kind, model, record, x):
    make, inputs = KINDS[kind]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make()
    restrict(other, catode.describe(make(), inputs(2)), record)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert type(other) is type(model)
    return other.eval()(x)


def exported(kind, model, record, x):
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (KINDS[kind][1](2),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()(x)


def onnx(kind, model, record, x):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    file = io.BytesIO()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, opset_version=18)
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def compiled(kind, model, record, x):
    torch.compiler.reset()
    try:
        return torch.compile(model)(x)
    except Exception as error:
        if "compiler" in str(error).lower():
            pytest.skip(f"no C++ compiler: {type(error).__name__}")
        raise
    finally:
        torch.compiler.reset()


EXACT = (pickled, copied, saved_whole, into_the_class)


@pytest.mark.parametrize("way", [*EXACT, exported, onnx, compiled], ids=lambda way: way.__name__)
def test_a_compact_network_computes_the_same_wherever_it_goes(way, compact):
    kind, model, record, x, expected = compact
    with torch.no_grad():
        found = way(kind, model, record, x)
    if way in EXACT:
        assert torch.equal(found, expected)
    else:
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


def quantised_by_ao(model):
    """Linear layers with int8 weights and activations, by PyTorch's own dynamic quantisation."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def quantised_by_torchao(model):
    """The same by torchao."""
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model


@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning", "ignore:.*quantiz.*:UserWarning")
@pytest.mark.parametrize("by", [quantised_by_ao, quantised_by_torchao])
def test_a_compact_network_is_quantised_as_its_whole_one_is(by, compact):
    """In int8 outputs differ by its steps: the compact network's by no more than four times the whole one's."""
    kind, model, _, x, expected = compact
    if by is quantised_by_ao and (
        importlib.util.find_spec("torch.ao.quantization") is None
        or "none" in torch.backends.quantized.supported_engines[-1:]
    ):
        pytest.skip("this PyTorch has no engine for int8")
    torch.manual_seed(1)
    whole = KINDS[kind][0]().eval()
    with torch.no_grad():
        error = {}
        for name, network in (("compact", model), ("whole", whole)):
            plain = network(x)
            found = by(copy.deepcopy(network))(x)
            error[name] = float((found - plain).abs().max() / plain.abs().max())
        assert torch.equal(model(x), expected)
    assert 0 < error["compact"] <= max(4 * error["whole"], 0.05)
