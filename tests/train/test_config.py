"""The configuration: one source for flags, ranges, presets, identity and config.json."""

import argparse
import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from catode.train import config as module
from catode.train.config import LEAST, PRESETS, Config, ConfigError, build_parser, check_out, parse, settings
from catode.train.models import ARCHITECTURES

MESSAGE = re.compile(r"^`[-\w.]+` must [^\n]+; got [^\n]+\. [^\n]+[.?]$|^`[-\w.]+` must [^\n]+; got [^\n]+[.?]$")

WRONG_FIELDS = [
    ("dataset", "cifar-10"),
    ("dataset", None),
    ("arch", "resnet21"),
    ("download", 1),
    ("array_gib", -1),
    ("workers", -1),
    ("workers", 1.5),
    ("augment", "cutout"),
    ("mixup", -0.1),
    ("shortcut", "a"),
    ("stem", "small"),
    ("init", ""),
    ("mixup", 101),
    ("hidden_scale", 0),
    ("hidden_scale", 1.01),
    ("nu", -1),
    ("target_macs", 0),
    ("target_macs", 1.0),
    ("target_params", -0.5),
    ("target_params", "half"),
    ("nu", float("nan")),
    ("nu", 5e-324),
    ("alpha", 1e-300),
    ("lr", 5e-324),
    ("nu", float("inf")),
    ("nu", "1"),
    ("nu", True),
    ("alpha", -0.1),
    ("alpha", 1.1),
    ("beta", -0.1),
    ("beta", 2),
    ("risk", 0),
    ("risk", 0.5),
    ("derive_tol", 1),
    ("tol", -0.1),
    ("tol", 1.5),
    ("cost", "time"),
    ("prior", "flat"),
    ("shadow", "yes"),
    ("round_to", 0),
    ("round_to", 8.0),
    ("estimator", "STE"),
    ("layer_estimator", "reinforce"),
    ("per_example_gates", "yes"),
    ("probe_size", 0),
    ("memory", 9),
    ("layers_per_probe", 0),
    ("initial_keep_prob", 0),
    ("initial_keep_prob", 1.2),
    ("warmup_epochs", -1),
    ("decide_until", 0),
    ("decide_until", 1.5),
    ("rate_ratio", 0),
    ("sink_share", 0),
    ("sink_share", 1.1),
    ("measure_every", 0),
    ("check_every", 1.5),
    ("epochs", 0),
    ("epochs", 1.0),
    ("batch_size", 1),
    ("lr", 0),
    ("momentum", 1),
    ("weight_decay", -1e-4),
    ("schedule", "linear"),
    ("label_smoothing", 1),
    ("amp", "fp16"),
    ("sync_bn", "yes"),
    ("amp", "half"),
    ("channels_last", None),
    ("seed", -1),
    ("seed", 2**32),
    ("device", "gpu"),
    ("device", "cuda:x"),
    ("device", "cpu:1"),
    ("device", ""),
    ("read_every", 0),
    ("width_multiple", 0),
    ("compile", "no"),
    ("tensorboard", 1),
    ("threads", 0),
    ("checkpoint_every", 0),
    ("keep_checkpoints", 0),
    ("out", ""),
    ("out", 3),
    ("resume", ""),
    ("dry_run", "no"),
]

