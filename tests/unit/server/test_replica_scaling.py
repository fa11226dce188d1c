"""How many replicas there should be."""

import pytest

from headrace.server.replica_scaling import ReplicaPressure, desired_replicas

IDLE = ReplicaPressure(0, 0)


@pytest.mark.parametrize(
    ("num_replicas", "pressures", "expected"),
    [
        pytest.param(2, [], 2, id="nobody has told"),
        pytest.param(2, [ReplicaPressure(0.6, 0)] * 2, 2, id="as aimed for"),
        pytest.param(2, [ReplicaPressure(0.65, 0)] * 2, 2, id="within the tolerance"),
        pytest.param(2, [ReplicaPressure(1.2, 0)] * 2, 4, id="the batch is full and others wait"),
        pytest.param(2, [ReplicaPressure(0.1, 1.2)] * 2, 4, id="first tokens are predicted late"),
        pytest.param(2, [ReplicaPressure(1.2, 0), IDLE], 2, id="one is full and one is idle"),
        pytest.param(3, [ReplicaPressure(0.3, 0.1)] * 3, 2, id="half of what is aimed for, rounded up"),
        pytest.param(4, [IDLE] * 4, 0, id="idle: the fewest, which are not decided here"),
        pytest.param(4, [ReplicaPressure(1.2, 0)] * 2, 8, id="those that have not told are as the others"),
    ],
)
def test_replicas_are_added_or_taken_until_their_mean_pressure_is_as_aimed_for(
    num_replicas: int, pressures: list[ReplicaPressure], expected: int
) -> None:
    assert desired_replicas(num_replicas, pressures) == expected


def test_the_number_that_comes_of_a_load_is_kept_under_it() -> None:
    num_replicas, load = 1, 5.0
    for _ in range(10):
        pressures = [ReplicaPressure(load / num_replicas, 0)] * num_replicas
        num_replicas = desired_replicas(num_replicas, pressures)
    assert num_replicas == 9
