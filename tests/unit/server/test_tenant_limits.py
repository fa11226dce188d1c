"""What a key's limits let in and refuse, on a clock of the test's own."""

import threading
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from headrace.server.api_keys import ApiKeys, create_key
from headrace.server.errors import BadRequestError, RateLimitError, retry_headers
from headrace.server.tenant_limits import TenantLimits


class Keyed:
    """Limits by a file that the test writes, and the time."""

    def __init__(self, folder: Path, **tenants: str) -> None:
        self.now_s = 1000.0
        self._file = folder / "keys.toml"
        self._write(tenants)
        self.keys = ApiKeys(self._file)
        self.limits = TenantLimits(self.keys, lambda: self.now_s)

    def reload(self, **tenants: str) -> None:
        """As the App does it."""
        self._write(tenants)
        self.keys.reload()
        self.limits.keep_only(self.keys.tenants)

    def _write(self, tenants: dict[str, str]) -> None:
        self._file.write_text(
            "".join(create_key(name)[1].as_toml() + limits + "\n" for name, limits in tenants.items())
        )

    def refusal(self, tenant: str = "alice", num_sequences: int = 1) -> RateLimitError | None:
        try:
            self.limits.admit(tenant, num_sequences)
        except RateLimitError as error:
            return error
        return None

    def num_admitted(self, tenant: str = "alice") -> int:
        """How many more requests are let in now."""
        num = 0
        while num < 1000 and self.refusal(tenant) is None:
            num += 1
        return num


def test_as_many_requests_pass_at_once_as_a_minute_allows_and_the_next_is_told_when_to_come_back(
    tmp_path: Path,
) -> None:
    keyed = Keyed(tmp_path, alice="requests_per_minute = 6")
    assert keyed.num_admitted() == 6
    keyed.now_s += 4
    refused = keyed.refusal()
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(6)
    assert refused.headers == retry_headers(refused.retry_after_s)
    assert (refused.status, refused.envelope()["error"]) == (
        429,
        {
            "message": "this key's limit of 6 requests per minute is used up",
            "type": "rate_limit_error",
            "param": None,
            "code": "rate_limit_exceeded",
        },
    )
    keyed.now_s += refused.retry_after_s
    assert keyed.num_admitted() == 1


def test_room_for_requests_comes_back_steadily_and_never_for_more_than_a_minutes(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="requests_per_minute = 6")
    keyed.num_admitted()
    for wait_s, expected in ((9.9, 0), (0.1, 1), (10, 1), (30, 3), (3600, 6)):
        keyed.now_s += wait_s
        assert keyed.num_admitted() == expected


@pytest.mark.parametrize("limit", [1, 7, 59, 61, 997])
def test_a_whole_minutes_worth_is_a_whole_one_where_a_minute_does_not_divide_evenly(tmp_path: Path, limit: int) -> None:
    keyed = Keyed(tmp_path, alice=f"requests_per_minute = {limit}")
    assert keyed.num_admitted() == limit
    keyed.now_s += 60.001
    assert keyed.num_admitted() == limit


def test_a_request_counts_once_however_many_answers_it_asks_for(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="requests_per_minute = 2")
    assert [keyed.refusal(num_sequences=8) is None for _ in range(3)] == [True, True, False]


def test_a_refused_request_costs_nothing(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="requests_per_minute = 2\ntokens_per_minute = 60\nmax_concurrent = 2")
    keyed.limits.begin("alice")
    keyed.limits.begin("alice")
    assert keyed.num_admitted() == 0
    keyed.limits.end("alice")
    keyed.limits.charge("alice", 60)
    assert keyed.num_admitted() == 0
    with pytest.raises(BadRequestError):
        keyed.limits.admit("alice", 3)
    keyed.now_s += 1
    assert keyed.num_admitted() == 2
    refused = [keyed.refusal() for _ in range(10)]
    assert {error and error.retry_after_s for error in refused} == {30}


