import pytest
import regrad
import torch
from regrad_gcode.branch import Branch, Field
from regrad_gcode.single_step import SOLVERS
from torch.utils._python_dispatch import TorchDispatchMode
from torchdiffeq import odeint

CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
}
SHAPES = [((4, 4, 4), (4, 4, 4), 1, 1), ((2, 4, 4), (4, 2, 2), 2, 1), ((3, 3, 3), (16, 2, 2), 2, 8)]


def make_branch(before, after, solver="midpoint", adjoint=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Branch(before, after, solver=solver, adjoint=adjoint).double()


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("before", "after", "stride", "groups"), SHAPES)
def test_the_branch_is_the_references_midpoint_step(before, after, stride, groups, reference):
    branch, hidden = make_branch(before, after), images(2, *before)
    expected = reference.branch(hidden, branch.state_dict(), stride=stride, groups=groups)
    assert expected.shape == (2, *after)
    torch.testing.assert_close(branch(hidden), expected, rtol=0, atol=1e-12)


def test_a_branch_by_hand():
    branch = make_branch((1, 1, 1), (1, 1, 1))
    for parameter in branch.parameters():
        parameter.data.zero_()
    branch.field.depthwise.bias.data.fill_(2.0)
    branch.field.pointwise.weight.data.copy_(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1))
    branch.field.pointwise.bias.data.fill_(5.0)
    # φ = 3·ReLU(2) + 4 t + 5 does not depend on x; the midpoint is at t = ½: 1 + (6 + 2 + 5)
    assert branch(torch.ones(2, 1, 1, 1, dtype=torch.float64)).tolist() == [[[[14.0]]], [[[14.0]]]]


def test_where_the_shapes_agree_and_the_field_is_zero_the_branch_is_the_identity():
    branch, hidden = make_branch((4, 3, 3), (4, 3, 3)), images(2, 4, 3, 3)
    branch.field.pointwise.weight.data.zero_()
    branch.field.pointwise.bias.data.zero_()
    assert torch.equal(branch(hidden), hidden)


@pytest.mark.parametrize(
    "solver", ["rk4", "heun3", "dopri5", "bosh3", "adaptive_heun", "fehlberg2", "dopri8"]
)
def test_other_solvers_come_near_the_exact_solution(solver):
    branch, hidden = make_branch((2, 4, 4), (4, 2, 2), solver), images(2, 2, 4, 4)
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    exact = odeint(branch.field, branch.project(hidden), times, method="rk4")[-1]
    # one step of rk4 is the roughest; the adaptive ones keep to a tolerance of 1e-4 per step
    torch.testing.assert_close(branch(hidden), exact, rtol=0, atol=1e-2)


@pytest.mark.parametrize("solver", ["midpoint", "dopri5"])
def test_the_adjoint_writes_no_gradient_into_the_field(solver):
    branch, hidden = (
        make_branch((4, 3, 3), (4, 3, 3), solver, adjoint=True),
        images(2, 4, 3, 3).requires_grad_(),
    )
    branch.requires_grad_(False)
    branch(hidden).sum().backward()
    assert hidden.grad is not None
    assert all(parameter.grad is None for parameter in branch.parameters())


def test_the_adjoint_gives_the_gradient_of_the_solution(reference):
    direct, adjoint = (
        make_branch((4, 3, 3), (4, 3, 3), "dopri5", flag).requires_grad_(False)
        for flag in (False, True)
    )
    gradients = []
    for branch in (direct, adjoint):
        branch.field.pointwise.weight.data.mul_(
            0.3
        )  # a calm field: there the solver's tolerance shows
        hidden = images(2, 4, 3, 3).requires_grad_()
        gradients.append(torch.autograd.grad(branch(hidden).square().sum(), hidden)[0])
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)  # both to the solver's tolerance
    assert not torch.equal(*gradients)


def test_a_fit_under_the_adjoint_differentiates_the_steps():
    branches = [make_branch((2, 4, 4), (4, 2, 2), "midpoint", flag) for flag in (False, True)]
    for one, other in zip(
        *(
            torch.autograd.grad(b(images(2, 2, 4, 4)).square().mean(), [*b.parameters()])
            for b in branches
        ),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("channels", [2, 3, 4, 8, 12, 16, 30])
def test_a_field_takes_any_number_of_channels_at_one_pixel(channels):
    field = Field(channels)
    assert field(torch.tensor(0.5), torch.randn(1, channels, 1, 1)).shape == (1, channels, 1, 1)
    assert channels % field.norm.num_groups == 0


@pytest.mark.parametrize(
    ("before", "after"), [((4, 15, 15), (8, 7, 7)), ((4, 4, 4), (4, 8, 8)), ((4, 8, 15), (8, 4, 7))]
)
def test_sizes_that_no_stride_joins_are_refused(before, after):
    with pytest.raises(
        regrad.RegradError, match=r"stages must shrink images by a stride, got \(4, .*; name others"
    ):
        make_branch(before, after)


@pytest.mark.parametrize(
    ("before", "after"), [((4, 7, 7), (8, 4, 4)), ((4, 8, 6), (8, 2, 3)), ((4, 7, 8), (8, 1, 1))]
)
def test_odd_and_uneven_sizes_have_their_strides(before, after):
    assert make_branch(before, after)(images(1, *before)).shape == (1, *after)


def test_a_branch_of_channels_last_images_with_frozen_weights_gives_the_numbers_of_contiguous_ones():
    results = []
    for layout in (
        torch.contiguous_format,
        torch.channels_last,
    ):  # crashed the interpreter with torch 2.13 on CPU
        branch = (
            make_branch((16, 4, 4), (32, 2, 2))
            .float()
            .requires_grad_(False)
            .to(memory_format=layout)
        )
        hidden = images(4, 16, 4, 4).float().contiguous(memory_format=layout).requires_grad_()
        value = branch(hidden)
        results.append([value.detach(), *torch.autograd.grad(value.square().sum(), hidden)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_is_that_of_torchdiffeq_bit_by_bit_with_its_gradients(solver, dtype):
    branch = make_branch((2, 4, 4), (4, 2, 2), solver).to(dtype)
    given = images(2, 2, 4, 4).to(dtype)
    found = []
    for solve in (
        branch,
        lambda hidden: odeint(branch.field, branch.project(hidden), branch.times, method=solver)[
            -1
        ],
    ):
        hidden = given.clone().requires_grad_()
        solution = solve(hidden)
        wanted = [hidden, *branch.parameters()]
        found.append([solution, *torch.autograd.grad(solution.square().sum(), wanted)])
    for ours, theirs in zip(*found, strict=True):
        if solver in ("euler", "midpoint"):
            assert torch.equal(ours, theirs)
        else:  # the order in which the gradients of several reads are summed
            torch.testing.assert_close(ours, theirs, **CLOSE[dtype])


class Reads(TorchDispatchMode):
    """Counts tensors that are read as a number: on a GPU each read waits for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_of_fixed_steps_reads_no_number(solver):
    branch = make_branch((4, 3, 3), (4, 3, 3), solver)
    with Reads() as reads:
        branch(images(2, 4, 3, 3))
    assert reads.count == 0
    with Reads() as reads:
        odeint(branch.field, images(2, 4, 3, 3), branch.times, method=solver)
    assert reads.count > 0  # torchdiffeq's own way, so that this test would see one
