"""The public names are frozen: to change one is to break somebody's script, so it takes a change here too."""

import dataclasses
import importlib
import inspect

import pytest

PUBLIC = {
    "regrad": {
        *(
            "attach",
            "available",
            "load",
            "create",
            "Correction",
            "Composition",
            "Attachment",
            "hookimpl",
        ),
        *("RegradError", "PluginLoadError", "RegradWarning"),
    },
    "regrad_activations": {"Int8Rows", "UniformRows", "WTACRS"},
    "regrad_adafisher": {"AdaFisher"},
    "regrad_adanorm": {"AdaNorm"},
    "regrad_bop": {"Bop", "Bop2", "binarise_"},
    "regrad_boosted": {"Boosted"},
    "regrad_cautious": {"Cautious"},
    "regrad_centralization": {"Centralization"},
    "regrad_deepspeed": {"ZeroLayout"},
    "regrad_clipping": {"AGC", "ClipNorm", "ClipUpdate", "ClipValue"},
    "regrad_powergrad": {"PowerGrad", "PowerGradCrossEntropyLoss"},
    "regrad_gcgd": {"GCGD"},
    "regrad_gcode": {"GCODE"},
    "regrad_gcw": {"GCW"},
    "regrad_lightning": {"RegradCallback"},
    "regrad_testing": {
        *(
            "CorrectionSuite",
            "LayoutSuite",
            "OptimizerSuite",
            "OptimizerStep",
            "Problem",
            "ReferenceStep",
            "SeveralExits",
            "StagedImages",
        ),
        "load_beside",
        "no_waiting",
        "run_on_processes",
    },
    "regrad_tom": {"Tom"},
    "regrad_velo": {"VeLO", "VeLOWeights", "load_weights", "random_weights", "save_weights"},
    "regrad_transformers": {"RegradCallback"},
    "regrad_xgrad": {"AdaM3", "XGrad"},
}
ATTACHMENT = {
    "criterion",
    "detach",
    "state_dict",
    "load_state_dict",
    "metrics",
    "explain",
    "receipt",
}
ENTRY_POINTS = {
    "regrad": {
        *(
            "adafisher",
            "adanorm",
            "agc",
            "boosted",
            "cautious",
            "centralization",
            "clip-norm",
            "clip-update",
            "clip-value",
            "gcgd",
            "gcode",
            "gcw",
            "int8-rows",
            "powergrad",
            "uniform-rows",
            "wta-crs",
            "xgrad",
        )
    },
    "regrad.layouts": {"zero"},
    "regrad.optimizers": {"adam3", "bop", "bop2", "tom", "velo"},
    "regrad.workloads": {
        "cifar10",
        "cifar100",
        "digits",
        "digits-binary",
        "fashion-mnist",
        "imagefolder",
        "parquet",
        "text",
    },
}
SIGNATURES = {
    "regrad:attach": [
        *("model", "optimizer", "corrections", "criterion=None", "*model_group=None")
    ],
    "regrad:available": ["group='regrad'"],
    "regrad:load": ["name", "group='regrad'"],
    "regrad:create": ["spec", "**options"],
    "regrad_lightning:RegradCallback": [
        *("corrections", "*module=None", "*criterion=None", "*optimizer=None", "*strict=True")
    ],
    "regrad_bop:Bop": [
        *("params", "lr=0.0001", "*threshold=1e-08", "*real_lr=0.01", "*betas=(0.9, 0.999)"),
        *("*eps=1e-08", "*weight_decay=0.0", "*maximize=False"),
    ],
    "regrad_bop:Bop2": [
        *("params", "lr=1e-07", "*threshold=1e-06", "*second_rate=0.001", "*unbiased=False"),
        *("*warmup_steps=0", "*real_lr=0.01", "*betas=(0.9, 0.999)", "*eps=1e-08"),
        *("*weight_decay=0.0", "*maximize=False"),
    ],
    "regrad_bop:binarise_": ["weights"],
    "regrad_boosted.functional:boosted_cross_entropy": [
        *("outputs", "target", "*decay=0.5", "*exit_weights=None", "*alpha=1.0", "*weight=None"),
        *("*ignore_index=-100", "*reduction='mean'", "*label_smoothing=0.0"),
    ],
    "regrad_boosted.functional:running_sum": ["outputs", "*decay=0.5"],
    "regrad_cautious.functional:keep_agreeing_": [
        *("displacement", "gradient", "*divisor='share'", "*keep='agreeing'", "*maximize=False")
    ],
    "regrad_centralization.functional:centralize_": ["grad"],
    "regrad_clipping.functional:clip_adaptive_": [
        *("grad", "weight", "*max_ratio=0.01", "*weight_floor=0.001", "*axis=0")
    ],
    "regrad_clipping.functional:clip_update_": ["displacement", "rate", "*max_rms=1.0"],
    "regrad_powergrad.functional:power_grad_cross_entropy": [
        *(
            "logits",
            "target",
            "*alpha=0.25",
            "*weight=None",
            "*ignore_index=-100",
            "*reduction='mean'",
        ),
        "*label_smoothing=0.0",
    ],
    "regrad_tom:Tom": [
        *("params", "lr=0.001", "betas=(0.9, 0.99, 0.999)", "eps=1e-08", "weight_decay=0.0"),
        *("*correct_bias=False", "*maximize=False", "*foreach=None"),
    ],
    "regrad_velo:VeLO": [
        *("params", "lr=1.0", "*weights", "*num_steps", "*pass_lstm_state=True"),
    ],
    "regrad_velo:load_weights": ["path"],
    "regrad_velo:random_weights": ["seed"],
    "regrad_velo:save_weights": ["weights", "path"],
    "regrad_transformers:RegradCallback": [*("corrections", "*criterion=None", "*restore=True")],
    "regrad_xgrad:AdaM3": [
        *("params", "lr=0.001", "betas=(0.9, 0.999)", "eps=1e-16", "weight_decay=0.0"),
        *("*maximize=False", "*foreach=None"),
    ],
}
OPTIONS = {
    "adafisher": {
        **{"average": "published", "refresh": 100, "damping": 1e-3, "fisher": "factored"},
        **{"select": (), "allow_adaptive": False},
    },
    "adanorm": {"decay": 0.95, "target": "moment"},
    "agc": {"max_ratio": 0.01, "weight_floor": 1e-3, "head": "auto", "axis": "auto"},
    "boosted": {
        **{"decay": 0.5, "exit_weights": (), "alpha": 1.0, "rescale": False, "exits": ()},
    },
    "cautious": {"divisor": "share", "keep": "agreeing"},
    "centralization": {"placement": "gradient", "conv_only": False},
    "clip-norm": {"max_norm": 1.0},
    "clip-update": {"max_rms": 1.0},
    "clip-value": {"max_value": 1.0},
    "int8-rows": {"layers": "linear"},
    "powergrad": {"alpha": 0.25},
    "uniform-rows": {"share": 0.3, "layers": "linear", "seed": 0},
    "wta-crs": {"share": 0.3, "layers": "linear", "seed": 0},
    "gcode": {
        **{
            "weight": 0.1,
            "warmup_steps": 400,
            "fit_every": 4,
            "learning_rate": 1e-3,
            "solver": "midpoint",
        },
        **{"adjoint": False, "norm": "free", "flow": "branch", "stages": (), "seed": 0},
    },
    "gcw": {
        **{
            "layers": "stages",
            "slots": ("last", "fast", "slow"),
            "prior": None,
            "predictor": "slot",
        },
        **{"fit_target": "next", "target": "moment", "norm": "free", "gate": True},
        **{"warmup_steps": 10, "fit_every": 10, "allow_double_lookahead": False},
    },
    "xgrad": {
        "horizon": 1.0,
        "decoupled_decay": None,
        "compiled": False,
        "allow_double_lookahead": False,
    },
}


