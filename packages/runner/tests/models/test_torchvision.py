import contextlib

import pytest
import torch
from regrad_runner.models.building import MODELS, build_model
from regrad_runner.models.heads import head_of
from regrad_runner.models.torchvision import build_classifier, classifier_names
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training.building import build_training
from regrad_runner.training.resolving import resolved
from regrad_runner.workloads.loading import load_workload
from torch import nn
from torchvision import models

# One of each family, the smallest; what is left out differs from these in numbers only.
FAMILIES = [
    *(
        "alexnet",
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "efficientnet_v2_s",
        "googlenet",
        "inception_v3",
    ),
    *(
        "maxvit_t",
        "mnasnet0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_y_400mf",
        "resnet18",
        "resnet50",
    ),
    *(
        "resnext50_32x4d",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "swin_t",
        "swin_v2_t",
        "vgg11",
        "vit_b_32",
    ),
]


def head_by_name(network):
    """Return the output layer under the name that torchvision gives it."""
    for path in ("fc", "head", "heads.head", "classifier"):
        with contextlib.suppress(AttributeError):
            layer = network.get_submodule(path)
            layers = [m for m in layer.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            return layers[-1]
    raise AssertionError(type(network))


def test_every_family_of_torchvision_is_tried_and_no_name_of_ours_is_hidden():
    kinds = {name.split("_")[0].rstrip("0123456789") for name in classifier_names()}
    tried = {name.split("_")[0].rstrip("0123456789") for name in FAMILIES}
    assert kinds - tried == {"wide"}  # a ResNet
    assert not set(MODELS) & set(classifier_names())


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifier_gives_logits_and_its_head_is_found(name):
    model = build_model(name, classes=7, image_size=224)
    assert model.training
    head = head_of(model)
    assert head is head_by_name(model)
    assert (head.out_features if isinstance(head, nn.Linear) else head.out_channels) == 7
    shapes = {key: tensor.to("meta") for key, tensor in model.state_dict().items()}
    logits = torch.func.functional_call(
        model.eval(), shapes, (torch.empty(2, 3, 224, 224, device="meta"),)
    )
    assert logits.shape == (2, 7)  # one tensor: no auxiliary outputs


def test_real_images_go_through_forward_and_backward():
    model = build_model("mobilenet_v3_small", classes=4, image_size=32)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "vit_b_32"])
def test_weights_are_torchvisions_own_and_a_function_of_the_seed(name):
    state = torch.get_rng_state()
    torch.rand(3)
    built = build_model(name, classes=7, image_size=224, seed=3).state_dict()
    torch.set_rng_state(state)
    again = build_model(name, classes=7, image_size=224, seed=3).state_dict()
    other = build_model(name, classes=7, image_size=224, seed=4).state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        extra = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
        original = models.get_model(name, num_classes=7, **extra).state_dict()
    assert all(torch.equal(built[key], again[key]) for key in original)
    assert all(torch.equal(built[key], original[key]) for key in original)
    assert any(not torch.equal(built[key], other[key]) for key in original)


def test_building_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    build_model("squeezenet1_1", classes=10, image_size=64, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_grey_images_are_repeated_and_keep_the_weights():
    grey, colour = (
        build_model("resnet18", classes=5, channels=c, image_size=32, seed=1).eval() for c in (1, 3)
    )
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grey(images), colour(images.repeat(1, 3, 1, 1)))
    assert head_of(grey).out_features == 5


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenet_v2", "regnet_x_400mf"])
def test_groups_take_the_place_of_every_batch_normalisation(name):
    model = build_model(name, classes=5, image_size=32, norm="group")
    kinds = [type(module) for module in model.modules()]
    assert nn.GroupNorm in kinds
    assert nn.BatchNorm2d not in kinds
    batch = build_model(name, classes=5, image_size=32)
    assert torch.equal(
        head_of(model).weight, head_of(batch).weight
    )  # the draws are those of the seed
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model.eval()(images)[:2], model(images[:2]), atol=1e-5)


def test_a_network_without_normalisation_may_be_asked_for_by_that():
    model = build_model("vgg11", classes=5, image_size=32, norm="none")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "resnet19"},
            "no model named 'resnet19'; there are resnet8, .*; did you mean 'resnet18'",
        ),
        ({"name": "vit_b_61"}, "no model named 'vit_b_61'; .*; did you mean 'vit_b_16'"),
        (
            {"width": 32},
            "width must be left out for model 'resnet18', whose widths are fixed, got 32",
        ),
        ({"channels": 2}, "channels must be 1 or 3 for model 'resnet18', got 2"),
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"name": "inception_v3"}, "image_size must fit model 'inception_v3', such as 75, got 32"),
        ({"name": "vit_b_32"}, "image_size must fit model 'vit_b_32', such as 224, got 32"),
        (
            {"norm": "none"},
            "norm must be 'batch' or 'group' for model 'resnet18', got 'none'; it cannot be left out",
        ),
        ({"norm": "layer"}, "norm must be one of batch, group, none, got 'layer'"),
        (
            {"name": "densenet121", "norm": "group"},
            "norm must be 'batch' for model 'densenet121', got 'group'; its constructor in "
            "torchvision accepts no other",
        ),
        (
            {"name": "efficientnet_v2_s", "norm": "group"},
            "norm must be 'batch' for .*, got 'group'; its constructor in torchvision sets its own",
        ),
        (
            {"name": "swin_t", "norm": "group"},
            "norm must be 'batch' for model 'swin_t', got 'group'; it has no batch normalisation "
            "and does not mix samples",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(**{"name": "resnet18", "classes": 10, **options})


def test_a_control_scales_the_head_of_a_classifier():
    from regrad.correction import Control

    workload = load_workload("digits", train_size=100)
    config = resolved(TrainConfig(model="resnet18"), workload)
    control = Control(name="scaled-head", head_init=0.25, head_lr=0.25, body_lr=4.0)
    plain, _ = build_training(config, workload, Arm("none"), seed=0, lr=0.1)
    scaled, optimizer = build_training(
        config, workload, Arm("scaled-head", control=control), seed=0, lr=0.1
    )
    assert config.width is None
    assert torch.equal(head_of(scaled).weight, head_of(plain).weight * 0.25)
    body, head = optimizer.param_groups
    assert (body["lr"], head["lr"]) == (0.4, 0.025)
    assert {id(p) for p in head["params"]} == {id(p) for p in head_of(scaled).parameters()}


def test_a_classifier_can_be_built_directly():
    model = build_classifier("resnet18", classes=3, channels=3, image_size=32, seed=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
