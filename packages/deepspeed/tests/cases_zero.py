"""What the processes of the tests run: an engine of DeepSpeed beside one process with whole batches.

Each function is launched by `run_on_processes` and makes all of its trials in one process group,
which DeepSpeed keeps for as long as the process lives.
"""

import importlib.util
import os
import warnings

import regrad
import torch
from regrad_testing import Problem
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")
if importlib.util.find_spec("deepspeed"):  # this file is imported where it is not installed, too
    import deepspeed

WORLD = 2
STEPS = 6
CORRECTIONS = {
    "none": [],
    "clip-norm": ["clip-norm:max_norm=0.3"],
    "clip-value": ["clip-value:max_value=0.02"],
    "agc": ["agc:max_ratio=0.02"],
    "agc, no head": ["agc:max_ratio=0.02,head=None"],
    "centralization": ["centralization"],
    "decayed": ["centralization:placement=decayed"],
    "xgrad": ["xgrad"],
    "powergrad": ["powergrad"],
    "adanorm": ["adanorm:target=gradient"],
    "gcw": ["gcw:layers=[first,head],target=gradient,warmup_steps=2,fit_every=2"],
    "several": ["xgrad", "powergrad", "centralization", "clip-norm:max_norm=0.5"],
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


class OddNet(nn.Module):
    """Shapes that two processes cannot share evenly, and what an optimizer does not step.

    A grouped transposed convolution, one row and one number for two processes, a frozen layer.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.norm = nn.GroupNorm(3, 6)
        self.gate = nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(24, 3)

    def forward(self, inputs):
        hidden = torch.tanh(self.frozen(torch.tanh(self.first(inputs))))
        images = torch.tanh(self.norm(self.up(hidden[:, :, None, None])))
        gated = images.flatten(1) * torch.sigmoid(self.gate(hidden))
        return self.head(self.scale * gated)


class Odd(Problem):
    """Tell rows apart with it."""

    def model(self):
        return OddNet()


PROBLEM = Odd()


def in_groups(model):
    """Return the parameters in two groups, the second with half the rate of the first."""
    named = list(model.named_parameters())
    weights = [parameter for name, parameter in named if name.endswith("weight")]
    others = [parameter for name, parameter in named if not name.endswith("weight")]
    return [{"params": weights, "share": 1.0}, {"params": others, "share": 0.5}]


def settings(stage, parts=1, **more):
    """Return a configuration of DeepSpeed: nothing clipped, small parameters kept whole."""
    return {
        "train_micro_batch_size_per_gpu": PROBLEM.batch_size // WORLD // parts,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 10_000,
            "stage3_param_persistence_threshold": 10,
        },
        **more,
    }


def make_engine(stage, optimizer, parts=1, **more):
    """Return a new engine with the weights that every model of the problem starts from."""
    model = PROBLEM.make_model(torch.float32)
    made = OPTIMIZERS[optimizer](in_groups(model))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=made,
        config=settings(stage, parts, **more),
        dist_init_required=False,
    )
    return engine


def rows_of(rank):
    """Return which rows of a batch a process sees."""
    size = PROBLEM.batch_size // WORLD
    return slice(rank * size, (rank + 1) * size)


def set_rates(groups, index):
    """Set the rate of a step, which goes up and down, for each group."""
    for group in groups:
        base = group.setdefault("base", group["lr"])
        group["lr"] = base * group["share"] * PROBLEM.rate(index)


def train_engine(engine, attachment, rank, indices, parts=1):
    """Take some steps on this process's rows of every batch."""
    criterion = nn.CrossEntropyLoss() if attachment is None else attachment.criterion
    for index in indices:
        set_rates(engine.optimizer.param_groups, index)
        batch = PROBLEM.batch(index, torch.float32)
        inputs, targets = batch.inputs[rows_of(rank)], batch.targets[rows_of(rank)]
        for part, wanted in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            loss = criterion(engine(part), wanted) * batch.weight
            engine.backward(loss)
            engine.step()


def weights_of(engine):
    """Return copies of the whole weights by name. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in trained}


def train_alone(optimizer, corrections, steps=range(STEPS)):
    """Return the weights of one process with whole batches, without DeepSpeed."""
    model = PROBLEM.make_model(torch.float32)
    made = OPTIMIZERS[optimizer](in_groups(model))
    attachment = regrad.attach(model, made, corrections, nn.CrossEntropyLoss())
    for index in steps:
        set_rates(made.param_groups, index)
        batch = PROBLEM.batch(index, torch.float32)
        made.zero_grad()
        (attachment.criterion(model(batch.inputs), batch.targets) * batch.weight).backward()
        made.step()
    attachment.detach()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def farthest(one, other):
    """Return the largest difference of weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def trained_apart(rank, stage, optimizer, parts):
    """Return how far an engine with each correction ends from one process."""
    far = {}
    for name, corrections in CORRECTIONS.items():
        if name == "decayed" and optimizer == "adamw":
            continue
        engine = make_engine(stage, optimizer, parts)
        attachment = regrad.attach(engine, engine.optimizer, corrections, nn.CrossEntropyLoss())
        train_engine(engine, attachment, rank, range(STEPS), parts)
        ends = weights_of(engine)
        receipt = attachment.receipt()
        attachment.detach()
        alone = train_alone(optimizer, corrections)
        plain = train_alone(optimizer, [])
        far[name] = {
            "far": farthest(ends, alone),
            "effect": farthest(alone, plain),
            "applied": receipt["steps_applied"],
            "layout": attachment.engine.layout.name,
            "effects": receipt["effects"],
            "notes": receipt["notes"],
        }
        engine.destroy()
    return far


def attached(engine, corrections):
    """Attach with a criterion."""
    return regrad.attach(engine, engine.optimizer, corrections, nn.CrossEntropyLoss())


def same_bits(one, other):
    """Say whether weights are equal, bit for bit."""
    return all(torch.equal(one[name], other[name]) for name in one)


def resumed(rank, stage, folder):
    """Return whether trainings that were interrupted end as those that were not."""
    found = {}
    for optimizer in ("adamw", "plain"):
        corrections = CORRECTIONS["several"]
        whole = make_engine(stage, optimizer, 2)
        attachment = attached(whole, corrections)
        train_engine(whole, attachment, rank, range(3), 2)
        whole.save_checkpoint(folder, tag=optimizer)
        train_engine(whole, attachment, rank, range(3, STEPS), 2)
        ends = weights_of(whole)
        attachment.detach()
        for order in ("attached", "loaded"):
            again = make_engine(stage, optimizer, 2)
            if order == "loaded":
                again.load_checkpoint(folder, tag=optimizer)
            attachment = attached(again, corrections)
            if order == "attached":
                again.load_checkpoint(folder, tag=optimizer)
            train_engine(again, attachment, rank, range(3, STEPS), 2)
            found[f"{optimizer}, {order} first"] = {
                "same": same_bits(weights_of(again), ends),
                "applied": attachment.metrics()["steps_applied"],
            }
            attachment.detach()
    return found


def loaded_otherwise(rank, stage, folder):
    """Return what loading says of a checkpoint of other corrections, and of one without any."""
    engine = make_engine(stage, "adamw")
    attachment = attached(engine, ["xgrad"])
    train_engine(engine, attachment, rank, range(2))
    engine.save_checkpoint(folder, tag="with")
    attachment.detach()
    engine.save_checkpoint(folder, tag="without")
    other = make_engine(stage, "adamw")
    attachment = attached(other, ["clip-norm"])
    try:
        other.load_checkpoint(folder, tag="with")
        refused = ""
    except regrad.RegradError as error:
        refused = str(error)
    attachment.detach()
    third = make_engine(stage, "adamw")
    attachment = attached(third, ["xgrad"])
    train_engine(third, attachment, rank, range(1))
    third.load_checkpoint(folder, tag="without")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_engine(third, attachment, rank, range(1))
    told = [str(one.message) for one in caught if issubclass(one.category, regrad.RegradWarning)]
    attachment.detach()
    return {"refused": refused, "told": told}


def looked_at_in_between(rank, stage, folder):
    """Evaluate and save between the micro-batches of a step, while weights are moved."""
    engine = make_engine(stage, "sgd", 2)
    attachment = attached(engine, ["xgrad"])
    batch = PROBLEM.batch(0, torch.float32)
    train_engine(engine, attachment, rank, range(2), 2)
    engine.eval()
    with torch.no_grad():
        before = engine(batch.inputs).clone()
    engine.train()
    state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    set_rates(engine.optimizer.param_groups, 2)
    third = PROBLEM.batch(2, torch.float32)
    parts = zip(
        third.inputs[rows_of(rank)].chunk(2), third.targets[rows_of(rank)].chunk(2), strict=True
    )
    found = {}
    for number, (part, wanted) in enumerate(parts):
        loss = attachment.criterion(engine(part), wanted) * third.weight
        moved = bool(attachment.engine.window.moved)
        engine.backward(loss)
        engine.step()
        if number == 0:
            found["moved"] = moved
            now = engine.module.state_dict()
            # Stage 3 shows a parameter in part of the time, and then it must be the true one.
            found["state"] = all(
                now[name].shape != value.shape or torch.equal(now[name], value)
                for name, value in state.items()
            )
            engine.save_checkpoint(folder, tag="between")
            engine.eval()
            with torch.no_grad():
                found["evaluation"] = torch.equal(engine(batch.inputs), before)
            engine.train()
    found["far"] = farthest(weights_of(engine), train_alone("sgd", ["xgrad"], range(3)))
    attachment.detach()
    fresh = make_engine(stage, "sgd", 2)
    fresh.load_checkpoint(folder, tag="between")
    with torch.no_grad():
        fresh.eval()
        found["saved"] = torch.equal(fresh(batch.inputs), before)
    return found


def skipped(rank, stage):
    """Train with one batch whose loss is infinite, which DeepSpeed leaves out."""
    engine = make_engine(stage, "sgd")
    attachment = attached(engine, CORRECTIONS["several"])
    train_engine(engine, attachment, rank, range(2))
    before = weights_of(engine)
    set_rates(engine.optimizer.param_groups, 2)
    batch = PROBLEM.batch(2, torch.float32)
    loss = attachment.criterion(engine(batch.inputs[rows_of(rank)]), batch.targets[rows_of(rank)])
    engine.backward(loss * (torch.inf if rank == 1 else 1.0))
    engine.step()
    found = {"left out": same_bits(weights_of(engine), before)}
    train_engine(engine, attachment, rank, range(2, STEPS))
    metrics = attachment.metrics()
    found |= {name: metrics[name] for name in ("steps_applied", "steps_skipped")}
    found["far"] = farthest(weights_of(engine), train_alone("sgd", CORRECTIONS["several"]))
    return found


def predicted_in_bfloat16(rank, stage):
    """Compare what a forward in bfloat16 reads with a prediction from the float32 weights."""
    engine = make_engine(stage, "sgd", bf16={"enabled": True})
    attachment = attached(engine, ["xgrad"])
    ends = []
    batch = PROBLEM.batch(0, torch.bfloat16)
    for index in range(2):
        ends.append(weights_of(engine))
        set_rates(engine.optimizer.param_groups, index)
        engine.backward(attachment.criterion(engine(batch.inputs[:8]).float(), batch.targets[:8]))
        engine.step()
    before, last = ends[-1], weights_of(engine)
    rates = [PROBLEM.rate(1), PROBLEM.rate(2)]
    set_rates(engine.optimizer.param_groups, 2)
    engine(batch.inputs[:8])
    wrong = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = rates[1] / rates[0]
        wanted = (last[name] + factor * (last[name] - before[name])).to(torch.bfloat16)
        with deepspeed.zero.GatheredParameters([parameter]):
            live = parameter.detach().clone()
        if live.dtype != torch.bfloat16 or (live.float() - wanted.float()).abs().max() > 1e-3:
            wrong.append(name)
    attachment.engine.close_window()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                if not torch.equal(parameter.detach(), last[name].to(torch.bfloat16)):
                    wrong.append(f"{name} restored")
    return {"wrong": wrong, "moved": attachment.engine.meter.effects()["xgrad"]["weights"]}


def detached(rank, stage):
    """Return whether an engine is without a trace of regrad after detach, and attaches again."""
    engine = make_engine(stage, "sgd")
    zero = engine.optimizer
    before = set(vars(zero))
    attachment = attached(engine, ["xgrad", "clip-norm"])
    try:
        attached(engine, ["clip-value"])
        twice = ""
    except regrad.RegradError as error:
        twice = str(error)
    train_engine(engine, attachment, rank, range(2))
    attachment.detach()
    attachment.detach()
    left = set(vars(zero)) - before
    again = attached(engine, ["xgrad"])
    train_engine(engine, again, rank, range(2, 4))
    return {"left": sorted(left), "twice": twice, "applied": again.metrics()["steps_applied"]}


def clipped(rank, stage):
    """Return the notes where the configuration says nothing of clipping, and where it does."""
    plain = make_engine(stage, "sgd")
    default = settings(stage)
    del default["gradient_clipping"]
    model = PROBLEM.make_model(torch.float32)
    optimizer = OPTIMIZERS["sgd"](in_groups(model))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=default, dist_init_required=False
    )
    return {
        "off": attached(plain, ["clip-norm"]).receipt()["notes"],
        "default": attached(engine, ["clip-norm"]).receipt()["notes"],
    }