WRONG_LINES = [
    ("--nu -1", "`nu` must be >= 0; got nu=-1. Use 0 for the ungated network."),
    ("--nu abc", "`nu` must be a number >= 0; got nu='abc'. Use 0 for the ungated network."),
    ("--nu", "`nu` must have a value; got --nu without one. Write --nu=VALUE."),
    ("--risk 0.5", "`risk` must lie in (0, 0.5); got risk=0.5. Use 0.05 if in doubt."),
    ("--epochs 1.5", "`epochs` must be an integer >= 1; got epochs='1.5'. Use at least one epoch."),
    ("--epoch 5", "`--epoch` must be a known flag; got --epoch. Did you mean --epochs?"),
    ("--zzz", "`--zzz` must be a known flag; got --zzz. See --help for all flags."),
    ("--bogus", "`--bogus` must be a known flag; got --bogus. See --help for all flags."),
    ("stray", "`stray` must follow a flag; got the stray argument 'stray'. Remove it, or see --help."),
    ("--dry-run=1", "`dry_run` must stand without a value; got --dry-run='1'. Write --dry-run alone."),
    ("--dataset cifar-10 --data-dir x", "Did you mean 'cifar10'?"),
    ("--arch resnet21", "Did you mean 'resnet20'?"),
    ("--dataset cifar10", "`data_dir` must be given for dataset='cifar10'; got data_dir=None."),
    ("--data-dir x", "`data_dir` must be left out for dataset='digits'"),
    ("--image-size 32", "`image_size` must be left out unless dataset='folder'"),
    ("--download", "`download` must be left out unless dataset is cifar10 or cifar100"),
    ("--workers 2", "`workers` must be left out unless dataset='folder'; got workers=2"),
    ("--array-gib 0.5", "`array_gib` must be left out unless dataset='folder'; got array_gib=0.5"),
    ("--download", "`download` must be left out unless dataset is cifar10 or cifar100"),
    ("--workers 2", "`workers` must be left out unless dataset='folder'; got workers=2"),
    ("--array-gib 0.5", "`array_gib` must be left out unless dataset='folder'; got array_gib=0.5"),
    ("--augment flip", "got augment='flip'. Did you mean 'crop-flip'?"),
    ("--image-size 3 --dataset folder --data-dir x", "`image_size` must be >= 4; got image_size=3."),
    ("--tol 0.1 --derive-tol", "`tol` must be left out with derive_tol; got tol=0.1 and derive_tol=True."),
    ("--amp fp16", "`amp` must be off or bf16 on device='cpu', where fp16 has no use; got amp='fp16'. Use --amp bf16."),
    ("--nu 1 --epochs 10 --decide-until 0.8 --warmup-epochs 8", "`warmup_epochs` must be < decide_until x epochs = 8"),
    ("--resume x --nu 1", "`nu` must be left out with resume; got nu=1.0 and resume='x'."),
    (
        "--resume nowhere",
        "`resume` must be the folder of a run that was cut off; got resume='nowhere', which holds no run.",
    ),
    ("--prior bernoulli", "`prior` must be flattening without --tol"),
    ("--prior concrete --tol 0.1 --shadow", "`prior` must be flattening without --tol, with a target or with shadow"),
    ("--prior concrete --tol 0.1", "`initial_keep_prob` must be below 1 with prior=concrete"),
    ("--shadow --nu 0", "`shadow` must be left out with nu=0"),
    ("--shadow --target-macs 0.5", "`shadow` must be left out with nu=0, a target"),
    ("--shadow --round-to 8", "`shadow` must be left out with nu=0, a target or round_to; got nu=3, round_to=8"),
    ("--seed -1", "`seed` must lie in [0, 4294967295]; got seed=-1."),
]


def floats(low, high):
    """Numbers of the range that are 0 or not too small."""
    return st.floats(low, high).filter(lambda value: value == 0 or abs(value) >= LEAST)


VALUES = {
    "hidden_scale": floats(0.1, 1),
    "nu": floats(0, 1e6),
    "alpha": floats(0, 1),
    "beta": floats(0, 1),
    "risk": floats(1e-6, 0.499),
    "tol": st.none() | floats(0, 1),
    "initial_keep_prob": floats(1e-3, 1),
    "decide_until": floats(1e-3, 1),
    "rate_ratio": st.none() | floats(1e-9, 1e9),
    "sink_share": floats(1e-3, 1),
    "estimator": st.sampled_from(settings()["estimator"].choices),
    "per_example_gates": st.booleans(),
    "epochs": st.integers(1, 1000),
    "channels_last": st.booleans(),
    "sync_bn": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "read_every": st.none() | st.integers(1, 100),
    "width_multiple": st.integers(1, 64),
    "round_to": st.integers(1, 64),
    "cost": st.sampled_from(settings()["cost"].choices),
    "threads": st.none() | st.integers(1, 64),
    "checkpoint_every": st.integers(1, 10**6),
    "keep_checkpoints": st.integers(1, 9),
    "schedule": st.sampled_from(settings()["schedule"].choices),
    "dry_run": st.booleans(),
}


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS)
def test_wrong_field_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"^`{name}` must ") as caught:
        Config(**{name: value})
    assert MESSAGE.match(str(caught.value)), str(caught.value)


