import json
from importlib.metadata import version

from regrad_runner.results.machine import machine, surroundings


def test_a_machine_is_told_with_its_versions_and_without_its_name():
    here = machine()
    assert here["versions"]["torch"] == version("torch")
    assert here["cores"] >= 1
    assert here["processor"]
    assert here["memory_gib"] > 0
    assert set(here) == {
        "system",
        "processor",
        "cores",
        "memory_gib",
        "devices",
        "python",
        "versions",
    }
    assert json.loads(json.dumps(here)) == here


def test_going_on_at_the_same_place_adds_nothing_and_at_another_one_an_entry():
    first = surroundings(processes=2, earlier={})
    assert first["processes"] == 2
    assert len(first["machines"]) == 1
    assert surroundings(processes=1, earlier=first) == {**first, "processes": 1}
    elsewhere = {"machines": [{**first["machines"][0], "processor": "another"}]}
    assert [m["processor"] for m in surroundings(processes=1, earlier=elsewhere)["machines"]] == [
        "another",
        machine()["processor"],
    ]