def refusal(call, *arguments, **options):
    """Return what a call raises, in words."""
    try:
        call(*arguments, **options)
    except regrad.RegradError as error:
        return str(error)
    return ""


def refused(rank, stage):
    """Return what is said of attachments and engines that are not served."""
    found = {}
    model = PROBLEM.make_model(torch.float32)
    early = OPTIMIZERS["sgd"](in_groups(model))
    attachment = regrad.attach(model, early, ["clip-norm"])
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=early, config=settings(stage), dist_init_required=False
    )
    inputs = PROBLEM.batch(0, torch.float32).inputs
    found["before initialize"] = refusal(engine, inputs)
    attachment.detach()
    zero = engine.optimizer
    found["inner optimizer"] = refusal(regrad.attach, engine, zero.optimizer, ["clip-norm"])
    found["another model"] = refusal(regrad.attach, nn.Linear(2, 1), zero, ["clip-norm"])
    found["micro"] = refusal(regrad.attach, engine, zero, ["gcode"])
    found["moments"] = refusal(regrad.attach, engine, zero, ["adanorm"])
    found["module and optimizer"] = refusal(regrad.attach, engine.module, zero, ["clip-norm"])
    if stage == 1:
        # In bfloat16 with gradients in the same, stage 0 has an optimizer of DeepSpeed's too.
        half = make_engine(0, "sgd", bf16={"enabled": True})
        found["stage 0"] = refusal(regrad.attach, half, half.optimizer, ["clip-norm"])
    if stage > 1:
        offload = {**settings(stage)["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
        away = make_engine(stage, "sgd", zero_optimization=offload)
        found["offload"] = refusal(regrad.attach, away, away.optimizer, ["clip-norm"])
    return found


def lived(rank, stage, folder):
    """Return what all that an engine's life brings does, by the function's name."""
    alone = (skipped, predicted_in_bfloat16, detached, clipped, refused)
    found = {function.__name__: function(rank, stage) for function in alone}
    for function in (resumed, loaded_otherwise, looked_at_in_between):
        found[function.__name__] = function(rank, stage, f"{folder}/{function.__name__}")
    return found
