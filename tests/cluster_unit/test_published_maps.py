"""Which hosts a map names, and what they must keep because of it: pure, against random placements."""

from hypothesis import given
from hypothesis import strategies as st

from actors.exchange import HostReport, RouterReport
from cluster.members import HostMember, RouterMember
from cluster.published_maps import NUM_KEPT, PublishedMaps, choose_holders, named_by
from model.logical_expert import LogicalExpert
from router.placement_map import Endpoint, HostKey, MapVersion

EXPERTS = [LogicalExpert(1, expert) for expert in range(5)]
KEYS = [HostKey(name, 1) for name in "abcd"]
placements = st.dictionaries(st.sampled_from(KEYS), st.frozensets(st.sampled_from(EXPERTS)), max_size=4)


@given(placements, placements, st.frozensets(st.sampled_from(KEYS)), st.integers(1, 3))
def test_who_is_named(ready, desired, suspects, min_replicas):
    chosen = choose_holders(EXPERTS, ready, desired, None, suspects, min_replicas)
    assert set(chosen) == {expert for held in ready.values() for expert in held}, "all that anybody holds, nothing else"
    for expert, keys in chosen.items():
        holders = {key for key, held in ready.items() if expert in held}
        wanted = {key for key in holders if expert in desired.get(key, ())}
        assert keys == tuple(sorted(set(keys)))
        assert wanted <= set(keys) <= holders
        num_desired = sum(expert in held for held in desired.values())
        if not wanted or num_desired > len(wanted):
            assert len(keys) >= min(len(holders - suspects), min(min_replicas, num_desired), 1)
        if holders - suspects:
            assert set(keys) - suspects, "one that can be reached, if there is any"


def hosts(held, epoch):
    endpoint = Endpoint("node", "", "", 0)
    return {key: HostMember(HostReport(key, endpoint, 1, ready, epoch_seen=epoch), 0.0, ready) for key, ready in held.items()}


def router(adopted=None, held=None, handed=None):
    return RouterMember(RouterReport(HostKey("r", 1), Endpoint("", "", "", 0), 1, adopted, held=held), 0.0, handed)


def published(num):
    """Maps that name a, b, c, d, a, ... in turn for every expert."""
    maps = PublishedMaps(7)
    for number in range(num):
        held = {KEYS[number % 4]: frozenset(EXPERTS)}
        assert maps.consider(EXPERTS, hosts(held, 7), held, (), 1) is not None
        assert maps.consider(EXPERTS, hosts(held, 7), held, (), 1) is None, "nothing new"
    return maps


def test_hosts_of_another_epoch_do_not_count():
    maps, held = PublishedMaps(7), {KEYS[0]: frozenset(EXPERTS)}
    assert maps.consider(EXPERTS, hosts(held, 6), held, (), 1) is None
    assert maps.kept(KEYS[0], frozenset(EXPERTS), []) == frozenset(EXPERTS), "nobody else holds them"


def test_a_map_uncovers_nothing():
    maps = published(1)
    held = {KEYS[1]: frozenset(EXPERTS[:4])}
    assert maps.consider(EXPERTS, hosts(held, 7), held, (), 1) is None
    assert maps.current.version == MapVersion(7, 1)
    assert maps.kept(KEYS[1], frozenset(EXPERTS[:4]), [maps.current]) == frozenset(EXPERTS[:4]), "the host that is named may be dead"


def test_a_map_that_is_held_back_counts_for_what_hosts_keep():
    maps, everything = published(1), frozenset(EXPERTS)
    both = {KEYS[1]: everything, KEYS[2]: everything}
    assert maps.consider(EXPERTS, hosts(both, 7), {KEYS[1]: everything}, (), 1, may_publish=False) is None
    assert maps.has_news
    assert maps.current.version == MapVersion(7, 1)
    assert [maps.kept(key, everything, []) for key in KEYS[1:3]] == [everything, frozenset()]
    # The one that the next map would have named dies before it is published.
    left = {KEYS[2]: everything}
    assert maps.consider(EXPERTS, hosts(left, 7), {KEYS[1]: everything}, (), 1, may_publish=False) is None
    assert maps.kept(KEYS[2], everything, []) == everything
    assert maps.consider(EXPERTS, hosts(left, 7), {KEYS[1]: everything}, (), 1) is not None
    assert not maps.has_news


def test_maps_in_use():
    maps = published(4)
    everything = frozenset(EXPERTS)

    def used_hosts(*routers):
        in_use = maps.in_use(routers)
        return None if in_use is None else {key.replica_id for key in KEYS if named_by(in_use, key) == everything}

    assert used_hosts() == {"d"}
    assert used_hosts(router()) == {"d"}
    assert used_hosts(router(adopted=MapVersion(7, 4))) == {"d"}
    assert used_hosts(router(adopted=MapVersion(7, 2)), router(adopted=MapVersion(7, 4))) == {"b", "c", "d"}
    assert used_hosts(router(held=MapVersion(7, 3))) == {"c", "d"}, "it may adopt what it was given"
    assert used_hosts(router(handed=MapVersion(7, 3))) == {"c", "d"}, "and what is on its way"
    assert used_hosts(router(adopted=MapVersion(6, 9))) is None, "another Coordinator's map: nobody here knows what it names"
    maps.forget_unused([router(adopted=MapVersion(7, 3))])
    assert used_hosts(router(adopted=MapVersion(7, 3))) == {"c", "d"}
    assert used_hosts(router(adopted=MapVersion(7, 2))) is None


def test_only_so_many_maps_are_kept():
    maps = published(NUM_KEPT + 5)
    assert len(maps.in_use([router(adopted=MapVersion(7, 6))])) == NUM_KEPT
    assert maps.in_use([router(adopted=MapVersion(7, 5))]) is None
