import pytest
import torch
from regrad_runner.models.building import MODELS, build_model
from regrad_runner.models.exits import exits_of
from regrad_runner.models.heads import head_of
from regrad_runner.models.residual import ResidualBlock, Scale
from torch import nn


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet20", 269722), ("resnet32", 464154), ("resnet56", 853018)],
    ids=str,
)
def test_sizes_are_the_papers(name, parameters):
    # Table 6 of He et al. says 0.27 M, 0.46 M and 0.85 M; option A adds no parameters.
    assert count(build_model(name, classes=10)) == parameters


def test_depth_counts_the_layers_with_weights():
    for name in MODELS:
        model = build_model(name, classes=10)
        layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        # of several output layers one belongs to the longest way
        depth = len(layers) - (exits_of(model) - 1)
        assert name in {f"resnet{depth}", f"multiexit{depth}"}


def test_size_worked_out_by_hand_for_digits():
    # 9·(1·4 + 2·4·4 + 4·8 + 8·8 + 8·16 + 16·16) weights, 2·(3·4 + 2·8 + 2·16) for norms, 16·10 + 10 at the end.
    assert (
        count(build_model("resnet8", classes=10, channels=1, image_size=8, width=4))
        == 9 * 516 + 120 + 170
    )


@pytest.mark.parametrize("image_size", [4, 8, 28, 32])
def test_any_image_size_gives_logits(image_size):
    model = build_model("resnet8", classes=7, channels=2, image_size=image_size, width=4)
    assert model(torch.zeros(3, 2, image_size, image_size)).shape == (3, 7)


def test_stages_double_the_channels_and_halve_the_image():
    shapes = []
    model = build_model("resnet20", classes=10, width=8)
    for stage in model.stages:
        stage.register_forward_hook(
            lambda module, given, result: shapes.append(tuple(result.shape[1:]))
        )
    model(torch.zeros(1, 3, 32, 32))
    assert shapes == [(8, 32, 32), (16, 16, 16), (32, 8, 8)]


def test_shortcut_takes_every_second_pixel_and_fills_new_channels_with_zeros():
    images = torch.arange(2 * 1 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)
    shortcut = ResidualBlock(2, 4, stride=2, norm="batch").shortcut(images)
    assert torch.equal(shortcut[:, :2], images[:, :, ::2, ::2])
    assert torch.equal(shortcut[:, 2:], torch.zeros(1, 2, 2, 2))


def test_a_block_whose_residual_is_zero_passes_positive_images_on():
    block = ResidualBlock(3, 3, stride=1, norm="group")
    nn.init.zeros_(block.conv2.weight)
    images = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(images), images)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_building_leaves_the_global_random_state_alone(norm):
    state = torch.get_rng_state()
    build_model("resnet8", classes=10, norm=norm, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_seeds_give_equal_weights_and_others_do_not():
    torch.manual_seed(1)
    first = build_model("resnet8", classes=10, seed=3).state_dict()
    torch.manual_seed(2)
    again = build_model("resnet8", classes=10, seed=3).state_dict()
    other = build_model("resnet8", classes=10, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_norms_share_the_seeds_weights():
    batch, group = (
        build_model("resnet8", classes=10, norm=norm, seed=3).state_dict()
        for norm in ("batch", "group")
    )
    assert torch.equal(batch["stages.1.0.conv1.weight"], group["stages.1.0.conv1.weight"])


def test_weights_have_variance_two_over_fan_in():
    weight = build_model("resnet20", classes=10, width=64).stages[1][1].conv1.weight
    # 147,456 normal numbers: their variance is known to 0.4 %.
    assert weight.var().item() == pytest.approx(2 / (128 * 9), rel=0.02)


def test_group_normalisation_does_not_mix_samples():
    model = build_model("resnet8", classes=10, width=4, norm="group")
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(images)[:2], model(images[:2]), atol=1e-6)


@pytest.mark.parametrize("width", [1, 4, 6, 16])
def test_group_normalisation_bears_any_width(width):
    model = build_model("resnet8", classes=10, width=width, norm="group")
    assert torch.isfinite(model(torch.ones(2, 3, 8, 8))).all()


def moments_by_block(model, images):
    """Return the second moment per pixel, summed over the channels, after the first convolution and each block."""
    moments = []

    def note(module, given, result):
        moments.append(result.square().sum(1).mean().item())

    model.stages[0][0].register_forward_pre_hook(lambda module, given: note(module, None, *given))
    for block in (block for stage in model.stages for block in stage):
        block.register_forward_hook(note)
    with torch.no_grad():
        model(images)
    return moments


def test_without_normalisation_the_second_moment_is_kept_over_the_depth():
    # Each of 27 blocks adds at most 1/27 of it: all together between 1 and e, give or take the draw. A shortcut
    # fills new channels with zeros, which changes the mean over the channels and not their sum.
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        moments = moments_by_block(
            build_model("resnet56", classes=10, norm="none", seed=seed), images
        )
        assert len(moments) == 28
        assert min(moments) / moments[0] > 0.8
        assert max(moments) / moments[0] < 3.3


def test_what_keeps_the_second_moment_is_the_small_start_of_the_branches():
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = build_model("resnet56", classes=10, norm="none")
    for module in model.modules():
        if isinstance(module, Scale):
            nn.init.ones_(module.factor)
    moments = moments_by_block(model, images)
    assert moments[-1] / moments[0] > 1000


def test_a_branch_without_normalisation_starts_with_one_over_the_root_of_the_blocks():
    model = build_model("resnet20", classes=10, norm="none")
    factors = [module.factor.item() for module in model.modules() if isinstance(module, Scale)]
    assert factors == pytest.approx([1 / 3] * 9)


def test_without_normalisation_every_convolution_has_a_bias_and_there_is_no_other_layer():
    model = build_model("resnet8", classes=10, width=4, norm="none")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(torch.equal(layer.bias, torch.zeros_like(layer.bias)) for layer in convolutions)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.GroupNorm) for module in model.modules())
    # To the sizes with normalisation: a bias for each of two numbers per channel, and a factor per block.
    assert (
        count(model)
        == count(build_model("resnet8", classes=10, width=4)) - (3 * 4 + 2 * 8 + 2 * 16) + 3
    )


def test_without_normalisation_gradients_reach_every_parameter_from_the_first_step():
    model = build_model("resnet20", classes=10, norm="none")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_head_is_the_output_layer():
    model = build_model("resnet8", classes=10)
    assert head_of(model) is model.fc
    assert head_of(nn.Sequential(model)) is model.fc


def test_a_model_without_linear_layer_has_no_head():
    with pytest.raises(
        ValueError, match="model must have a linear output layer, got ReLU without one"
    ):
        head_of(nn.ReLU())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "resnet9"},
            "no model named 'resnet9'; there are resnet8, resnet20, .*; did you mean 'resnet8'",
        ),
        ({"norm": "layer"}, "norm must be one of batch, group, none, got 'layer'"),
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"image_size": 3}, "image_size must be at least 4, got 3"),
        ({"width": 0}, "width must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(**{"name": "resnet8", "classes": 10, **options})
