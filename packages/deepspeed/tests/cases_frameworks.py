"""What the processes of the tests run: Accelerate and the Trainer with DeepSpeed inside."""

import functools

import regrad
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from regrad_testing import load_beside
from regrad_transformers import RegradCallback
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    training_args,
)

zero = load_beside(__file__, "cases_zero")

CORRECTIONS = ["xgrad", "powergrad", "agc:max_ratio=0.05", "clip-norm:max_norm=0.5"]


def accelerated(rank, stage, folder):
    """Train with Accelerate, whose `backward` steps the engine; then resume from its checkpoint."""
    plugin = DeepSpeedPlugin(hf_ds_config=zero.settings(stage, 2))
    backend = InitProcessGroupKwargs(backend="gloo")
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[backend])
    found = {"processes": accelerator.num_processes}

    def prepared():
        model = zero.PROBLEM.make_model(torch.float32)
        optimizer = zero.OPTIMIZERS["sgd"](zero.in_groups(model))
        return accelerator.prepare(model, optimizer)

    def train(model, optimizer, attachment, indices):
        for index in indices:
            zero.set_rates(optimizer.param_groups, index)
            batch = zero.PROBLEM.batch(index, torch.float32)
            inputs, targets = batch.inputs[zero.rows_of(rank)], batch.targets[zero.rows_of(rank)]
            for part, wanted in zip(inputs.chunk(2), targets.chunk(2), strict=True):
                with accelerator.accumulate(model):
                    loss = attachment.criterion(model(part), wanted) * batch.weight
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()

    model, optimizer = prepared()
    attachment = regrad.attach(model, optimizer, CORRECTIONS, nn.CrossEntropyLoss())
    found["layout"] = attachment.engine.layout.name
    train(model, optimizer, attachment, range(3))
    accelerator.save_state(folder)
    train(model, optimizer, attachment, range(3, zero.STEPS))
    ends = zero.weights_of(model)
    found["far"] = zero.farthest(ends, zero.train_alone("sgd", CORRECTIONS))
    accelerator.load_state(folder)
    train(model, optimizer, attachment, range(3, zero.STEPS))
    again = zero.weights_of(model)
    found["same"] = all(torch.equal(ends[name], again[name]) for name in ends)
    attachment.detach()
    return found


def make_trainer(folder, stage):
    """Return a Trainer with the callback; stage 0 is DDP without DeepSpeed."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    rows = [{"input_ids": [n % 9, n % 7, n % 5], "labels": n % 2} for n in range(48)]
    engine = {"deepspeed": {**zero.settings(stage, 2), "train_micro_batch_size_per_gpu": 4}}
    if stage:
        # Without a backend that is named, accelerate takes each process on a CPU for the only one.
        training_args.PartialState = functools.partial(PartialState, backend="gloo")
    arguments = TrainingArguments(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        optim="sgd",  # Adam would magnify the rounding of gradients near zero
        max_grad_norm=0.0,
        logging_steps=2,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        **(engine if stage else {"use_cpu": True}),
    )
    callback = RegradCallback(["xgrad", "powergrad", "clip-norm:max_norm=0.5"])
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback]), callback


def trained_by_the_trainer(rank, stage, folder):
    """Return weights and receipt of a training; with DeepSpeed of a resumed one as well."""
    trainer, callback = make_trainer(folder, stage)
    trainer.train()
    found = {
        "layout": callback.attachment.engine.layout.name,
        "steps": callback.attachment.engine.applied,
        "logged": any(
            "regrad/xgrad/weights/relative_change" in x for x in trainer.state.log_history
        ),
    }
    if not stage:
        named = trainer.model.named_parameters()
        return {**found, "weights": {name: p.flatten().tolist() for name, p in named}}
    ends = zero.weights_of(trainer.model_wrapped)
    resumed, callback = make_trainer(folder, stage)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    again = zero.weights_of(resumed.model_wrapped)
    found["resumed"] = callback.attachment.engine.applied
    found["same"] = all(torch.equal(ends[name], again[name]) for name in ends)
    return {**found, "weights": {name: weight.flatten().tolist() for name, weight in ends.items()}}
