import pytest
from regrad.correction import Control
from regrad_runner.files import write_whole
from regrad_runner.results.cells import Cell
from regrad_runner.results.folder import ResultsFolder, check_arms, check_folder, start_folder
from regrad_runner.results.outcomes import Result, Trial
from regrad_runner.results.points import Point
from regrad_runner.results.run import begin_run
from regrad_runner.results.tables import read_rows, write_rows
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import CompareConfig, TrainConfig

POINT = Point(step=4, epoch=0.25, loss=1.5, value=0.3, lr=0.05)


def result(arm="baseline", seed=0, **values):
    return Result(arm=arm, seed=seed, **{"value": 0.1 + 0.2, "touched": True, **values})


def test_rows_read_back_as_they_were_written(tmp_path):
    rows = [
        result(),
        result(
            "a,b\n", 1, status="failed", value=None, steps_to_target=3, must_beat="c", touched=False
        ),
    ]
    write_rows(tmp_path / "results.csv", rows, Result)
    assert read_rows(tmp_path / "results.csv", Result) == rows


def test_arm_and_seed_come_first(tmp_path):
    write_rows(tmp_path / "tuning.csv", [], Trial)
    assert (tmp_path / "tuning.csv").read_text() == "arm,seed,lr,validation\n"


@pytest.mark.parametrize("text", ["arm,seed\nnone,first\n", "arm,colour\nnone,red\n", "seed\n1\n"])
def test_a_file_of_other_rows_is_refused(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ValueError, match=r"results.csv' must hold the columns arm, seed, status"):
        read_rows(tmp_path / "results.csv", Result)


def test_a_folder_holds_every_run_that_ended(tmp_path, ended_run):
    ended_run(tmp_path, result(seed=0), [POINT])
    ended_run(tmp_path, result(seed=1), [POINT])
    folder = ResultsFolder(tmp_path)
    assert folder.results == [result(seed=0), result(seed=1)]
    assert [(p.arm, p.seed, p.step) for p in folder.curves] == [
        ("baseline", 0, 4),
        ("baseline", 1, 4),
    ]
    assert folder.is_finished("baseline", 1)
    assert not folder.is_finished("baseline", 2)


def test_the_rows_of_a_run_are_made_once_and_anew_when_it_ran_again(tmp_path, ended_run):
    ended_run(tmp_path, result(), [POINT])
    folder = ResultsFolder(tmp_path)
    first = folder.curves[0]
    assert folder.curves[0] is first
    ended_run(tmp_path, result(), [POINT, POINT])
    folder.take(Cell("baseline", 0))
    assert len(folder.curves) == 2


def test_a_run_is_taken_when_it_has_ended(tmp_path, ended_run):
    folder = ResultsFolder(tmp_path)
    with begin_run(tmp_path, {"name": "baseline", "arm": "baseline", "seed": 0, "lr": 0.1}):
        with pytest.raises(ValueError, match="must hold a run that ended, got one that has not"):
            folder.take(Cell("baseline", 0))
        assert ResultsFolder(tmp_path).results == []
    ended_run(tmp_path, result(), [POINT])
    assert folder.take(Cell("baseline", 0)) == result()
    assert len(folder.curves) == 1


def test_a_failed_run_is_not_finished_and_gives_way_to_its_repetition(tmp_path, ended_run):
    ended_run(tmp_path, result(seed=0, status="failed", value=None))
    assert not ResultsFolder(tmp_path).is_finished("baseline", 0)
    ended_run(tmp_path, result(seed=0), [POINT])
    assert [r.status for r in ResultsFolder(tmp_path).results] == ["finished"]


def test_a_run_that_diverged_is_not_repeated(tmp_path, ended_run):
    ended_run(tmp_path, result(seed=0, status="diverged", value=None))
    again = ResultsFolder(tmp_path)
    assert again.is_finished("baseline", 0)
    assert again.results[0].as_run_row().diverged


def test_the_curve_of_a_run_without_a_result_is_left_out(tmp_path, ended_run):
    ended_run(tmp_path, result(seed=0), [POINT])
    ended_run(tmp_path, result(seed=1, status="failed", value=None), [POINT])
    assert [p.seed for p in ResultsFolder(tmp_path).curves] == [0]


def test_runs_come_in_the_order_of_the_cells_whoever_came_first(tmp_path, ended_run):
    start_folder(tmp_path, CompareConfig(seeds=2), {"arms": {"baseline": {}, "agc": {}}})
    for arm, seed in (("agc", 1), ("baseline", 1), ("agc", 0), ("baseline", 0)):
        ended_run(tmp_path, result(arm, seed))
    folder = ResultsFolder(tmp_path)
    assert [(r.seed, r.arm) for r in folder.results] == [
        (0, "baseline"),
        (0, "agc"),
        (1, "baseline"),
        (1, "agc"),
    ]
    assert folder.missing == []


def test_a_folder_of_an_earlier_version_is_one_clear_line(tmp_path):
    (tmp_path / "about.json").write_text('{"kind": "comparison"}')
    with pytest.raises(
        ValueError,
        match=r"folder must be of layout 3, got .* of another version",
    ):
        ResultsFolder(tmp_path)


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.txt", "old")

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_new_or_empty_folder_may_be_written(tmp_path):
    check_folder(tmp_path / "new", CompareConfig(), resume=False)
    check_folder(tmp_path, CompareConfig(), resume=False)
    assert list(tmp_path.iterdir()) == []


