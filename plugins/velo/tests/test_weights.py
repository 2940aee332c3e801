"""Shapes, and the files that hold weights. The sizes are those of the published files."""

import msgpack
import numpy as np
import pytest
import torch
from regrad_velo import VeLOWeights, load_weights, random_weights, save_weights
from regrad_velo.weights import SHAPES
from safetensors.torch import save_file

RECURRENT = {
    "linear": "mix_layer1",
    "linear_1": "mix_layer2",
    "linear_2": "final_mix_layer",
    "rnn/linear": "lstm.linear",
    "rnn_to_controls": "rnn_to_controls",
    "step_size": "step_size",
}


@pytest.fixture(scope="session")
def theta(reference):
    return reference.random_theta(0)


def packed(tree):
    """Return a tree of arrays as flax writes it."""
    if isinstance(tree, dict):
        return {name: packed(branch) for name, branch in tree.items()}
    if isinstance(tree, np.ndarray):
        content = (tree.shape, tree.dtype.name, tree.tobytes("C"))
        return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))
    return tree


def write_published(path, tree):
    path.write_bytes(msgpack.packb(packed(tree)))
    return path


def write_copies(folder, theta):
    """Write the copies for PyTorch; the bank's has the mixed MLP beside the bank."""
    recurrent = {}
    for theirs, name in RECURRENT.items():
        layer = theta["rnn_params"][theirs]
        recurrent[f"{name}.weight"] = torch.tensor(layer["w"]).T.contiguous()
        recurrent[f"{name}.bias"] = torch.tensor(layer["b"])
    recurrent["lstm_init_state.0"] = torch.tensor(theta["lstm_init_state"]["hidden"])
    recurrent["lstm_init_state.1"] = torch.tensor(theta["lstm_init_state"]["cell"])
    stack = theta["ff_mod_stack"]["~"]
    first = np.concatenate([stack[f"w0__{index}"] for index in range(14)], axis=1)
    layers = [("input", "", first), ("hidden", ".0", stack["w1"]), ("output", "", stack["w2"])]
    bank = {}
    for place, (name, end, weight) in enumerate(layers):
        bank[f"{name}_weights_{end}"] = torch.tensor(weight).mT.contiguous()
        bank[f"{name}_bias_{end}"] = torch.tensor(stack[f"b{place}"])
        bank[f"{name}_weights{end}"] = torch.zeros(weight.shape[2], weight.shape[1])
        bank[f"{name}_bias{end}"] = torch.zeros(weight.shape[2])
    for name, tensors in (("VeLO_RNN", recurrent), ("VeLO_MLP", bank)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return folder


def test_the_counts_are_the_published_ones():
    numbers = {name: tensor.numel() for name, tensor in random_weights(0).tensors.items()}
    bank = sum(number for name, number in numbers.items() if name.startswith("bank"))
    assert bank == 40_704
    assert bank / 256 == 159
    assert sum(numbers.values()) - bank == 2_279_681
    assert sum(numbers.values()) == 2_320_385


def test_the_published_layout_has_the_published_size_and_is_read(tmp_path, theta):
    bare = write_published(tmp_path / "theta.state", theta)
    assert bare.stat().st_size == 9_282_507
    checkpoint = {"params": theta, "gen_id": "0" * 32, "step": 5620}
    whole = write_published(tmp_path / "params", checkpoint)
    assert whole.stat().st_size == 9_282_564
    weights = load_weights(bare)
    assert load_weights(whole).digest() == weights.digest()
    stack = theta["ff_mod_stack"]["~"]
    assert torch.equal(weights.tensors["bank.0.weight"][:, 3:6], torch.tensor(stack["w0__3"]))
    own = torch.tensor(theta["rnn_params"]["linear_2"]["w"])
    assert torch.equal(weights.tensors["own.weight"], own)


def test_the_copies_for_pytorch_are_the_published_file(tmp_path, theta):
    folder = write_copies(tmp_path, theta)
    assert (folder / "VeLO_RNN" / "model.safetensors").stat().st_size == 9_119_908
    published = load_weights(write_published(tmp_path / "params", theta))
    assert load_weights(str(folder)).digest() == published.digest()


def test_saved_weights_are_read_again(tmp_path):
    weights = random_weights(1)
    save_weights(weights, tmp_path / "own.safetensors")
    assert load_weights(tmp_path / "own.safetensors").digest() == weights.digest()
    assert weights.digest() != random_weights(2).digest()
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got"):
        save_weights(weights, tmp_path / "own.bin")


def test_a_missing_file_says_what_it_is_where_it_is_and_its_licence(tmp_path):
    with pytest.raises(FileNotFoundError) as problem:
        load_weights(tmp_path / "params")
    for word in ("a file that exists, got", "gs://gresearch", "Pauljanson002/VeLO_RNN", "Apache"):
        assert word in str(problem.value)
    with pytest.raises(FileNotFoundError, match=r"VeLO_RNN.*model\.safetensors"):
        load_weights(tmp_path)


def test_what_is_no_such_file_is_refused(tmp_path):
    path = tmp_path / "params"
    path.write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(ValueError, match="weights must"):
        load_weights(path)
    other = tmp_path / "own.safetensors"
    other.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="weights must be safetensors"):
        load_weights(other)


def test_a_wrong_name_or_shape_is_named(tmp_path, theta):
    renamed = {**theta, "rnn_params": {**theta["rnn_params"]}}
    del renamed["rnn_params"]["step_size"]
    with pytest.raises(ValueError, match="must have the tensor 'rnn_params/step_size/w', got none"):
        load_weights(write_published(tmp_path / "renamed", renamed))
    small = {"ff_mod_stack": {"~": {**theta["ff_mod_stack"]["~"]}}}
    small["ff_mod_stack"]["~"]["w0__3"] = np.zeros((256, 2, 4), np.float32)
    with pytest.raises(ValueError, match=r"'ff_mod_stack/~/w0__3' of shape \[256, 3, 4\], got"):
        load_weights(write_published(tmp_path / "small", {**theta, **small}))
    double = {**theta, "lstm_init_state": {"hidden": np.zeros((1, 512))}}
    with pytest.raises(ValueError, match="its arrays must be float32, got 'float64'"):
        load_weights(write_published(tmp_path / "double", double))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": None}, "weights must have 'hidden', got none"),
        ({"more": torch.zeros(1)}, "weights must have VeLO's names alone, got 'more'"),
        ({"cell": torch.zeros(512)}, r"'cell' of shape \[1, 512\], got \[512\]"),
        ({"cell": torch.zeros(1, 512).double()}, r"'cell' in float32, got torch\.float64"),
        ({"cell": torch.full((1, 512), torch.nan)}, "finite numbers in 'cell'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message):
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors.update(change)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        VeLOWeights(kept)
