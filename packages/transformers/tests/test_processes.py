"""A Trainer on two processes: as one, resumed, and with shards."""

import torch
from regrad import RegradError
from regrad_testing import load_beside, run_on_processes
from regrad_transformers import RegradCallback
from torch import distributed
from transformers import Trainer, TrainingArguments

CORRECTIONS = ["xgrad", "powergrad", "agc", "adanorm"]


def train_on_half(cases, folder, resume=None):
    """Train on this process's half of every batch; where training goes on, the loss is computed inside the model."""
    callback = RegradCallback(CORRECTIONS)
    arguments = TrainingArguments(
        str(folder),
        **cases.SETTINGS,
        per_device_train_batch_size=2,
        save_steps=2,
        logging_strategy="no",
        ddp_backend="gloo",
    )
    kept = {"train_dataset": cases.sentences(), "callbacks": [callback]}
    if resume is None:
        kept["compute_loss_func"] = callback.compute_loss
    trainer = Trainer(cases.language_model(), arguments, **kept)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def farthest(model, weights):
    parameters = model.named_parameters()
    return max((p.detach() - weights[name]).abs().max().item() for name, p in parameters)


def what_is_said_of_shards(cases, trainer):
    """Return what the callback says where training begins with shards and checkpoints are asked for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = cases.language_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    objects = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    trainer.state.global_step = 0
    try:
        RegradCallback(["xgrad"]).on_train_begin(
            trainer.args, trainer.state, trainer.control, **objects
        )
    except RegradError as problem:
        return str(problem)
    return "nothing"


def train_and_resume(rank, folder):
    """Train and resume; return how far that ends from one process, and what is said of shards."""
    cases = load_beside(__file__, "cases")
    uninterrupted = train_on_half(cases, folder)
    distributed.barrier()
    resumed = train_on_half(cases, folder, resume=str(folder / "checkpoint-2"))
    alone = torch.load(folder / "alone.pt", weights_only=True)
    return {
        "wrapped": type(uninterrupted.model_wrapped).__name__,
        "from one process": farthest(uninterrupted.model, alone),
        "after resuming": farthest(resumed.model, dict(uninterrupted.model.named_parameters())),
        "shards": what_is_said_of_shards(cases, resumed),
    }


def test_two_processes_train_like_one_resume_to_the_same_bits_and_refuse_checkpoints_of_shards(
    make_trainer, tmp_path
):
    trainer = make_trainer([RegradCallback(CORRECTIONS)])
    trainer.train()
    torch.save(trainer.model.state_dict(), tmp_path / "alone.pt")
    for seen in run_on_processes(train_and_resume, tmp_path):
        assert seen["wrapped"] == "DistributedDataParallel"
        # float32: gradients are added in another order, and Adam divides by small second moments
        assert seen["from one process"] < 1e-5
        assert seen["after resuming"] == 0
        assert "checkpoints must not be sharded" in seen["shards"]
        assert "save_strategy='no'" in seen["shards"]
    assert (tmp_path / "regrad.json").is_file()