def written(parameter: inspect.Parameter) -> str:
    star = {inspect.Parameter.KEYWORD_ONLY: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(
        parameter.kind, ""
    )
    default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
    return f"{star}{parameter.name}{default}"


@pytest.mark.parametrize("module", PUBLIC)
def test_a_package_offers_exactly_its_frozen_names(module):
    package = importlib.import_module(module)
    assert set(getattr(package, "__all__", dir(package))) == PUBLIC[module]
    assert all(getattr(package, name).__doc__ for name in PUBLIC[module] - {"hookimpl"})


@pytest.mark.parametrize("place", SIGNATURES)
def test_a_public_callable_takes_exactly_its_frozen_arguments(place):
    module, _, name = place.partition(":")
    function = getattr(importlib.import_module(module), name)
    assert [written(p) for p in inspect.signature(function).parameters.values()] == SIGNATURES[
        place
    ]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_correction_has_exactly_its_frozen_options_and_defaults(name):
    regrad = importlib.import_module("regrad")
    assert dataclasses.asdict(regrad.create(name).options) == OPTIONS[name]


def test_an_attachment_has_its_frozen_names():
    regrad = importlib.import_module("regrad")
    assert set(dir(regrad.Attachment)) >= ATTACHMENT


@pytest.mark.parametrize("group", ENTRY_POINTS)
def test_what_users_ask_for_by_name_is_installed_under_that_name(group):
    regrad = importlib.import_module("regrad")
    entries = regrad.available(group)
    assert set(entries) == ENTRY_POINTS[group]
    assert all(entry.refused is None for entry in entries.values())
    assert all(regrad.load(name, group) for name in entries)


def test_a_misspelt_name_is_an_attribute_error():
    regrad = importlib.import_module("regrad")
    with pytest.raises(AttributeError, match="module 'regrad' has no attribute 'atach'"):
        _ = regrad.atach