def test_every_field_has_a_wrong_value_in_the_table():
    free = {"data_dir", "image_size"}  # refused together with other fields, in WRONG_LINES
    assert {name for name, _ in WRONG_FIELDS} | free == set(settings())


@pytest.mark.parametrize(("line", "expected"), WRONG_LINES)
def test_wrong_command_line_is_one_clear_line(line, expected):
    with pytest.raises(ConfigError) as caught:
        parse(line.split())
    assert expected in str(caught.value)
    assert MESSAGE.match(str(caught.value)), str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_missing_device_is_refused(device):
    with pytest.raises(ConfigError, match=r"`device` must be there; got device='cuda.* Use --device cpu"):
        parse(["--device", device])


def test_device_index_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Config(device="cuda:1").device == "cuda:1"
    with pytest.raises(ConfigError, match="no cuda device beyond cuda:1"):
        Config(device="cuda:2")


def test_every_flag_has_help_and_every_field_a_flag(capsys):
    actions = {a.dest: a for a in build_parser()._actions if a.dest != "help"}
    assert set(actions) == {f.name for f in dataclasses.fields(Config)}
    for name, action in actions.items():
        assert "--" + name.replace("_", "-") in action.option_strings
        assert action.help and len(action.help) > 10
        if settings()[name].range:
            assert settings()[name].range in action.help
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    assert "--derive-tol" in capsys.readouterr().out


def test_no_argument_is_the_digits_preset():
    config = parse([])
    assert (config.dataset, config.arch, config.out) == ("digits", "resnet20", "runs/digits-resnet20-default-s0")
    assert config.derive_tol and config.tol is None
    assert parse(["--derive-tol"]) == config == Config.from_presets()


def test_flag_over_preset_over_default(monkeypatch):
    presets = {("digits", "*"): {"lr": 0.3, "momentum": 0.5, "nu": 0.2}, ("digits", "resnet32"): {"momentum": 0.7}}
    monkeypatch.setattr(module, "PRESETS", presets)
    config = parse(["--arch", "resnet32", "--lr", "0.4"])
    assert (config.lr, config.momentum, config.nu) == (0.4, 0.7, 0.2)
    assert config.weight_decay == Config.weight_decay
    config = parse([])
    assert (config.lr, config.momentum) == (0.3, 0.5)
    assert parse(["--lr", "0.1"]).lr == 0.1  # the field's own default, given, still wins


@pytest.mark.parametrize("dataset", settings()["dataset"].choices)
@pytest.mark.parametrize("arch", settings()["arch"].choices)
def test_every_preset_is_admitted(dataset, arch):
    given = {} if dataset == "digits" else {"data_dir": "somewhere"}
    config = Config.from_presets(dataset=dataset, arch=arch, **given)
    assert config.tag == "default"
    assert config.out == f"runs/{dataset}-{arch}-default-s0"


def test_preset_keys_are_known():
    for (dataset, arch), preset in PRESETS.items():
        assert dataset in ("*", *settings()["dataset"].choices)
        assert arch in ("*", *settings()["arch"].choices)
        assert set(preset) <= set(settings())


def test_warm_up_of_the_preset_shrinks_with_the_epochs():
    full = parse([])
    short = parse(["--epochs", "1"])
    assert short.warmup_epochs == pytest.approx(full.warmup_epochs / full.epochs)
    assert parse(["--epochs", "5000"]).warmup_epochs == full.warmup_epochs
    assert parse(["--epochs", "10", "--warmup-epochs", "3"]).warmup_epochs == 3


