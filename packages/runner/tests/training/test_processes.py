import math
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import regrad
import torch
from regrad_runner.checkpoints.folder import checkpoints
from regrad_runner.cli.main import main
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.points import steps_to_target
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training.processes import check_task, make_accelerator
from regrad_runner.workloads.workload import Measure

SHAPE = [
    "--train-size",
    "100",
    "--batch-size",
    "20",
    "--width",
    "4",
    "--norm",
    "group",
    "--threads",
    "1",
]
INSTALLED = [name for name in ("xgrad", "powergrad") if name in regrad.available()]
WORDS = ["train", *SHAPE, "--epochs", "3", *(["--corrections", *INSTALLED] if INSTALLED else [])]
SECONDS = 600  # of which a quiet machine needs 20
EASY = Measure(name="test accuracy", target=0.15)

pytestmark = pytest.mark.timeout(700)


def test_half_precision_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="mixed_precision must be 'no' or 'bf16' without an accelerator device"
    ):
        make_accelerator(TrainConfig(mixed_precision="fp16"))


def test_another_number_of_processes_than_asked_is_refused_with_how_to_launch():
    launch = r"torchrun --nproc-per-node 2 -m regrad_runner …, or on each of M nodes .* --nnodes M"
    with pytest.raises(
        ValueError, match=f"processes must be 2 as asked, got 1; launch with: {launch}"
    ):
        make_accelerator(TrainConfig(processes=2))


