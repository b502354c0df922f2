"""The memory format of parameters and inputs changes nothing of what is found."""

import pytest
import torch
from torch import nn

import catode
from benchmarks.prunability.models import declare_operators


class Net(nn.Module):
    """Convolutions, one of them depthwise, a norm and a classifier."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.d = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b, self.head = nn.Conv2d(8, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(nn.functional.adaptive_avg_pool2d(self.b(self.d(self.n(self.a(x)).relu())), 1).flatten(1))


def mobile():
    declare_operators()
    import torchvision

    return torchvision.models.mobilenet_v2(num_classes=10)


@pytest.mark.parametrize("make", [Net, mobile])
def test_channels_last_networks_are_described_as_others_are(make):
    model, x = make(), torch.zeros(2, 3, 32, 32)
    plain = catode.describe(model, x)
    last = catode.describe(model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))
    assert list(plain) == list(last) and plain.refused == last.refused
    assert sum(site.width for block in plain for site in block.sites) > 10
    assert model.a.weight.is_contiguous(memory_format=torch.channels_last) if make is Net else True
