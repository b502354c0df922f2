"""The configuration: ranges, presets, identity and config.json."""

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from catode.train.models import ARCHITECTURES
from catode.train.settings.commandline import parse
from catode.train.settings.config import DERIVED, Config, ConfigError, check_out, settings
from catode.train.settings.presets import PRESETS
from catode.train.settings.setting import GROUPS, LEAST
from catode.train.settings.training import learning_rates, ode_time

MESSAGE = re.compile(r"^`[-\w.]+` must [^\n]+; got [^\n]+\. [^\n]+[.?]$|^`[-\w.]+` must [^\n]+; got [^\n]+[.?]$")

WRONG_FIELDS = [
    ("dataset", "cifar-10"),
    ("dataset", None),
    ("arch", "resnet21"),
    ("download", 1),
    ("image_size", 3),
    ("keep", "layer1"),
    ("keep", ()),
    ("least", ("layer1",)),
    ("least", ("layer1=0",)),
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
    ("max_norm", 0.0),
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
    ("epochs", 2**31),
    ("epochs", 10**400),
    ("probe_size", 10**30),
    ("threads", 2**63),
    ("batch_size", 1),
    ("accumulate", 0),
    ("accumulate", 3),
    ("optimizer", "adam"),
    ("lr", 0),
    ("momentum", 1),
    ("weight_decay", -1e-4),
    ("decay_on", "weights"),
    ("clip_grad", 0),
    ("clip_grad", "1"),
    ("schedule", "linear"),
    ("label_smoothing", 1),
    ("nesterov", "yes"),
    ("ema", 1),
    ("ema", -0.1),
    ("validation_share", 0.6),
    ("validation_share", -0.1),
    ("split_seed", -1),
    ("amp", "fp16"),
    ("sync_bn", "yes"),
    ("amp", "half"),
    ("layout", "nchw"),
    ("layout", None),
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
    "layout": st.sampled_from(settings()["layout"].choices),
    "sync_bn": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "read_every": st.none() | st.integers(1, 100),
    "width_multiple": st.integers(1, 64),
    "max_norm": st.floats(1e-3, 1e3),
    "clip_grad": st.none() | st.floats(1e-3, 1e3),
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


def test_nesterov_needs_momentum():
    with pytest.raises(
        ConfigError, match=r"^`nesterov` must be left out without momentum; got [^\n]+ with momentum=0\. "
    ):
        Config(nesterov=True, momentum=0.0)
    assert Config(nesterov=True).tag != Config().tag


@pytest.mark.parametrize(
    ("flags", "name", "value"), [(["--momentum=0.9"], "momentum", "0.9"), (["--nesterov"], "nesterov", "True")]
)
def test_adamw_has_no_momentum_of_its_own(flags, name, value):
    with pytest.raises(
        ConfigError, match=rf"^`{name}` must be left out with optimizer=adamw, [^\n]+; got {name}={value}\. "
    ):
        parse(["--optimizer=adamw", *flags])


def test_an_optimizer_has_rates_of_its_own():
    config, given = parse(["--optimizer=adamw"]), parse(["--optimizer=adamw", "--lr=0.02", "--weight-decay=0"])
    assert (config.lr, config.weight_decay, config.momentum) == (3e-3, 0.05, 0.0) and config.tag != "default"
    assert (given.lr, given.weight_decay, given.nu) == (0.02, 0.0, config.nu)
    assert parse(["--optimizer=sgd"]) == parse([])


@pytest.mark.parametrize(("batch_size", "accumulate"), [(64, 3), (64, 64), (64, 10**9), (6, 4), (2, 2)])
def test_parts_are_equal_and_of_two_images(batch_size, accumulate):
    with pytest.raises(
        ConfigError,
        match=rf"^`accumulate` must divide batch_size [^\n]+; got accumulate={accumulate} with batch_size={batch_size}\. ",
    ):
        parse([f"--batch-size={batch_size}", f"--accumulate={accumulate}"])
    assert parse(["--batch-size=6", "--accumulate=3"]).tag != parse(["--batch-size=6"]).tag


def test_the_ode_time_of_adamw_is_the_sum_of_its_rates():
    config = parse(["--optimizer=adamw", "--schedule=constant", "--sink-share=0.25"]).resolved(1000)
    assert config.rate_ratio == pytest.approx(1.0 / (0.25 * 1000 * 3e-3), rel=1e-12)


def test_every_field_has_a_wrong_value_in_the_table():
    free = {"data_dir"}  # refused together with other fields, on the command line
    assert {name for name, _ in WRONG_FIELDS} | free == set(settings())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_missing_device_is_refused(device):
    with pytest.raises(ConfigError, match=r"`device` must be available; got device='cuda.* Use --device cpu"):
        parse(["--device", device])


def test_device_index_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Config(device="cuda:1").device == "cuda:1"
    with pytest.raises(ConfigError, match="no cuda device beyond cuda:1"):
        Config(device="cuda:2")


def test_no_argument_is_the_digits_preset():
    config = parse([])
    assert (config.dataset, config.arch, config.out) == ("digits", "resnet20", "runs/digits-resnet20-default-s0")
    assert config.derive_tol and config.tol is None
    assert parse(["--derive-tol"]) == config == Config.from_presets()


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
    assert json.loads(config.to_json()) == dataclasses.asdict(config) | {"derived": []}
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
        ('{"derived": ["nu"]}', "`derived` must hold names among memory, check_every"),
        ('{"derived": "memory"}', "`derived` must hold names among memory, check_every"),
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


def test_settings_stand_in_the_order_of_their_groups():
    assert list(dict.fromkeys(setting.group for setting in settings().values())) == list(GROUPS)


def test_a_resolved_configuration_holds_what_follows_from_the_length_of_the_run():
    config = Config.from_presets(dataset="cifar10", data_dir="d", arch="resnet20", probe_size=None)
    assert [getattr(config, name) for name in DERIVED] == [None] * 4
    done = config.resolved(7800)  # 20 epochs of 390 steps, of which 6,240 decide
    assert (done.memory, done.check_every, done.probe_size) == (200, 50, 12)
    time = ode_time(learning_rates("one-cycle", 0.1, 7800), 0.9)
    assert time == pytest.approx(7800 * 0.05 / 0.1, rel=1e-3)  # the one-cycle's mean is half its peak
    assert done.rate_ratio == pytest.approx(1 / (0.1 * time)) and done.derived == DERIVED
    assert done.resolved(10**6) == done and Config.from_json(done.to_json()) == done
    assert config.resolved(8 * 7800).memory == 800  # length^(2/3)
    given = {"memory": 50, "check_every": 7, "rate_ratio": 0.3, "probe_size": 9}
    own = Config.from_presets(dataset="cifar10", data_dir="d", **given).resolved(7800)
    assert {name: getattr(own, name) for name in DERIVED} == given and own.derived == ()
    assert Config(memory=100).resolved(7800).check_every == 25


def test_resolving_leaves_the_name_and_the_identity_of_a_run():
    config = parse([])
    done = config.resolved(1320)
    assert done.derived == ("memory", "rate_ratio") and done.tag == config.tag == "default"
    assert done.out == config.out == "runs/digits-resnet20-default-s0"
    assert done.identity() == config.identity() and done.identity()["rate_ratio"] is None
    assert parse(["--memory", "41"]).resolved(1320).tag == parse(["--memory", "41"]).tag != "default"
    changed = Config.from_json(done.to_json(), rate_ratio=0.3)
    assert changed.derived == () and changed.identity()["rate_ratio"] == 0.3


def test_settings_of_a_run_changed_for_another_are_derived_anew():
    """What followed from the length of the run that was read must not be carried into one of another length."""
    config = Config.from_presets(dataset="cifar10", data_dir="d")
    done = config.resolved(7800)
    shorter = Config.from_json(done.to_json(), epochs=10)
    assert shorter.derived == () and shorter.memory is shorter.rate_ratio is None
    assert shorter.resolved(3900) == dataclasses.replace(config, epochs=10, out=done.out).resolved(3900)
    moved = Config.from_json(done.to_json(), data_dir="elsewhere", threads=2)  # the same run
    assert moved == dataclasses.replace(done, data_dir="elsewhere", threads=2)


def test_nothing_is_null_that_a_run_fills_in():
    """What stays null is not used, or this machine's own choice."""
    unused = {
        "data_dir",
        "image_size",
        "init",
        "tol",
        "target_macs",
        "target_params",
        "max_norm",
        "clip_grad",
        "resume",
        "keep",
        "least",
    }
    values = json.loads(parse([]).resolved(1320).to_json())
    assert {name for name, value in values.items() if value is None} == unused | {"threads", "workers", "array_gib"}


@pytest.mark.parametrize(
    ("sync_bn", "processes", "probed"), [(False, 1, 25), (False, 4, 12), (True, 4, 25), (False, 32, 8)]
)
def test_each_process_probes_its_share_unless_they_normalise_together(sync_bn, processes, probed):
    assert Config(batch_size=256, sync_bn=sync_bn).resolved(100, processes).probe_size == probed
