"""The protocol holds in every interleaving of hosts, streams and deaths; broken ones do not."""

import pytest

from tests.ring.model import MUTANTS, Search, Violation


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_protocol_keeps_its_promises_in_every_reachable_state(num_slots):
    assert Search(num_slots, total=num_slots + 2).run() > 1000


@pytest.mark.parametrize("mutant", MUTANTS)
def test_search_catches_the_mutant(mutant):
    with pytest.raises(Violation):
        Search(2, total=4, mutant=mutant).run()
