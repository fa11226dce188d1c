"""Tickets on a clock of the test's own."""

import pytest

from headrace.server import tickets
from headrace.server.errors import InvalidTicketError
from headrace.server.tickets import TICKET_TTL_S, Tickets


class Clocked(Tickets):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(lambda: self.now)

    def holds(self, ticket: str) -> bool:
        """Whether it is still there, without showing it."""
        return any(ticket in of_tenant for of_tenant in self._tickets.values())


def test_a_ticket_belongs_to_who_asked_for_it_and_is_not_to_be_guessed() -> None:
    store = Clocked()
    issued = {store.issue(tenant): tenant for tenant in ("alice", "bob", "alice", "")}
    assert len(issued) == 4
    for ticket, tenant in issued.items():
        assert store.show(ticket).tenant == tenant
        assert len(ticket) >= 43
    for wrong in ("", "x", *(ticket[:-1] for ticket in issued), *(f"{ticket} " for ticket in issued)):
        with pytest.raises(InvalidTicketError):
            store.show(wrong)


def test_a_ticket_expires_some_time_after_it_was_last_shown() -> None:
    store = Clocked()
    ticket = store.issue("alice")
    store.show(ticket).stream_id = "its stream"
    for _ in range(3):
        assert store.show(ticket).stream_id is not None
        store.now += TICKET_TTL_S - 1
    store.now += 1
    with pytest.raises(InvalidTicketError):
        store.show(ticket)


def test_a_ticket_that_starts_nothing_expires_however_often_it_is_shown() -> None:
    store = Clocked()
    ticket = store.issue("alice")
    store.now += TICKET_TTL_S - 1
    store.show(ticket)
    store.now += 1
    with pytest.raises(InvalidTicketError):
        store.show(ticket)


def test_a_ticket_outlasts_the_longest_wait_that_an_overloaded_server_asks_for() -> None:
    assert TICKET_TTL_S > 120 * 2


def test_a_tenants_tickets_are_bounded_and_cost_no_other_tenant_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "_MAX_TICKETS", 3)
    store = Clocked()
    others = store.issue("bob")
    first, second, third = (store.issue("alice") for _ in range(3))
    store.show(first).stream_id = "its stream"
    store.show(first)
    fourth = store.issue("alice")
    assert [store.holds(ticket) for ticket in (others, first, second, third, fourth)] == [True, True, False, True, True]


def test_expired_tickets_are_let_go() -> None:
    store = Clocked()
    old = [store.issue("alice") for _ in range(10)]
    store.now += TICKET_TTL_S
    store.issue("alice")
    assert not any(store.holds(ticket) for ticket in old)


def test_tickets_of_tenants_that_are_gone_are_worth_nothing() -> None:
    store = Clocked()
    gone, kept = store.issue("alice"), store.issue("bob")
    store.keep_only(frozenset({"bob", "carol"}))
    assert store.show(kept).tenant == "bob"
    with pytest.raises(InvalidTicketError):
        store.show(gone)


def test_a_ticket_names_the_replica_that_issued_it() -> None:
    store = Tickets(lambda: 0.0, "alpha")
    ticket = store.issue("alice")
    assert ticket.startswith("alpha.")
    assert store.show(ticket).tenant == "alice"
    with pytest.raises(InvalidTicketError):
        store.show(ticket.removeprefix("alpha."))
