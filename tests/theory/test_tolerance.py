"""The tolerance: its laws, the worked figures of docs/mathematics.md section 5, and the iterates themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from catode.theory import BenefitSystem, Tolerance, commit_alarm, derive, escape_probability, fixed

LAWS = settings(max_examples=50, deadline=None, derandomize=True)
CHECK = {
    "benefit": 0.0,
    "price": 0.1,
    "gain": 0.5,
    "decay": 0.05,
    "rate_ratio": 1.0,
    "noise": 0.1,
    "benefit_noise": 0.0,
    "drift": 0.0,
    "step_time": 0.01,
}
STARTS = np.array([0.02, 0.05, 0.08, 0.10])


def numbers(low, high):
    return st.floats(low, high, allow_nan=False)


inputs = st.fixed_dictionaries(
    {
        "benefit": numbers(-0.5, 0.6),
        "price": numbers(0.001, 1.0),
        "gain": st.one_of(st.just(0.0), numbers(1e-4, 3.0)),
        "decay": st.one_of(st.just(0.0), numbers(0.0, 0.5)),
        "rate_ratio": numbers(0.01, 10.0),
        "noise": st.one_of(st.just(0.0), numbers(0.0, 0.3)),
        "benefit_noise": st.one_of(st.just(0.0), numbers(0.0, 0.1)),
        "drift": st.one_of(st.just(0.0), numbers(0.0, 0.2)),
        "step_time": st.one_of(st.just(0.0), numbers(0.0, 0.1)),
    }
)
rises = numbers(1.0, 4.0)


@LAWS
@given(inputs, numbers(0.001, 0.49), numbers(0.0, 0.4))
def test_the_tolerance_rises_with_risk(given_, risk, more):
    low, high = derive(**given_, risk=risk), derive(**given_, risk=min(risk + more, 0.499))
    assert high.values >= low.values
    assert np.array_equal(high.separatrix, low.separatrix)


@pytest.mark.parametrize("name", ["noise", "benefit_noise", "drift", "benefit"])
def test_the_tolerance_never_rises_with_what_makes_it_less_certain(name):
    @LAWS
    @given(inputs, numbers(0.0, 0.3))
    def law(given_, more):
        worse = {**given_, name: given_[name] + more}
        assert derive(**worse).values <= derive(**given_).values + 1e-12

    law()


@LAWS
@given(inputs, rises)
def test_the_tolerance_never_falls_with_price(given_, factor):
    dearer = {**given_, "price": factor * given_["price"]}
    assert derive(**dearer).values >= derive(**given_).values - 1e-12 * np.abs(derive(**given_).values)


@LAWS
@given(inputs)
def test_the_tolerance_lies_in_the_domain(given_):
    result = derive(**given_)
    assert result.values <= min(1.0, result.separatrix) + 1e-12
    if given_["gain"] > 0.0 and result.values > 0.0:
        system = BenefitSystem(**{k: given_[k] for k in ("price", "gain", "rate_ratio", "decay", "drift")})
        assert np.isclose(result.separatrix, system.separatrix(given_["benefit"]), rtol=1e-12)
        assert system.contains([given_["benefit"], 0.999 * float(result)])


@LAWS
@given(inputs, numbers(0.01, 0.45))
def test_at_the_tolerance_the_escape_bound_is_the_risk(given_, risk):
    value = float(derive(**given_, risk=risk))
    if 0.0 < value < 1.0 and (given_["noise"] > 0.01 or given_["benefit_noise"] > 0.01):
        assert np.isclose(escape_probability(keep_prob=value, **given_), risk, rtol=1e-6)


@LAWS
@given(inputs, numbers(0.0, 1.0), numbers(0.0, 1.0))
def test_the_escape_bound_is_a_probability_that_rises_with_theta(given_, one, other):
    low, high = escape_probability(keep_prob=sorted([one, other]), **given_)
    assert 0.0 <= low <= high <= 1.0


@LAWS
@given(inputs)
def test_every_answer_has_one_sentence_and_a_round_trip(given_):
    result = derive(**given_)
    sentence = result.reason()
    assert sentence.endswith(".")
    assert sentence.startswith("Safe" if result.values > 0.0 else "Not safe:")
    assert "nan" not in sentence
    assert Tolerance.from_json(result.to_json()) == result


def test_the_worked_figures_of_the_theory():
    mu = (-0.05 + np.sqrt(0.05**2 + 4.0 * 0.5)) / 2.0
    separatrix = 0.1 * (mu + 0.05) / 0.5
    for step_time, form, figures in (
        (0.0, 2.0 * mu, [0.070, 0.130, 0.219, 0.293]),
        (0.01, mu * (2.0 + 0.01 * mu), [0.069, 0.129, 0.218, 0.293]),
    ):
        bound = escape_probability(keep_prob=STARTS, **{**CHECK, "step_time": step_time})
        assert np.allclose(bound, norm.cdf(-(separatrix - STARTS) * 0.5 * np.sqrt(form) / (0.5 * 0.1)), rtol=1e-12)
        assert np.array_equal(np.round(bound, 3), figures)
        assert np.allclose(bound, [0.069, 0.129, 0.217, 0.291], atol=2.5e-3)  # its section 5, printed a little low


def test_the_iterates_escape_as_the_theory_measured_and_below_the_bound():
    rng, n = np.random.default_rng(20240611), 10_000
    escaped = []
    for start in STARTS:
        b, theta, away = np.zeros(n), np.full(n, start), 0
        for _ in range(20_000):
            step = 0.01 * (b - 0.1) + 0.01 * rng.standard_normal(b.size)
            b, theta = b + 0.01 * (0.5 * theta - 0.05 * b), np.minimum(theta + step, 1.0)
            far = b > 0.6  # the drift then exceeds 0.5 against a variance of 0.01: return has probability e^-100 theta
            away += int(np.sum(far & (theta > 0.0)))
            alive = (theta > 0.0) & ~far
            b, theta = b[alive], theta[alive]
            if not b.size:
                break
        assert not b.size
        escaped.append(away / n)
    escaped, measured = np.array(escaped), np.array([0.021, 0.068, 0.131, 0.192])
    error = np.sqrt(measured * (1.0 - measured) / n)
    assert np.all(np.abs(escaped - measured) <= 4.0 * error + 5e-4)
    assert np.all(escaped <= escape_probability(keep_prob=STARTS, **CHECK))


def test_the_noises_add_in_the_worst_case():
    mu = (-0.05 + np.sqrt(0.05**2 + 4.0 * 0.5)) / 2.0
    result = derive(**{**CHECK, "noise": 0.01, "benefit_noise": 0.004})
    spread = (0.5 * 0.01 + mu * 0.004) / (0.5 * np.sqrt(mu * (2.0 + 0.01 * mu)))
    assert np.isclose(result.values, 0.1 * (mu + 0.05) / 0.5 - norm.ppf(0.95) * spread, rtol=1e-12)


def test_the_price_that_a_refusal_asks_for_is_the_threshold():
    rho, gain, step_time, deviation = 2.0, 0.3, 0.01, 1.5
    z = norm.ppf(0.95)
    threshold = z * deviation * np.sqrt(step_time / 2.0) * (rho * gain) ** 0.25
    base = {**CHECK, "gain": gain, "decay": 0.0, "rate_ratio": rho, "step_time": 0.0}
    base["noise"] = np.sqrt(step_time) * rho * deviation
    assert derive(**{**base, "price": 1.0001 * threshold}).values > 0.0
    refusal = derive(**{**base, "price": 0.9999 * threshold})
    assert refusal.values < 0.0
    assert f"exceed {threshold:.4g} nats" in refusal.reason()
    both = {**base, "price": 0.9 * threshold, "benefit_noise": 0.01}
    asked = float(derive(**both).reason().split("exceed ")[1].split(" nats")[0])
    assert derive(**{**both, "price": 1.001 * asked}).values > 0.0 > derive(**{**both, "price": 0.999 * asked}).values


@pytest.mark.parametrize(
    ("change", "value", "words"),
    [
        ({"benefit": 0.1}, -np.inf, "the benefit may be 0.1 nats"),
        ({"drift": 0.006}, -np.inf, "the drift 0.006 is not below decay times price"),
        ({"decay": 0.0, "drift": 0.08}, None, "leaves no domain"),
        ({"noise": 1.0}, None, "noise margin"),
        ({"gain": 0.0}, 1.0, "without gain"),
        ({"gain": 0.0, "decay": 0.0}, 1.0, "without gain"),
        ({"gain": 0.0, "drift": 0.006}, -np.inf, "decay times price"),
        ({"gain": 0.0, "decay": 0.0, "drift": 0.1}, -np.inf, "no gain and no decay the drift"),
        ({"gain": 0.0, "decay": 0.0, "benefit_noise": 0.1}, -np.inf, "noise of the benefit"),
        ({"gain": 0.001, "noise": 0.0}, 1.0, "exceeds 1"),
        ({"noise": 0.01}, None, "Safe to remove at or below"),
    ],
)
def test_every_case_says_why(change, value, words):
    result = derive(**{**CHECK, **change})
    assert words in result.reason()
    if value is not None:
        assert result.values == value
    bound = escape_probability(keep_prob=0.01, **{**CHECK, **change})
    assert bound == 1.0 if result.values == -np.inf else 0.0 <= bound <= 1.0


@pytest.mark.parametrize("change", [{"decay": 0.05}, {"decay": 0.0}, {"decay": 0.0, "drift": 0.01}])
def test_a_gain_of_zero_is_the_limit(change):
    base = {**CHECK, "noise": 0.01, **change}
    exact = derive(**{**base, "gain": 0.0})
    near = derive(**{**base, "gain": 1e-14})
    assert np.sign(near.separatrix) == np.sign(exact.separatrix)
    assert near.values == exact.values or (near.values < -1e6 and exact.values == -np.inf)


def test_arrays_broadcast_and_keep_their_order():
    benefit = np.array([0.0, 0.05, 0.2])
    result = derive(**{**CHECK, "benefit": benefit, "noise": 0.001})
    one_by_one = [derive(**{**CHECK, "benefit": b, "noise": 0.001}) for b in benefit]
    assert len(result) == 3
    assert np.array_equal(result.values, [float(t) for t in one_by_one])
    assert result.reasons == tuple(t.reason() for t in one_by_one)
    assert result.reason(2) == one_by_one[2].reason()
    assert result.reason() == "2 of 3 structures have a positive tolerance."
    assert Tolerance.from_json(result.to_json()) == result
    assert result.inputs["price"].shape == (3,)
    table = derive(**{**CHECK, "benefit": benefit[:, None], "price": np.array([0.1, 0.2])})
    assert table.values.shape == (3, 2)


def test_a_tolerance_cannot_be_changed():
    result = derive(**CHECK)
    with pytest.raises(AttributeError):
        result.values = 1.0
    with pytest.raises(ValueError, match="read-only"):
        result.values[...] = 1.0
    given_ = np.array([0.0, 0.0])
    result = derive(**{**CHECK, "benefit": given_})
    given_[:] = 7.0
    assert np.all(result.inputs["benefit"] == 0.0)


def test_a_fixed_tolerance_claims_nothing():
    one, many = fixed(0.5), fixed(0.5, 3)
    assert float(one) == 0.5
    assert many.values.tolist() == [0.5] * 3
    assert one.origin == "fixed"
    assert np.isnan(one.separatrix)
    assert "no failure probability" in many.reason(1)
    assert Tolerance.from_json(many.to_json()) == many
    assert one != many


def test_the_commit_alarm_is_the_page_rate_times_the_steps():
    alarm = commit_alarm(benefit=0.3, price=0.1, rate_ratio=2.0, noise=0.25, step_time=0.01, steps_left=1000)
    variance = 0.25**2 / (0.01 * 2.0**2)
    assert np.isclose(alarm, 1000 * np.exp(-2.0 * (0.3 - 0.1) / (0.01 * 2.0 * variance)), rtol=1e-12)
    cases = commit_alarm(
        benefit=[0.05, 0.1, 0.2, 0.2, 5.0],
        price=0.1,
        rate_ratio=1.0,
        noise=[0.1, 0.1, 0.0, 10.0, 0.1],
        step_time=0.01,
        steps_left=[1, 1, 100, 100, 10],
    )
    assert cases.tolist() == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_the_commit_alarm_bounds_the_iterates():
    rng, n, steps = np.random.default_rng(7), 4000, 400
    gap, sigma, tau = 0.5, 0.33, 0.05
    theta, alarmed = np.ones(n), np.zeros(n, dtype=bool)
    for _ in range(steps):
        theta = np.minimum(theta + tau * gap + np.sqrt(tau) * sigma * rng.standard_normal(n), 1.0)
        alarmed |= theta <= 0.0
    bound = commit_alarm(benefit=0.6, price=0.1, rate_ratio=1.0, noise=sigma, step_time=tau, steps_left=steps)
    assert alarmed.mean() <= bound < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"price": 0.0}, "`price` must be positive and finite; got price=0.0. A structure without a price has no gate"),
        ({"price": [0.1, -0.1]}, r"`price` must be positive and finite; got price\[1\]=-0.1"),
        ({"benefit": np.nan}, "`benefit` must be finite; got benefit=nan"),
        ({"gain": -1.0}, "`gain` must be non-negative"),
        ({"decay": np.inf}, "`decay` must be non-negative and finite"),
        ({"rate_ratio": 0.0}, "`rate_ratio` must be positive"),
        ({"noise": [0.1, -0.1]}, r"got noise\[1\]=-0.1"),
        ({"benefit_noise": "x"}, "`benefit_noise` must be a real number"),
        ({"drift": -1e-9}, "`drift` must be non-negative"),
        ({"step_time": -0.1}, "`step_time` must be non-negative"),
        ({"risk": 0.5}, r"`risk` must lie in \(0, 0.5\); got risk=0.5. Choose e.g. 0.05"),
        ({"risk": 0.0}, r"`risk` must lie in \(0, 0.5\)"),
        ({"benefit": [0.0, 0.0], "gain": [1.0, 1.0, 1.0]}, "must broadcast together"),
    ],
)
def test_bad_inputs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        derive(**{**CHECK, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fixed(1.5), r"`value` must lie in \[0, 1\]"),
        (lambda: fixed(0.5, 0), "`n` must be an integer of at least 1"),
        (lambda: escape_probability(keep_prob=1.5, **CHECK), r"`keep_prob` must lie in \[0, 1\]"),
        (lambda: Tolerance.from_json("{}"), "`text` must hold the keys"),
        (lambda: Tolerance.from_json("[1, 2]"), "`text` must hold the keys"),
        (lambda: Tolerance(np.zeros(()), np.zeros(()), {}, "guessed"), "`origin` must be one of"),
        (
            lambda: commit_alarm(benefit=1.0, price=0.1, rate_ratio=1.0, noise=0.1, step_time=0.1, steps_left=-1),
            "`steps_left` must be non-negative",
        ),
    ],
)
def test_other_bad_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
