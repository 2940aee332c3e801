"""The examples, by the command of their docstrings, and without the lines that attach, by `regrad run`."""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "examples"
SECONDS = 600  # of which a quiet machine needs 10

pytestmark = pytest.mark.timeout(1300)


@dataclass(frozen=True)
class Example:
    """What of an example attaches, and where its weights are.

    Attributes:
        corrections: What it attaches.
        needs: What it imports that may be missing here.
        without: Its texts, and what stands in their place where nothing is attached.
        end: The line that reports what regrad did: from here on the weights are saved instead.
        trained: An expression for what is saved.
        launcher: Words behind `python`, where it is started on several processes.
        words: On its command line.
        says: What `regrad run` tells at the end; empty where the example ends by `os._exit`.
    """

    corrections: tuple[str, ...]
    without: dict[str, str]
    end: str
    trained: str
    needs: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    says: tuple[str, ...] = ()


EXAMPLES = {
    "plain": Example(
        corrections=("xgrad", "powergrad", "agc"),
        without={
            "import regrad\n": "",
            "attachment = regrad.attach("
            'model, optimizer, ["xgrad", "powergrad", "agc"], criterion)\n': "",
            "attachment.criterion(": "criterion(",
        },
        end="print(attachment)\n",
        trained="model.state_dict()",
        says=("on AdamW with Sequential: 32 steps corrected",),
    ),
    "accelerate_loop": Example(
        corrections=("xgrad", "agc"),
        needs=("accelerate",),
        without={
            "import regrad\n": "",
            'attachment = regrad.attach(model, optimizer, ["xgrad", "agc"])\n': "",
        },
        end="accelerator.print(attachment)\n",
        trained="accelerator.unwrap_model(model).state_dict()",
        says=("on AdamW with Sequential: 16 steps corrected",),
    ),
    "compiled": Example(
        corrections=("xgrad", "agc:max_ratio=0.02,head=2"),
        without={
            "import regrad\n": "",
            "tuple[nn.Module, regrad.Attachment]": "tuple[nn.Module, None]",
            "    attachment = regrad.attach(model, optimizer, CORRECTIONS)\n": "",
            "    attachment.detach()\n": "",
            "return network, attachment\n": "return network, None\n",
        },
        end="    numbers = attachment.metrics()\n",
        trained="[plain.state_dict(), compiled.state_dict()]",
        words=("--backend", "aot_eager"),
        says=("on SGD with Sequential: 10 steps corrected",),
    ),
    "fsdp2": Example(
        corrections=("xgrad", "agc:max_ratio=0.02"),
        without={
            "import regrad\n": "",
            "tuple[list[torch.Tensor], regrad.Attachment]": "tuple[list[torch.Tensor], None]",
            "    attachment = regrad.attach(model, optimizer, CORRECTIONS)\n": "",
            "    attachment.detach()\n": "",
            "], attachment\n": "], None\n",
        },
        end="        numbers = attachment.metrics()\n",
        trained="[weights, expected]",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    ),
    "hf_trainer": Example(
        corrections=("xgrad", "powergrad", "agc"),
        needs=("transformers", "accelerate"),
        without={
            "from regrad_transformers import RegradCallback\n": "",
            '    callback = RegradCallback(["xgrad", "powergrad", "agc"])\n': "",
            ", callbacks=[callback]": "",
        },
        end="print(callback.attachment)\n",
        trained="model.state_dict()",
        says=("on AdamW with LlamaForCausalLM: 24 steps corrected",),
    ),
    "lightning_trainer": Example(
        corrections=("xgrad", "powergrad:alpha=0.5"),
        needs=("lightning",),
        without={
            "from regrad_lightning import RegradCallback\n": "",
            "callback: RegradCallback": "callback: None",
            "callbacks=[callback], ": "",
            '        callback = RegradCallback(CORRECTIONS, criterion="criterion")\n': "",
            "make_trainer(callback, ": "make_trainer(None, ",
            'RegradCallback(CORRECTIONS, criterion="criterion")': "None",
        },
        end="    numbers = callback.attachment.metrics()\n",
        trained="[whole.state_dict(), resumed.state_dict()]",
        says=("on SGD with Sequential: 48 steps corrected",),
    ),
}


