"""Laws of the complexity polynomial: multilinear, exact gradient, prices."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catode.structures.complexity import Complexity, Term
from catode.structures.description import Block, Site
from catode.structures.inventory import Inventory

coefficients = st.integers(1, 10**6)
shares = st.floats(0.0, 1.0)


def inventory(blocks, site_block, widths):
    """Blocks and the widths of their sites; `site_block` says which block each site is in."""
    sites = [Site(f"site{s}", width, (), ()) for s, width in enumerate(widths)]
    own = [tuple(site for site, of in zip(sites, site_block, strict=True) if of == b) for b in range(blocks)]
    return Inventory([Block(f"block{b}", f"block{b}.out", sites) for b, sites in enumerate(own)])


@st.composite
def polynomials(draw, most_blocks=3, most_width=4):
    """A random polynomial: blocks of one or two sites, chains inside each block, a fixed part."""
    blocks = draw(st.integers(1, most_blocks))
    site_block = [b for b in range(blocks) for _ in range(draw(st.integers(1, 2)))]
    widths = draw(st.lists(st.integers(1, most_width), min_size=len(site_block), max_size=len(site_block)))
    terms = []
    for block in range(blocks):
        own = [s for s, b in enumerate(site_block) if b == block]
        chain = [None, *own, None]
        for inner, outer in itertools.pairwise(chain):
            terms.append(Term(f"{block}.{inner}", draw(coefficients), draw(coefficients), block, inner, outer))
        for site in draw(st.lists(st.sampled_from([*own, None]), max_size=3)):
            terms.append(Term(f"{block}.norm", draw(coefficients), draw(coefficients), block, None, site))
    for _ in range(draw(st.integers(0, 2))):
        terms.append(Term("fixed", draw(coefficients), draw(coefficients)))
    return Complexity(draw(st.permutations(terms)), inventory(blocks, site_block, widths))


def points(complexity):
    """Keep probabilities of a polynomial; multiples of 1/64, so that sums of them are exact."""
    n = complexity.size
    return st.lists(st.integers(0, 64), min_size=n, max_size=n).map(lambda k: np.array(k) / 64)


@st.composite
def evaluated(draw):
    complexity = draw(polynomials())
    return complexity, draw(points(complexity)), draw(shares)


def exact(complexity, theta, beta, without=None):
    """J in exact rational arithmetic by summing every pair of units; `without`: its derivative there instead."""
    theta = [Fraction(float(t)) for t in theta]
    beta = Fraction(float(beta))
    units = [units.tolist() for units in complexity.inventory.units]

    def monomials(term):
        inner = [None] if term.inner is None else units[term.inner]
        outer = [None] if term.outer is None else units[term.outer]
        return [[k for k in (term.block, i, o) if k is not None] for i in inner for o in outer]

    removable = [t for t in complexity.terms if t.block is not None]
    whole = [
        sum(len(monomials(t)) * Fraction(c) for t, c in zip(removable, cs, strict=True))
        for cs in ([t.macs for t in removable], [t.params for t in removable])
    ]
    total = Fraction(0)
    for term in removable:
        share = (1 - beta) * Fraction(term.macs) / whole[0] + beta * Fraction(term.params) / whole[1]
        for factors in monomials(term):
            if without is not None and without not in factors:
                continue
            product = Fraction(1)
            for k in factors:
                product *= 1 if k == without else theta[k]
            total += share * product
    return total


@settings(max_examples=60)
@given(evaluated())
def test_law_index_and_gradient_are_exact(case):
    complexity, theta, beta = case
    assert complexity.index(theta, beta) == pytest.approx(float(exact(complexity, theta, beta)), rel=1e-12, abs=0)
    gradient = complexity.gradient(theta, beta)
    for k in range(complexity.size):
        assert gradient[k] == pytest.approx(float(exact(complexity, theta, beta, without=k)), rel=1e-12, abs=0)


@settings(max_examples=60)
@given(evaluated(), st.data())
def test_law_multilinear_with_gradient_equal_to_the_difference_along_each_coordinate(case, data):
    complexity, theta, beta = case
    k = data.draw(st.integers(0, complexity.size - 1))
    values = []
    for t in (0.0, 0.5, 1.0):
        theta[k] = t
        values.append(complexity.index(theta, beta))
    low, middle, high = values
    assert abs(low - 2 * middle + high) <= 1e-12
    assert abs(complexity.gradient(theta, beta)[k] - (high - low)) <= 1e-12


@settings(max_examples=60)
@given(evaluated(), st.data())
def test_law_gradient_is_independent_of_its_own_theta(case, data):
    complexity, theta, beta = case
    before = complexity.gradient(theta, beta)
    k = data.draw(st.integers(0, complexity.size - 1))
    theta[k] = data.draw(st.floats(0.0, 1.0))
    assert complexity.gradient(theta, beta)[k] == pytest.approx(before[k], rel=1e-12, abs=0)


@settings(max_examples=60)
@given(evaluated())
def test_law_index_lies_in_the_unit_interval_and_is_one_at_ones(case):
    complexity, theta, beta = case
    assert -1e-15 <= complexity.index(theta, beta) <= 1 + 1e-12
    assert complexity.index(np.ones(complexity.size), beta) == pytest.approx(1.0, rel=1e-12)
    assert complexity.index(np.zeros(complexity.size), beta) == 0.0


@settings(max_examples=60)
@given(evaluated())
def test_law_index_and_gradient_grow_with_theta(case):
    complexity, theta, beta = case
    gradient = complexity.gradient(theta, beta)
    more = np.minimum(theta + 0.25, 1.0)
    assert (gradient >= 0).all()
    assert complexity.index(more, beta) >= complexity.index(theta, beta) - 1e-12
    assert (complexity.gradient(more, beta) >= gradient - 1e-12).all()


@settings(max_examples=60)
@given(evaluated(), st.floats(0.0, 10.0), shares)
def test_law_prices_split_by_alpha_scale_with_nu_and_sum_to_the_index(case, nu, alpha):
    complexity, theta, beta = case
    blocks = complexity.inventory.layers
    layers = slice(0, blocks)
    gradient = complexity.gradient(theta, beta)
    price = complexity.prices(theta, nu=nu, alpha=alpha, beta=beta)
    expected = nu * np.where(np.arange(complexity.size) < blocks, alpha, 1 - alpha) * gradient
    np.testing.assert_allclose(price, expected, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(
        complexity.prices(theta, nu=2 * nu, alpha=alpha, beta=beta), 2 * price, rtol=1e-12, atol=1e-300
    )
    # every removable monomial holds exactly one layer, so Euler's rule gives the whole index back
    index = complexity.index(theta, beta)
    assert price[layers] @ theta[layers] == pytest.approx(nu * alpha * index, rel=1e-9, abs=1e-300)
    assert not complexity.prices(theta, nu=nu, alpha=0.0, beta=beta)[layers].any()
    assert not complexity.prices(theta, nu=nu, alpha=1.0, beta=beta)[blocks:].any()
    assert not complexity.prices(theta, nu=0.0, alpha=alpha, beta=beta).any()


@settings(max_examples=60)
@given(evaluated())
def test_law_expected_counts_contain_the_fixed_part(case):
    complexity, theta, _ = case
    fixed_macs = sum(t.macs for t in complexity.terms if t.block is None)
    fixed_params = sum(t.params for t in complexity.terms if t.block is None)
    zeros = np.zeros(complexity.size)
    assert (complexity.macs(zeros), complexity.params(zeros)) == (fixed_macs, fixed_params)
    for count, beta, whole, fixed in (
        (complexity.macs, 0.0, complexity.removable_macs, fixed_macs),
        (complexity.params, 1.0, complexity.removable_params, fixed_params),
    ):
        assert count(theta) == pytest.approx(fixed + whole * complexity.index(theta, beta), rel=1e-12)


def small():
    """One block, two hidden units: conv1 10 MACs and 1 parameter a unit, conv2 20 and 3, norm 6 and 2; stem 100."""
    return Complexity(
        [
            Term("stem", 100, 7),
            Term("conv1", 10, 1, 0, None, 0),
            Term("conv2", 20, 3, 0, 0, None),
            Term("norm", 6, 2, 0),
        ],
        inventory(1, [0], [2]),
    )


def test_a_small_example_by_hand():
    complexity, theta = small(), [0.5, 0.5, 0.25]  # N = 3/4
    assert (complexity.removable_macs, complexity.removable_params) == (66, 10)
    assert complexity.macs(theta) == 100 + 0.5 * (0.75 * 30 + 6)
    assert complexity.params(theta) == 7 + 0.5 * (0.75 * 4 + 2)
    assert complexity.index(theta, 0.0) == pytest.approx(14.25 / 66, rel=1e-15)
    assert complexity.index(theta, 1.0) == pytest.approx(0.25, rel=1e-15)
    assert complexity.index(theta, 0.5) == pytest.approx((14.25 / 66 + 0.25) / 2, rel=1e-15)
    np.testing.assert_allclose(complexity.gradient(theta, 0.0), [28.5 / 66, 15 / 66, 15 / 66], rtol=1e-14)
    np.testing.assert_allclose(complexity.gradient(theta, 1.0), [5 / 10, 2 / 10, 2 / 10], rtol=1e-14)
    price = complexity.prices(theta, nu=2.0, alpha=0.25, beta=0.0)
    np.testing.assert_allclose(price, [2 * 0.25 * 28.5 / 66, *[2 * 0.75 * 15 / 66] * 2], rtol=1e-14)


@pytest.mark.parametrize(("inner", "outer"), [(None, 0), (0, None), (None, 1), (1, None)])
def test_what_no_term_counts_costs_nothing(inner, outer):
    complexity = Complexity([Term("a", 2, 1, 0, inner, outer)], inventory(2, [0, 0, 1], [2, 2, 1]))
    site = inner if outer is None else outer
    expected = [0.75, 0.0, *[0.25 * (site == 0)] * 2, *[0.25 * (site == 1)] * 2, 0.0]
    theta = [0.5, 1.0, 0.75, 0.75, 0.75, 0.75, 1.0]
    np.testing.assert_allclose(complexity.gradient(theta, 0.5), expected, rtol=1e-14)
    assert complexity.macs(theta) == 2 * 0.5 * 1.5


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("theta", lambda c: c.index(np.ones(2), 0.0)),
        ("theta", lambda c: c.gradient(np.ones((3, 1)), 0.0)),
        ("theta", lambda c: c.macs(np.ones(4))),
        ("theta", lambda c: c.params(1.0)),
        ("theta", lambda c: c.prices([], nu=1.0, alpha=0.5, beta=0.0)),
        ("beta", lambda c: c.index(np.ones(3), -0.1)),
        ("beta", lambda c: c.gradient(np.ones(3), 1.1)),
        ("beta", lambda c: c.prices(np.ones(3), nu=1.0, alpha=0.5, beta=float("nan"))),
        ("nu", lambda c: c.prices(np.ones(3), nu=-1e-9, alpha=0.5, beta=0.0)),
        ("nu", lambda c: c.prices(np.ones(3), nu=float("inf"), alpha=0.5, beta=0.0)),
        ("alpha", lambda c: c.prices(np.ones(3), nu=1.0, alpha=1.01, beta=0.0)),
        ("alpha", lambda c: c.prices(np.ones(3), nu=1.0, alpha=-0.01, beta=0.0)),
        ("loop", lambda c: Complexity([Term("loop", 1, 1, 0, 0, 0)], inventory(1, [0], [2]))),
    ],
)
def test_bad_input_is_refused(name, call):
    with pytest.raises(ValueError, match=rf"^`{name}` must [^\n]+; got [^\n]+$"):
        call(small())
