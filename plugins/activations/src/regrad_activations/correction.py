"""What linear layers keep of their inputs for backward, as corrections."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import weakref
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from regrad import Attachment, Correction, RegradError
from regrad.correction import Control, Needs
from regrad.signatures import takes
from torch import Tensor, distributed, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from regrad_activations import functional

FEWEST_ROWS = 10
EVERY_LINEAR = "linear"
Layers = str | tuple[str | int, ...]


class Short:
    """The short form of one layer's input, kept by the graph until backward.

    Args:
        matrix: Tells shape and dtype.
        parts: The tensors that are kept.
    """

    def __init__(self, matrix: Tensor, *parts: Tensor) -> None:
        self.shape = matrix.shape
        self.dtype = matrix.dtype
        self.parts = parts

    def bytes(self) -> int:
        """Return what it takes."""
        return sum(part.nbytes for part in self.parts)


class SavedRows(Correction):
    """Give the inputs that linear layers save for backward a shorter form.

    Outputs, input gradients and bias gradients keep every bit; the weight gradient is computed from
    what the short form gives back.
    """

    needs = Needs(stages=("hidden",), exclusive=("saved inputs",), reads=("elements",), sparse=True)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._shared = WeakTensorKeyDictionary()
        self._names: dict[nn.Module, str] = {}
        self._bytes_kept = 0
        self._bytes_plain = 0

    @abstractmethod
    def _shorten(self, matrix: Tensor, name: str) -> Short | None:
        """Return the short form of a matrix, or None to keep it as it is."""

    @abstractmethod
    def _restore(self, short: Short) -> Tensor:
        """Return what backward reads."""

    def setup(self, attachment: Attachment) -> None:
        """Hook the layers."""
        layers = _selected(attachment.model, self.options.layers)
        self._names = {layer: name for name, layer in layers.items()}
        for layer in layers.values():
            attachment.hook_saved(layer, self._pack, self._unpack, with_inputs=True)

    @torch.no_grad()
    def _pack(self, layer: Any, inputs: tuple[Any, ...], tensor: Tensor) -> Any:
        """Shorten the layer's input; leave its weight as it is."""
        given = inputs[0]
        if not _is_input(layer, given, tensor):
            return tensor
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            raise RegradError(
                f"{self.name!r} must see plain tensors, got {type(tensor).__name__} in layer "
                f"{self._names[layer]!r}; leave tensor-parallel layers out with layers=[…]"
            )
        is_view = tensor.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
        shared = self._shared_with(layer, given, tensor)
        if shared is not None:
            self._bytes_plain += 0 if is_view else tensor.nbytes
            return shared
        short = self._shorten(tensor, self._names[layer])
        self._bytes_plain += tensor.nbytes
        if short is None:
            self._bytes_kept += tensor.nbytes
            return tensor
        self._bytes_kept += short.bytes()
        # The graph alone keeps the short form.
        self._shared[given] = (given._version, weakref.ref(short))
        self._measure(layer, tensor, short)
        return short

    def _shared_with(self, layer: Any, given: Tensor, tensor: Tensor) -> Short | None:
        """Return the short form that another layer has made of the same input."""
        # A hook of the user's may have given the layer another input.
        if given not in self._shared or len(layer._forward_pre_hooks) > 1:
            return None
        version, reference = self._shared[given]
        short: Short | None = reference()
        if short is None or version != given._version or short.dtype != tensor.dtype:
            return None
        return short

    def _measure(self, layer: nn.Module, tensor: Tensor, short: Short) -> None:
        """Show the effect meter, where it looks, the input before and after."""
        engine = self.attachment.engine
        if engine.meter.due(self, engine.applied):
            name = self._names[layer]
            before = {name: tensor.detach()}
            engine.meter.observe(self.name, "hidden", before, {name: self._restore(short)})

    @torch.no_grad()
    def _unpack(self, packed: Any) -> Tensor:
        """Return what backward reads."""
        return self._restore(packed) if isinstance(packed, Short) else packed

    def metrics(self) -> dict[str, float]:
        """Return the share of the bytes of the layers' inputs that is kept, since attach."""
        if not self._bytes_plain:
            return {}
        return {"saved_share": self._bytes_kept / self._bytes_plain}


@dataclass(frozen=True, kw_only=True)
class OfLayers:
    """Which layers."""

    layers: Layers = EVERY_LINEAR


@dataclass(frozen=True, kw_only=True)
class OfSample:
    """How many rows of which layers, and how they are drawn."""

    share: float = 0.3
    layers: Layers = EVERY_LINEAR
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed!r}")


