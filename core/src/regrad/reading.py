"""What a correction may read, and what of it the core's own layouts offer."""

from collections.abc import Collection, Mapping
from typing import Literal, get_args

Reading = Literal["elements", "units", "tensor", "model", "moments", "micro", "criterion"]

EVERYTHING: frozenset[Reading] = frozenset(get_args(Reading))
IN_WORDS: Mapping[Reading, str] = {
    "elements": "single elements",
    "units": "units (one output's weights)",
    "tensor": "whole tensors",
    "model": "the whole model",
    "moments": "the optimizer's moments",
    "micro": "the micro-batches of a step",
    "criterion": "the criterion",
}
OFFERS: Mapping[str, frozenset[Reading]] = {
    "plain": EVERYTHING,
    "ddp": EVERYTHING,
    "fsdp2": EVERYTHING - {"micro"},
    "flat": frozenset({"elements", "moments", "criterion"}),
    "zero-redundancy": EVERYTHING - {"moments"},
}
"""What the layouts of the core offer, by their names."""


class Implied(tuple[str, ...]):
    """Names of layouts that follow from what a correction reads: nobody listed them."""

    __slots__ = ()


def layouts_with(reads: Collection[str]) -> Implied:
    """Return the names of the core's layouts that offer all that is read.

    Args:
        reads: Of a correction. Empty where it does not say; then one process is all that
            is known.

    Example:
        >>> layouts_with(["elements"])
        ('plain', 'ddp', 'fsdp2', 'flat', 'zero-redundancy')
        >>> layouts_with(["micro"])
        ('plain', 'ddp', 'zero-redundancy')
        >>> layouts_with([])
        ('plain',)
    """
    if not reads:
        return Implied(("plain",))
    return Implied(name for name, offered in OFFERS.items() if offered.issuperset(reads))
