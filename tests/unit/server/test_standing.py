"""What a gateway's hints may change of a request's standing, and what they may not."""

from pathlib import Path

import pytest

from headrace.scheduler.fair_queue import tenant_of
from headrace.scheduler.messages import Tier
from headrace.server.api_keys import ApiKeys, append_key, create_key
from headrace.server.standing import NUM_FLOWS, Hints, standing_of


def keys_with(path: Path, tier: Tier) -> ApiKeys:
    _, key = create_key("alice", tier)
    append_key(path / "keys.toml", key.model_copy(update={"weight": 4.0}))
    return ApiKeys(path / "keys.toml")


@pytest.mark.parametrize("hinted", [None, *Tier])
@pytest.mark.parametrize("own", Tier)
def test_a_hint_lowers_a_keys_tier_and_never_raises_it(tmp_path: Path, own: Tier, hinted: Tier | None) -> None:
    ranks = [*Tier]
    standing = standing_of(keys_with(tmp_path, own), "alice", Hints(hinted))
    assert ranks.index(standing.tier) == max(ranks.index(own), ranks.index(hinted or own))
    assert standing.weight == 4.0


@pytest.mark.parametrize("hinted", [None, *Tier])
def test_without_keys_a_hint_decides(hinted: Tier | None) -> None:
    assert standing_of(None, "", Hints(hinted)).tier is (hinted or Tier.STANDARD)


def test_an_id_is_one_flow_of_its_tenant_and_there_are_only_so_many() -> None:
    names = {standing_of(None, "", Hints(fairness_id=f"user {i}")).tenant for i in range(20 * NUM_FLOWS)}
    assert NUM_FLOWS / 2 < len(names) <= NUM_FLOWS
    assert {tenant_of(name) for name in names} == {""}
    assert "" not in names
    first, second = (standing_of(None, "bob", Hints(fairness_id="a")) for _ in range(2))
    assert first == second
    assert tenant_of(first.tenant) == tenant_of("bob") == "bob"
    assert standing_of(None, "bob").tenant == "bob"
