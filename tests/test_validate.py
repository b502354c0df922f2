"""One message form, conversion, and one table of bad inputs."""

from __future__ import annotations

import re

import numpy as np
import pytest

from catode import _validate as v

NAN, INF = float("nan"), float("inf")

GOOD = [
    (v.check_real, (3,), {}, 3.0),
    (v.check_real, (np.float32(0.5),), {}, 0.5),
    (v.check_real, (np.array(2.0),), {}, 2.0),
    (v.check_positive, (1e-300,), {}, 1e-300),
    (v.check_nonnegative, (0,), {}, 0.0),
    (v.check_interval, (0.5, 0.0, 0.5), {}, 0.5),
    (v.check_interval, (-7, -INF, 0.0), {}, -7.0),
    (v.check_int, (np.int64(4),), {"low": 1, "high": 4}, 4),
    (v.check_choice, ("unit", ("layer", "unit")), {}, "unit"),
    (v.check_bool, (np.True_,), {}, True),
]

BAD = [
    (v.check_real, ("x",), {}, "`p` must be a real number; got p='x'"),
    (v.check_real, (True,), {}, "`p` must be a real number; got p=True"),
    (v.check_real, (None,), {}, "`p` must be a real number; got p=None"),
    (v.check_real, (1j,), {}, "`p` must be a real number; got p=1j"),
    (v.check_real, (NAN,), {}, "`p` must be finite; got p=nan"),
    (v.check_real, (np.zeros(2),), {}, "`p` must be a real number; got p=array([0., 0.])"),
    (v.check_real, ([1.0, INF],), {"array": True}, "`p` must be finite; got p[1]=inf"),
    (v.check_real, ([[0, 1], [2, NAN]],), {"array": True}, "`p` must be finite; got p[1, 1]=nan"),
    (v.check_real, ("ab",), {"array": True}, "`p` must be a real number or an array of them; got p='ab'"),
    (v.check_real, ([True],), {"array": True}, "`p` must be a real number or an array of them; got p=[True]"),
    (v.check_positive, (0.0,), {}, "`p` must be positive and finite; got p=0.0"),
    (v.check_positive, (NAN,), {}, "`p` must be positive and finite; got p=nan"),
    (v.check_positive, ([1, -2, -3],), {"array": True}, "`p` must be positive and finite; got p[1]=-2.0"),
    (v.check_nonnegative, (-1,), {}, "`p` must be non-negative and finite; got p=-1.0"),
    (v.check_interval, (1.5, 0.0, 0.5, True, True), {}, "`p` must lie in (0, 0.5); got p=1.5"),
    (v.check_interval, (0.0, 0.0, 1.0, True), {}, "`p` must lie in (0, 1]; got p=0.0"),
    (v.check_interval, (1.0, 0.0, 1.0, False, True), {}, "`p` must lie in [0, 1); got p=1.0"),
    (v.check_interval, (NAN, 0.0, 1.0), {}, "`p` must lie in [0, 1]; got p=nan"),
    (v.check_interval, (INF, 0.0, INF), {}, "`p` must lie in [0, inf); got p=inf"),
    (
        v.check_interval,
        (2, 0, 1),
        {"hint": "Choose e.g. 0.05."},
        "`p` must lie in [0, 1]; got p=2.0. Choose e.g. 0.05.",
    ),
    (v.check_int, (1.0,), {}, "`p` must be an integer; got p=1.0"),
    (v.check_int, (True,), {}, "`p` must be an integer; got p=True"),
    (v.check_int, (0,), {"low": 1}, "`p` must be an integer of at least 1; got p=0"),
    (v.check_int, (9,), {"high": 8}, "`p` must be an integer of at most 8; got p=9"),
    (v.check_int, (9,), {"low": 1, "high": 8}, "`p` must be an integer in [1, 8]; got p=9"),
    (v.check_bool, (1,), {}, "`p` must be True or False; got p=1"),
    (v.check_choice, ("x", ("a", "b")), {}, "`p` must be one of 'a', 'b'; got p='x'"),
    (v.check_choice, (True, (1, 2)), {}, "`p` must be one of 1, 2; got p=True"),
    (v.check_state, ([1.0, 2.0, 3.0],), {}, "`p` must have shape (..., 2); got p of shape (3,)"),
    (v.check_state, (1.0,), {}, "`p` must have shape (..., 2); got p of shape ()"),
]


@pytest.mark.parametrize(("check", "args", "options", "expected"), GOOD)
def test_good_values_are_converted(check, args, options, expected):
    value = check("p", *args, **options)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(("check", "args", "options", "message"), BAD)
def test_bad_values_are_refused_in_one_form(check, args, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check("p", *args, **options)


def test_an_array_option_always_returns_a_new_float_array():
    given = np.array([1, 2])
    value = v.check_real("p", given, array=True)
    assert value.dtype == np.float64
    assert not np.shares_memory(value, given)
    assert v.check_real("p", 1, array=True).shape == ()


def test_shapes_that_do_not_broadcast_are_listed():
    with pytest.raises(
        ValueError, match=re.escape("`a`, `b` must broadcast together; got a of shape (2,), b of shape (3,)")
    ):
        v.check_broadcast({"a": np.zeros(2), "b": np.zeros(3)})
    assert v.check_broadcast({"a": np.zeros(2), "b": np.zeros(())}) == (2,)


def test_long_values_are_cut():
    with pytest.raises(ValueError, match=r"\.\.\.$"):
        v.check_real("p", "x" * 1000)