MODULES = {"python": (), "torchrun": ("-m", "torch.distributed.run", "--standalone")}


def command_of(path: Path) -> list[str]:
    """Return the words of the one indented line in an example's docstring, for this interpreter."""
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    (command,) = [line.strip() for line in lines if line.startswith("    ")]
    program, *words = shlex.split(command)
    assert str(path.relative_to(ROOT)) in words
    return [*MODULES[program], *words]


def train(command, file, place, folder):
    """Run a script; return what it trained, and what it said on stdout and on stderr.

    Args:
        command: Words behind `python`.
        file: Where the script saves.
        place: The working directory.
        folder: For what is written to a home or a temporary folder; nothing is fetched.
    """
    ours = ("ACCELERATE_", "MASTER_", "SLURM_", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=place,
        env={**clean, **settings, "TMPDIR": str(folder), "TRAINED": str(file)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(file), done.stdout, done.stderr


def saving(text, example, *, reports):
    """Return an example's text that saves what it trained, before it reports or in place of that."""
    assert text.count(example.end) == 1
    before, after = text.split(example.end)
    lead = example.end[: len(example.end) - len(example.end.lstrip())]
    saved = f"torch.save({example.trained}, __import__('os').environ['TRAINED'])\n"
    if reports:
        return f"{before}{lead}{saved}{example.end}{after}"
    start = 'if __name__ == "__main__":\n    main()\n'
    return f"{before}{lead}{saved}" + (start if start in text else "")


def unattached(text, example):
    """Return an example's text without what attaches."""
    for old, new in example.without.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def same(found, wanted):
    """Say whether two nests of tensors are alike, bit for bit."""
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(
            same(found[key], wanted[key]) for key in wanted
        )
    return len(found) == len(wanted) and all(map(same, found, wanted))


def names_regrad(text):
    """Say whether code, docstrings aside, has the word regrad anywhere."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Pass()
    return "regrad" in ast.unparse(tree).lower()


def test_every_example_that_trains_is_here():
    by_hand = {path.stem for path in FOLDER.glob("*.py")} - {"own_script"}  # it never attaches
    assert set(EXAMPLES) == by_hand


def check_report(said):
    """Check what an example says of what regrad did."""
    assert "regrad attachment: " in said
    assert int(re.search(r"^steps(?:_applied)?: (\d+)", said, flags=re.MULTILINE)[1]) > 0
    changes = re.findall(r"relative_change: (\S+)$", said, flags=re.MULTILINE)
    assert all(float(change) > 0 for change in changes), said  # of every correction, where shown


LONG = [
    pytest.param(name, marks=pytest.mark.long) if name != "plain" else name for name in EXAMPLES
]


@pytest.mark.parametrize("name", LONG)
def test_an_example_runs_by_its_own_command_and_without_its_attach_under_run(name, tmp_path):
    example = EXAMPLES[name]
    for library in example.needs:
        pytest.importorskip(library)
    path = FOLDER / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    by_hand, script = tmp_path / "by_hand.py", tmp_path / "script.py"
    by_hand.write_text(saving(text, example, reports=True))
    script.write_text(unattached(saving(text, example, reports=False), example))
    assert not names_regrad(script.read_text())

    before = {one for one in ROOT.iterdir() if one.name != "__pycache__"}
    command = [by_hand if word.endswith(path.name) else word for word in command_of(path)]
    wanted, report, _ = train(command, tmp_path / "wanted", ROOT, tmp_path)
    check_report(report)
    assert {one for one in ROOT.iterdir() if one.name != "__pycache__"} == before

    command = [*example.launcher, script, *example.words]
    plain, _, _ = train(command, tmp_path / "plain", tmp_path, tmp_path)
    runner = shlex.split("-m regrad_runner run --corrections")
    # The launcher takes a module as it takes a script.
    command = [*example.launcher, *runner, *example.corrections, "--", script, *example.words]
    found, _, said = train(command, tmp_path / "found", tmp_path, tmp_path)
    assert same(found, wanted)
    assert not same(plain, wanted)
    assert all(words in said for words in example.says), said
