"""`--layout auto`: which memory layout a run is trained in, and that the trial leaves no trace in its results."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catode.structures.inventory import Inventory
from catode.train import loop
from catode.train.loop import layout
from catode.train.models import build
from catode.train.settings.config import Config
from catode.train.settings.training import LAYOUTS

FLAGS = dict(dataset="digits", arch="resnet14", hidden_scale=0.25, epochs=2, batch_size=128, nu=20.0, memory=10)
FLAGS |= dict(check_every=2, warmup_epochs=0.1, threads=1)


@pytest.fixture
def slow(monkeypatch):
    """Makes one layout slow on a clock of its own: a step takes 2 ms in it, and 1 ms in the other."""

    def make(name):
        formats, passed = {True: LAYOUTS[0], False: LAYOUTS[1]}, []
        step = layout._step

        def timed(work, device):
            del passed[:]
            work()
            return 2.0 if passed[0] == name else 1.0

        def look(model, x, labels, config):
            passed.append(formats[x.is_contiguous(memory_format=torch.channels_last)])
            step(model, x, labels, config)

        monkeypatch.setattr(layout, "passing_ms", timed)
        monkeypatch.setattr(layout, "_step", look)

    return make


SMALL = dict(dataset="digits", nu=1.0, epochs=2, batch_size=4)


def trial(**more):
    config = Config.from_presets(**{**SMALL, **more})

    def make(own):
        model = build("resnet14", in_channels=3, classes=10, hidden_scale=0.25)
        return model.to(memory_format=layout.memory_format(own))

    blocks, before = make(config).structures(), torch.get_rng_state()
    found = layout.trial(config, make, blocks, (3, 8, 8), 10)
    assert torch.equal(torch.get_rng_state(), before)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_slow_layout_takes_longer_by_what_the_clock_says(slow, name):
    slow(name)
    other = next(one for one in LAYOUTS if one != name)
    assert trial(width_multiple=1) == {(name, 1): 4.0, (other, 1): 2.0}  # the network and half of it
    assert trial(nu=0.0, width_multiple=8) == {(name, 8): 2.0, (other, 8): 1.0}  # nothing will go
    assert trial(width_multiple=8) == {(name, 8): 4.0, (name, 1): 4.0, (other, 8): 2.0, (other, 1): 2.0}
    for more in (dict(alpha=1.0), dict(round_to=8)):  # no width will be odd
        assert trial(width_multiple=8, **more) == {(name, 8): 4.0, (other, 8): 2.0}


def test_a_real_trial_takes_time():
    found = trial(amp="bf16", width_multiple=8)
    assert found.keys() == {(name, multiple) for name in LAYOUTS for multiple in (8, 1)} and min(found.values()) > 0


@settings(max_examples=30)
@given(
    alpha=st.sampled_from([0.0, 0.5, 1.0]), round_to=st.sampled_from([1, 2, 4, 8]), multiple=st.sampled_from([1, 3, 8])
)
def test_law_the_half_network_has_widths_as_the_run_will(alpha, round_to, multiple):
    inventory = Inventory(build("resnet20", in_channels=3, classes=10).structures())
    config = Config.from_presets(**SMALL, alpha=alpha, round_to=round_to, width_multiple=multiple)
    kept = layout._half(inventory, config)
    assert np.array_equal(inventory.close(kept), kept)
    widths = np.array([kept[units].sum() for units in inventory.units])
    if alpha == 1:
        assert kept[inventory.is_layer].mean() == pytest.approx(0.5, abs=0.06)
        assert set(widths) <= {0, *inventory.widths}
    else:
        step = max(round_to, multiple)
        assert kept[inventory.is_layer].all() and all(
            w % step == 0 or w == n for w, n in zip(widths, inventory.widths, strict=True)
        )
        assert (widths >= 0.4 * inventory.widths - 0.5).all() and (widths < 0.6 * inventory.widths + 0.5 + step).all()


def test_a_run_is_that_of_the_layout_which_was_found_and_says_so(tmp_path, monkeypatch, capsys):
    times = dict(zip([(name, multiple) for name in LAYOUTS for multiple in (8, 1)], (4.0, 3.0, 2.5, 2.0), strict=True))
    monkeypatch.setattr(layout, "trial", lambda *given: times)
    monkeypatch.setattr("catode.report.report.write", lambda folder: None)
    folders = {}
    for name in ("auto", "channels-first"):
        width = {} if name == "auto" else {"width_multiple": 1}
        config = Config.from_presets(**FLAGS, layout=name, out=str(tmp_path / name), **width)
        folders[name] = loop.run(config, progress=False)
    own, given_one = folders.values()
    assert (
        "note: layout channels-first with any widths: a step of the network and one of half of it took 2 ms, channels-first with "
        "widths in multiples of 8 2.5 ms, channels-last with any widths 3 ms, channels-last with widths in multiples of 8 4 ms."
        in (capsys.readouterr().err)
    )
    config = json.loads((own / "config.json").read_text())
    assert config["layout"] == "channels-first" and config["width_multiple"] == 1
    first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in (own, given_one))
    assert all(torch.equal(first[key], second[key]) for key in second)
    assert (own / "structures.csv").read_bytes() == (given_one / "structures.csv").read_bytes()


def test_the_layout_is_no_part_of_a_run_s_name_and_older_files_are_read():
    plain = Config.from_presets(dataset="digits")
    assert plain.layout == "channels-last" and plain.channels_last
    assert {replace(plain, layout=one, out=None).out for one in (*LAYOUTS, "auto")} == {plain.out}
    for flag, name in ((True, "channels-last"), (False, "channels-first")):
        old = json.loads(plain.to_json())
        del old["layout"]
        read = Config.from_json(json.dumps(old | {"channels_last": flag}))
        assert (read.layout, read.channels_last) == (name, flag)
