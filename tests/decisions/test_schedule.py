"""Which step does what: laws of the schedule, by walking through whole runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catode.decisions.schedule import Schedule, Turns, needed_memory, needed_phase

counts = st.integers(1, 12)


@st.composite
def schedules(draw):
    steps = draw(st.integers(1, 120))
    watched = draw(st.integers(0, 60))
    warmup = draw(st.integers(0, steps - 1))
    return Schedule(steps, steps + watched, warmup, draw(counts), draw(counts), draw(counts))


@given(schedules())
def test_law_a_burst_is_three_steps_in_a_row_that_end_with_a_probe(schedule):
    cycle, every = schedule.burst_every, schedule.measure_every
    assert cycle % every == 0 and cycle >= max(8, 2 * every) and cycle - every < max(8, 2 * every)
    assert (
        len(schedule.burst) == 3 == len(set(schedule.burst))
        and min(schedule.burst) >= 0
        and max(schedule.burst) < cycle
    )
    first, second, third = schedule.burst
    # probes come at the steps whose number is a multiple of `measure_every`, counted from 0
    assert (second - first, third - second, third % every) == (1, 1, 0) and third < 2 + every
    assert [done for done in range(6 * cycle) if schedule.answers(done) and done % cycle == third] == [
        turn * 2 * cycle + third for turn in range(3)
    ]


@given(schedules())
def test_law_a_check_follows_a_reading_at_the_first_chance_after_each_multiple(schedule):
    """Step by step, by hand: a check is owed from each multiple of `check_every` on, and paid at the next reading."""
    owed, last = False, 0
    for done in range(1, schedule.watch_until + 1):
        owed |= done % schedule.check_every == 0
        ends = done in (schedule.steps, schedule.watch_until)
        reads = ends or done % schedule.read_every == 0
        assert schedule.ends(done) == ends and schedule.reads(done) == reads
        expected = ends or (done % schedule.read_every == 0 and owed and done > schedule.warmup)
        assert schedule.checks(done) == expected, done
        if done % schedule.read_every == 0 and owed:
            # the step at which the one before was due, whether the warm-up let it happen or not
            assert schedule.checked_before(done) == last
            owed, last = False, done


@given(schedules(), st.integers(0, 40))
def test_law_draws_reach_exactly_to_the_next_reading(schedule, start):
    """From wherever gates begin, at a reading or not."""
    done, found = min(start, schedule.watch_until - 1), []
    while done < schedule.watch_until:
        ahead = schedule.until_read(done)
        assert ahead >= 1
        assert not any(step % schedule.read_every == 0 for step in range(done + 1, done + ahead))
        done += ahead
        found.append(done)
    assert done == schedule.watch_until
    assert all(step % schedule.read_every == 0 for step in found[:-1])
    assert schedule.until_read(schedule.watch_until) == 1, "the step after the last draws for itself"


@given(schedules())
def test_law_progress_goes_from_the_warm_up_to_the_end(schedule):
    assert schedule.progress(schedule.warmup) == 0.0 and schedule.progress(schedule.steps) == 1.0
    middle = schedule.progress((schedule.warmup + schedule.steps) / 2)
    assert middle == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("warmup", "memory", "layers", "per_probe", "begin"),
    [
        (1000, 100, 0, 1, 600),  # four memories before
        (
            1000,
            100,
            9,
            1,
            424,
        ),  # a round of nine layers takes 2 * 2 * 9 steps, and eight of them are needed: 4 * 36 * 8 / 2
        (1000, 100, 9, 3, 600),  # three layers at a time: 4 * 12 * 4 steps are less than four memories
        (1000, 10, 9, 2, 680),  # nine layers two at a time take five probes: 4 * 20 * 4
        (300, 100, 9, 3, 0),
    ],
)
def test_gates_begin_early_enough_to_measure(warmup, memory, layers, per_probe, begin):
    assert Schedule(2000, 2000, warmup, 2, 50, 1).begin(memory, layers, per_probe) == begin


def test_turns_go_round_and_round():
    turns, candidates = Turns(), np.array([3, 5, 8])
    assert (turns.layers, turns.units) == (0, 0)
    assert [turns.next(candidates, taken, 2) for taken in (0, 2, 4)] == [[3, 5], [8, 3], [5, 8]]
    assert turns.next(candidates, 1, 9) == [5, 8, 3], "each once at the most"
    assert turns.next(np.array([], dtype=np.int64), 7, 2) == []


def test_memory_that_tells_nothing_from_a_price():
    """(z s / g)^2 / 2 independent estimates, at z = 1.645, s = 1.6e-3, g = 1e-4; three times as many at a correlation of 1/2."""
    assert needed_memory(1.6e-3, 1e-4, 0.05) == pytest.approx((1.64485 * 16) ** 2 / 2, rel=1e-4)
    assert needed_memory(1.6e-3, 1e-4, 0.05, 0.5) == pytest.approx(1.5 * (1.64485 * 16) ** 2, rel=1e-4)
    assert (needed_phase(40, 5), needed_phase(3, 50)) == (400, 500)
