"""Which replicas a request tries first."""

from ftray.serve.routing.placement import ReplicaView, ranked


def view(name: str, *adapters: str, load: int = 0) -> ReplicaView:
    return ReplicaView(name, frozenset(adapters), load)


def test_a_warm_replica_comes_first_even_if_busier():
    replicas = [view("a"), view("b", "x@1", load=3), view("c")]
    assert ranked("x@1", replicas, spread_at=8) == [["b"], ["a", "c"]]
    assert ranked("x@1", [view("a", "x@1", load=5), view("b", "x@1", load=2)], spread_at=8)[0] == ["b", "a"]


def test_a_hot_adapter_spreads():
    replicas = [view("a"), view("b", "x@1", load=8), view("c", load=1)]
    assert ranked("x@1", replicas, spread_at=8)[0] == ["a"]


def test_a_cold_adapter_has_one_home_and_homes_are_spread():
    replicas = [view(name) for name in "abcd"]
    homes = [ranked(f"x{i}@1", replicas, spread_at=8)[0] for i in range(200)]
    assert all(len(home) == 1 for home in homes)
    assert homes == [ranked(f"x{i}@1", replicas[::-1], spread_at=8)[0] for i in range(200)]
    assert min(homes.count([name]) for name in "abcd") > 25
    fewer = [ranked(f"x{i}@1", replicas[:3], spread_at=8)[0] for i in range(200)]
    assert all(a == b for a, b in zip(homes, fewer, strict=True) if a != ["d"])


def test_the_base_goes_where_there_is_least_to_do():
    replicas = [view("a", load=2), view("b"), view("c", load=1)]
    assert ranked(None, replicas, spread_at=8) == [["b", "c"], ["a"]]