class Int8Rows(SavedRows):
    r"""Keep the inputs of linear layers in int8, with one scale per row.

    For row i of the input H, :math:`s_i = \max_j |H_{ij}| / 127` and

    .. math:: \hat H_{ij} = s_i\,\mathrm{round}(H_{ij} / s_i), \qquad \partial W = G^\top \hat H.

    Args:
        layers: "linear" for every `nn.Linear`, or names and patterns such as "blocks.*.fc1".

    Raises:
        RegradError: At attach, in a compiled model or without such layers; in the first forward,
            inside an activation checkpoint.

    Example:
        >>> Int8Rows()
        Int8Rows(layers='linear')

    References:
        Block-wise quantisation of saved activations is common, as in Chen et al., 2021, "ActNN".
        There the rounding is random and down to 2 bits; here it is to the nearest of 255 values.
    """

    name = "int8-rows"
    needs = Needs(
        stages=("hidden",),
        exclusive=("saved inputs",),
        reads=("elements",),
        closures=True,
        sparse=True,
    )
    Options = OfLayers

    @takes(OfLayers)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def _shorten(self, matrix: Tensor, name: str) -> Short | None:
        if not matrix.numel():
            return None
        return Short(matrix, *functional.quantise(matrix))

    def _restore(self, short: Short) -> Tensor:
        integers, scales = short.parts
        return functional.dequantise(integers, scales, dtype=short.dtype)


class Sampled(SavedRows):
    """Keep a sample of the rows, drawn anew for every input."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._draws = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def _shorten(self, matrix: Tensor, name: str) -> Short | None:
        rows = len(matrix)
        count = max(math.floor(self.options.share * rows), FEWEST_ROWS)
        if count >= rows:
            return None
        indices, weights = self._choose(matrix, count, name)
        values = matrix[indices] * weights.to(matrix.dtype)
        return Short(matrix, indices, values)

    @abstractmethod
    def _choose(self, matrix: Tensor, count: int, name: str) -> tuple[Tensor, Tensor]:
        """Return indices [k] and weights [k, 1] or one weight."""

    def _restore(self, short: Short) -> Tensor:
        return functional.sampled_sum(short.shape, *short.parts)

    def _generator(self, device: torch.device) -> torch.Generator:
        """Return the random numbers of the next draw: they follow from seed, rank and its number.

        So the number alone is state, the same on every rank, and a resumed run draws the same.
        """
        is_apart = distributed.is_available() and distributed.is_initialized()
        rank = distributed.get_rank() if is_apart else 0
        key = f"{self.options.seed} {rank} {self._draws}".encode()
        self._draws += 1
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        number = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest())
        return self._generators[device].manual_seed(number)

    def state_dict(self) -> dict[str, Any]:
        """Return how many draws there were."""
        return {"draws": self._draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the draws after those of the state."""
        self._draws = int(state["draws"])


class UniformRows(Sampled):
    r"""Keep a share of the rows of linear layers' inputs, chosen uniformly without replacement.

    Of M rows :math:`k = \max(\lfloor \rho M \rfloor, 10)` are kept, each times M/k, so that the
    weight gradient is unbiased. With k ≥ M nothing changes.

    Args:
        share: :math:`\rho`, in (0, 1].
        layers: "linear" for every `nn.Linear`, or names and patterns such as "blocks.*.fc1".
        seed: Of the draws, with the rank.

    Raises:
        ValueError: If an option is out of its range.
        RegradError: At attach, in a compiled model or without such layers; in the first forward,
            inside an activation checkpoint.

    Example:
        >>> UniformRows(share=0.5)
        UniformRows(share=0.5, layers='linear', seed=0)

    References:
        The control of `WTACRS`.
    """

    name = "uniform-rows"
    Options = OfSample

    @takes(OfSample)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def _choose(self, matrix: Tensor, count: int, name: str) -> tuple[Tensor, Tensor]:
        rows = len(matrix)
        generator = self._generator(matrix.device)
        indices = functional.choose_uniformly(
            rows, count, generator=generator, device=matrix.device
        )
        # What is not finite must show in the gradient, also where its row is not chosen.
        is_finite = _norms(matrix).sum().isfinite()
        return indices, torch.where(is_finite, rows / count, torch.nan)

    def control(self, optimizer: Optimizer) -> Control:
        """Return int8 rows of the same layers, which keep less memory and all rows."""
        spec = Int8Rows(layers=self.options.layers).as_text()
        return Control(name=spec, corrections=(spec,))


