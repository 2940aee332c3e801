import json

import pytest
import regrad
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from regrad import RegradError
from regrad.correction import Needs
from regrad_lightning import RegradCallback
from torch import nn

SPECS = ["xgrad", "agc:max_ratio=0.05"]
TWICE = "allow_double_lookahead=true"
RESUMED = [f"xgrad:{TWICE}", f"gcw:warmup_steps=2,fit_every=2,layers=all,{TWICE}"]

# What Lightning says of small data and of trainings without validation.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "You defined a `validation_step` but have no `val_dataloader`",
        "The number of training batches",
    )
]


@pytest.fixture(scope="module")
def plain(toys):
    """What the written-out loop makes of the network."""
    return toys.plain_loop(SPECS)[0]


@pytest.mark.parametrize(
    ("accumulate", "algorithm", "precision"),
    [
        (1, None, "32-true"),
        (2, "norm", "32-true"),
        (3, "value", "32-true"),
        (2, "norm", "bf16-mixed"),
    ],
)
def test_a_fit_is_the_plain_loop_bit_for_bit(toys, tmp_path, accumulate, algorithm, precision):
    module, callback = toys.Classifier(), RegradCallback(SPECS)
    clipping = (
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": algorithm} if algorithm else {}
    )
    settings = {"accumulate_grad_batches": accumulate, "precision": precision, **clipping}
    toys.trainer(tmp_path, callback, **settings).fit(module, toys.loader())
    clips = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}
    clip = (lambda parameters: clips[algorithm](parameters, 0.02)) if algorithm else None
    dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    expected, attachment = toys.plain_loop(SPECS, accumulate=accumulate, clip=clip, dtype=dtype)
    assert toys.difference(toys.weights(module), expected) == 0
    assert callback.attachment.metrics() == attachment.metrics()
    assert callback.attachment.metrics()["steps_applied"] == 12 // accumulate
    assert callback.attachment.metrics()["xgrad/weights/trigger_rate"] > 0.8


def test_without_corrections_a_fit_is_the_one_without_the_callback(toys, tmp_path):
    fits = []
    for callbacks in (
        [],
        [RegradCallback([])],
        [RegradCallback(["powergrad:alpha=1"], criterion="criterion")],
    ):
        module = toys.Classifier()
        toys.trainer(tmp_path, *callbacks).fit(module, toys.loader(), toys.loader())
        fits.append(toys.weights(module))
    assert toys.difference(fits[0], fits[1]) == 0
    assert toys.difference(fits[0], fits[2]) == 0


class AtEveryBatch(Callback):
    """Saves in the middle of accumulations, and notes what the live weights are then."""

    def __init__(self, toys, folder):
        self.toys, self.folder, self.live, self.saved = toys, folder, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        path = self.folder / f"{batch_idx}.ckpt"
        trainer.save_checkpoint(path)
        self.live.append(self.toys.weights(pl_module))
        self.saved.append(list(torch.load(path, weights_only=True)["state_dict"].values())[:6])


