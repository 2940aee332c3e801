"""The weights of VeLO's networks: their shapes, and the files that hold them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES: dict[str, tuple[int, ...]] = {
    "unused.weight": (30, 512),
    "unused.bias": (512,),
    "others.weight": (30, 512),
    "others.bias": (512,),
    "own.weight": (30, 512),
    "own.bias": (512,),
    "gates.weight": (1024, 2048),
    "gates.bias": (2048,),
    "mixing.weight": (512, 256),
    "mixing.bias": (256,),
    "factor.weight": (512, 1),
    "factor.bias": (1,),
    "hidden": (1, 512),
    "cell": (1, 512),
    "bank.0.weight": (256, 30, 4),
    "bank.0.bias": (256, 4),
    "bank.1.weight": (256, 4, 4),
    "bank.1.bias": (256, 4),
    "bank.2.weight": (256, 4, 3),
    "bank.2.bias": (256, 3),
}
"""Name and shape of every tensor; the published networks have an `unused` layer too."""

# Where the published file has them. Its first layer is cut by the 14 kinds of features.
PUBLISHED_NAMES = {
    "unused": "rnn_params/linear",
    "others": "rnn_params/linear_1",
    "own": "rnn_params/linear_2",
    "gates": "rnn_params/rnn/linear",
    "mixing": "rnn_params/rnn_to_controls",
    "factor": "rnn_params/step_size",
}
FEATURE_WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)

# Where the copies for PyTorch have them: two folders, matrices transposed.
RECURRENT_FOLDER = "VeLO_RNN"
BANK_FOLDER = "VeLO_MLP"
TORCH_NAMES = {
    "unused": "mix_layer1",
    "others": "mix_layer2",
    "own": "final_mix_layer",
    "gates": "lstm.linear",
    "mixing": "rnn_to_controls",
    "factor": "step_size",
}
TORCH_BANK_NAMES = {
    "bank.0.weight": "input_weights_",
    "bank.0.bias": "input_bias_",
    "bank.1.weight": "hidden_weights_.0",
    "bank.1.bias": "hidden_bias_.0",
    "bank.2.weight": "output_weights_",
    "bank.2.bias": "output_bias_",
}

ARRAY_CODE = 1  # of an array among the extension types of flax
WHERE = (
    "the published ones are the file params of gs://gresearch/learned_optimization/"
    "pretrained_lopts/aug12_continue_on_bigger_2xbs_200kstep_bigproblem_v2_5620, and in the "
    f"folders {RECURRENT_FOLDER} and {BANK_FOLDER} the copies Pauljanson002/VeLO_RNN and "
    "Pauljanson002/VeLO_MLP of the Hugging Face hub; both Apache-2.0"
)


class VeLOWeights:
    """Hold the weights of VeLO's networks, 2,320,385 numbers in float32.

    Args:
        tensors: Every tensor of `SHAPES` by its name, in float32; matrices map rows to columns.

    Raises:
        ValueError: If a name is missing or unknown, or a shape, a dtype or a value is not right.

    Example:
        >>> weights = random_weights(0)
        >>> sum(tensor.numel() for tensor in weights.tensors.values())
        2320385
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        missing = sorted(SHAPES.keys() - tensors.keys())
        if missing:
            raise ValueError(f"weights must have {missing[0]!r}, got none; {WHERE}")
        unknown = sorted(tensors.keys() - SHAPES.keys())
        if unknown:
            raise ValueError(f"weights must have VeLO's names alone, got {unknown[0]!r}; {WHERE}")
        for name, shape in SHAPES.items():
            _check(name, tensors[name], shape)
        self.tensors = {name: tensors[name].detach().cpu() for name in SHAPES}

    def digest(self) -> str:
        """Return 16 hexadecimal digits that tell these weights from others."""
        total = hashlib.sha256()
        for tensor in self.tensors.values():
            total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()[:16]

    def placed(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors on a device and in a dtype."""
        return {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}


def random_weights(seed: int) -> VeLOWeights:
    """Draw weights, for tests: an optimizer with them does not optimise.

    Args:
        seed: The same weights for the same seed; global random numbers are left alone.

    Returns:
        Normal numbers over the root of a layer's inputs; a tenth of that for biases and the
        LSTM's first state.

    Example:
        >>> random_weights(0).tensors["bank.0.weight"].shape
        torch.Size([256, 30, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in SHAPES.items():
        scale = 0.1
        if name.endswith("weight"):
            scale = 1 / math.sqrt(shape[-2])
        tensors[name] = scale * torch.randn(shape, generator=generator)
    return VeLOWeights(tensors)


def save_weights(weights: VeLOWeights, path: str | os.PathLike[str]) -> None:
    """Write weights to a file of safetensors, which `load_weights` reads.

    Args:
        weights: What to write.
        path: Must end in .safetensors. Overwritten.

    Raises:
        ValueError: If the name does not end so.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    save_file(contiguous, path)


def load_weights(path: str | os.PathLike[str]) -> VeLOWeights:
    """Read weights from any layout in which they are published; nothing is unpickled.

    Args:
        path: The published file (flax's msgpack, with or without what a checkpoint adds), or a
            folder with the folders VeLO_RNN and VeLO_MLP of the copies for PyTorch, each with
            its model.safetensors, or a file .safetensors of `save_weights`.

    Raises:
        FileNotFoundError: If the file, or one in the folder, is missing.
        ValueError: If it has another layout, or a name or a shape is not right.
        TypeError: If there is something else than a tensor under a name.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"weights must be a file that exists, got {str(path)!r}; {WHERE}")
    if path.is_dir():
        return VeLOWeights(_from_torch_copies(path))
    if path.suffix == ".safetensors":
        return VeLOWeights(_read_safetensors(path))
    return VeLOWeights(_from_published(path))


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless a tensor has its shape, float32 and finite numbers."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"weights must have {name!r} of shape {list(shape)}, got {list(tensor.shape)}; {WHERE}"
        )
    if tensor.dtype != torch.float32:
        raise ValueError(f"weights must have {name!r} in float32, got {tensor.dtype}; {WHERE}")
    if not tensor.isfinite().all():
        raise ValueError(f"weights must have finite numbers in {name!r}, got others; {WHERE}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file."""
    if not path.exists():
        raise FileNotFoundError(f"weights must be a file that exists, got {str(path)!r}; {WHERE}")
    try:
        return load_file(path)
    except SafetensorError as problem:
        raise ValueError(
            f"weights must be safetensors, got {str(path)!r}: {problem}; {WHERE}"
        ) from problem


def _from_torch_copies(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the two folders for PyTorch, under our names."""
    recurrent = _read_safetensors(folder / RECURRENT_FOLDER / "model.safetensors")
    bank = _read_safetensors(folder / BANK_FOLDER / "model.safetensors")
    tensors = {}
    for ours, theirs in TORCH_NAMES.items():
        tensors[f"{ours}.weight"] = _taken(recurrent, f"{theirs}.weight").mT
        tensors[f"{ours}.bias"] = _taken(recurrent, f"{theirs}.bias")
    tensors["hidden"] = _taken(recurrent, "lstm_init_state.0")
    tensors["cell"] = _taken(recurrent, "lstm_init_state.1")
    for ours, theirs in TORCH_BANK_NAMES.items():
        tensor = _taken(bank, theirs)
        tensors[ours] = tensor.mT if ours.endswith("weight") else tensor
    return tensors


def _from_published(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the published file, under our names."""
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_array, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as problem:
        raise ValueError(
            f"weights must be msgpack as flax writes it, got {str(path)!r}: {problem}; {WHERE}"
        ) from problem
    if isinstance(tree, Mapping) and "params" in tree:
        tree = tree["params"]
    there = dict(_leaves(tree, ""))
    tensors = {}
    for ours, theirs in PUBLISHED_NAMES.items():
        tensors[f"{ours}.weight"] = _taken(there, f"{theirs}/w")
        tensors[f"{ours}.bias"] = _taken(there, f"{theirs}/b")
    tensors["hidden"] = _taken(there, "lstm_init_state/hidden")
    tensors["cell"] = _taken(there, "lstm_init_state/cell")
    parts = []
    for index, width in enumerate(FEATURE_WIDTHS):
        name = f"ff_mod_stack/~/w0__{index}"
        part = _taken(there, name)
        _check(name, part, (256, width, 4))
        parts.append(part)
    tensors["bank.0.weight"] = torch.cat(parts, dim=1)
    tensors["bank.0.bias"] = _taken(there, "ff_mod_stack/~/b0")
    for layer in (1, 2):
        tensors[f"bank.{layer}.weight"] = _taken(there, f"ff_mod_stack/~/w{layer}")
        tensors[f"bank.{layer}.bias"] = _taken(there, f"ff_mod_stack/~/b{layer}")
    return tensors


def _taken(tensors: Mapping[str, Any], name: str) -> Tensor:
    """Return a tensor, or raise `ValueError` if there is none of that name."""
    if name not in tensors:
        raise ValueError(f"weights must have the tensor {name!r}, got none; {WHERE}")
    tensor: Any = tensors[name]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"weights must have a tensor at {name!r}, got {tensor!r:.40}; {WHERE}")
    return tensor


def _leaves(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    """Return the leaves of nested dicts by their paths."""
    if not isinstance(tree, Mapping):
        return [(prefix, tree)]
    leaves = []
    for key, branch in tree.items():
        leaves += _leaves(branch, f"{prefix}/{key}" if prefix else str(key))
    return leaves


def _array(code: int, data: bytes) -> Any:
    """Return an array of flax's msgpack as a tensor, and anything else as None."""
    if code != ARRAY_CODE:
        return None
    shape, dtype, content = msgpack.unpackb(data)
    if dtype != "float32":
        raise ValueError(f"its arrays must be float32, got {dtype!r}")
    if math.prod(shape) == 0:
        return torch.empty(shape)
    return torch.frombuffer(bytearray(content), dtype=torch.float32).reshape(shape)
