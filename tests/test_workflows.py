"""Workflows, ours and those of a new plugin: pinned actions, no permission without need."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SKELETON = ROOT / "packages/runner/src/regrad_runner/plugins/skeleton/shared/.github/workflows"
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.glob(".github/workflows/*.yml"))
}
for path in sorted(SKELETON.glob("*.yml.txt")):
    TEXTS[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8").replace("$$", "$")
PINNED = re.compile(r"uses: ([\w-]+/[\w-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)")


@pytest.fixture(params=TEXTS)
def workflow(request):
    return yaml.safe_load(TEXTS[request.param])


def jobs_of(workflow):
    return workflow["jobs"].items()


def test_there_are_ours_and_those_of_a_new_plugin():
    names = [Path(name).name for name in TEXTS]
    assert names == ["ci.yml", "release.yml", "ci.yml.txt", "publish.yml.txt"]


def test_every_action_is_pinned_by_a_commit_with_its_version_beside_it():
    pins = {}
    for name, text in TEXTS.items():
        uses = [line.strip().removeprefix("- ") for line in text.splitlines() if "uses:" in line]
        assert uses, name
        for line in uses:
            found = PINNED.fullmatch(line)
            assert found, f"{name}: {line}"
            action, commit, version = found.groups()
            assert pins.setdefault(action, (commit, version)) == (commit, version), name


def test_nothing_is_permitted_but_what_a_job_names(workflow):
    assert workflow["permissions"] == {}
    for name, job in jobs_of(workflow):
        assert job["permissions"], name
        writes = {key for key, value in job["permissions"].items() if value != "read"}
        assert writes <= {"id-token", "attestations"}, name


def test_a_job_that_holds_an_identity_runs_no_code_of_the_repository(workflow):
    for name, job in jobs_of(workflow):
        if "id-token" not in job["permissions"]:
            continue
        uses = [step.get("uses", "") for step in job["steps"]]
        assert not [action for action in uses if "checkout" in action or "setup-" in action], name
        assert "contents" not in job["permissions"], name


def test_only_an_environment_may_publish(workflow):
    for name, job in jobs_of(workflow):
        publishes = any("pypi-publish" in step.get("uses", "") for step in job["steps"])
        assert publishes == ("environment" in job), name


def test_a_checkout_leaves_no_password_behind_and_no_script_is_made_of_values(workflow):
    for name, job in jobs_of(workflow):
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False, name
            assert "${{" not in step.get("run", ""), name


def test_what_publishes_reads_no_cache():
    publishing = [yaml.safe_load(text) for text in TEXTS.values() if "pypi-publish@" in text]
    assert len(publishing) == 2
    for workflow in publishing:
        for name, job in jobs_of(workflow):
            for step in job["steps"]:
                if "setup-uv" in step.get("uses", ""):
                    assert step["with"]["enable-cache"] is False, name


def test_the_release_builds_with_what_is_pinned_by_hash():
    release = yaml.safe_load(TEXTS[".github/workflows/release.yml"])
    commands = " ".join(step.get("run", "") for step in release["jobs"]["build"]["steps"])
    assert "--build-constraints release/build-requirements.txt --require-hashes" in commands
    lines = (ROOT / "release" / "build-requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith((" ", "#"))]
    assert [line for line in pins if not re.fullmatch(r"[\w-]+==[\w.]+ \\", line)] == []
    assert "hatchling" in {line.partition("==")[0] for line in pins}
    hashes = [line for line in lines if line.strip().startswith("--hash=sha256:")]
    assert len(hashes) >= len(pins)
