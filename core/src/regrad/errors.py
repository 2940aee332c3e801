"""What regrad raises and warns about."""


class RegradError(RuntimeError):
    """A state of regrad's own that does not allow what was asked.

    Wrong arguments raise `ValueError` or `TypeError` instead.
    """


class PluginLoadError(RegradError):
    """One plugin could not be imported or does not fit; the others are unaffected."""


class RegradWarning(UserWarning):
    """Something that regrad was told to do has probably not the effect that was meant."""
