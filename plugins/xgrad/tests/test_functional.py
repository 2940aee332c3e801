import pytest
import torch
from regrad_xgrad import functional


def tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


SHAPES = [(3,), (2, 5), (), (4, 1, 2)]


def test_momentum_displacement_is_minus_rate_times_buffer():
    buffers, out = tensors(SHAPES), tensors(SHAPES, seed=1)
    functional.momentum_displacement_(out, buffers, [0.5] * 4)
    for got, buffer in zip(out, buffers, strict=True):
        assert torch.equal(got, -0.5 * buffer)


def test_adam_displacement_is_the_published_formula():
    first, second, out = (
        tensors(SHAPES),
        [t.square() for t in tensors(SHAPES, seed=1)],
        tensors(SHAPES, seed=2),
    )
    functional.adam_displacement_(
        out,
        first,
        second,
        rate=[0.1] * 4,
        steps=[1, 2, 10, 1000],
        betas=[(0.9, 0.99)] * 4,
        eps=[1e-3] * 4,
    )
    for got, m, v, t in zip(out, first, second, [1, 2, 10, 1000], strict=True):
        unbiased, root = m / (1 - 0.9**t), (v / (1 - 0.99**t)).sqrt()
        torch.testing.assert_close(got, -0.1 * unbiased / (root + 1e-3), rtol=1e-14, atol=0)


def test_adam_displacement_of_a_first_step_is_the_rate_by_hand():
    out = [torch.empty(1, dtype=torch.float64)]
    # m = .1·2, v = .001·4 after one gradient of 2: m̂ = 2, v̂ = 4, D = 1
    m, v = torch.tensor([0.2], dtype=torch.float64), torch.tensor([0.004], dtype=torch.float64)
    functional.adam_displacement_(
        out, [m], [v], rate=[0.3], steps=[1], betas=[(0.9, 0.999)], eps=[0.0]
    )
    assert out[0].item() == pytest.approx(-0.3, abs=1e-15)


def test_list_operations_give_the_numbers_of_the_loop(monkeypatch):
    first, second = tensors(SHAPES), [t.square() for t in tensors(SHAPES, seed=1)]
    results = []
    for one_launch in (False, True):
        monkeypatch.setattr(functional, "_one_launch", lambda *_, answer=one_launch: answer)
        out, moved = tensors(SHAPES, seed=2), tensors(SHAPES, seed=3)
        functional.adam_displacement_(
            out,
            first,
            second,
            rate=[0.1] * 4,
            steps=[3] * 4,
            betas=[(0.9, 0.99)] * 4,
            eps=[1e-3] * 4,
        )
        functional.momentum_displacement_(moved, first, [0.5] * 4)
        results.append(out + moved)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)


def test_a_rate_of_zero_moves_nothing():
    out = tensors(SHAPES)
    functional.momentum_displacement_(out, tensors(SHAPES, seed=1), [0.0] * 4)
    assert all(not t.any() for t in out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu():
    first, second = tensors(SHAPES), [t.square() for t in tensors(SHAPES, seed=1)]
    options = {"rate": [0.1] * 4, "steps": [3] * 4, "betas": [(0.9, 0.99)] * 4, "eps": [1e-3] * 4}
    here, there = tensors(SHAPES), [t.cuda() for t in tensors(SHAPES)]
    functional.adam_displacement_(here, first, second, **options)
    functional.adam_displacement_(
        there, [t.cuda() for t in first], [t.cuda() for t in second], **options
    )
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-13, atol=0)
