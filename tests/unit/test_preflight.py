"""What the nodes of a cluster must agree on."""

from pathlib import Path

import pytest

from ftray.errors import UserError
from ftray.tracking.environment import describe_environment
from ftray.train.preflight import NodeReport, compare_nodes, workers_that_fit

PACKAGES = describe_environment()["packages"]
GOOD = {"address": "10.0.0.2", "probe": "token", "packages": PACKAGES, "clock": 100.5}


def compare(**changes) -> None:
    reports = [NodeReport(**GOOD), NodeReport(**GOOD | changes)]
    compare_nodes(reports, "token", Path("/runs/a"), asked=100.0, answered=101.0)


def test_nodes_that_agree():
    compare()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe": None}, r"runs_dir: /runs/a is not on storage that all nodes share: node 10\.0\.0\.2"),
        ({"probe": "another"}, "is not on storage"),
        ({"packages": PACKAGES | {"torch": "1.0"}}, r"node 10\.0\.0\.2 has torch 1\.0, this machine"),
        ({"clock": 900.0}, "its clock differs by 799 s"),
    ],
)
def test_nodes_that_differ_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        compare(**changes)


def test_workers_fit_by_their_scarcest_resource():
    assert workers_that_fit({"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}) == 2
    assert workers_that_fit({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}) == 0