@pytest.mark.parametrize("dataset", settings()["dataset"].choices)
def test_shortcut_and_stem_are_the_architectures_own_unless_given(dataset):
    given = {} if dataset == "digits" else {"data_dir": "somewhere"}
    for arch, own in ARCHITECTURES.items():
        config = Config.from_presets(dataset=dataset, arch=arch, **given)
        assert (config.shortcut, config.stem) == (own.shortcut, own.stem)
    config = Config.from_presets(dataset=dataset, arch="resnet18", stem="cifar", shortcut="A", **given)
    assert (config.shortcut, config.stem) == ("A", "cifar") and config.tag != "default"


def test_image_folders_and_imagenet_networks_take_the_papers_setting():
    config = parse(["--dataset", "folder", "--data-dir", "x", "--arch", "resnet50"])
    assert (config.nu, config.alpha, config.beta, config.epochs) == (0.24, 0.5, 0.5, 90)
    assert parse(["--dataset", "folder", "--data-dir", "x", "--arch", "resnet20"]).beta == 0.0


def test_fixed_tolerance_turns_derivation_off():
    config = parse(["--tol", "0.25"])
    assert config.tol == 0.25 and not config.derive_tol
    assert Config.from_json(config.to_json()) == config


def test_switches_can_be_turned_both_ways():
    assert not parse(["--no-channels-last"]).channels_last
    assert parse(["--channels-last"]).channels_last
    assert parse(["--per-example-gates"]).per_example_gates


def test_identity_depends_on_what_is_computed():
    base = parse([])
    assert parse(["--threads", "1", "--out", "x", "--seed", "3", "--dry-run"]).tag == base.tag == "default"
    tags = {parse(line.split()).tag for line in ("--nu 0", "--nu 0.317", "--tol 0.1", "--tol 0.2", "--epochs 997")}
    assert len(tags) == 5 and "default" not in tags
    assert parse(["--nu", "0.317"]).out == parse(["--nu", "3.17e-1"]).out
    assert parse(["--seed", "7"]).out.endswith("-s7")


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({"warmup_epochs": st.just(0.0)}, optional=VALUES))
def test_json_and_command_line_round_trips(values):
    config = Config.from_presets(**values)
    assert Config.from_json(config.to_json()) == config
    line = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if settings()[name].kind is bool:
            line += [flag] if value else [flag.replace("--", "--no-")] if settings()[name].negatable else []
        elif value is not None:
            line.append(f"{flag}={value}")
    assert parse(line) == config


def test_json_holds_every_resolved_field():
    config = parse(["--nu", "0.5"])
    assert json.loads(config.to_json()) == dataclasses.asdict(config)
    assert Config.from_json(config.to_json(), seed=4).seed == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "`config.json` must be valid JSON"),
        ("[]", "`config.json` must hold one JSON object; got list"),
        ('{"epoch": 3}', "`epoch` must be the name of a setting; got epoch=3. Did you mean `epochs`?"),
        ('{"xyzzy": 3}', "`xyzzy` must be the name of a setting; got xyzzy=3. Leave it out."),
        ('{"nu": -1}', "`nu` must be >= 0; got nu=-1."),
        ('{"nu": NaN}', "`nu` must be finite"),
    ],
)
def test_wrong_json_is_refused(text, expected):
    with pytest.raises(ConfigError) as caught:
        Config.from_json(text)
    assert expected in str(caught.value)


def test_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="Did you mean `alpha`"):
        Config.from_presets(alfa=0.2)


def test_config_is_frozen_and_converts():
    config = Config(nu=1, out=None)
    assert isinstance(config.nu, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.nu = 2.0
    assert dataclasses.replace(config, seed=5, out=None).out.endswith("-s5")


def test_check_out(tmp_path):
    check_out(Config(out=tmp_path))
    check_out(Config(out=tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="`out` must be a folder without a run; got out=.* Choose another --out"):
        check_out(Config(out=tmp_path))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="`out` must be a folder; got out="):
            check_out(Config(out=out))


def test_parser_raises_instead_of_exiting():
    assert isinstance(build_parser(), argparse.ArgumentParser)
    with pytest.raises(ConfigError):
        build_parser().parse_args(["--no-such-flag"])
