import pytest
import regrad
import torch
from regrad_gcode import GCODE
from regrad_gcode.selection import find_stages
from torch import nn


class BasicBlock(nn.Module):
    """torchvision's names: conv1, conv2, downsample."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.downsample = None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False))

    def forward(self, x):
        y = self.conv2(torch.relu(self.conv1(x)))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """Down-samples in its middle, with squeeze and excitation written into it."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside // 4, 1)
        self.conv2 = nn.Conv2d(outside // 4, outside // 4, 3, stride, 1)
        self.conv3 = nn.Conv2d(outside // 4, outside, 1)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(outside, outside, 1)
        changes = stride > 1 or inside != outside
        self.downsample = nn.Sequential(
            *([nn.Conv2d(inside, outside, 1, stride)] if changes else [])
        )

    def forward(self, x):
        y = self.conv3(self.conv2(self.conv1(x)))
        return y * self.gate(self.pool(y)).sigmoid() + self.downsample(x)


class ImageNetResNet(nn.Module):
    def __init__(self, block=BasicBlock, names="layer{}"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = (8, 8, 16, 16, 32)
        self.names = [names.format(index) for index in (1, 2, 3, 4)]
        for index, name in enumerate(self.names):
            first = block(widths[index], widths[index + 1], 1 if index == 0 else 2)
            setattr(
                self, name, nn.Sequential(first, block(widths[index + 1], widths[index + 1], 1))
            )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.conv1(x)))
        for name in self.names:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(x).flatten(1))


class CifarBlock(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.stride, self.more = stride, outside - inside

    def forward(self, x):
        y = self.conv2(torch.relu(self.conv1(x)))
        x = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(y + nn.functional.pad(x, (0, 0, 0, 0, 0, self.more)))


class CifarResNet(nn.Module):
    """He's network for small images: a stem, three stages of n blocks, an average."""

    def __init__(self, blocks=3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.GroupNorm(2, 4)
        self.stages, previous = nn.Sequential(), 4
        for index, width in enumerate((4, 8, 16)):
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(CifarBlock(previous, width, 2 if index and not block else 1))
                previous = width
            self.stages.append(stage)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.stages(torch.relu(self.norm(self.conv(x)))).mean(dim=(2, 3)))


class Wrapped(nn.Module):
    """A task around a backbone, in a list that is never called itself."""

    def __init__(self, backbone):
        super().__init__()
        self.parts = nn.ModuleList([backbone])

    def forward(self, x):
        return self.parts[0](x).softmax(dim=-1)


def attached(model, size, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    correction = GCODE(warmup_steps=1, weight=0.5, **options)
    with regrad.attach(model, optimizer, [correction]):
        for _ in range(2):
            optimizer.zero_grad()
            model(
                torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
            ).square().sum().backward()
            optimizer.step()
    return correction


def pairs_of(model, size, **options):
    correction = attached(model, size, **options)
    seen = {
        key.removeprefix("cosine_") for key in correction.metrics() if key.startswith("cosine_")
    }
    assert seen == set(correction.state_dict())  # every pair injected
    return list(correction.state_dict())


def test_resnet_20_has_three_pairs_and_begins_behind_the_stem():
    correction = attached(CifarResNet(), 16)
    assert {name: kept["shapes"] for name, kept in correction.state_dict().items()} == {
        "stages.0": ((4, 16, 16), (4, 16, 16)),
        "stages.1": ((4, 16, 16), (8, 8, 8)),
        "stages.2": ((8, 8, 8), (16, 4, 4)),
    }


def test_resnet_18_has_four_pairs_and_begins_behind_the_pooling():
    correction = attached(ImageNetResNet(), 64)
    assert {name: kept["shapes"] for name, kept in correction.state_dict().items()} == {
        "layer1": ((8, 16, 16), (8, 16, 16)),
        "layer2": ((8, 16, 16), (16, 8, 8)),
        "layer3": ((16, 8, 8), (16, 4, 4)),
        "layer4": ((16, 4, 4), (32, 2, 2)),
    }


@pytest.mark.parametrize("size", [16, 32])
def test_numbered_layers_are_stages_however_small_the_images(size):
    assert pairs_of(ImageNetResNet(), size) == ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_without_numbers_the_sizes_of_the_image_tell_the_same(block):
    names = ["part_a1", "part_b1", "part_c1", "part_d1"]
    model = ImageNetResNet(block)
    for old, new in zip(model.names, names, strict=True):
        setattr(model, new, getattr(model, old))
        delattr(model, old)
    model.names = names
    assert pairs_of(model, 64) == names


@pytest.mark.parametrize(
    ("backbone", "stages"),
    [
        (ImageNetResNet, [f"layer{n}" for n in (1, 2, 3, 4)]),
        (CifarResNet, [f"stages.{n}" for n in range(3)]),
    ],
)
def test_a_wrapped_network_has_the_same_stages(backbone, stages):
    assert pairs_of(Wrapped(backbone()), 32) == [f"parts.0.{name}" for name in stages]


def test_a_plain_network_has_runs_of_modules_from_each_pooling():
    layers = [
        nn.Conv2d(3, 4, 3, 1, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, 1, 1),
        nn.ReLU(inplace=True),
    ]
    layers += [
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, 1, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.ReLU(),
    ]
    layers += [
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ]
    correction = attached(nn.Sequential(*layers), 8)
    assert {name: kept["shapes"] for name, kept in correction.state_dict().items()} == {
        "2..3": ((4, 8, 8), (4, 8, 8)),
        "4..8": ((4, 8, 8), (8, 4, 4)),
        "9..10": ((8, 4, 4), (8, 2, 2)),
    }


def test_stages_can_be_named():
    assert pairs_of(CifarResNet(), 16, stages=("stages.1", "stages.2")) == ["stages.1", "stages.2"]
    model = nn.Sequential(
        *[nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1)]
    )
    assert pairs_of(model, 8, stages=(1, 2)) == ["1", "2"]


def test_a_module_that_reads_a_size_already_left_stands_beside_the_path():
    class Inline(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
            self.two, self.short = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(4, 8, 1, 2)
            self.last = nn.Conv2d(8, 8, 3, 1, 1)

        def forward(self, x):
            x = self.one(self.stem(x))
            return self.last(self.two(x) + self.short(x))

    assert pairs_of(Inline(), 8) == ["one", "two..last"]


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (
            [nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Flatten(), nn.Linear(256, 2)],
            "1",
        ),
        ([nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 2)], "none"),
        ([nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, 2)], "none"),
    ],
)
def test_fewer_than_two_stages_are_refused_with_what_was_found(layers, found):
    message = rf"'gcode' must find two stages or more, found {found}; name them with stages=\[…\]"
    with pytest.raises(regrad.RegradError, match=message):
        attached(nn.Sequential(*layers), 8)


def test_named_stages_must_be_there_and_give_images():
    with pytest.raises(
        regrad.RegradError, match=r"stages must name modules of the model, got \['layer9'\]; it has"
    ):
        attached(CifarResNet(), 8, stages=("stages.0", "layer9"))
    message = r"stages must take and return images \[B, C, H, W\]; 'fc' takes and returns \(\(2, 16\), \(2, 3\)\)"
    with pytest.raises(regrad.RegradError, match=message):
        attached(CifarResNet(), 8, stages=("stages.0", "fc"))


def test_without_calls_there_are_no_stages():
    assert find_stages([], []) == []