class WTACRS(Sampled):
    r"""Keep a share of the rows of linear layers' inputs, chosen by WTA-CRS.

    With :math:`p_i = |H_i| / \sum_j |H_j|`, the gradient being unknown in the forward, the
    :math:`n^*` most probable rows are kept, and :math:`k - n^*` of the rest are drawn with
    replacement, weighted so that the weight gradient is unbiased; see
    `regrad_activations.functional.choose_by_weight`.

    Args:
        share: :math:`\rho` in :math:`k = \max(\lfloor \rho M \rfloor, 10)`, in (0, 1].
        layers: "linear" for every `nn.Linear`, or names and patterns such as "blocks.*.fc1".
        seed: Of the draws, with the rank.

    Raises:
        ValueError: If an option is out of its range.
        RegradError: At attach, in a compiled model or without such layers; in the first forward,
            inside an activation checkpoint.

    Example:
        >>> WTACRS()
        WTACRS(share=0.3, layers='linear', seed=0)

    References:
        Liu et al., 2023, "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of
        Language Model" (arXiv 2305.15265). There p also has the norm of the same sample's gradient
        in the last epoch, from a table on the host; here it has not.
    """

    name = "wta-crs"
    Options = OfSample

    @takes(OfSample)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._seen: dict[str, Tensor] = {}

    def _choose(self, matrix: Tensor, count: int, name: str) -> tuple[Tensor, Tensor]:
        norms = _norms(matrix)
        probabilities = functional.row_probabilities(norms)
        is_finite = norms.sum().isfinite()
        usable = torch.where(is_finite, probabilities, 1 / len(norms))
        generator = self._generator(matrix.device)
        indices, weights, certain = functional.choose_by_weight(usable, count, generator=generator)
        engine = self.attachment.engine
        if engine.meter.due(self, engine.applied):
            ratio = _variance_ratio(norms.double(), usable, certain, count)
            self._seen[name] = torch.stack([certain / count, ratio])
        return indices, torch.where(is_finite, weights, torch.nan)[:, None]

    def control(self, optimizer: Optimizer) -> Control:
        """Return as many rows of the same layers, chosen uniformly."""
        options = self.options
        spec = UniformRows(layers=options.layers, share=options.share).as_text()
        return Control(name=spec, corrections=(spec,))

    def metrics(self) -> dict[str, float]:
        """Return, beside the share of bytes, what the last measured inputs gave, as layers' means.

        `certain_share` is n*/k. `variance_ratio` is the variance beside that of as many rows
        chosen uniformly, if all rows' gradients have one size and independent directions.
        """
        found = super().metrics()
        if self._seen:
            means = torch.stack([seen.cpu() for seen in self._seen.values()]).mean(dim=0)
            found["certain_share"] = float(means[0])
            found["variance_ratio"] = float(means[1])
        return {name: value for name, value in found.items() if math.isfinite(value)}


def _norms(matrix: Tensor) -> Tensor:
    """Return the rows' norms [M], in float32 at least."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=dtype)
    return norms


def _variance_ratio(norms: Tensor, probabilities: Tensor, certain: Tensor, count: int) -> Tensor:
    """Return the variance beside that of uniform rows without replacement."""
    ordered, order = probabilities.sort(descending=True, stable=True)
    squares = norms[order].square()
    is_drawn = (torch.arange(len(norms), device=norms.device) >= certain) & (ordered > 0)
    rest = torch.where(is_drawn, ordered, 0).sum()
    sums = torch.where(is_drawn, squares / ordered, 0).sum() * rest
    own = (sums - torch.where(is_drawn, squares, 0).sum()) / (count - certain)
    return own * count / ((len(norms) - count) * squares.sum())


def _is_input(layer: nn.Linear, given: Any, tensor: Tensor) -> bool:
    """Say whether a saved tensor is the layer's input, by shape and stride.

    Under autocast both are copies, and the order differs with and without bias. A tensor that may
    as well be the weight is none: then its gradient is exact and nothing is saved.
    """
    width = layer.in_features
    if not isinstance(given, Tensor) or tensor.dim() != 2 or tensor.shape[1] != width:
        return False
    if tensor.shape[0] * width != given.numel():
        return False
    if tensor.shape != (width, layer.out_features):
        return True
    # Square: the weight is saved transposed.
    is_weight_plain = layer.weight.is_contiguous() and width > 1
    return is_weight_plain and tensor.stride() != (1, width)


def _selected(model: nn.Module, layers: Layers) -> dict[str, nn.Linear]:
    """Return the layers that are meant, by name.

    Raises:
        RegradError: If there are none, or a name or pattern finds none.
    """
    found = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if layers == EVERY_LINEAR:
        if not found:
            raise RegradError(
                "layers must find an nn.Linear in the model, got 'linear', which finds none"
            )
        return found
    patterns = [layers] if isinstance(layers, str) else [str(layer) for layer in layers]
    selected: dict[str, nn.Linear] = {}
    for pattern in patterns:
        names = fnmatch.filter(found, pattern)
        if not names:
            known = ", ".join(found) or "none"
            raise RegradError(
                f"layers must name nn.Linear modules, got {pattern!r}; there: {known}"
            )
        selected |= {name: found[name] for name in names}
    if not selected:
        raise RegradError(f"layers must name nn.Linear modules, got {layers!r}")
    return selected


def _is_linear(module: nn.Module) -> bool:
    """Say whether a module computes what `nn.Linear` does and saves nothing else."""
    if not isinstance(module, nn.Linear) or parametrize.is_parametrized(module):
        return False
    return type(module).forward is nn.Linear.forward
