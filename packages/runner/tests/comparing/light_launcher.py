"""A launcher that starts scripts without torch, in a tenth of a second.

It is given the words of `python`: "-m regrad_runner.scripts.probing QUESTION ANSWER -- SCRIPT ..."
or "-m regrad_runner run FLAGS -- SCRIPT ...", writes what these would write, and runs the script.
"""

import hashlib
import json
import os
import runpy
import sys
from pathlib import Path

END = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)  # doctest imports this too
OURS, WORDS = sys.argv[1:END], sys.argv[END + 1 :]
NESTEROV = {"name": "nesterov", "optimizer": {"nesterov": True}, "corrections": []}


def answer(question: str, file: str) -> None:
    """Write what a script would have been seen to train."""
    arms = json.loads(Path(question).read_text())["arms"]
    refused = {arm: "it needs whole weights" for arm in arms if os.environ.get("REFUSED") in {arm}}
    seen = {
        "optimizer": "SGD",
        "modules": ["Linear"],
        "controls": {"xgrad": NESTEROV} if "xgrad" in arms else {},
        "refused": refused,
        "refused_controls": {"nesterov": "the head is tied"} if "TIED" in os.environ else {},
    }
    Path(file).write_text(json.dumps(seen))


def flag(name: str) -> str:
    """Return the value of a flag, nothing where it is not given."""
    return OURS[OURS.index(name) + 1] if name in OURS else ""


def write_receipt(file: str) -> None:
    """Write what a run would have done; the beginning depends on the script's words alone."""
    name = flag("--corrections")
    part = {"name": name, "distribution": f"regrad-{name}", "version": "1", "stages": ["weights"]}
    seen = {"share_touched": 1.0, "relative_change": 0.1, "cosine": 0.9, "trigger_rate": 1.0}
    receipt = {
        "corrections": [part] if name else [],
        "order": [name] if name else [],
        "effects": {name: {"weights": seen}} if name else {},
        "steps_applied": 3,
        "steps_skipped": 0,
    }
    unlike = os.environ.get("UNLIKE", "")
    start = [word for word in WORDS if "/out" not in word] + ([name] if unlike else [])
    told = {
        "start": hashlib.sha256(repr(start).encode()).hexdigest(),
        "control_of": [flag("--control-of")],
        "not_attached": [],
        "attached": [{"optimizer": "SGD", "modules": ["Linear"], "receipt": receipt}],
    }
    Path(file).write_text(json.dumps(told))


def main() -> None:
    """Do what is asked for."""
    if "probing" in OURS[1]:
        answer(OURS[2], OURS[3])
        sys.exit(0)
    os.environ["CORRECTIONS"] = flag("--corrections")
    os.environ["FLAGS"] = " ".join(OURS)
    sys.argv = WORDS
    if "NO_RECEIPT" not in os.environ:
        write_receipt(flag("--receipt"))
    runpy.run_path(WORDS[0], run_name="__main__")


if __name__ == "__main__":
    main()
