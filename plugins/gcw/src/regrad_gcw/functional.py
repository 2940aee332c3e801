r"""Slots, offset, evidence and fits of GC-W, as functions of tensors.

Symbols: g the gradient of one tensor at step t, flat, N numbers; g' the gradient that
follows; S slots :math:`M_1 \ldots M_S`; coefficients a, one per slot. A *history* has
shape [S + 1, *]: g in row 0, the slots below. Where tensors are cut into shards, each
process holds its part of a history, and inner products are added over the processes. A
*Gram matrix* has shape [S + 2, S + 2]: inner products of g, the slots and g', in that
order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WIDTH = 8
FIT_STEPS = 20
FIT_RATE = 1e-2
LOWEST = -1.0
HIGHEST = 2.0
LOG_RATIO_BOUND = 10.0
Whole = Callable[[Tensor], Tensor]


@torch.no_grad()
def roll_(history: Tensor, gradient: Tensor, *, decays: Sequence[float], seen: int) -> None:
    r"""Update the slots with the gradient in row 0, and replace that by the new one.

    With n gradients seen before this call, slot k becomes
    :math:`M_k \leftarrow M_k + w\,(g - M_k)`, :math:`w = (1-d_k)/(1-d_k^n)`: the moving
    average :math:`e \leftarrow d\,e + (1-d)\,g` read as :math:`e/(1-d^n)`.

    Args:
        history: Shape [S + 1, *]. Overwritten.
        gradient: g of the step that begins, shape of a slot. Entries that are not finite
            are kept as 0.
        decays: :math:`d_k` in [0, 1), S of them; 0 keeps the last gradient.
        seen: n, gradients that the history has held before, at least 0.

    Example:
        >>> history = torch.tensor([[4.0], [1.0]])
        >>> roll_(history, torch.tensor([7.0]), decays=[0.0], seen=2)
        >>> history
        tensor([[7.],
                [4.]])
    """
    if seen:
        for slot, decay in zip(history[1:], decays, strict=True):
            slot.lerp_(history[0], (1 - decay) / (1 - decay**seen))
    history[0].copy_(gradient).nan_to_num_(0.0, 0.0, 0.0)


@torch.no_grad()
def offset(
    gradient: Tensor,
    slots: Tensor,
    coefficients: Tensor,
    *,
    keep_norm: bool = False,
    whole: Whole = lambda part: part,
) -> Tensor:
    r"""Return :math:`\Delta G = \sum_k a_k (g - M_k)`.

    Args:
        gradient: g, N numbers of any shape.
        slots: Shape [S, *] of N numbers each, float32 at least.
        coefficients: a, shape [S], of the dtype of `slots`.
        keep_norm: Rescale :math:`g + \Delta G` to the norm of g.
        whole: Adds, over the processes that hold parts of the tensor, what each computed.

    Returns:
        Shape of `gradient`, dtype of `slots`.

    Example:
        >>> offset(torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([0.5]))
        tensor([1., 0.])
    """
    raw = gradient.to(slots.dtype)
    with torch.autocast(slots.device.type, enabled=False):
        change = raw * coefficients.sum() - torch.mv(_flat(slots).T, coefficients).view(raw.shape)
    if not keep_norm:
        return change
    corrected = raw + change
    parts = torch.stack([torch.linalg.vector_norm(part) for part in (raw, corrected, change)])
    old, new, moved = whole(parts.square()).sqrt()
    factor = old / new.clamp_min(torch.finfo(raw.dtype).tiny)
    rescaled: Tensor = corrected * factor - raw
    return rescaled.masked_fill(moved == 0, 0.0)  # coefficients of 0 change nothing, bit for bit


def _flat(history: Tensor) -> Tensor:
    """Return [S, *] as [S, N]."""
    return history[:, None].flatten(1)  # the new dimension is for slots that are scalars


@torch.no_grad()
def gram(history: Tensor, following: Tensor) -> Tensor:
    r"""Return the inner products of g, the slots and g'.

    Args:
        history: Shape [S + 1, *].
        following: g', shape of a slot.

    Returns:
        Shape [S + 2, S + 2], on the device.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([3.0, 0.0]))
        tensor([[5., 2., 3.],
                [2., 1., 0.],
                [3., 0., 9.]])
    """
    rows = _flat(history)
    flat = following.reshape(-1).to(history.dtype)
    with torch.autocast(history.device.type, enabled=False):
        side = torch.mv(rows, flat)
        top = torch.cat([rows @ rows.T, side[:, None]], dim=1)
        bottom = torch.cat([side, torch.dot(flat, flat)[None]])
        return torch.cat([top, bottom[None]])


def _lengths(grams: Tensor) -> Tensor:
    """Return the norms of g, the slots and g', shape [*, S + 2], never 0."""
    squares = grams.diagonal(dim1=-2, dim2=-1)
    return squares.clamp_min(0).sqrt().clamp_min(torch.finfo(grams.dtype).tiny)


