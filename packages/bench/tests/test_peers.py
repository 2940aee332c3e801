"""What the documentation says of peers is what they do here; a repaired peer fails a test, and the page is mended."""

import pytest
from regrad_bench.peers import TRIALS, findings

FOUND = {(f.peer.partition(" ")[0], f.what): f for f in findings()}


def test_every_trial_is_reported_with_the_version_that_was_run():
    assert len(FOUND) == len(TRIALS)
    assert all(f.peer.partition(" ")[2][:1].isdigit() for f in FOUND.values())


@pytest.mark.parametrize("key", FOUND)
def test_ours_is_the_rule_on_every_layer(key):
    assert FOUND[key].our_error < 1e-14


@pytest.mark.parametrize("key", FOUND)
def test_a_peer_is_wrong_where_the_page_says_so_and_right_elsewhere(key):
    if FOUND[key].why == "right":
        assert FOUND[key].peer_error < 1e-14
    else:
        assert FOUND[key].peer_error > 0.1
