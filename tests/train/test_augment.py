"""Resized crops and mixtures: known answers and laws."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import make, some

from catode.train.data import Batches, DataError
from catode.train.data.augment import CROP_AREA, CROP_RATIO, crop_boxes, draw, mixing_share, resize_crops

unit = st.floats(0, 1, exclude_max=True)
sides = st.integers(1, 700)


@given(st.lists(st.tuples(unit, unit, unit, unit), min_size=1, max_size=5), sides, sides)
def test_boxes_lie_in_the_image_with_the_area_and_ratio_asked_for(draws, height, width):
    left, top, wide, high = crop_boxes(np.array(draws), height, width).T
    assert (left >= 0).all() and (top >= 0).all() and (wide > 0).all() and (high > 0).all()
    assert (left + wide <= width * (1 + 1e-12)).all() and (top + high <= height * (1 + 1e-12)).all()
    share, ratio = wide * high / (height * width), wide / high
    assert (share <= CROP_AREA[1] + 1e-9).all()
    whole = (wide < width) & (high < height)  # not cut to the image's size
    assert (share[whole] >= CROP_AREA[0] - 1e-9).all()
    assert (ratio[whole] >= 1 / CROP_RATIO - 1e-9).all() and (ratio[whole] <= CROP_RATIO + 1e-9).all()


def test_boxes_reach_every_place_and_size():
    left, top, wide, high = crop_boxes(draw("resized-crop", 4000, 0, 0).crop, 60, 80).T
    share = wide * high / 4800
    assert share.min() < 0.09 and share.max() > 0.95 and 0.48 < share.mean() < 0.55
    assert left.min() < 0.1 and (left + wide).max() > 79.9 and top.min() < 0.1 and (top + high).max() > 59.9


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 99))
def test_a_box_of_a_plane_is_that_part_of_the_plane(height, width, seed):
    """Bilinear interpolation is exact on a linear image, up to half a pixel from its edge."""
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    image = torch.from_numpy(3 * columns - 2 * rows).float()[None, None]
    box = crop_boxes(np.random.default_rng(seed).random((1, 4)), height, width)
    found = resize_crops(image, torch.from_numpy(box).float())[0, 0].double().numpy()
    left, top, wide, high = box[0]
    x = np.clip(left + wide * (np.arange(width) + 0.5) / width, 0.5, width - 0.5)
    y = np.clip(top + high * (np.arange(height) + 0.5) / height, 0.5, height - 0.5)
    assert found == pytest.approx(3 * x[None, :] - 2 * y[:, None], abs=1e-4)


def test_the_box_of_the_whole_image_changes_nothing():
    images = torch.rand(3, 2, 5, 7)
    boxes = torch.tensor([[0.0, 0.0, 7.0, 5.0]]).expand(3, 4)
    assert torch.allclose(resize_crops(images, boxes), images, atol=1e-5)


def test_half_of_the_resized_crops_are_mirrored():
    ramp = (10 * torch.arange(20, dtype=torch.uint8)).expand(400, 1, 20, 20).contiguous()
    labels = torch.zeros(400, dtype=torch.int64)
    ((x, _),) = Batches(ramp, labels, 400, (0.0,), (1.0,), augment="resized-crop").epoch(0, 0)
    falling = (x[:, 0, :, -1] < x[:, 0, :, 0]).float().mean()
    assert 0.4 < falling < 0.6


def mixed(alpha, world=1, rank=0, batch_size=4, channels_last=False, augment="crop-flip"):
    options = {"mixup": alpha, "classes": 20, "shard": (rank, world), "channels_last": channels_last}
    return make(batch_size, augment, **options)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch_size", [4, 5])
def test_a_mixed_batch_is_the_batch_mixed_with_its_second_half(channels_last, batch_size):
    plain = make(batch_size, channels_last=channels_last).epoch(2, 3)
    for k, ((x, y), (mix, soft)) in enumerate(
        zip(plain, mixed(0.4, batch_size=batch_size, channels_last=channels_last).epoch(2, 3), strict=True)
    ):
        share, half = mixing_share(0.4, 2, 3, k), batch_size // 2
        assert 0 <= share <= 1
        assert torch.allclose(mix, share * x + (1 - share) * x.roll(-half, 0), atol=1e-6)
        hard = torch.nn.functional.one_hot(y, 20).float()
        assert torch.allclose(soft, share * hard + (1 - share) * hard.roll(-half, 0), atol=1e-6)
        assert torch.allclose(soft.sum(1), torch.ones(batch_size)) and soft.shape == (batch_size, 20)


@pytest.mark.parametrize(("batch_size", "world"), [(4, 2), (6, 2), (6, 3), (5, 5), (10, 2)])
def test_shards_of_mixed_batches_make_up_the_batch(batch_size, world):
    whole = list(mixed(0.4, batch_size=batch_size, augment="resized-crop").epoch(1, 1))
    for rank in range(world):
        part = mixed(0.4, world, rank, batch_size, augment="resized-crop").epoch(1, 1, start=1)
        for (x, y), (px, py) in zip(whole[1:], part, strict=True):
            assert torch.equal(px, x[rank::world]) and torch.equal(py, y[rank::world])


def test_shares_of_mixtures_vary_and_follow_alpha():
    shares = np.array([[mixing_share(alpha, 0, 0, k) for k in range(400)] for alpha in (0.1, 1.0, 50.0)])
    assert shares.mean(1) == pytest.approx([0.5] * 3, abs=0.06)
    assert shares.var(1) == pytest.approx([1 / (4 * (2 * a + 1)) for a in (0.1, 1.0, 50.0)], rel=0.25)


@pytest.mark.parametrize(("mixup", "classes"), [(-0.1, 20), (0.2, None), (0.2, 19)])
def test_wrong_mixtures_are_refused(mixup, classes):
    images, labels, mean, std = some()
    with pytest.raises(DataError, match=r"^`mixup` must be >= 0, and `classes` above every label"):
        Batches(images, labels, 4, mean, std, mixup=mixup, classes=classes)


def test_images_without_room_on_the_device_stay_with_the_host(monkeypatch):
    """The meta device stands for any that is not the host."""
    for room, place in ((10**9, "meta"), (0, "cpu")):
        monkeypatch.setattr("catode.train.data.batches._image_budget", lambda device, room=room: room)
        batches = make(device="meta")
        assert batches._images.device.type == place
        for x, y in batches.epoch(0, 0):
            assert x.device.type == y.device.type == "meta" and x.shape == (4, 3, 8, 10)
