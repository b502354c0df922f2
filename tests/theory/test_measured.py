"""From what a run measured to the arguments of the tolerance, and the memory of its pools (docs/theory.md, section 1)."""

import pytest

from catode.theory.tolerance.measured import LEAST_PRICE, arguments, check_steps, pool_memory

OTHERS = {
    "gain": 0.5,
    "decay": 0.05,
    "rate_ratio": 0.07,
    "noise": 0.02,
    "benefit_noise": 0.001,
    "drift": 0.003,
    "step_time": 0.01,
    "memory": 0.6,
}


@pytest.mark.parametrize(
    ("benefit", "upper", "price", "effective"),
    [(0.02, 0.02, 0.1, 0.1), (0.02, 0.05, 0.1, 0.07), (-0.02, 0.05, 0.1, 0.03), (-0.2, 0.05, 0.1, 1e-12)],
)
def test_the_price_is_lower_by_the_margin(benefit, upper, price, effective):
    known = arguments(benefit=benefit, benefit_upper=upper, price=price, **OTHERS)
    assert known.pop("price") == pytest.approx(effective, rel=1e-9) and LEAST_PRICE == 1e-12
    assert known == OTHERS | {"benefit": upper, "pooled": benefit}


@pytest.mark.parametrize(
    ("steps", "memory"), [(1, 200), (6240, 200), (6263, 200), (6264, 201), (8 * 6240, 800), (27 * 6240, 1800)]
)
def test_memory_grows_with_the_length_of_the_run_to_the_power_of_two_thirds(steps, memory):
    assert pool_memory(steps) == memory


@pytest.mark.parametrize(("memory", "steps"), [(200, 50), (203, 50), (10, 2)])
def test_checks_come_four_times_a_memory(memory, steps):
    assert check_steps(memory) == steps
