"""The worst inputs are requests that a server can read to their end, whatever it then makes of them."""

import h11
import pytest

from headrace.benchmarks.worst_inputs import WorstInput, worst_inputs

INPUTS = list(worst_inputs("model"))


@pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.name)
def test_a_worst_input_is_one_whole_request(case: WorstInput) -> None:
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
    reader.receive_data(case.request("127.0.0.1:1"))
    request = reader.next_event()
    assert isinstance(request, h11.Request)
    assert request.target == case.path.encode()
    body = b""
    while isinstance(event := reader.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert body == case.body
    assert reader.trailing_data == (b"", False)


def test_their_names_differ() -> None:
    assert len({case.name for case in INPUTS}) == len(INPUTS) >= 25
