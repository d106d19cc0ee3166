"""A Ray session of our own, on a machine where other clusters run or have run."""

import os

import pytest


def test_its_processes_ask_it_and_no_other_cluster(ray_session):
    """As Ray Train's PlacementGroupCleaner looks for the cluster; without the address it would take the last one that
    `ray start` began, if there is one."""

    @ray_session.remote(num_cpus=0)
    def look(*, address_known: bool) -> str:
        from ray._private.services import get_ray_address_from_environment

        with pytest.MonkeyPatch.context() as patch:
            if not address_known:
                patch.delenv("RAY_ADDRESS")
            return str(get_ray_address_from_environment(None, None))

    own = ray_session.get_runtime_context().gcs_address
    assert ray_session.get(look.remote(address_known=True)) == own
    assert ray_session.get(look.remote(address_known=False)) != own
    assert os.environ.get("RAY_ADDRESS") != own, "what this process starts next is another session"
