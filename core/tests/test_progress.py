"""What was done with the present gradients, if the step is tried again."""

import torch
from regrad.progress import Progress


def begun(progress, gradients):
    progress.begin(gradients)
    return progress.is_done("correct_gradients", "scale")


def test_gradients_that_were_corrected_are_known_again():
    progress = Progress()
    gradients = [torch.ones(2), torch.ones(3)]
    assert not begun(progress, gradients)
    gradients[0].mul_(2)
    progress.note("correct_gradients", "scale")
    progress.end(gradients)
    assert begun(progress, gradients)
    assert not progress.is_done("correct_moments", "scale")
    assert not progress.is_done("correct_gradients", "other")


def test_gradients_that_were_written_or_replaced_or_forgotten_are_new():
    def corrected():
        progress = Progress()
        gradients = [torch.ones(2), torch.ones(3)]
        progress.begin(gradients)
        progress.note("correct_gradients", "scale")
        progress.end(gradients)
        return progress, gradients

    progress, gradients = corrected()
    gradients[1].add_(1)
    assert not begun(progress, gradients)
    progress, gradients = corrected()
    assert not begun(progress, [gradients[0], gradients[1].clone()])
    progress, gradients = corrected()
    assert not begun(progress, gradients[:1])
    progress, gradients = corrected()
    progress.forget()
    assert not begun(progress, gradients)