def test_settings_whose_writing_a_kill_broke_off_bar_nobody_and_are_removed(tmp_path):
    left = tmp_path / ".config.yaml.0123456789abcdef.part"
    left.write_text("workload: di")
    check_folder(tmp_path, CompareConfig(), resume=False)
    assert left.is_file()
    start_folder(tmp_path, CompareConfig(), {"kind": "comparison"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "config.yaml"]


@pytest.mark.parametrize(
    "name", [".config.yaml.0123.part", ".notes.txt.0123456789abcdef.part", ".hidden"]
)
def test_another_hidden_file_is_somebody_elses(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="out must be a new or empty folder"):
        check_folder(tmp_path, CompareConfig(), resume=False)


def test_a_link_with_the_name_of_broken_off_settings_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").write_text("mine")
    (out / ".config.yaml.0123456789abcdef.part").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="out must be a new or empty folder"):
        check_folder(out, CompareConfig(), resume=False)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_or_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        check_folder(tmp_path / "notes.txt", CompareConfig(), resume=False)
    with pytest.raises(
        ValueError,
        match=r"out must be a new or empty folder, got .*, which holds 'notes\.txt'; choose",
    ):
        check_folder(tmp_path, CompareConfig(), resume=False)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out must be in a folder that can be written, got"):
        check_folder(tmp_path / "notes.txt" / "out", CompareConfig(), resume=False)


def test_only_the_same_configuration_continues_a_folder(tmp_path):
    start_folder(tmp_path, CompareConfig(seeds=3), {})
    with pytest.raises(
        ValueError, match=r"out must be a new or empty folder, got .*; --resume continues it"
    ):
        check_folder(tmp_path, CompareConfig(seeds=3), resume=False)
    check_folder(tmp_path, CompareConfig(seeds=3, tracker="none"), resume=True)
    with pytest.raises(
        ValueError, match="out must hold the same configuration, got seeds 3 there and 2 here"
    ):
        check_folder(tmp_path, CompareConfig(seeds=2), resume=True)


def test_a_folder_continues_with_more_and_what_was_there_comes_first(tmp_path):
    start_folder(tmp_path, CompareConfig(seeds=3, corrections=("xgrad", "agc")), {})
    more = CompareConfig(seeds=4, corrections=("gcw", "agc", "xgrad"))
    continued = check_folder(tmp_path, more, resume=True)
    assert (continued.seeds, continued.corrections) == (4, ("xgrad", "agc", "gcw"))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            {"corrections": ("xgrad", "gcw")},
            r"corrections \['xgrad', 'agc'\] there and \['xgrad', 'gcw'\] here",
        ),
        ({"seeds": 4, "epochs": 9}, "epochs None there and 9 here"),
        ({"seeds": 4, "controls": False}, "controls True there and False here"),
    ],
)
def test_a_folder_does_not_continue_with_less_or_with_something_else(tmp_path, change, difference):
    start_folder(tmp_path, CompareConfig(seeds=3, corrections=("xgrad", "agc")), {})
    config = CompareConfig(**{"seeds": 3, "corrections": ("xgrad", "agc"), **change})
    with pytest.raises(
        ValueError, match=f"out must hold the same configuration, got {difference}; choose another"
    ):
        check_folder(tmp_path, config, resume=True)


def test_a_run_is_never_continued_with_other_corrections(tmp_path):
    start_folder(tmp_path, TrainConfig(corrections=("xgrad",)), {})
    with pytest.raises(
        ValueError, match=r"got corrections \['xgrad'\] there and \['xgrad', 'agc'\] here"
    ):
        check_folder(tmp_path, TrainConfig(corrections=("xgrad", "agc")), resume=True)


def test_an_arm_that_would_mean_something_else_is_refused(tmp_path):
    clipping = Arm("clip-norm", control=Control(name="clip-norm", corrections=("clip-norm",)))
    start_folder(tmp_path, CompareConfig(), {"arms": {"clip-norm": clipping.recipe}})
    check_arms(
        tmp_path,
        [Arm("clip-norm", corrections=("clip-norm",)), Arm("xgrad", corrections=("xgrad",))],
    )
    with pytest.raises(
        ValueError,
        match=r"out must hold the same arms, got another 'clip-norm' in .*; choose another",
    ):
        check_arms(tmp_path, [Arm("clip-norm", corrections=("clip-norm:max_norm=2",))])
    with pytest.raises(ValueError, match="out must hold the same arms, got another 'clip-norm'"):
        check_arms(tmp_path, [Arm("clip-norm", control=Control(name="clip-norm", head_lr=0.5))])


def test_runs_say_what_their_arms_are_after_corrections_were_added(tmp_path, ended_run):
    ended_run(tmp_path, result("clip-norm", control=True))
    roles = {"clip-norm": {"must_beat": "smaller-rate", "control": False}}
    start_folder(tmp_path, CompareConfig(), {"roles": roles})
    (row,) = ResultsFolder(tmp_path).results
    assert (row.control, row.must_beat, row.value) == (False, "smaller-rate", 0.1 + 0.2)


def test_there_must_be_something_to_continue(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"out must be the folder of an earlier run to resume it, got .* without config",
    ):
        check_folder(tmp_path, CompareConfig(), resume=True)
