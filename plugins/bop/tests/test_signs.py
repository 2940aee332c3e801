import pytest
import torch
from regrad_bop import binarise_


def test_a_modules_weights_become_their_signs_and_zero_becomes_one():
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.0], [-1e-30, -7.0]]))
        layer.bias.copy_(torch.tensor([3.0, -3.0]))
    binarise_(layer)
    assert layer.weight.tolist() == [[1.0, 1.0], [-1.0, -1.0]]
    assert layer.bias.tolist() == [1.0, -1.0]
    assert layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_keep_their_dtype(dtype):
    weight = torch.tensor([2.0, -2.0], dtype=dtype)
    binarise_([weight])
    assert weight.dtype == dtype
    assert weight.tolist() == [1.0, -1.0]


def test_what_has_no_sign_is_refused_before_anything_changes():
    good = torch.tensor([0.5])
    with pytest.raises(ValueError, match="weights must be numbers, got nan; initialise them"):
        binarise_([good, torch.tensor([float("nan")])])
    assert good.item() == 0.5
