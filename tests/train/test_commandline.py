"""The command line of a run: a flag for every setting, and one clear line for whatever is wrong."""

import argparse
import re

import pytest

from catode.train.settings import presets as module
from catode.train.settings.commandline import build_parser, parse
from catode.train.settings.config import Config, ConfigError, settings

MESSAGE = re.compile(r"^`[-\w.]+` must [^\n]+; got [^\n]+\. [^\n]+[.?]$|^`[-\w.]+` must [^\n]+; got [^\n]+[.?]$")

WRONG_LINES = [
    ("--nu -1", "`nu` must be >= 0; got nu=-1. Use 0 to train without gates."),
    ("--nu abc", "`nu` must be a number >= 0; got nu='abc'. Use 0 to train without gates."),
    ("--nu", "`nu` must have a value; got --nu without one. Write --nu=VALUE."),
    ("--risk 0.5", "`risk` must lie in (0, 0.5); got risk=0.5. Use 0.05 if in doubt."),
    ("--epochs 1.5", "`epochs` must be an integer >= 1; got epochs='1.5'. Use at least one epoch."),
    ("--epoch 5", "`--epoch` must be a known flag; got --epoch. Did you mean --epochs?"),
    ("--zzz", "`--zzz` must be a known flag; got --zzz. See --help for all flags."),
    ("--bogus", "`--bogus` must be a known flag; got --bogus. See --help for all flags."),
    ("stray", "`stray` must follow a flag; got the argument 'stray'. Remove it, or see --help."),
    ("--dry-run=1", "`dry_run` must be given without a value; got --dry-run='1'. Write --dry-run alone."),
    ("--dataset cifar-10 --data-dir x", "Did you mean 'cifar10'?"),
    ("--arch resnet21", "Did you mean 'resnet20'?"),
    ("--dataset cifar10", "`data_dir` must be given for dataset='cifar10'; got data_dir=None."),
    ("--data-dir x", "`data_dir` must be left out for dataset='digits'"),
    ("--download", "`download` must be left out unless dataset is cifar10 or cifar100"),
    ("--workers 2", "`workers` must be left out unless dataset='folder'; got workers=2"),
    ("--array-gib 0.5", "`array_gib` must be left out unless dataset='folder'; got array_gib=0.5"),
    ("--augment flip", "got augment='flip'. Did you mean 'crop-flip'?"),
    ("--image-size 3 --dataset folder --data-dir x", "`image_size` must be >= 4; got image_size=3."),
    ("--tol 0.1 --derive-tol", "`tol` must be left out with derive_tol; got tol=0.1 and derive_tol=True."),
    (
        "--amp fp16",
        "`amp` must be off or bf16 on device='cpu', where fp16 is not supported; got amp='fp16'. Use --amp bf16.",
    ),
    ("--nu 1 --epochs 10 --decide-until 0.8 --warmup-epochs 8", "`warmup_epochs` must be < decide_until x epochs = 8"),
    ("--resume x --nu 1", "`nu` must be left out with resume; got nu=1.0 and resume='x'."),
    (
        "--resume nowhere",
        "`resume` must be the folder of an interrupted run; got resume='nowhere', which holds no config.json.",
    ),
    ("--prior bernoulli", "`prior` must be flattening without --tol"),
    ("--prior concrete --tol 0.1 --shadow", "`prior` must be flattening without --tol, with a target or with shadow"),
    ("--prior concrete --tol 0.1", "`initial_keep_prob` must be below 1 with prior=concrete"),
    ("--shadow --nu 0", "`shadow` must be left out with nu=0"),
    ("--shadow --target-macs 0.5", "`shadow` must be left out with nu=0, a target"),
    ("--shadow --round-to 8", "`shadow` must be left out with nu=0, a target or round_to; got nu=3, round_to=8"),
    ("--seed -1", "`seed` must lie in [0, 4294967295]; got seed=-1."),
]


@pytest.mark.parametrize(("line", "expected"), WRONG_LINES)
def test_wrong_command_line_is_one_clear_line(line, expected):
    with pytest.raises(ConfigError) as caught:
        parse(line.split())
    assert expected in str(caught.value)
    assert MESSAGE.match(str(caught.value)), str(caught.value)


def test_every_flag_has_help_and_every_field_a_flag(capsys):
    actions = {a.dest: a for a in build_parser()._actions if a.dest != "help"}
    assert set(actions) == set(settings())
    for name, action in actions.items():
        assert "--" + name.replace("_", "-") in action.option_strings
        assert action.help and len(action.help) > 10
        if settings()[name].range:
            assert settings()[name].range in action.help
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    assert "--derive-tol" in capsys.readouterr().out


def test_flag_over_preset_over_default(monkeypatch):
    presets = {("digits", "*"): {"lr": 0.3, "momentum": 0.5, "nu": 0.2}, ("digits", "resnet32"): {"momentum": 0.7}}
    monkeypatch.setattr(module, "PRESETS", presets)
    config = parse(["--arch", "resnet32", "--lr", "0.4"])
    assert (config.lr, config.momentum, config.nu) == (0.4, 0.7, 0.2)
    assert config.weight_decay == Config.weight_decay
    config = parse([])
    assert (config.lr, config.momentum) == (0.3, 0.5)
    assert parse(["--lr", "0.1"]).lr == 0.1  # the field's own default, given, still wins


def test_switches_can_be_turned_both_ways():
    assert parse(["--nesterov"]).nesterov
    assert not parse(["--no-nesterov"]).nesterov
    assert parse(["--per-example-gates"]).per_example_gates


def test_parser_raises_instead_of_exiting():
    assert isinstance(build_parser(), argparse.ArgumentParser)
    with pytest.raises(ConfigError):
        build_parser().parse_args(["--no-such-flag"])
