"""What the tests share: a Trainer of a small model, and weights to compare."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
from regrad_testing import load_beside
from transformers import Trainer, TrainingArguments


@pytest.fixture(scope="session", autouse=True)
def collect_what_tests_make():
    """Let every Trainer's garbage collection pass over what models and earlier tests imported."""
    gc.freeze()


@pytest.fixture(scope="session")
def cases():
    """The module with models and rows."""
    return load_beside(__file__, "cases")


@pytest.fixture
def make_trainer(tmp_path, cases):
    """Return a function that makes a Trainer of four steps, each of two micro-batches of four rows."""

    def make(
        callbacks=(), *, model=None, data=None, model_init=None, folder="out", more=None, **settings
    ):
        plain = {
            **cases.SETTINGS,
            "per_device_train_batch_size": 4,
            "logging_steps": 2,
            "save_strategy": "no",
        }
        arguments = TrainingArguments(str(tmp_path / folder), **{**plain, **settings})
        if model is None and model_init is None:
            model = cases.language_model()
        data = data or cases.sentences()
        kept = {
            "train_dataset": data,
            "eval_dataset": data[:8],
            "callbacks": [*callbacks],
            **(more or {}),
        }
        return Trainer(model, arguments, model_init=model_init, **kept)

    return make


@pytest.fixture
def weights():
    """Return a function that copies a model's weights by name."""
    return lambda model: {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def distance():
    """Return a function that says how far two such copies are apart."""

    def far(one, other):
        assert one.keys() <= other.keys()
        return max((one[name] - other[name]).abs().max().item() for name in one)

    return far