def test_validation_and_checkpoints_in_the_middle_of_an_accumulation_hold_the_true_weights(
    toys, tmp_path
):
    module, each = toys.Classifier(), AtEveryBatch(toys, tmp_path)
    settings = {
        "accumulate_grad_batches": 2,
        "val_check_interval": 1,
        "limit_val_batches": 1,
        "max_epochs": 1,
    }
    toys.trainer(tmp_path, RegradCallback(["xgrad"]), each, **settings).fit(
        module, toys.loader(), toys.loader()
    )
    validated = module.validated[1:]  # the sanity check comes first
    assert len(each.saved) == len(validated) == 6
    assert toys.difference(module.validated[0], toys.weights(toys.Classifier())) == 0
    assert [toys.difference(*pair) for pair in zip(each.saved, validated, strict=True)] == [0] * 6
    # of the second step on a window is open after the first half of an accumulation
    moved = [
        toys.difference(live, saved) > 0 for live, saved in zip(each.live, each.saved, strict=True)
    ]
    assert moved == [False, False, True, False, True, False]
    expected, _ = toys.plain_loop(["xgrad"], accumulate=2, batches=6)
    assert toys.difference(toys.weights(module), expected) == 0


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`"
)  # the callback that saved is not needed
def test_a_resumed_fit_is_the_uninterrupted_one_bit_for_bit(toys, tmp_path):
    whole, callback = toys.Classifier(), RegradCallback(RESUMED)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1)
    toys.trainer(tmp_path, callback, saving, enable_checkpointing=True).fit(whole, toys.loader())
    assert callback.attachment.metrics()["gcw/gradient/trigger_rate"] > 0
    path = tmp_path / "epoch=0-step=6.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert "RegradCallback" not in checkpoint["callbacks"]  # the optimizer's state holds it
    assert checkpoint["optimizer_states"][0]["regrad"]["receipt"]["steps_applied"] == 6
    again, resumed = toys.Classifier(), RegradCallback(RESUMED)
    toys.trainer(tmp_path, resumed).fit(again, toys.loader(), ckpt_path=path)
    assert toys.difference(toys.weights(again), toys.weights(whole)) == 0
    assert resumed.attachment.metrics() == callback.attachment.metrics()


@pytest.fixture(scope="module")
def checkpoints(toys, tmp_path_factory):
    """Checkpoints after one epoch, without corrections and with."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, callbacks in {"without": [], "with": [RegradCallback(["xgrad"])]}.items():
        trainer = toys.trainer(folder, *callbacks, max_epochs=1)
        trainer.fit(toys.Classifier(), toys.loader())
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder


def test_a_checkpoint_without_the_corrections_is_refused_unless_told(toys, tmp_path, checkpoints):
    rule = r"must hold the state of \['xgrad'\], got none; pass strict=False to RegradCallback to reset them"
    with pytest.raises(RegradError, match=rule):
        toys.trainer(tmp_path, RegradCallback(["xgrad"])).fit(
            toys.Classifier(), toys.loader(), ckpt_path=checkpoints / "without.ckpt"
        )
    callback = RegradCallback(["xgrad"], strict=False)
    toys.trainer(tmp_path, callback).fit(
        toys.Classifier(), toys.loader(), ckpt_path=checkpoints / "without.ckpt"
    )
    assert callback.attachment.metrics()["steps_applied"] == 6


def test_a_checkpoint_of_other_corrections_is_refused_unless_told(toys, tmp_path, checkpoints):
    path = checkpoints / "with.ckpt"
    with pytest.raises(RegradError, match=r"xgrad.horizon was 1.0, is 0.5; or pass strict=False"):
        toys.trainer(tmp_path, RegradCallback(["xgrad:horizon=0.5"])).fit(
            toys.Classifier(), toys.loader(), ckpt_path=path
        )
    callback = RegradCallback(["xgrad:horizon=0.5"], strict=False)
    toys.trainer(tmp_path, callback).fit(toys.Classifier(), toys.loader(), ckpt_path=path)
    assert callback.attachment.metrics()["steps_applied"] == 12


def test_a_validation_of_a_checkpoint_leaves_nothing_for_the_next_fit(toys, tmp_path, checkpoints):
    module, callback = toys.Classifier(), RegradCallback(["xgrad"])
    trainer = toys.trainer(tmp_path, callback, max_epochs=1)
    trainer.validate(module, toys.loader(), ckpt_path=checkpoints / "with.ckpt")
    trainer.fit(module, toys.loader())
    assert callback.attachment.metrics()["steps_applied"] == 6


def hooks_of(module, optimizer):
    owners = [*module.modules(), optimizer]
    return [
        len(value)
        for owner in owners
        for key, value in vars(owner).items()
        if key.endswith("_hooks")
    ]


def test_a_fit_leaves_no_hook_and_can_be_followed_by_another(toys, tmp_path, plain):
    module, callback = toys.Classifier(), RegradCallback(SPECS)
    trainer = toys.trainer(tmp_path, callback)
    trainer.fit(module, toys.loader())
    first = callback.attachment
    assert first.is_detached
    assert sum(hooks_of(module, first.optimizer)) == 0
    assert toys.difference(toys.weights(module), plain) == 0
    module.load_state_dict(toys.Classifier().state_dict())
    again = toys.trainer(tmp_path, callback)
    again.fit(module, toys.loader())
    assert callback.attachment is not first
    assert toys.difference(toys.weights(module), plain) == 0


class Failing(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            raise OSError("no")


def test_an_exception_restores_the_weights_and_detaches_and_the_state_can_still_be_saved(
    toys, tmp_path
):
    module, callback = (
        toys.Classifier(),
        RegradCallback(["xgrad", "powergrad"], criterion="criterion"),
    )
    trainer = toys.trainer(tmp_path, callback, Failing(), accumulate_grad_batches=2)
    with pytest.raises(OSError, match="no"):
        trainer.fit(module, toys.loader())
    assert callback.attachment.is_detached
    assert "forward" not in vars(module.criterion)
    # one step was made; the third batch had opened the window of the second
    expected, _ = toys.plain_loop(["xgrad", "powergrad"], accumulate=2, batches=2, corrected=True)
    assert toys.difference(toys.weights(module), expected) == 0
    assert json.loads((tmp_path / "regrad-receipt.json").read_text())["steps_applied"] == 1
    trainer.save_checkpoint(tmp_path / "rescue.ckpt")
    held = torch.load(tmp_path / "rescue.ckpt", weights_only=True)["callbacks"]["RegradCallback"]
    assert held["attachment"]["receipt"]["steps_applied"] == 1


def test_a_criterion_is_corrected_in_training_and_given_back(toys, tmp_path):
    module, callback = (
        toys.Classifier(),
        RegradCallback(["powergrad:alpha=0.5"], criterion="criterion"),
    )
    each = AtEveryBatch(toys, tmp_path)
    toys.trainer(tmp_path, callback, each).fit(module, toys.loader(), toys.loader())
    expected, attachment = toys.plain_loop(["powergrad:alpha=0.5"], corrected=True)
    assert toys.difference(toys.weights(module), expected) == 0
    assert callback.attachment.metrics() == attachment.metrics()
    assert callback.attachment.metrics()["powergrad/criterion/share_touched"] == 1
    assert "forward" not in vars(module.criterion)
    names = torch.load(tmp_path / "0.ckpt", weights_only=True)["state_dict"].keys()
    assert names == toys.Classifier().state_dict().keys()
    assert "criterion.weight" in names


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (
            {"corrections": ["powergrad"]},
            r"'powergrad' corrects the criterion; keep it as self.criterion = nn.Cross",
        ),
        (
            {"corrections": ["powergrad"], "criterion": "loss"},
            "criterion must name a loss module of Classifier, got 'loss'; keep it as self.criterion",
        ),
        (
            {"corrections": [], "module": "nett"},
            "module must name a submodule of Classifier, got 'nett'; it has net",
        ),
        (
            {"corrections": [], "module": "net.0"},
            "must hold every parameter that the optimizer trains, 'net.0' lacks 4 parameters",
        ),
        (
            {"corrections": [], "optimizer": 1},
            "optimizer must be an index below 1, got 1; use one RegradCallback",
        ),
    ],
)
def test_what_does_not_fit_the_module_is_refused_before_training(toys, tmp_path, arguments, rule):
    module = toys.Classifier()
    with pytest.raises(RegradError, match=rule):
        toys.trainer(tmp_path, RegradCallback(**arguments)).fit(module, toys.loader())
    assert toys.difference(toys.weights(module), toys.weights(toys.Classifier())) == 0


def test_a_wrong_correction_is_refused_when_the_callback_is_made():
    with pytest.raises(ValueError, match="no correction named 'xgrda'"):
        RegradCallback(["xgrda"])
    with pytest.raises(
        TypeError, match=r"corrections must be a list, got 'xgrad'; write \['xgrad'\]"
    ):
        RegradCallback("xgrad")


class Pair(LightningModule):
    """Two networks, two optimizers, stepped by hand; both train on the other's output."""

    automatic_optimization = False

    def __init__(self, toys):
        super().__init__()
        self.one, self.two = toys.network(), toys.network()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (self.one, self.two)
        ]

    def losses(self, batch):
        yield nn.functional.cross_entropy(self.one(batch[0]), batch[1])
        yield nn.functional.cross_entropy(
            self.two(batch[0]) + self.one(batch[0]).detach(), batch[1]
        )

    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), self.losses(batch), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


def test_each_of_several_optimizers_stepped_by_hand_has_a_callback_of_its_own(toys, tmp_path):
    module = Pair(toys)
    one, two = (
        RegradCallback(["xgrad"], optimizer=0, module="one"),
        RegradCallback(["agc"], optimizer=1, module="two"),
    )
    saving = ModelCheckpoint(tmp_path)
    toys.trainer(tmp_path, one, two, saving, enable_checkpointing=True).fit(module, toys.loader())
    states = torch.load(saving.best_model_path)["optimizer_states"]
    assert [list(state["regrad"]["corrections"]) for state in states] == [["xgrad"], ["agc"]]
    expected = Pair(toys)
    optimizers = expected.configure_optimizers()
    with (
        regrad.attach(expected.one, optimizers[0], ["xgrad"]),
        regrad.attach(expected.two, optimizers[1], ["agc"]),
    ):
        for batch in [*toys.loader()] * 2:
            for optimizer, loss in zip(optimizers, expected.losses(batch), strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert toys.difference(toys.weights(module), toys.weights(expected)) == 0
    assert [c.attachment.metrics()["steps_applied"] for c in (one, two)] == [12, 12]


def test_several_optimizers_without_an_index_are_refused(toys, tmp_path):
    rule = "optimizer must be an index below 2, got None; use one RegradCallback for each optimizer"
    with pytest.raises(RegradError, match=rule):
        toys.trainer(tmp_path, RegradCallback(["xgrad"])).fit(Pair(toys), toys.loader())


class Apart(LightningModule):
    """Its children are called one by one: no module's forward makes the outputs."""

    def __init__(self, toys):
        super().__init__()
        self.body, self.head = toys.network()[:-1], toys.network()[-1]

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_a_module_that_is_never_called_trains_with_prediction_all_the_same(toys, tmp_path):
    module, callback = Apart(toys), RegradCallback(["xgrad"])
    toys.trainer(tmp_path, callback).fit(module, toys.loader())
    expected = nn.Sequential(*toys.network())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    with regrad.attach(expected, optimizer, ["xgrad"]):
        for inputs, targets in [*toys.loader()] * 2:
            nn.functional.cross_entropy(expected(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert toys.difference(toys.weights(module), toys.weights(expected)) == 0


def test_a_correction_that_must_see_a_forward_refuses_a_module_that_is_never_called(toys, tmp_path):
    rule = (
        "gcw must attach to the module that training_step calls, got no forward of the "
        "LightningModule; name it with module='…'"
    )
    with pytest.raises(RegradError, match=rule):
        toys.trainer(tmp_path, RegradCallback(["gcw"])).fit(Images(), toys.loader())


class Images(LightningModule):
    """Convolutions, so that GC-W looks for stages."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 1), nn.Linear(24, 4)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(
            self.head(self.body(batch[0][:, None, None]).flatten(1)), batch[1]
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_metrics_are_logged_with_lightnings_own_at_its_steps(toys, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callback = RegradCallback(["xgrad"])
    settings = {"logger": logger, "log_every_n_steps": 2, "accumulate_grad_batches": 2}
    toys.trainer(tmp_path, callback, **settings).fit(toys.Classifier(), toys.loader())
    head, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    values = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["step"] for row in values] == ["1", "3", "5"]
    assert [float(row["regrad/steps_applied"]) for row in values] == [2, 4, 6]
    assert all(
        row["loss"] and float(row["regrad/xgrad/weights/relative_change"]) > 0 for row in values
    )
    assert (tmp_path / "regrad-receipt.json").is_file()


def test_a_trial_run_leaves_nothing_behind(toys, tmp_path):
    toys.trainer(tmp_path, RegradCallback(["xgrad"]), fast_dev_run=True).fit(
        toys.Classifier(), toys.loader()
    )
    assert list(tmp_path.iterdir()) == []


def test_steps_that_a_scaler_skips_are_no_steps(toys, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    module, callback = toys.Classifier(), RegradCallback(SPECS)
    half = MixedPrecision("16-mixed", "cpu", scaler=scaler)

    class Overflowing(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.fit_loop.epoch_loop.batch_idx == 1:
                pl_module.net[0].weight.grad.fill_(torch.inf)

    toys.trainer(tmp_path, callback, Overflowing(), plugins=[half]).fit(module, toys.loader())
    assert callback.attachment.metrics()["steps_applied"] == 10
    assert all(weight.isfinite().all() for weight in module.parameters())
    assert callback.attachment.metrics()["xgrad/weights/relative_change"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_on_a_device_trains_finite(toys, tmp_path):
    module, callback = toys.Classifier(), RegradCallback(SPECS)
    toys.trainer(tmp_path, callback, accelerator="cuda", precision="16-mixed").fit(
        module, toys.loader()
    )
    assert all(weight.isfinite().all() for weight in module.parameters())
    assert callback.attachment.metrics()["steps_applied"] > 0


class DeepSpeedEngine(nn.Module):
    """What DeepSpeed's strategy puts around a module goes by this name."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class FullyShardedDataParallel(nn.Sequential):
    """What FSDP1 puts around a module goes by this name."""


@pytest.mark.parametrize(
    ("wrapper", "rule"),
    [
        (DeepSpeedEngine, "DeepSpeed hides gradients; use DDP, FSDP2"),
        (FullyShardedDataParallel, "'agc' is not exact on layout 'flat'"),
        (
            nn.parallel.DistributedDataParallel,
            "'lone' is not exact on layout 'ddp'; it is on plain",
        ),
    ],
)
def test_a_strategy_on_which_a_correction_is_not_exact_is_refused_before_training(
    toys, tmp_path, wrapper, rule
):
    class Wrapping(SingleDeviceStrategy):
        def model_to_device(self):
            if wrapper is nn.parallel.DistributedDataParallel:
                self.model = wrapper.__new__(wrapper)  # without processes
                nn.Module.__init__(self.model)
                self.model.module = self.lightning_module
            else:
                self.model = wrapper(self.model)

    made = [Lone()] if wrapper is nn.parallel.DistributedDataParallel else ["agc"]
    module, strategy = toys.Classifier(), Wrapping(torch.device("cpu"))
    with pytest.raises(RegradError, match=rule):
        toys.trainer(tmp_path, RegradCallback(made), strategy=strategy).fit(module, toys.loader())
    assert toys.difference(toys.weights(module), toys.weights(toys.Classifier())) == 0


class Lone(regrad.Correction):
    """Exact on one process alone."""

    name = "lone"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step):
        pass


def test_a_search_for_the_rate_leaves_no_trace(toys, tmp_path):
    fits = []
    for place in (
        0,
        1,
    ):  # after the search there is nothing of the callback's that it could have touched
        module, callback = toys.Classifier(), RegradCallback(["xgrad"])
        module.lr = 0.1
        callbacks = [LearningRateFinder(num_training_steps=4, update_attr=False)]
        callbacks.insert(place, callback)
        trainer = toys.trainer(tmp_path, *callbacks)
        trainer.fit(module, toys.loader())
        # Lightning 2.5.0 itself takes the search's steps off those of the fit.
        assert callback.attachment.metrics()["steps_applied"] == trainer.global_step >= 8
        fits.append(toys.weights(module))
    assert toys.difference(*fits) == 0


def test_a_tuner_leaves_no_trace(toys, tmp_path):
    module, callback = toys.Classifier(), RegradCallback(["xgrad"])
    module.lr = 0.1
    trainer = toys.trainer(tmp_path, callback)
    Tuner(trainer).lr_find(module, toys.loader(), num_training=4, update_attr=False)
    trainer.fit(module, toys.loader())
    assert toys.difference(toys.weights(module), toys.plain_loop(["xgrad"])[0]) == 0
    assert callback.attachment.metrics()["steps_applied"] == 12


def test_a_trainer_of_the_other_import_name_takes_the_callback(toys, tmp_path):
    other = pytest.importorskip("pytorch_lightning")
    assert other.Trainer is not Trainer

    class Theirs(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = toys.network()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return toys.optimizer_for(self.net)

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    folder = {"default_root_dir": tmp_path, "enable_checkpointing": False}
    whole, callback = Theirs(), RegradCallback(["xgrad"])
    trainer = other.Trainer(max_epochs=1, callbacks=[callback], **folder, **quiet)
    trainer.fit(whole, toys.loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = RegradCallback(["xgrad"])
    trainer = other.Trainer(max_epochs=2, callbacks=[again], **folder, **quiet)
    trainer.fit(Theirs(), toys.loader(), ckpt_path=tmp_path / "half.ckpt")
    assert again.attachment.metrics()["steps_applied"] == 12
    assert again.attachment.metrics()["xgrad/weights/trigger_rate"] > 0.8
