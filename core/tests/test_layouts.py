"""Which layout is chosen, and what a distribution that offers one must do; see `cases_flat.py`."""

import pytest
import regrad
import torch
from regrad import PluginLoadError, layouts

OWN = """
import regrad
from regrad.layouts import PlainLayout

class Own(PlainLayout):
    name = "own"

@regrad.hookimpl
def regrad_layout(model, optimizer, model_group):
    return Own(model_group) if hasattr(model, "of_the_engine") else None
"""


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Install a distribution that offers a layout from the given code."""

    def install(name, code):
        site = tmp_path / name
        info = site / f"regrad_{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: regrad-{name}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(f"[regrad.layouts]\n{name} = engine_{name}\n")
        (site / f"engine_{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))

    yield install
    layouts._layout_plugins.cache_clear()


def test_an_engines_layout_is_taken_for_its_models_alone(toys, offer):
    offer("own", OWN)
    model = toys.Net()
    attachment = regrad.attach(model, toys.sgd(model), [])
    assert attachment.engine.layout.name == "plain"
    model.of_the_engine = True
    attachment.detach()
    attachment = regrad.attach(model, toys.sgd(model), [])
    assert attachment.engine.layout.name == "own"
    assert attachment.engine.layout.model_group is None


def test_an_engine_with_a_layout_is_no_longer_refused_for_its_name(toys, offer):
    engine = type("Engine", (toys.Net,), {"__module__": "deepspeed.runtime.engine"})
    model = engine()
    with pytest.raises(regrad.RegradError, match="DeepSpeed hides gradients"):
        regrad.attach(model, toys.sgd(model), [])
    offer("own", OWN)
    model.of_the_engine = True
    assert regrad.attach(model, toys.sgd(model), []).engine.layout.name == "own"


def test_a_layout_that_the_environment_leaves_out_is_not_asked(toys, offer, monkeypatch):
    offer("own", OWN)
    monkeypatch.setenv("REGRAD_DISABLE", "own")
    model = toys.Net()
    model.of_the_engine = True
    assert layouts.choose(model, toys.sgd(model)).name == "plain"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "plugin 'bad' .* could not be imported: division by zero"),
        ("def regrad_layout(model): ...", "'bad' must have a function 'regrad_layout' marked with"),
    ],
)
def test_a_layout_that_cannot_be_asked_stops_attach_with_its_name(toys, offer, code, message):
    offer("bad", code)
    model = toys.Net()
    with pytest.raises(PluginLoadError, match=message):
        regrad.attach(model, toys.sgd(model), [])


def test_gradients_are_written_back_also_where_a_correction_raises(toys):
    class Copying(layouts.PlainLayout):
        """Hands out copies of the gradients."""

        waiting = None

        def gradients(self, step):
            self.waiting = {p: p.grad for p in step.parameters if p.grad is not None}
            for parameter, gradient in self.waiting.items():
                parameter.grad = gradient.clone()

        def commit(self, step):
            for parameter, gradient in self.waiting.items():
                gradient.copy_(parameter.grad)
                parameter.grad = gradient

    class Fails(toys.Add):
        name = "fails"
        fails = True

        def correct_gradients(self, step):
            if self.fails:
                raise MemoryError
            super().correct_gradients(step)

    model, other = toys.Net(), toys.Net()
    optimizer, fails = toys.sgd(model), Fails()
    attachment = regrad.attach(model, optimizer, [toys.Scale(), fails])
    attachment.engine.before_first_use = None
    attachment.engine.layout = Copying()
    toys.loss_of(model).backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    fails.fails = False
    optimizer.step()
    plain = toys.sgd(other)
    regrad.attach(other, plain, [toys.Scale(), toys.Add()])
    toys.train_step(other, plain)
    for seen, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(seen, wanted)