def test_tokens_are_charged_when_they_are_known_and_below_zero_where_need_be(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="tokens_per_minute = 600")
    keyed.limits.charge("alice", 599)
    assert keyed.refusal() is None
    keyed.limits.charge("alice", 1201)
    refused = keyed.refusal()
    assert refused is not None
    assert refused.message == "this key's limit of 600 tokens per minute is used up"
    # 1200 that were not there, and one more for the next to begin with, at 10 a second.
    assert refused.retry_after_s == pytest.approx(120.1)
    keyed.now_s += refused.retry_after_s - 0.01
    assert keyed.refusal() is not None
    keyed.now_s += 0.01
    assert keyed.refusal() is None


def test_tokens_used_up_to_the_last_one_are_used_up(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="tokens_per_minute = 600")
    keyed.limits.charge("alice", 600)
    refused = keyed.refusal()
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(0.1)


def test_nothing_is_charged_for_no_tokens(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="tokens_per_minute = 1")
    keyed.limits.charge("alice", 0)
    assert keyed.refusal() is None


@settings(max_examples=50, deadline=None)
@given(
    limit=st.integers(1, 100_000_000),
    arrivals=st.lists(st.tuples(st.floats(0, 90), st.floats(0, 3)), min_size=1, max_size=40),
)
def test_what_a_tenant_uses_stays_within_its_limit_but_for_the_last_request(
    tmp_path_factory: pytest.TempPathFactory, limit: int, arrivals: list[tuple[float, float]]
) -> None:
    keyed = Keyed(tmp_path_factory.mktemp("keys"), alice=f"tokens_per_minute = {limit}")
    start_s, num_used, largest = keyed.now_s, 0, 0
    for wait_s, minutes in arrivals:
        keyed.now_s += wait_s
        num_tokens = round(limit * minutes)
        if keyed.refusal() is None:
            keyed.limits.charge("alice", num_tokens)
            num_used += num_tokens
            largest = max(largest, num_tokens)
        num_minutes = (keyed.now_s - start_s) / 60
        assert num_used <= limit * (num_minutes + 1) + largest


@pytest.mark.parametrize("limit", [900, 7_000_000, 90_000_000])
def test_a_tenant_that_always_asks_gets_what_its_limit_says(tmp_path: Path, limit: int) -> None:
    keyed = Keyed(tmp_path, alice=f"tokens_per_minute = {limit}")
    num_tokens = limit // 90
    num_used = 0
    while keyed.now_s < 1000 + 600:
        refused = keyed.refusal()
        if refused is None:
            keyed.limits.charge("alice", num_tokens)
            num_used += num_tokens
        else:
            keyed.now_s += refused.retry_after_s
    assert num_used / 11 == pytest.approx(limit, rel=0.01)  # ten minutes, and the one it had at first


def test_of_several_limits_that_are_used_up_the_one_that_takes_longest_is_told(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="requests_per_minute = 6\ntokens_per_minute = 60\nmax_concurrent = 1")
    keyed.num_admitted()
    keyed.limits.begin("alice")
    refused = keyed.refusal()
    assert refused is not None
    assert "6 requests per minute" in refused.message
    keyed.limits.charge("alice", 120)
    refused = keyed.refusal()
    assert refused is not None
    assert "60 tokens per minute" in refused.message
    assert refused.retry_after_s == pytest.approx(61)
    keyed.now_s += 3600
    refused = keyed.refusal()
    assert refused is not None
    assert (refused.message, refused.retry_after_s) == ("this key's limit of 1 answers at once is used up", 1)


def test_answers_under_way_are_counted_until_each_has_ended(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="max_concurrent = 3")
    for _ in range(2):
        keyed.limits.begin("alice")
    assert keyed.limits.num_running("alice") == 2
    assert keyed.refusal(num_sequences=1) is None
    assert keyed.refusal(num_sequences=2) is not None
    keyed.limits.end("alice")
    assert keyed.refusal(num_sequences=2) is None
    keyed.limits.end("alice")
    assert keyed.limits.num_running("alice") == 0


