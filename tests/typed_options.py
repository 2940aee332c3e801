"""What a type checker must accept and refuse: `nox -s typecheck` reads it, nobody runs it.

A call that is wrong is marked as ignored. Where the checker finds nothing wrong, the mark itself
is an error (`warn_unused_ignores`).
"""

from typing import Any

from regrad_activations import WTACRS, Int8Rows, UniformRows
from regrad_adafisher import AdaFisher
from regrad_adanorm import AdaNorm
from regrad_boosted import Boosted
from regrad_cautious import Cautious
from regrad_centralization import Centralization
from regrad_clipping import AGC, ClipNorm, ClipUpdate, ClipValue
from regrad_gcode import GCODE
from regrad_gcw import GCW
from regrad_powergrad import PowerGrad
from regrad_tom import Tom
from regrad_velo import VeLO
from regrad_xgrad import AdaM3, XGrad


def right_calls() -> None:
    """Give every option a value of its type."""
    AdaFisher(average="ema", refresh=50, damping=1e-2, fisher="mean", select=("head.*", 2))
    AdaFisher(allow_adaptive=True)
    AdaNorm(decay=0.9, target="gradient")
    AGC(max_ratio=0.02, weight_floor=1e-2, head=None, axis=("decoder.*.weight=1",))
    Boosted(decay=0.3, exit_weights=(1.0, 2.0), alpha=0.5, rescale=True, exits=("aux", "main"))
    Cautious(divisor="count", keep="agreeing")
    Centralization(placement="decayed", conv_only=True)
    ClipNorm(max_norm=0.5)
    ClipUpdate(max_rms=0.5)
    ClipValue(max_value=0.5)
    GCODE(weight=0.2, warmup_steps=100, fit_every=2, learning_rate=1e-2, solver="rk4", adjoint=True)
    GCODE(norm="keep", flow="branch", stages=("layer1", 2), seed=1)
    GCW(layers="all", slots=("last",), prior=0.9, predictor="prior", fit_target="hindsight")
    GCW(target="gradient", norm="keep", gate=False, warmup_steps=0, fit_every=5)
    GCW(allow_double_lookahead=True)
    Int8Rows(layers=("blocks.*", "head"))
    PowerGrad(alpha=0.3)
    UniformRows(share=0.5, layers="linear", seed=1)
    WTACRS(share=0.5, layers=("0", 1), seed=1)
    XGrad(horizon=2.0, decoupled_decay=0.01, allow_double_lookahead=True, compiled=True)


def wrong_names() -> None:
    """Give a name that is no option."""
    AdaFisher(averages="ema")  # type: ignore[call-arg]
    AdaNorm(decays=0.9)  # type: ignore[call-arg]
    AGC(maxratio=0.02)  # type: ignore[call-arg]
    Boosted(decays=0.3)  # type: ignore[call-arg]
    Cautious(division="share")  # type: ignore[call-arg]
    Centralization(convonly=True)  # type: ignore[call-arg]
    ClipNorm(norm=0.5)  # type: ignore[call-arg]
    ClipUpdate(rms=0.5)  # type: ignore[call-arg]
    ClipValue(value=0.5)  # type: ignore[call-arg]
    GCODE(weights=0.2)  # type: ignore[call-arg]
    GCW(layer="all")  # type: ignore[call-arg]
    Int8Rows(share=0.5)  # type: ignore[call-arg]
    UniformRows(shares=0.5)  # type: ignore[call-arg]
    WTACRS(rows=10)  # type: ignore[call-arg]
    PowerGrad(beta=0.3)  # type: ignore[call-arg]
    XGrad(horizont=1)  # type: ignore[call-arg]


def wrong_values() -> None:
    """Give a value of another type."""
    AdaFisher(refresh="often")  # type: ignore[arg-type]
    AdaNorm(decay="0.9")  # type: ignore[arg-type]
    AGC(axis="none")  # type: ignore[arg-type]
    Boosted(exits="main")  # type: ignore[arg-type]
    Cautious(divisor="mean")  # type: ignore[arg-type]
    Centralization(placement="decay")  # type: ignore[arg-type]
    ClipNorm(max_norm=None)  # type: ignore[arg-type]
    ClipUpdate(max_rms="1")  # type: ignore[arg-type]
    ClipValue(max_value="1")  # type: ignore[arg-type]
    GCODE(solver="rk5")  # type: ignore[arg-type]
    GCW(predictor="slots")  # type: ignore[arg-type]
    Int8Rows(layers=1)  # type: ignore[arg-type]
    UniformRows(share="half")  # type: ignore[arg-type]
    WTACRS(seed="first")  # type: ignore[arg-type]
    PowerGrad(alpha=None)  # type: ignore[arg-type]
    XGrad(horizon="a")  # type: ignore[arg-type]


def no_name() -> None:
    """Give an option without its name."""
    XGrad(1.0)  # type: ignore[call-arg]


def attributes() -> None:
    """Use what the class has besides."""
    XGrad().needs.stages.index("weights")


def optimizers(parameters: Any) -> None:
    """Make the optimizers that plugins offer."""
    AdaM3(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.1, maximize=True)
    Tom(parameters, lr=1e-3, betas=(0.9, 0.99, 0.999), correct_bias=True, foreach=False)
    AdaM3(parameters, learning_rate=1e-3)  # type: ignore[call-arg]
    VeLO(parameters, lr=0.5, weights="params", num_steps=100)
    VeLO(parameters, weights="params")  # type: ignore[call-arg]
    Tom(parameters, betas=(0.9, 0.99))  # type: ignore[arg-type]
