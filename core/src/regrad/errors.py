"""The errors and warnings of regrad."""


class RegradError(RuntimeError):
    """The current state of regrad does not allow what was asked.

    Wrong arguments raise `ValueError` or `TypeError` instead.
    """


class PluginLoadError(RegradError):
    """One plugin could not be imported or does not fit; the others are unaffected."""


class RegradWarning(UserWarning):
    """Something that regrad was told to do probably does not have the intended effect."""
