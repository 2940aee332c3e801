"""What was done with the current gradients, in case the step raises and is tried again."""

from collections.abc import Iterable

from torch import Tensor

from regrad.sharding import local


class Progress:
    """Remembers which corrections were applied to which gradients.

    A step that raises after its corrections, when memory runs out for example, may be tried again
    with the same gradients: they must not be corrected twice.
    """

    def __init__(self) -> None:
        self._done: set[tuple[str, str]] = set()
        self._gradients: list[tuple[Tensor, int]] = []

    def forget(self) -> None:
        """Start over: the gradients were used."""
        self._done.clear()
        self._gradients = []

    def begin(self, gradients: Iterable[Tensor]) -> None:
        """Forget what was done, unless these are the gradients that it was done with."""
        if not self._are_the_same(list(gradients)):
            self._done.clear()

    def _are_the_same(self, gradients: list[Tensor]) -> bool:
        """Say whether these are the gradients as they were left, and nobody wrote them since."""
        if len(gradients) != len(self._gradients):
            return False
        for gradient, (seen, version) in zip(gradients, self._gradients, strict=True):
            if gradient is not seen or local(gradient)._version != version:
                return False
        return True

    def end(self, gradients: Iterable[Tensor]) -> None:
        """Remember the gradients as they are now."""
        self._gradients = [(gradient, local(gradient)._version) for gradient in gradients]

    def is_done(self, what: str, of: str = "") -> bool:
        """Say whether something was done with these gradients.

        Args:
            what: Name of a hook, or "unscale".
            of: Name of the correction, for a hook.
        """
        return (what, of) in self._done

    def note(self, what: str, of: str = "") -> None:
        """Remember that something was done."""
        self._done.add((what, of))