def evidence(grams: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return how each slot's offset agrees with the gradient that followed.

    Args:
        grams: Shape [*, S + 2, S + 2].

    Returns:
        Two tensors of shape [*, S]: :math:`\langle g', g - M_k\rangle` and
        :math:`c_k = \cos(g', g - M_k)`; NaN if a number is not finite, cosine 0
        where a vector is zero.
    """
    slots = slice(1, -1)
    product = grams[..., -1, :1] - grams[..., -1, slots]
    squares = grams.diagonal(dim1=-2, dim2=-1)
    apart = (squares[..., :1] + squares[..., slots] - 2 * grams[..., 0, slots]).clamp_min(0).sqrt()
    floor = torch.finfo(grams.dtype).tiny
    cosine = (product / apart.clamp_min(floor) / _lengths(grams)[..., -1:]).clamp(-1, 1)
    known = product.isfinite() & cosine.isfinite()
    return product.where(known, torch.nan), cosine.where(known, torch.nan)


def features(grams: Tensor) -> Tensor:
    r"""Return what the attention reads of each slot.

    .. math:: f_k = (\cos(M_k, g),\ \log|M_k|/|g|,\ \text{one-hot } k)

    Args:
        grams: Shape [*, S + 2, S + 2].

    Returns:
        Shape [*, S + 1, S + 3], k = 0 being the slot that makes no offset,
        :math:`M_0 = g`. The logarithm is held within ±10, NaN becomes 0.
    """
    members = grams.shape[-1] - 1
    length = _lengths(grams)[..., :members]
    cosine = (grams[..., 0, :members] / length / length[..., :1]).clamp(-1, 1)
    ratio = (length / length[..., :1]).log().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    one_hot = torch.eye(members, dtype=grams.dtype, device=grams.device)
    return torch.cat(
        [
            cosine.nan_to_num(0.0)[..., None],
            ratio.nan_to_num(0.0)[..., None],
            one_hot.expand(*cosine.shape, members),
        ],
        dim=-1,
    )


def fit_slot(coefficients: Tensor, cosines: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{clamp}(a_k + \tfrac12\,\overline{c_k},\, -1,\, 2)`.

    Args:
        coefficients: a, shape [n, S].
        cosines: c of a window, shape [n, rows, S]; NaN counts as missing.

    Example:
        >>> fit_slot(torch.tensor([[0.9]]), torch.tensor([[[0.5], [-0.1]]]))
        tensor([[1.]])
    """
    mean = cosines.nanmean(dim=1).nan_to_num(0.0)
    return (coefficients + 0.5 * mean).clamp(LOWEST, HIGHEST)


def attend(module: Sequence[Tensor], features: Tensor, prior: Tensor) -> Tensor:
    r"""Return the coefficients that the attention predicts.

    .. math:: a_k = \text{prior}_k
        + \gamma\,(\mathrm{softmax}_k(q^\top W f_k/\sqrt 8) - 1/(S+1))

    Args:
        module: q, shape [n, 8]; W, shape [n, 8, S + 3]; γ, shape [n], 0 returns the prior.
        features: f, shape [n, S + 1, S + 3].
        prior: Shape [n, S].

    Returns:
        a, shape [n, S]; the slot that makes no offset takes its share of the softmax.
    """
    query, key, scale = module
    keys = (features[..., None, :] * key[:, None]).sum(dim=-1)
    logits = (query[:, None] * keys).sum(dim=-1) / WIDTH**0.5
    share: Tensor = logits.softmax(dim=-1)[:, 1:] - 1 / features.shape[1]
    return prior + scale[:, None] * share


def fit_attention(
    module: Sequence[Tensor], features: Tensor, cosines: Tensor, prior: Tensor
) -> list[Tensor]:
    r"""Return q, W, γ after 20 steps of Adam on the loss of a window.

    .. math:: -\sum_k a_k \overline{c_k} + \tfrac12|a - \text{prior}|^2

    Args:
        module: q, shape [n, 8]; W, shape [n, 8, S + 3]; γ, shape [n].
        features: f, means over the window, shape [n, S + 1, S + 3].
        cosines: c, shape [n, rows, S]; NaN counts as missing.
        prior: Shape [n, S].

    Returns:
        New q, W and γ. Adam starts afresh in every window, rate .01.
    """
    learned = [tensor.detach().clone().requires_grad_() for tensor in module]
    mean = cosines.nanmean(dim=1).nan_to_num(0.0)
    optimizer = torch.optim.Adam(learned, lr=FIT_RATE)
    with torch.enable_grad():
        for _ in range(FIT_STEPS):
            coefficients = attend(learned, features, prior)
            loss = (0.5 * (coefficients - prior).square() - coefficients * mean).sum()
            for tensor, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                tensor.grad = gradient
            optimizer.step()
    return [tensor.detach() for tensor in learned]


def gate(gains: Tensor) -> tuple[Tensor, Tensor]:
    r"""Say which coefficients a tensor may use, to first order.

    A gain is :math:`\sum_k a_k \langle g', g - M_k\rangle`, positive where the offset
    pointed downhill. The learned coefficients are preferred while their mean gain beats
    the prior's; what is preferred is used while its mean gain is not below zero by more
    than one standard error.

    Args:
        gains: Shape [n, rows, 2]: of the prior, of the learned coefficients; NaN counts
            as missing. Fewer than two known rows switch nothing off.

    Returns:
        Two boolean tensors of shape [n]: whether to use the learned coefficients, and
        whether to use any.
    """
    known = gains.isfinite().all(dim=-1, keepdim=True)
    count = known.sum(dim=1)
    mean = gains.where(known, 0.0).sum(dim=1) / count.clamp_min(1)
    squares = (gains - mean[:, None]).where(known, 0.0).square()
    variance = squares.sum(dim=1) / (count - 1).clamp_min(1)
    error = (variance / count.clamp_min(1)).sqrt().where(count > 1, torch.inf)
    learned = mean[:, 1] > mean[:, 0]
    downhill = mean >= -error
    return learned, torch.where(learned, downhill[:, 1], downhill[:, 0])
