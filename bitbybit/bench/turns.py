"""Times programs that take turns, so that other load and a drifting clock hit all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Call = Callable[[], object]
_TURN_SECONDS = 0.05  # of calls in one turn, about
_MOST_CALLS = 20  # in one turn
_LEAST_TURNS = 3
_SLOW = 1.0  # seconds: whatever a first call prepares is little beside that
_WARM_BELOW = 0.02  # seconds: the first call of a turn is not counted where caches may matter


@dataclass(frozen=True)
class TurnOptions:
    """How long to measure.

    Attributes:
        seconds: for all programs together, about; a program gets an equal share, but at least three turns.
        repetitions: turns of each program at most; 0 leaves it to ``seconds``.
        pause: seconds before each turn, in which the threads of the program before go to sleep.
        seed: of the order within a round.
    """

    seconds: float = 5.0
    repetitions: int = 0
    pause: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Spread:
    """A sample's middle and its spread.

    Attributes:
        median: half of the sample is below.
        p10: a tenth of it is below.
        p90: nine tenths are below.
        count: size of the sample.
    """

    median: float
    p10: float
    p90: float
    count: int


def spread(values: list[float]) -> Spread:
    """Median and percentiles of a sample of at least one value."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return Spread(float(median), float(p10), float(p90), len(values))


def plan_turns(costs: Mapping[str, float], options: TurnOptions) -> list[str]:
    """The order of turns: those of each program lie evenly over the whole.

    Programs with equally many turns so make rounds, whose inner order changes; a slow program sits
    out in most of them instead of using up the time.

    Args:
        costs: program to seconds of one turn.
        options: how long to measure.
    """
    rng = np.random.default_rng(options.seed)
    share = options.seconds / len(costs)
    limit = options.repetitions or round(max(_LEAST_TURNS, share / min(costs.values())))
    places = []
    for name, cost in costs.items():
        turns = options.repetitions if 0 < options.repetitions < _LEAST_TURNS else _LEAST_TURNS
        turns = min(limit, max(turns, round(share / cost)))
        places += [((index + rng.uniform(0.25, 0.75)) / turns, name) for index in range(turns)]
    return [name for _, name in sorted(places)]


def time_in_turns(
    calls: Mapping[str, Call], options: TurnOptions, on_turn: Callable[[int, int], None] | None = None
) -> dict[str, list[float]]:
    """Seconds of each call of each program.

    A turn is several calls in a row, as a program in use makes them. Every program is called once
    before the clock starts.

    Args:
        calls: program to what is timed; its answers are checked elsewhere.
        options: how long to measure.
        on_turn: told how many turns are done, of how many.
    """
    single = {}
    for name, call in calls.items():
        single[name] = _seconds(call)
        if single[name] < _SLOW:  # the first call may have prepared something
            single[name] = _seconds(call)
    in_turn = {name: max(1, min(_MOST_CALLS, round(_TURN_SECONDS / cost))) for name, cost in single.items()}
    costs = {name: options.pause + cost * (in_turn[name] + _warms(cost)) for name, cost in single.items()}
    order = plan_turns(costs, options)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for done, name in enumerate(order):
        if options.pause:
            time.sleep(options.pause)
        if _warms(single[name]):
            calls[name]()
        found[name] += [_seconds(calls[name]) for _ in range(in_turn[name])]
        if on_turn is not None:
            on_turn(done + 1, len(order))
    return found


def _warms(cost: float) -> bool:
    return cost < _WARM_BELOW


def _seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
