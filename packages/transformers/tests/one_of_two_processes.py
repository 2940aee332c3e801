"""Started by test_processes.py, makes itself two: train on two processes and resume, and say how far that is from one.

Arguments: port, folder, a file with the weights of one process.
"""

import gc
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
from regrad import RegradError
from regrad_testing import load_beside
from regrad_transformers import RegradCallback
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

CORRECTIONS = ["xgrad", "powergrad", "agc", "adanorm"]
cases = load_beside(__file__, "cases")


def train(folder, resume=None):
    callback = RegradCallback(CORRECTIONS)
    more = {
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_strategy": "no",
        "ddp_backend": "gloo",
    }
    arguments = TrainingArguments(str(folder), **cases.SETTINGS, **more)
    kept = {"train_dataset": cases.sentences(), "callbacks": [callback]}
    if resume is None:  # the loss beside the model; where training goes on, inside of it
        kept["compute_loss_func"] = callback.compute_loss
    trainer = Trainer(cases.language_model(), arguments, **kept)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def far(model, weights):
    return max(
        (p.detach() - weights[name]).abs().max().item() for name, p in model.named_parameters()
    )


def what_is_said_of_shards(trainer):
    """Return what the callback says where training begins with shards and checkpoints are asked for."""
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


def main(port, folder, alone):
    torch.set_num_threads(1)
    gc.freeze()  # a Trainer collects garbage among all that was imported
    child = os.fork()  # to import costs more than all of the training
    rank = 0 if child else 1
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    whole = train(folder)
    seen = {"wrapped": type(whole.model_wrapped).__name__}
    seen["from_one_process"] = far(whole.model, torch.load(alone, weights_only=True))
    distributed.barrier()
    resumed = train(folder, resume=str(folder / "checkpoint-2"))
    seen["after_resuming"] = far(resumed.model, dict(whole.model.named_parameters()))
    seen["shards"] = what_is_said_of_shards(resumed)
    (folder / f"seen-by-{rank}.txt").write_text(
        "".join(f"{name} {value}\n" for name, value in seen.items())
    )
    distributed.barrier()
    distributed.destroy_process_group()
    failed = os.waitpid(child, 0)[1] if child else 0
    sys.stdout.flush()
    os._exit(
        1 if failed else 0
    )  # gloo's threads may outlive the group and abort the interpreter's own exit


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