def test_more_answers_than_the_tenant_may_ever_have_at_once_are_no_matter_of_waiting(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="max_concurrent = 3\ntokens_per_minute = 1")
    keyed.limits.charge("alice", 100)
    with pytest.raises(BadRequestError, match="4 answers are more than this key's 3 at once"):
        keyed.limits.admit("alice", 4)


def test_a_tenant_uses_up_no_other_tenants_limits(tmp_path: Path) -> None:
    every = "requests_per_minute = 1\ntokens_per_minute = 10\nmax_concurrent = 1"
    keyed = Keyed(tmp_path, alice=every, bob=every)
    assert keyed.num_admitted("alice") == 1
    keyed.limits.charge("alice", 1000)
    keyed.limits.begin("alice")
    assert keyed.num_admitted("bob") == 1


def test_who_has_no_entry_no_limits_or_a_server_without_keys_is_never_refused(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="")
    for limits in (keyed.limits, TenantLimits(None, lambda: 0.0)):
        for tenant in ("alice", "carol", ""):
            for _ in range(100):
                limits.admit(tenant, 100)
                limits.begin(tenant)
                limits.charge(tenant, 1_000_000)
            assert limits.num_running(tenant) == 100


def test_a_reload_takes_effect_at_once_and_starts_a_rate_anew_where_it_has_changed(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="requests_per_minute = 2\ntokens_per_minute = 10")
    assert keyed.num_admitted() == 2
    keyed.limits.charge("alice", 10_000)
    keyed.reload(alice="requests_per_minute = 2")
    refused = keyed.refusal()
    assert refused is not None, "what did not change goes on"
    assert "2 requests" in refused.message
    keyed.reload(alice="requests_per_minute = 5\ntokens_per_minute = 20")
    assert keyed.num_admitted() == 5
    keyed.reload(alice="requests_per_minute = 3\ntokens_per_minute = 20")
    assert keyed.num_admitted() == 3
    keyed.reload(alice="")
    assert keyed.num_admitted() == 1000


def test_answers_under_way_outlast_a_reload_even_one_that_takes_their_tenant(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="")
    keyed.limits.begin("alice")
    keyed.reload(bob="")
    assert keyed.limits.num_running("alice") == 1
    keyed.reload(alice="max_concurrent = 1")
    assert keyed.refusal() is not None
    keyed.reload(bob="")
    keyed.limits.end("alice")
    assert keyed.limits.num_running("alice") == 0


def test_nothing_is_kept_of_tenants_that_are_gone_and_have_nothing_under_way(tmp_path: Path) -> None:
    every = "requests_per_minute = 1\ntokens_per_minute = 10\nmax_concurrent = 1"
    keyed = Keyed(tmp_path, alice=every, bob=every)
    for tenant in ("alice", "bob"):
        assert keyed.num_admitted(tenant) == 1
        keyed.limits.charge(tenant, 20)
        keyed.limits.begin(tenant)
    keyed.reload(bob=every)
    keyed.limits.charge("alice", 20)
    for tenant in ("alice", "bob"):
        keyed.limits.end(tenant)
    limits = keyed.limits
    assert [set(held) for held in (limits._requests._states, limits._tokens._states, limits._running)] == [
        {"bob"},
        {"bob"},
        set(),
    ]
    assert keyed.num_admitted("bob") == 0


def test_what_is_kept_of_a_tenant_does_not_grow_with_what_it_uses_and_takes_no_thread(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, alice="requests_per_minute = 1000\ntokens_per_minute = 1000000")
    threads = threading.active_count()
    for _ in range(1000):
        keyed.limits.admit("alice", 1)
        keyed.limits.charge("alice", 999)
    for bucket in (keyed.limits._requests, keyed.limits._tokens):
        assert [len(state) for _, state in bucket._states.values()] == [1]
    assert threading.active_count() == threads
