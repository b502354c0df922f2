"""The small GPT: its text, a quick comparison that goes on from its records, its picture."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gpt import comparison, text
from benchmarks.gpt.model import GPT
from benchmarks.gpt.picture import draw


def test_windows_are_followed_by_their_next_characters_and_modules_are_held_out():
    of = text.load()
    assert len(of.training) > 1_000_000 and len(of.held_out) > 100_000
    x, y = text.windows(of.held_out, torch.tensor([0, 5, len(of.held_out) - 9]), 8)
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(x[1, :3], of.held_out[5:8])
    assert y[2, -1] == of.held_out[-1] and int(of.training.min()) >= 0 and int(of.training.max()) < of.vocabulary


def test_a_character_depends_on_those_before_it_alone():
    torch.manual_seed(0)
    model, tokens = GPT(11, context=6, width=8, depth=1, heads=2).eval(), torch.randint(11, (1, 6))
    other = tokens.clone()
    other[0, 4] = (other[0, 4] + 1) % 11
    with torch.no_grad():
        one, two = model(tokens), model(other)
    assert torch.equal(one[:, :4], two[:, :4]) and not torch.equal(one[:, 4:], two[:, 4:])
    assert (
        sum(p.numel() for p in model.parameters())
        == 11 * 8 + 6 * 8 + (8 * 24 + 24) + 72 + 16 + 8 * 32 + 32 + 32 * 8 + 8 + 16 + 16
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quick_comparison_goes_on_from_its_records(tmp_path, capsys, monkeypatch):
    comparison.main(["--quick", "--folder", str(tmp_path)])
    told = capsys.readouterr().out
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "quick").iterdir()}
    assert set(records) == {"pruned-s0", "dense-s0"}
    pruned, dense = records["pruned-s0"], records["dense-s0"]
    assert pruned["tied"] and pruned["macs"] < 0.6 and pruned["params"] < dense["params"]
    assert pruned["params_share"] == pytest.approx(pruned["params"] / dense["params"])
    assert f"{pruned['held_out_loss']:.4f}" in told and "tied in every compact network: yes." in told
    monkeypatch.setattr(comparison, "train", lambda *_: pytest.fail("a record is not made again"))
    comparison.main(["--quick", "--folder", str(tmp_path)])
    assert capsys.readouterr().out == told
    with pytest.raises(ValueError, match=r"^`folder` must hold records of these settings; pruned-s0.json has others"):
        comparison.main(["--quick", "--folder", str(tmp_path), "--set", "lr=0.1"])
    figure = draw([(pruned, dense)], 10)
    shown = f"seed 0: {100 * pruned['macs']:.0f} % of the MACs"
    assert [ax.get_title(loc="left") for ax in figure.axes] == [shown, "training loss"]
