"""Configurations drawn at random: what is accepted trains, what is refused says why in one line, and nothing crashes."""

import contextlib
import dataclasses
import io
import re
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catode.train import loop
from catode.train.__main__ import main
from catode.train.settings import config

LEFT_OUT = {"dataset", "data_dir", "out", "resume", "init", "device", "compile", "download", "threads", "tensorboard"}
LEFT_OUT |= {"image_size", "array_gib", "workers"}  # of the machine, of other data sets, or given below
SLOW_ARCHITECTURES = ("resnet44", "resnet56", "resnet110", "resnet50", "resnet101", "resnet34", "resnet18", "resnet32")
WRONG = ["", "nan", "-1", "1e9", "x", "0"]
EPOCHS = config.settings()["epochs"]  # as many would take as long
IMAGES = 40
RECIPES = (
    [],
    ["--optimizer=adamw"],
    ["--accumulate=2", "--clip-grad=0.5"],
    ["--optimizer=adamw", "--accumulate=4", "--ema=0.9"],
)


def values(setting, wrong):
    """Texts for one flag: what its range or choices admit, or what they may not."""
    if wrong:
        return st.sampled_from(WRONG)
    if setting.choices:
        return st.sampled_from([c for c in setting.choices if c not in SLOW_ARCHITECTURES])
    elif setting.kind is int:
        low = max(int(setting.low), 0) if setting.low > -1e9 else 0
        usual = st.integers(low, min(setting.high, low + 12))
        far = [] if setting is EPOCHS else [v for v in (10**5, 10**9) if low <= v <= setting.high]
        return st.one_of(usual, usual, *([st.sampled_from(far)] if far else [])).map(lambda v: str(int(v)))
    low, high = max(setting.low, 0.0), min(setting.high, 5.0)
    far = [10.0**power for power in range(-30, 31) if setting.low < 10.0**power < setting.high]
    return st.one_of(st.floats(low, high), st.floats(low, high), st.sampled_from(far)).map("{:.3g}".format)


@st.composite
def command_lines(draw):
    """A few flags with values, on top of a run of one or two epochs of a few steps and of an optimizer's recipe."""
    known = {name: s for name, s in config.settings().items() if name not in LEFT_OUT}
    chosen = draw(st.lists(st.sampled_from(sorted(known)), max_size=4, unique=True))
    argv = ["--arch=resnet14", "--epochs=2", "--batch-size=8", "--warmup-epochs=0", "--memory=10", "--check-every=2"]
    argv += draw(st.sampled_from(RECIPES))
    for name in chosen:
        flag = "--" + name.replace("_", "-")
        argv.append(
            flag if known[name].kind is bool else f"{flag}={draw(values(known[name], draw(st.integers(0, 9)) == 9))}"
        )
    return [*argv, "--device=cpu"]


def few(*args, load=loop.setup.data.load, **kwargs):
    """The data set's first images."""
    whole = load(*args, **kwargs)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return dataclasses.replace(whole, **{name: getattr(whole, name)[:IMAGES] for name in names})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(command_lines())
def test_a_configuration_trains_or_says_why_not(argv):
    out, err = io.StringIO(), io.StringIO()
    quick = (
        mock.patch.object(loop.setup.data, "load", few),
        mock.patch.object(loop.result, "latency_ms", lambda *args: [[1.0], [1.0]]),
        mock.patch("catode.report.report.write"),
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for each in (*quick, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
            stack.enter_context(each)
        status = main([*argv, "--out", f"{folder}/run"])
        files = {path.name for path in Path(folder, "run").glob("*")}
    if status == 0:
        assert "--dry-run" in argv or {"result.json", "model.pt", "structures.csv"} <= files, argv
    elif status == 2:
        assert re.fullmatch(r"error: `\w+` .*; got .*\n", err.getvalue()) and not files, (argv, err.getvalue())
    else:
        assert status == 1 and "`loss` must stay finite" in err.getvalue() and "model.pt" in files, (
            argv,
            err.getvalue(),
        )