def test_a_launcher_that_started_one_process_of_several_is_found_out(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(
        ValueError,
        match="processes must be several as asked of accelerate launch, got 1; launch with",
    ):
        make_accelerator(TrainConfig())


def test_tasks_of_srun_that_know_nothing_of_each_other_are_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_task()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(
        ValueError, match=r"srun must start one launcher per node, got 8 tasks, .*; use srun"
    ):
        check_task()
    monkeypatch.setenv("WORLD_SIZE", "8")
    check_task()


def test_restarts_on_several_nodes_need_a_store_of_their_own(monkeypatch):
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in {**shared, "GROUP_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError,
        match=r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE must be 1 .* got --max-restarts 3 without it",
    ):
        make_accelerator(TrainConfig())


def test_sharding_where_accelerate_would_train_unsharded_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(
        ValueError, match="use_fsdp must be asked for on accelerator devices, got 'cpu', where"
    ):
        make_accelerator(TrainConfig())


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what a launcher has left in it, for CPUs.

    Where there are no other devices nothing is set, as a user would not.
    """
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ACCELERATE_", "MASTER_", "SLURM_"))
    }
    cpus = {"ACCELERATE_USE_CPU": "true"} if torch.accelerator.is_available() else {}
    return {**clean, **cpus, "OMP_NUM_THREADS": "1", **more}


def launched(command: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("one") / "out"
    assert main([*WORDS, "--tracker", "none", "--out", str(folder)]) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoints(folder / "checkpoints")[-1] / "tensors.pt", weights_only=True)[
        "model"
    ]


def check_same(several: Path, one: Path) -> None:
    """Assert that a run on several processes is the run of one, and was tracked once."""
    ours, theirs = weights(several), weights(one)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-6
    there, here = ResultsFolder(one), ResultsFolder(several)
    assert [point.value for point in here.curves] == [point.value for point in there.curves]
    assert [result.value for result in here.results] == [result.value for result in there.results]
    assert steps_to_target(here.curves, EASY) == steps_to_target(there.curves, EASY) is not None
    main(["sync", str(several)])  # what a busy machine did not deliver in time
    with closing(sqlite3.connect(several / "mlflow.db")) as database:
        assert database.execute("select name, status from runs").fetchall() == [("out", "FINISHED")]
        seen = "select count(*) from metrics where key = 'validation accuracy'"
        assert database.execute(seen).fetchone() == (len(there.curves),)


CLUSTER = Path(__file__).parents[4] / "docs" / "cluster"


def sent(script: str, folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script as SLURM would in the batch step of a job."""
    return subprocess.run(
        ["bash", str(CLUSTER / script), "out", *words],
        cwd=folder,
        env=environment(SLURM_JOB_ID="71", SLURM_CPUS_PER_TASK="1", **more),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.long
def test_the_script_of_one_node_ends_in_the_weights_of_one_process_and_in_one_tracked_run(
    tmp_path, one, path_with
):
    path = path_with(tmp_path, srun='exec "$@"')
    done = sent("single_node.sh", tmp_path, *WORDS[1:], SLURM_GPUS_ON_NODE="2", PATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation accuracy") == 1
    check_same(tmp_path / "out", one)


@pytest.mark.slow
def test_accelerate_launch_ends_in_the_weights_of_one_process_and_in_one_tracked_run(tmp_path, one):
    launch = [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines",
        "1",
        "--num_processes",
        "2",
    ]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "regrad_runner"]
    done = launched([*launch, *plain, *WORDS, "--processes", "2", "--out", "out"], tmp_path)
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "out", one)


NETWORK = {"regrad-a": "10.77.0.1", "regrad-b": "10.77.0.2"}
NODES = """
for node in regrad-a regrad-b; do
    ip netns exec $node unshare --uts sh -c 'hostname "$0" && exec "$@"' $node "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task"; done
"""


def ip(*words: str) -> bool:
    """Change the network, and say whether that was allowed."""
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


def join_two_nodes() -> bool:
    """Make two network namespaces with a wire between them, and say whether this machine allows that."""
    one, two = NETWORK
    made = ip("netns", "add", one) and ip("netns", "add", two)
    made = made and ip(
        "link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", two
    )
    for node, address in NETWORK.items():
        made = made and ip("-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
        made = (
            made
            and ip("-n", node, "link", "set", "eth0", "up")
            and ip("-n", node, "link", "set", "lo", "up")
        )
    return made and ip("netns", "exec", one, "unshare", "--uts", "hostname", one)


@pytest.fixture
def two_nodes():
    """Two network namespaces, each with a host name of its own that leads to its address; gone afterwards."""
    reason = "two nodes on one machine need Linux, root, iproute2 and unshare"
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or not (shutil.which("ip") and shutil.which("unshare"))
    ):
        pytest.skip(reason)
    hosts = "127.0.0.1 localhost\n" + "".join(
        f"{address} {node}\n" for node, address in NETWORK.items()
    )
    places = [Path("/etc/netns") / node for node in NETWORK]
    try:
        if not join_two_nodes():
            pytest.skip(f"{reason}, and this machine does not allow network namespaces")
        for place in places:
            place.mkdir(parents=True)
            (place / "hosts").write_text(hosts)
        yield
    finally:
        for node, place in zip(NETWORK, places, strict=True):
            ip("netns", "del", node)
            shutil.rmtree(place, ignore_errors=True)


@pytest.mark.long
@pytest.mark.usefixtures("two_nodes")
def test_two_nodes_end_in_the_weights_of_one_process_and_in_one_tracked_run(
    tmp_path, one, path_with
):
    path = path_with(tmp_path, srun=NODES, scontrol="printf 'regrad-a\\nregrad-b\\n'")
    size = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "regrad-[a-b]"}
    done = sent("multi_node.sh", tmp_path, *WORDS[1:], **size, GLOO_SOCKET_IFNAME="eth0", PATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation accuracy") == 1
    check_same(tmp_path / "out", one)


@pytest.mark.slow
def test_the_script_for_shards_asks_for_them_and_is_refused_without_devices(tmp_path, path_with):
    path = path_with(tmp_path, srun='exec "$@"')
    done = sent("fsdp2.sh", tmp_path, *WORDS[1:], SLURM_GPUS_ON_NODE="2", PATH=path)
    assert done.returncode != 0
    # Once in each of the launcher's lives: it starts processes that failed three times again.
    assert (
        done.stderr.count("regrad: use_fsdp must be asked for on accelerator devices, got 'cpu'")
        == 4
    )
    assert not (tmp_path / "out").exists()


SBATCH = """
printf '%s\\n' "$*" >>jobs
for word in "$@"; do
    case $word in
        --array=*) numbers=${word#--array=} ;;
        --wrap=*) job=${word#--wrap=} ;;
    esac
done
if [[ -z ${numbers:-} ]]; then
    bash -c "$job" >report
    exit
fi
for part in $(tr , ' ' <<<"${numbers%\\%*}"); do
    for number in $(seq "${part%-*}" "${part#*-}"); do
        if [[ $number != "${LOST:-}" ]]; then
            SLURM_ARRAY_TASK_ID=$number bash -c "$job" >&2 || echo "cell $number failed" >&2
        fi
    done
done
echo "$(wc -l <jobs);cluster"
"""


def arrays_in(folder: Path) -> list[str]:
    """The numbers in the array of each job that was sent."""
    jobs = (folder / "jobs").read_text().splitlines()
    return [job.partition("--array=")[2].partition(" ")[0] for job in jobs]


@pytest.mark.slow
def test_the_script_of_a_job_array_runs_every_cell_and_sends_only_what_is_missing(
    tmp_path, path_with
):
    (tmp_path / "few.yaml").write_text(
        "corrections: []\nlr: [0.02, 0.1]\ntuning_seeds: 1\ntuning_extensions: 1\nseeds: 2\n"
    )
    path = path_with(tmp_path, sbatch=SBATCH)
    words = ["job_array.sh", tmp_path, *SHAPE, "--epochs", "1", "--config", "few.yaml"]
    done = sent(*words, PATH=path, LOST="3")  # the node of one run fails
    assert done.returncode == 0, done.stderr
    assert arrays_in(tmp_path) == ["0-1%8", "2%8", "3-4%8", ""]
    assert "1 of 5 cells are missing: 3" in (tmp_path / "report").read_text()
    (tmp_path / "jobs").unlink()
    done = sent(*words, PATH=path)
    assert done.returncode == 0, done.stderr
    assert arrays_in(tmp_path) == ["3%8", ""]
    assert "missing" not in (tmp_path / "report").read_text()
    assert len(ResultsFolder(tmp_path / "out").results) == 2
    with closing(sqlite3.connect(tmp_path / "out" / "mlflow.db")) as database:
        assert database.execute("select distinct status from runs").fetchall() == [("FINISHED",)]
        assert database.execute(
            "select count(*) from tags where key = 'mlflow.parentRunId'"
        ).fetchone() == (5,)
    (tmp_path / "jobs").unlink()
    assert sent(*words, PATH=path).returncode == 0
    assert arrays_in(tmp_path) == [""]  # the report alone


CELLS = """
if [[ $* == *--cells* ]]; then
    printf 'trials 0-2,5\\nextensions-1 6\\nruns 9-12\\nout out\\n'
fi
"""


def test_the_script_of_a_job_array_limits_the_jobs_and_lets_no_failure_hold_up_the_others(
    tmp_path, path_with
):
    path = path_with(tmp_path, sbatch=SBATCH, regrad=CELLS)
    done = sent("job_array.sh", tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    jobs = (tmp_path / "jobs").read_text().splitlines()
    assert arrays_in(tmp_path) == ["0-2,5%8", "6%8", "9-12%8", ""]
    assert "--dependency" not in jobs[0]
    for number, job in enumerate(jobs[1:], 1):
        assert f"--dependency=afterany:{number} " in job
    assert all("--requeue --open-mode=append" in job for job in jobs[:-1])
    assert all("--output=out/jobs/" in job for job in jobs)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say_of_the_scripts(script):
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


@pytest.mark.slow
def test_a_rate_that_diverges_on_two_processes_is_a_trial_that_lost_and_ends_nothing(tmp_path):
    (tmp_path / "few.yaml").write_text(
        "corrections: []\nlr: [0.05, 1.0e+30]\ntuning_seeds: 1\ntuning_extensions: 0\nseeds: 1\n"
    )
    words = ["-m", "regrad_runner", "compare", *SHAPE, "--epochs", "4", "--config", "few.yaml"]
    done = launched(
        [
            *["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
            *[*words, "--tracker", "none", "--out", "out"],
        ],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    folder = ResultsFolder(tmp_path / "out")
    assert [math.isfinite(trial.validation) for trial in folder.trials] == [True, False]
    assert [(result.lr, result.status) for result in folder.results] == [(0.05, "finished")]


@pytest.mark.long
def test_accelerate_launch_that_starts_one_process_of_two_fails(tmp_path):
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = launched(
        [*launch, *plain, "-m", "regrad_runner", "compare", "--seeds", "1", "--tracker", "none"],
        tmp_path,
    )
    assert done.returncode != 0
    assert "processes must be several as asked of accelerate launch, got 1" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_another_number_than_asked_is_said_once_and_nothing_is_written(tmp_path):
    words = ["-m", "regrad_runner", *WORDS, "--processes", "3", "--out", "out"]
    done = launched(
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words], tmp_path
    )
    assert done.returncode != 0
    said = "regrad: processes must be 3 as asked, got 2; launch with: torchrun --nproc-per-node 3"
    assert done.stderr.count(said) == 1
    assert list(tmp_path.iterdir()) == []
