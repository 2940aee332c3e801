import pytest
import regrad
import torch
from regrad_gcw import GCW
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
        shortcut = x if self.downsample is None else None
        y = self.conv2(torch.relu(self.conv1(x)))
        return torch.relu(y + (self.downsample(x) if shortcut is None else shortcut))


class Bottleneck(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside // 4, 1)
        self.conv2 = nn.Conv2d(outside // 4, outside // 4, 3, stride, 1)
        self.conv3 = nn.Conv2d(outside // 4, outside, 1)
        changes = stride > 1 or inside != outside
        self.downsample = nn.Sequential(
            *([nn.Conv2d(inside, outside, 1, stride)] if changes else [])
        )

    def forward(self, x):
        return self.conv3(self.conv2(self.conv1(x))) + self.downsample(x)


class Gated(BasicBlock):
    """With squeeze and excitation behind it."""

    def __init__(self, inside, outside, stride):
        super().__init__(inside, outside, stride)
        self.se = SqueezeExcitation(outside)

    def forward(self, x):
        return self.se(super().forward(x))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean(dim=(2, 3), keepdim=True))).sigmoid()


class ImageNetResNet(nn.Module):
    def __init__(self, blocks=(2, 2, 2, 2), block=BasicBlock):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = (8, 8, 16, 16, 32)
        for index, count in enumerate(blocks):
            first = block(widths[index], widths[index + 1], 1 if index == 0 else 2)
            rest = [block(widths[index + 1], widths[index + 1], 1) for _ in range(count - 1)]
            setattr(self, f"layer{index + 1}", nn.Sequential(first, *rest))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
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
        self.conv = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.stages, previous = nn.Sequential(), 4
        for index, width in enumerate((4, 8, 16)):
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(CifarBlock(previous, width, 2 if index and not block else 1))
                previous = width
            self.stages.append(stage)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.stages(torch.relu(self.conv(x))).mean(dim=(2, 3)))


def selected(model, size, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with regrad.attach(model, optimizer, [GCW(**options)]) as attachment:
        model(
            torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        ).sum().backward()
        optimizer.step()
        return [
            name.removesuffix(".weight")
            for name in attachment.receipt()["corrections"][0]["matched"]
        ]


def test_resnet_18_has_four_selected_layers():
    assert selected(ImageNetResNet(), 64) == [f"layer{stage}.1.conv2" for stage in (1, 2, 3, 4)]


def test_cifar_resnet_20_has_three_selected_layers():
    assert selected(CifarResNet(), 16) == [f"stages.{stage}.2.conv2" for stage in range(3)]


def test_a_stage_of_one_block_ends_in_its_path_and_not_in_its_shortcut():
    assert selected(ImageNetResNet((1, 1, 1, 1)), 64) == [
        f"layer{stage}.0.conv2" for stage in (1, 2, 3, 4)
    ]


def test_a_block_that_halves_the_image_in_its_middle_belongs_to_the_new_stage():
    found = selected(ImageNetResNet((2, 2, 2, 2), Bottleneck), 64)
    assert found == [f"layer{stage}.1.conv3" for stage in (1, 2, 3, 4)]


def test_squeeze_and_excitation_is_no_stage():
    assert selected(ImageNetResNet(block=Gated), 64) == [
        f"layer{stage}.1.conv2" for stage in (1, 2, 3, 4)
    ]


def test_a_plain_network_ends_its_stages_before_each_pooling():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    assert selected(model, 8) == ["1", "3"]


def test_layers_can_be_all_or_patterns_of_parameters_and_modules():
    model = CifarResNet(1)
    assert len(selected(model, 8, layers="all")) == 8 + 1
    assert selected(model, 8, layers=("stages.*.conv2", "fc.bias")) == [
        "stages.0.0.conv2",
        "stages.1.0.conv2",
        "stages.2.0.conv2",
        "fc.bias",
    ]


def test_before_the_first_forward_nothing_is_known_and_a_frozen_end_stays_out():
    model = CifarResNet(1)
    model.stages[1][0].conv2.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with regrad.attach(model, optimizer, ["gcw"]) as attachment:
        assert attachment.receipt()["corrections"][0]["matched"] == []
    assert selected(model, 8) == ["stages.0.0.conv2", "stages.2.0.conv2"]


def test_a_model_without_convolutions_needs_names_and_is_told_which_there_are():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(
        regrad.RegradError, match=r"layers must be named in a model without stages; it has 0, 2\n"
    ):
        regrad.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), ["gcw"])


def test_a_model_whose_only_convolution_is_its_stem_is_refused_at_the_first_step():
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(
        regrad.RegradError, match=r"layers must be named in a model without stages; it has 0, 2\n"
    ):
        selected(model, 8)


def test_a_name_that_is_not_there_is_refused():
    model = nn.Linear(3, 4)
    with pytest.raises(
        regrad.RegradError, match=r"layers must name parameters, got 'layer1\.\*'; it has weight"
    ):
        regrad.attach(
            model, torch.optim.SGD(model.parameters(), lr=0.1), [GCW(layers=("weight", "layer1.*"))]
        )


def test_a_compiled_model_needs_names():
    model = torch.compile(CifarResNet(1), backend="eager")
    with pytest.raises(
        regrad.RegradError, match=r"must be named in a compiled model; it has conv, stages\.0\.0"
    ):
        regrad.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), ["gcw"])
