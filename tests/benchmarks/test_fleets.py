"""The simulated dispatcher keeps within what any schedule can do."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwm_audit.dispatcher import MODELS_PER_ACTOR
from tests.benchmarks.fleets import OFF, RESULTS, Cluster, Work, points, requests, simulate

seconds = st.floats(0.0, 10.0)
works = st.lists(st.builds(Work, st.integers(1, 40), st.integers(0, 1 << 28), seconds, seconds), min_size=1, max_size=3)


@given(works, st.integers(1, 9), seconds, seconds, st.floats(1e6, 1e10))
def test_a_run_takes_no_less_than_its_busiest_part_and_no_more_than_all_in_a_row(fleet_, workers, driver, start, rate):
    cluster = Cluster(workers, start, driver, 0.0, 0.0, rate)
    outcome = simulate(fleet_, cluster)
    count = sum(work.count for work in fleet_)
    spent = outcome.seconds - start
    on_link = sum(work.count * work.bytes for work in fleet_) / rate
    computed = sum(work.count * work.compute_s for work in fleet_)
    fetched = sum(work.count * work.fetch_s for work in fleet_)
    slack = 1e-6 * (1 + spent)
    assert spent >= max(computed / workers, driver * count, on_link) - slack
    assert spent <= computed + fetched + driver * count + on_link * 2 + slack


def test_workers_divide_the_work_until_the_driver_is_busy():
    work = [Work(1000, 0, 0.0, 1.0)]
    alone = simulate(work, Cluster(1, 0.0, 0.01, 0.0, 0.0, math.inf))
    assert alone.seconds == pytest.approx(1010)
    ten = simulate(work, Cluster(10, 0.0, 0.01, 0.0, 0.0, math.inf))
    assert ten.seconds == pytest.approx(101, rel=0.01)
    crowd = simulate(work, Cluster(1000, 0.0, 0.01, 0.0, 0.0, math.inf))
    assert crowd.seconds == pytest.approx(11, rel=0.01)
    assert crowd.driver > 0.9 > crowd.workers


def test_workers_are_replaced():
    count = 2 * MODELS_PER_ACTOR + 1
    work = [Work(count, 0, 0.0, 0.1)]
    kept, replaced = (simulate(work, Cluster(1, 0.0, 0.0, 0.0, pause, math.inf)).seconds for pause in (0.0, 7.0))
    assert replaced - kept == pytest.approx(14)


def test_each_worker_prepares_for_each_class_once():
    cluster = Cluster(2, 0.0, 0.0, 0.0, 0.0, math.inf)
    works = [Work(20, size, 0.0, 1.0, once) for size, once in ((2, 3.0), (1, 5.0))]
    assert simulate(works, cluster).seconds == pytest.approx(20 + 3 + 5)


CURVES, SPEED = (json.loads((RESULTS / name).read_text()) for name in ("curves.json", "speed.json"))


def test_requests_are_those_that_a_proxy_counted():
    """Whose keys were local, and whose models one range each."""
    seen = CURVES["requests"]
    counted = {"get": 0, "put": 0}
    for name, count in seen["counted"].items():
        counted["get" if name.split()[0] in ("GET", "HEAD") else "put"] += count
    expected = requests(seen["models"], 814_416, workers=seen["workers"], keys=0)
    assert counted["put"] == expected["put"]
    # A worker that had nothing left to do took a model whose file another one had begun to fetch.
    assert expected["get"] <= counted["get"] <= expected["get"] + seen["workers"]
    assert requests(200, 40 << 20, workers=2, keys=0)["get"] == 609


def test_the_simulation_meets_what_was_measured():
    """Rows, sizes, numbers of workers, and the classes of checkpoints, of which the last is all of them together."""
    seen = points(CURVES, SPEED)
    assert len(seen) == 18
    assert {name: simulated / took for name, took, simulated in seen if abs(simulated / took - 1) > OFF} == {}


def test_a_model_of_other_costs_would_not():
    """Of a driver that takes twice as long for a record, for one."""
    slow = copy.deepcopy(CURVES)
    for point in slow["rows"]:
        point["rate"] /= 2
    measured = {name: took for name, took, _ in points(CURVES, SPEED)}
    off = [name for name, _, simulated in points(slow, SPEED) if abs(simulated / measured[name] - 1) > OFF]
    assert "100000 rows of no work" in off
