"""The corrected loss is the model's own, for every class that can be made small."""

import pytest
import torch
from regrad import RegradError
from regrad_testing import load_beside
from regrad_transformers import RegradCallback
from regrad_transformers.loss import own_target, shifts_labels
from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed

small = load_beside(__file__, "small_models")

# Shifted or not, with a loss type or without, by a mapping, by a module and by nll_loss, with and without a decoder.
SOME = [
    *(("causal", f"{name}LMHeadModel") for name in ("GPT2", "OpenAIGPT", "Bert", "XLNet")),
    *(("causal", f"{name}ForCausalLM") for name in ("Llama", "Bart", "ProphetNet", "Mixtral")),
    ("masked", "BertForMaskedLM"),
    *(("seq2seq", f"{name}ForConditionalGeneration") for name in ("T5", "Bart", "ProphetNet")),
    *(("sequence", f"{name}ForSequenceClassification") for name in ("Bert", "Llama", "Bart")),
    ("token", "BertForTokenClassification"),
    ("question", "BertForQuestionAnswering"),
    ("choice", "BertForMultipleChoice"),
]
EVERY = [(task, name) for task in small.TASKS for name in small.class_names(task)]


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no")


def loss_and_gradients(model, batch):
    """Return the loss of one training batch and its gradients; what is random is the same at every call."""
    model.zero_grad()
    set_seed(2)
    outputs = model(**batch)
    loss = outputs["loss"]
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def corrected(model, batch, arguments, alpha):
    """Return the same through the callback, which refuses where no cross entropy was met."""
    callback = RegradCallback([f"powergrad:alpha={alpha}"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(arguments, state, control, model=model, optimizer=optimizer)
    try:
        loss, gradients = loss_and_gradients(model, batch)
        callback.on_pre_optimizer_step(arguments, state, control)
    finally:
        callback.detach()
    return loss, gradients


def check(model, batch, arguments):
    """Compare a model through the callback with the same model without it."""
    loss, gradients = loss_and_gradients(model, batch)
    neutral_loss, neutral_gradients = corrected(model, batch, arguments, 1.0)
    # nll_loss is corrected as the cross entropy that it is: the same to rounding
    assert neutral_loss == pytest.approx(loss, rel=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(neutral_gradients[key], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("task", "name"), SOME)
def test_at_the_neutral_setting_loss_and_gradients_are_those_of_the_model_itself(
    task, name, arguments
):
    model, batch = small.small_model(name).train(), small.small_batch(task)
    loss, gradients = loss_and_gradients(model, batch)
    check(model, batch, arguments)
    flat_loss, flat_gradients = corrected(model, batch, arguments, 0.25)
    assert flat_loss == pytest.approx(loss, rel=1e-6)
    assert any(
        not torch.allclose(flat_gradients[key], gradient, rtol=1e-3)
        for key, gradient in gradients.items()
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "name"), EVERY)
def test_so_it_is_for_every_class_of_the_installed_transformers(task, name, arguments):
    try:
        model, batch = small.small_model(name).train(), small.small_batch(task)
        loss_and_gradients(model, batch)  # some choose their attention in the first forward
        once, twice = (loss_and_gradients(model, batch)[0] for _ in range(2))
    except Exception as problem:
        pytest.skip(f"{name} cannot be made small and run: {problem!r}"[:300])
    if once != twice:
        pytest.skip(f"{name} draws from random numbers that nobody can seed")
    check(model, batch, arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("task", "name"), [each for each in EVERY if each[0] in ("causal", "masked", "seq2seq")]
)
def test_every_language_model_says_whether_it_shifts_as_its_own_loss_does(task, name):
    try:
        model, batch = small.small_model(name).train(), small.small_batch(task)
        model(**batch)
    except Exception as problem:
        pytest.skip(f"{name} cannot be made small and run: {problem!r}"[:300])
    labels = batch.pop("labels")
    try:
        target = own_target(model, (), batch, labels)
    except RegradError as refusal:
        assert "loss must be cross entropy of every label" in str(refusal)  # noqa: PT017
        return
    assert shifts_labels(model) is target.shift
