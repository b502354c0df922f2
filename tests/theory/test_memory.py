"""The tolerance with a pool between the benefit and theta (docs/theory.md, section 2)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from catode.theory.systems import growth_rate
from catode.theory.tolerance import derive, escape_probability
from catode.theory.tolerance.measured import LEAST_PRICE, arguments

positive = st.floats(0.01, 10.0)
SYSTEMS = st.fixed_dictionaries(
    {
        "price": positive,
        "gain": positive,
        "decay": st.one_of(st.just(0.0), positive),
        "rate_ratio": positive,
        "memory": st.floats(0.0, 100.0),
    }
)
QUIET = {"noise": 0.0, "benefit_noise": 0.0, "step_time": 0.0}


def jacobian(gain, decay, rate_ratio, memory):
    return np.array([[-decay, 0.0, gain], [1 / memory, -1 / memory, 0.0], [0.0, rate_ratio, 0.0]])


@given(SYSTEMS)
@settings(deadline=None, max_examples=200)
def test_growth_rate_is_the_unstable_eigenvalue_and_falls_with_memory(system):
    decay, rho, q, memory = (system[k] for k in ("decay", "rate_ratio", "gain", "memory"))
    mu = growth_rate(decay, rho, q, memory)
    assert mu * (mu + decay) * (1 + memory * mu) == pytest.approx(rho * q, rel=1e-9)
    assert mu <= growth_rate(decay, rho, q) * (1 + 1e-12)
    if memory > 0.01:
        assert np.linalg.eigvals(jacobian(q, decay, rho, memory)).real.max() == pytest.approx(mu, rel=1e-6)


@given(SYSTEMS, st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(0.0, 1.0), st.floats(0.0, 0.5))
@settings(deadline=None, max_examples=200)
def test_v_grows_from_its_threshold_at_the_growth_rate(system, b, pool, theta, drift):
    g, q, a, rho, memory = (system[k] for k in ("price", "gain", "decay", "rate_ratio", "memory"))
    memory += 0.01
    mu = growth_rate(a, rho, q, memory)
    row = np.array([1.0, (mu + a) * memory, q / mu])
    state, saddle = np.array([b, pool, theta]), np.array([g, g, (a * g - drift) / q])
    speed = jacobian(q, a, rho, memory) @ state + np.array([drift, 0.0, -rho * g])
    assert row @ speed == pytest.approx(mu * (row @ (state - saddle)), rel=1e-6, abs=1e-7)
    tolerance = derive(benefit=min(b, 0.99 * g), drift=0.0, **system | {"memory": memory}, **QUIET)
    if np.isfinite(tolerance.separatrix):
        edge = np.array([min(b, 0.99 * g), min(b, 0.99 * g), float(tolerance.separatrix)])
        assert row @ (edge - np.array([g, g, a * g / q])) == pytest.approx(0.0, abs=1e-6 * (1 + row @ edge))


@given(SYSTEMS, st.floats(0.0, 0.9))
@settings(deadline=None, max_examples=100)
def test_memory_zero_is_the_plain_formula_and_memory_widens_the_domain(system, share):
    common = (
        {k: v for k, v in system.items() if k != "memory"} | {"benefit": share * system["price"], "drift": 0.0} | QUIET
    )
    plain = derive(**common)
    assert float(derive(memory=0.0, **common).separatrix) == float(plain.separatrix)
    assert float(derive(memory=1e-9, **common).separatrix) == pytest.approx(float(plain.separatrix), rel=1e-6)
    assert derive(memory=system["memory"], **common).separatrix >= plain.separatrix * (1 - 1e-9)


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("memory", [0.5, 5.0, 50.0])
def test_the_separatrix_divides_absorbed_from_escaping_trajectories(side, memory):
    g, q, a, rho = 0.1, 0.5, 0.05, 0.05
    common = {"price": g, "gain": q, "decay": a, "rate_ratio": rho, "memory": memory, "drift": 0.0}
    edge = float(derive(benefit=0.02, **common, **QUIET).separatrix)
    assert 0.0 < edge < 0.95
    b = pool = 0.02
    theta, dt = edge * (1 + 0.02 * side), 0.005
    for _ in range(200_000):
        b, pool, theta = b + dt * (q * theta - a * b), pool + dt * (b - pool) / memory, theta + dt * rho * (pool - g)
        theta = min(theta, 1.0)
        if theta <= 0.0 or theta == 1.0:
            break
    assert (theta <= 0.0) == (side < 0)


def test_pooled_iterates_escape_no_more_often_than_the_bound():
    g, q, a, rho, tau, memory = 0.1, 0.5, 0.05, 1.0, 0.01, 0.5
    rng = np.random.default_rng(0)
    n = 2000
    for start in (0.05, 0.1, 0.15):
        sigma = np.sqrt(tau) * rho
        bound = float(
            escape_probability(
                keep_prob=start,
                benefit=0.0,
                price=g,
                gain=q,
                decay=a,
                rate_ratio=rho,
                noise=sigma,
                benefit_noise=0.0,
                drift=0.0,
                step_time=tau,
                memory=memory,
            )
        )
        theta, b, pool = np.full(n, start), np.zeros(n), np.zeros(n)
        gone = np.zeros(n, dtype=bool)
        for _ in range(4000):
            draw = b + rng.standard_normal(n)
            b = b + tau * (q * theta - a * b)
            pool = pool + tau * (draw - pool) / memory
            theta = np.where(gone, 0.0, np.clip(theta + tau * rho * (pool - g), 0.0, 1.0))
            gone |= theta == 0.0
        escaped = 1.0 - gone.mean()
        assert escaped <= bound + 3 * np.sqrt(bound * (1 - bound) / n)


@given(SYSTEMS, st.floats(0.0, 0.9), st.floats(0.0, 0.9))
@settings(deadline=None, max_examples=100)
def test_a_pool_that_stands_lower_widens_the_domain_and_moves_the_edge_along_v(system, share, lower):
    g, q, a, rho, memory = (system[k] for k in ("price", "gain", "decay", "rate_ratio", "memory"))
    benefit, pooled = share * g, lower * share * g
    common = system | {"benefit": benefit, "drift": 0.0} | QUIET
    one, two = float(derive(**common).separatrix), float(derive(pooled=pooled, **common).separatrix)
    mu = growth_rate(a, rho, q, memory)
    assert two >= one * (1 - 1e-12)
    assert two - one == pytest.approx((mu + a) * memory * (benefit - pooled) * mu / q, rel=1e-6, abs=1e-9 * abs(one))


MEASURED = {"gain": 0.5, "decay": 0.05, "rate_ratio": 0.05, "drift": 0.0} | QUIET


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("memory", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("margin", [0.0, 0.01, 0.03])
def test_the_tolerance_of_measured_arrays_divides_what_goes_when_theta_moves_by_the_pool_plus_its_margin(
    margin, memory, side
):
    price, pooled, q, a, rho = 0.1, 0.02, MEASURED["gain"], MEASURED["decay"], MEASURED["rate_ratio"]
    upper = pooled + margin
    known = arguments(benefit=pooled, benefit_upper=upper, price=price, memory=memory, **MEASURED)
    edge = float(derive(**known))
    assert 0.0 < edge < 0.95

    def speed(_, state):
        benefit, pool, theta = state
        return q * theta - a * benefit, (benefit - pool) / memory, rho * (pool + margin - price)

    ends = [lambda _, state: state[2], lambda _, state: state[2] - 1.0]
    for end in ends:
        end.terminal = True
    start = [upper, pooled, edge * (1.0 + 0.01 * side)]  # the worst benefit that the pool allows
    path = solve_ivp(speed, (0.0, 1e4), start, events=ends, rtol=1e-9, atol=1e-12)
    assert [len(times) for times in path.t_events] == ([1, 0] if side < 0 else [0, 1])


@given(st.integers(0, 10**6), st.floats(0.0, 0.2))
@settings(deadline=None, max_examples=50)
def test_theta_moves_by_pool_plus_margin_as_a_pool_without_margin_does_at_the_lower_price(seed, margin):
    price, rho, rng = 0.3, 2.0, np.random.default_rng(seed)
    pools = rng.uniform(-0.1, 0.5, 200)
    known = arguments(benefit=pools, benefit_upper=pools + margin, price=price, memory=1.0, **MEASURED)
    one, other = [0.5], [0.5]
    for pool, lower in zip(pools, known["price"], strict=True):
        one.append(np.clip(one[-1] + 0.05 * rho * (pool + margin - price), 0.0, 1.0))
        other.append(np.clip(other[-1] + 0.05 * rho * (pool - lower), 0.0, 1.0))
    assert np.ptp(one) > 0.01 and one == pytest.approx(other, abs=1e-12)


def test_measured_arrays_go_where_they_belong():
    measured = {name: np.array([float(i), i + 0.5]) for i, name in enumerate([*MEASURED, "memory"], start=1)}
    known = arguments(benefit=[0.1, 0.2], benefit_upper=[0.2, 0.9], price=[0.3, 0.4], **measured)
    assert {name: known[name].tolist() for name in measured} == {k: v.tolist() for k, v in measured.items()}
    assert known["pooled"] == [0.1, 0.2] and known["benefit"] == [0.2, 0.9]
    assert known["price"] == pytest.approx(
        [0.2, LEAST_PRICE], rel=1e-12
    )  # a margin above the price leaves the least one
    assert known.keys() == {"benefit", "pooled", "price", *measured}


def regrets(gain, distance, margin_in_price, n=400, steps=5000):
    """Removals and regrets of shadow structures whose theta follows the upper limit of a pool, as the trainer's does.

    The benefit is constant, `distance` standard errors below the price; a regret is a structure whose theta, left alone
    after it first met the condition, came back to 1 before it reached 0 (or did neither).
    """
    rng = np.random.default_rng(0)
    memory, g, z = 400, 1e-3, 1.645
    rho, sd = 1 / 66 / g, 8 * g
    benefit = g - distance * sd / np.sqrt(2 * memory)
    forget, w, w2 = 1 - 1 / memory, 0.0, 0.0
    s, s2, theta = np.zeros(n), np.zeros(n), np.ones(n)
    met, end = np.zeros(n, bool), np.zeros(n, int)
    for step in range(1, steps + 1):
        draw = benefit + sd * rng.standard_normal(n)
        w, w2, s, s2 = forget * w + 1, forget**2 * w2 + 1, forget * s + draw, forget * s2 + draw**2
        count, mean = w * w / w2, s / w
        if step <= 110:
            continue
        margin = z * np.sqrt(np.maximum(s2 / w - mean**2, 0.0) / (count - 1))
        theta = np.clip(theta - rho * (g - mean - margin), 0.0, 1.0)
        end[(end == 0) & met & (theta == 0.0)] = 1
        end[(end == 0) & met & (theta >= 1.0)] = 2
        if step % 20 == 0:
            known = arguments(
                benefit=mean, benefit_upper=mean + margin, price=g, gain=gain, decay=0.0, rate_ratio=rho, noise=rho * sd,
                benefit_noise=0.0, drift=0.0, step_time=1.0, memory=w,
            )  # fmt: skip
            tolerance = derive(**known if margin_in_price else known | {"price": g})
            met |= (end == 0) & (mean + margin < g) & (theta <= tolerance.values) & (theta > 0.0)
    return int(met.sum()), int((met & (end != 1)).sum())


@pytest.mark.parametrize("distance", [0.6, 1.5, 3.0, 6.0])
@pytest.mark.parametrize("gain", [1e-6, 1e-5])
def test_the_trainers_removals_would_have_gone_by_themselves(gain, distance):
    removed, wrong = regrets(gain, distance, margin_in_price=True)
    assert wrong <= 0.05 * removed + 3 * np.sqrt(0.05 * max(removed, 1))
    assert removed > 0 or distance == 6.0  # far below the price theta falls to 0 between two looks


def test_without_the_margin_in_the_price_many_would_have_recovered():
    removed, wrong = regrets(1e-7, 0.6, margin_in_price=False)
    assert removed > 100 and wrong > 0.2 * removed


def test_negative_memory_is_refused():
    with pytest.raises(ValueError, match="`memory` must be non-negative"):
        derive(benefit=0.0, price=0.1, gain=0.5, decay=0.0, rate_ratio=1.0, drift=0.0, memory=-1.0, **QUIET)
