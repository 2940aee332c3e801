"""Save shards whole, load them again and go on, as one of two processes."""

import io

import regrad
import torch
from regrad.correction import Correction, Needs
from regrad.sharding import is_sharded, local
from regrad_runner.checkpoints import states
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Averaged(Correction):
    """Adds the average gradient so far: state of the shape of the part, of one number, and of another shape."""

    name = "averaged"
    needs = Needs(stages=("gradient",), layouts=("plain", "ddp", "fsdp2"))

    def setup(self, attachment):
        self.sums, self.counts, self.others = {}, {}, {}

    def correct_gradients(self, step):
        for name, gradient in zip(step.names, step.gradients, strict=True):
            part = local(gradient)
            self.sums[name] = self.sums.get(name, torch.zeros_like(part)) + part
            self.counts[name] = self.counts.get(name, torch.zeros(())) + 1
            self.others[name] = (
                self.others.get(name, torch.zeros(4)) + 0.01
            )  # the second process has 4 of 9 rows
            part.add_(self.sums[name] / self.counts[name] + self.others[name].sum())

    def state_dict(self):
        return {
            "sums": self.sums,
            "counts": self.counts,
            "others": {n: {"deep": o} for n, o in self.others.items()},
        }

    def load_state_dict(self, state):
        self.sums = {name: tensor.clone() for name, tensor in state["sums"].items()}
        self.counts = {name: tensor.clone() for name, tensor in state["counts"].items()}
        self.others = {name: below["deep"].clone() for name, below in state["others"].items()}


class OtherLibrary(torch.optim.Adam):
    """Adam's numbers under another class."""


CASES = {
    "averaged-sgd": (lambda p: torch.optim.SGD(p, lr=0.02), [Averaged]),
    "averaged-adamw": (lambda p: torch.optim.AdamW(p, lr=0.01), [Averaged]),
}
if {"xgrad", "adanorm"} <= regrad.available().keys():
    names = ["adanorm:target=gradient", "xgrad"]
    CASES["displacement"] = (
        lambda p: OtherLibrary(p, lr=0.01),
        [lambda name=name: name for name in names],
    )
STEPS, HALF = 6, 3


def make(mesh, make_optimizer, corrections, *, seed=0):
    """Return a model of uneven shards (or a plain one), its optimizer and its attachment."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            torch.nn.Linear(6, 9),
            torch.nn.GroupNorm(3, 9),
            torch.nn.Tanh(),
            torch.nn.Linear(9, 3),
        ]
        model = torch.nn.Sequential(*layers).double()
    if mesh is not None:
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh)
    optimizer = make_optimizer(model.parameters())
    return model, optimizer, regrad.attach(model, optimizer, [c() for c in corrections])


def go_on(model, optimizer, steps, part):
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        target = torch.randint(3, (8,), generator=generator)
        if step in steps:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[part]), target[part]).backward()
            optimizer.step()


def saved(model, optimizer, attachment):
    """Return what a file would give back to every process: what the first one has."""
    state = {
        "model": states.model_state(model),
        "optimizer": states.optimizer_state(model, optimizer),
        "corrections": states.corrections_state(attachment),
    }
    file = io.BytesIO()
    torch.save(state, file)
    files = [file.getvalue()]
    distributed.broadcast_object_list(files)
    return torch.load(io.BytesIO(files[0]), weights_only=True)


def resumed(state, mesh, make_optimizer, corrections, part):
    model, optimizer, attachment = make(mesh, make_optimizer, corrections, seed=5)
    with attachment:
        states.load_corrections(attachment, state["corrections"])
        states.load_model(model, state["model"])
        states.load_optimizer(model, optimizer, state["optimizer"])
        applied = attachment.engine.applied
        go_on(model, optimizer, range(HALF, STEPS), part)
    return weights(model), applied


def interrupted(mesh, make_optimizer, corrections, part):
    """Return the state after half of the steps and the weights at the end, where saving must not have shown."""
    model, optimizer, attachment = make(mesh, make_optimizer, corrections)
    with attachment:
        go_on(model, optimizer, range(HALF), part)
        optimizer.zero_grad()
        state = saved(model, optimizer, attachment)
        go_on(model, optimizer, range(HALF, STEPS), part)
    return state, weights(model)


def uninterrupted(mesh, make_optimizer, corrections, part):
    model, optimizer, attachment = make(mesh, make_optimizer, corrections)
    with attachment:
        go_on(model, optimizer, range(STEPS), part)
    return weights(model)


def weights(model):
    return [p.full_tensor() if is_sharded(p) else p.detach() for p in model.parameters()]


def farthest(seen, wanted):
    pairs = zip(seen, wanted, strict=True)
    return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)


def differences(rank):
    """Return how far each case ends from exact, and from the numbers of one process."""
    mesh = init_device_mesh("cpu", (2,))
    half = slice(4 * rank, 4 * rank + 4)
    everything = slice(None)
    seen = {}
    for name, case in CASES.items():
        of_shards, shards = interrupted(mesh, *case, half)
        of_whole, whole = interrupted(None, *case, everything)
        again, applied = resumed(of_shards, mesh, *case, half)
        to_whole, _ = resumed(of_shards, None, *case, everything)
        to_shards, _ = resumed(of_whole, mesh, *case, half)
        never_saved = uninterrupted(mesh, *case, half)
        seen[f"{name}:exact:saving"] = farthest(shards, never_saved)
        seen[f"{name}:exact:shards-to-shards"] = farthest(again, shards)
        seen[f"{name}:exact:steps-counted"] = applied - HALF
        seen[f"{name}:near:shards-to-whole"] = farthest(to_whole, whole)
        seen[f"{name}:near:whole-to-shards"] = farthest(to_shards, whole)
        sums = of_shards["corrections"]["corrections"].get("averaged", {}).get("sums", {})
        ours = of_whole["corrections"]["corrections"].get("averaged", {}).get("sums", {})
        if sums:
            seen[f"{name}:near:gathered"] = farthest(sums.values(), ours.values())
    return seen
