import pytest
import regrad
import torch
from torch import nn


class Block(nn.Module):
    """torchvision's basic block."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """torchvision's ResNet-18, narrower."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        for index, (inside, outside) in enumerate(((8, 8), (8, 16), (16, 16), (16, 32))):
            blocks = Block(inside, outside, 2 if index else 1), Block(outside, outside, 1)
            setattr(self, f"layer{index + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 3)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class ResNet20(nn.Module):
    """He's network for small images, narrower: a stem, three stages of three blocks, an average."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.stages, previous = nn.Sequential(), 4
        for index, width in enumerate((4, 8, 16)):
            stage = nn.Sequential()
            for block in range(3):
                stage.append(Block(previous, width, 2 if index and not block else 1))
                previous = width
            self.stages.append(stage)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.stages(torch.relu(self.norm(self.conv(x)))).mean(dim=(2, 3)))


NETWORKS = {
    "ResNet-20": (
        ResNet20,
        16,
        [f"stages.{s}.2.conv2.weight" for s in range(3)],
        [f"stages.{s}" for s in range(3)],
    ),
    "ResNet-18": (
        ResNet18,
        64,
        [f"layer{s}.1.conv2.weight" for s in range(1, 5)],
        [f"layer{s}" for s in range(1, 5)],
    ),
}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def make(network):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network()


def batches(count, size):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, 3, size, size, generator=generator),
            torch.randint(3, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def train(model, data, specs, state=None):
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, specs) as attachment:
        if state is not None:
            optimizer.load_state_dict(state[0])
            attachment.load_state_dict(state[1])
        for inputs, target in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
        return (
            attachment.metrics(),
            attachment.receipt(),
            (optimizer.state_dict(), attachment.state_dict()),
        )


def test_options_go_to_the_part_that_they_name(reference):
    weights, pairs = regrad.create("gcgd:gcw.prior=.9,gcode.weight=.2,gcw.fit_every=7")
    assert (weights.name, weights.options.prior, weights.options.fit_every) == ("gcw", 0.9, 7)
    assert (pairs.name, pairs.options.weight, pairs.options.fit_every) == ("gcode", 0.2, 4)
    given = {("gcw", "prior"): 0.9, ("gcode", "weight"): 0.2, ("gcw", "fit_every"): 7}
    alone = [regrad.create(spec) for spec in reference.specs(given)]
    assert [repr(c) for c in alone] == [repr(weights), repr(pairs)]


def test_options_without_a_part_are_refused():
    with pytest.raises(
        TypeError,
        match="options of 'gcgd' must start with one of gcw, gcode and a dot, got 'weight'",
    ):
        regrad.create("gcgd:weight=.2")


@pytest.mark.parametrize("name", NETWORKS)
def test_both_parts_act_where_their_cards_say(name):
    network, size, tensors, stages = NETWORKS[name]
    options = "gcgd:gcw.warmup_steps=1,gcode.warmup_steps=1"
    metrics, receipt, (_, state) = train(make(network), batches(4, size), [options])
    assert receipt["order"] == ["gcw", "gcode"]
    assert receipt["corrections"][0]["matched"] == tensors
    assert list(state["corrections"]["gcw"]) == tensors
    assert list(state["corrections"]["gcode"]) == stages
    assert metrics["gcw/gradient/relative_change"] > 0
    assert metrics["gcode/hidden/relative_change"] > 0
    assert metrics["gcode/hidden/share_touched"] == 1
    assert all(f"gcode/cosine_{stage}" in metrics for stage in stages)


def test_the_composition_trains_as_its_parts_in_any_order_do(reference):
    network, size, *_ = NETWORKS["ResNet-20"]
    options = {("gcw", "warmup_steps"): 1, ("gcode", "warmup_steps"): 1, ("gcode", "fit_every"): 2}
    parts = reference.specs(options)
    spec = "gcgd:" + ",".join(
        f"{part}.{option}={value}" for (part, option), value in options.items()
    )
    models = [make(network) for _ in range(5)]
    for model, specs in zip(
        models, ([spec], parts, parts[::-1], parts[:1], parts[1:]), strict=True
    ):
        train(model, batches(6, size), specs)
    together, *others = ([*model.parameters()] for model in models)
    same = [
        all(torch.equal(a, b) for a, b in zip(together, other, strict=True)) for other in others
    ]
    assert same == [True, True, False, False]


def test_a_resumed_run_is_the_same_bit_for_bit():
    network, size, *_ = NETWORKS["ResNet-20"]
    spec, data, whole = (
        "gcgd:gcw.warmup_steps=1,gcode.warmup_steps=2,gcode.fit_every=2",
        batches(7, size),
        make(network),
    )
    train(whole, data, [spec])
    model = make(network)
    *_, state = train(model, data[:4], [spec])
    again = network()
    again.load_state_dict(model.state_dict())
    train(again, data[4:], [spec], state)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )
