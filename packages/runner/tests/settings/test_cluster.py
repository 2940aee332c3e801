import re

import pytest
from regrad_runner.settings.cluster import cluster_of, minutes_of


def test_runs_take_place_here_unless_something_else_is_said():
    assert cluster_of(None, None) is None
    assert cluster_of("here", None) is None
    local = cluster_of("local", None)
    assert (local.place, local.requests, local.words) == ("local", {}, "--on local")


def test_what_slurm_is_asked_for_is_read_with_commas_inside_values():
    text = "partition=gpu,nodelist=n1,n2,cpus-per-task=8,gres=gpu:a100:1,array_parallelism=8"
    cluster = cluster_of("slurm", text)
    assert cluster.requests == {
        "partition": "gpu",
        "nodelist": "n1,n2",
        "cpus_per_task": "8",
        "gres": "gpu:a100:1",
        "array_parallelism": "8",
    }
    assert cluster.array_parallelism == 8
    assert cluster.minutes == 240
    assert cluster.words == f"--on slurm --slurm {text}"
    assert cluster_of("slurm", "comment=two words").words.endswith("'comment=two words'")
    assert cluster_of("slurm", None).requests == {}


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("1", 1),
        ("90:01", 91),
        ("4:00:00", 240),
        ("2-0", 2880),
        ("1-02:03", 1563),
        ("1-02:03:04", 1564),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text, minutes):
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["0", "0:00:00", "4h", "-3", "1:2:3:4", "", "∞"])
def test_a_time_limit_that_sbatch_does_not_take_is_refused(text):
    with pytest.raises(ValueError, match="--slurm time must be a time limit of more than nothing"):
        minutes_of(text)


@pytest.mark.parametrize(
    ("place", "slurm", "message"),
    [
        ("cloud", None, "on must be one of here, local, slurm, got 'cloud'"),
        ("local", "time=5", "slurm must be given with --on slurm, got --on local"),
        (None, "time=5", "slurm must be given with --on slurm, got --on here"),
        ("slurm", "gpu", "slurm must be NAME=VALUE pairs with commas between, got 'gpu'"),
        ("slurm", "partion=gpu", "no --slurm setting named 'partion'; did you mean 'partition'?"),
        ("slurm", "array=0-3", "no --slurm setting named 'array'"),
        ("slurm", "ntasks=4", "no --slurm setting named 'ntasks'"),
        ("slurm", "partition=", "--slurm partition must not be empty, got ''"),
        ("slurm", "time=4h", "--slurm time must be a time limit"),
        ("slurm", "array_parallelism=0", "array_parallelism must be a whole number from 1"),
        ("slurm", "cpus_per_task=many", "cpus_per_task must be a whole number from 1, got 'many'"),
        ("slurm", "time=5,time=6", "slurm must name time once"),
        ("slurm", "comment=a\nb", "slurm must be at most 1000 printable characters"),
    ],
)
def test_what_slurm_does_not_take_is_refused(place, slurm, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cluster_of(place, slurm)
