import math

import pytest
import torch
from regrad_runner.models.gpt import build_gpt
from torch.nn import functional as F

CONTEXT = 10


@pytest.fixture(scope="module")
def model():
    """Return a model in float64 whose biases and gains are not what they start from."""
    built = build_gpt(vocabulary=17, context=CONTEXT, width=12, layers=2, heads=3, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            )
    return built


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(17, (3, CONTEXT), generator=torch.Generator().manual_seed(3))


def normalised(vector, layer):
    mean = sum(vector.tolist()) / len(vector)
    variance = sum((value - mean) ** 2 for value in vector.tolist()) / len(vector)
    return (vector - mean) / math.sqrt(variance + layer.eps) * layer.weight + layer.bias


def attended(rows, attention):
    """Return what attention makes of the rows, place by place and head by head."""
    width = len(rows[0])
    size = width // attention.heads
    packed = [attention.project_in.weight @ row + attention.project_in.bias for row in rows]
    gathered = []
    for place in range(len(rows)):
        parts = []
        for head in range(attention.heads):
            own = slice(head * size, (head + 1) * size)
            query, keys, values = (
                packed[place][:width][own],
                [packed[other][width : 2 * width][own] for other in range(place + 1)],
                [packed[other][2 * width :][own] for other in range(place + 1)],
            )
            scores = [math.exp((query @ key).item() / math.sqrt(size)) for key in keys]
            parts.append(
                sum(
                    score / sum(scores) * value for score, value in zip(scores, values, strict=True)
                )
            )
        gathered.append(
            attention.project_out.weight @ torch.cat(parts) + attention.project_out.bias
        )
    return gathered


def by_hand(model, sequence):
    """Return the logits [T, vocabulary] of one sequence, without a batch, a mask or a kernel."""
    rows = [
        model.tokens.weight[token] + model.positions.weight[place]
        for place, token in enumerate(sequence.tolist())
    ]
    for block in model.blocks:
        seen = attended([normalised(row, block.norm1) for row in rows], block.attention)
        rows = [row + more for row, more in zip(rows, seen, strict=True)]
        for place, row in enumerate(rows):
            inside = block.mlp_in.weight @ normalised(row, block.norm2) + block.mlp_in.bias
            gelu = torch.stack(
                [value * 0.5 * (1 + torch.erf(value / math.sqrt(2))) for value in inside]
            )
            rows[place] = row + block.mlp_out.weight @ gelu + block.mlp_out.bias
    return torch.stack([model.head.weight @ normalised(row, model.norm) for row in rows])


@torch.no_grad()
def test_the_logits_are_those_of_attention_written_by_hand(model, tokens):
    wanted = torch.stack([by_hand(model, sequence) for sequence in tokens])
    assert (model(tokens).transpose(1, 2) - wanted).abs().max() < 1e-12
    short = tokens[:1, :4]
    assert (model(short)[0].T - by_hand(model, short[0])).abs().max() < 1e-12


@torch.no_grad()
def test_a_byte_changes_no_logits_before_it_and_all_from_it_on(model, tokens):
    plain = model(tokens)
    for place in range(CONTEXT):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 17
        difference = (model(changed) - plain).abs().amax(1)
        assert torch.equal(difference[:, :place], torch.zeros(3, place, dtype=torch.float64))
        assert (difference[:, place:] > 1e-9).all()


def test_weights_start_from_a_deviation_that_is_smaller_where_a_branch_ends():
    model = build_gpt(vocabulary=256, context=64, width=64, layers=8)
    spread = {
        name: parameter.std().item()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }
    ends = {name for name in spread if name.endswith(("project_out.weight", "mlp_out.weight"))}
    assert len(ends) == 16
    for name, value in spread.items():
        assert value == pytest.approx(0.02 / (4 if name in ends else 1), rel=0.06)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_a_seed_fixes_the_weights_and_nothing_global_is_drawn():
    before = torch.get_rng_state()
    first, again, other = (
        build_gpt(vocabulary=9, context=4, width=8, layers=1, seed=s).state_dict()
        for s in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_tied_head_is_the_embedding_and_its_gradient_comes_from_both():
    tied, untied = (
        build_gpt(vocabulary=9, context=4, width=8, layers=1, tied=value, seed=5)
        for value in (True, False)
    )
    assert tied.head.weight is tied.tokens.weight
    assert (
        sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
        == 9 * 8
    )
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        untied.head.weight.copy_(untied.tokens.weight)
    for model in (tied, untied):
        F.cross_entropy(model(tokens), tokens).backward()
    both = untied.tokens.weight.grad + untied.head.weight.grad
    assert torch.allclose(tied.tokens.weight.grad, both, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"width": 10}, r"width must be a multiple of heads \(4\), got 10"),
        ({"vocabulary": 1}, "vocabulary must be at least 2, got 1"),
        ({"context": 0}, "context must be at least 1, got 0"),
    ],
)
def test_sizes_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_gpt(**{"vocabulary": 9, "context": 4, "width": 8, **options})
