"""Every pair of corrections that are shipped: what comes of attaching both, and that the page says so."""

import importlib
import itertools
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
# Half a minute of computing for the pairs, minutes on a busy machine.
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def pairs():
    """The generator of the page."""
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("interactions")
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def found(pairs):
    """What comes of every pair on every optimizer."""
    return pairs.interactions()


@pytest.fixture
def attach(pairs):
    """Attach corrections by name to a model of their own."""
    import regrad

    def attach(given, optimizer="SGD with momentum"):
        model = pairs.network()
        rule = pairs.OPTIMIZERS[optimizer](model.parameters(), lr=1e-3)
        return regrad.attach(model, rule, given, pairs.nn.CrossEntropyLoss(reduction="sum"))

    return attach


def test_every_pair_of_shipped_corrections_has_a_verdict_on_every_optimizer(pairs, found, members):
    plugins = [member for member in members if member.is_plugin]
    names = {
        name for plugin in plugins for name in plugin.project["entry-points"].get("regrad", {})
    }
    wanted = {
        (pair, kind)
        for pair in itertools.combinations(sorted(names), 2)
        for kind in pairs.OPTIMIZERS
    }
    assert {(i.pair, i.optimizer) for i in found} == wanted
    assert {i.verdict for i in found} == {"ok", "ordered", "refused"}
    assert all(i.reason for i in found if i.verdict != "ok")


def test_the_page_of_the_pairs_is_fresh(pairs, found):
    assert pairs.page(found) == (DOCS / "interactions.md").read_text(encoding="utf-8")


def test_a_pair_that_may_be_attached_really_acts_both(found):
    assert [
        (i.pair, i.optimizer, i.stages)
        for i in found
        if i.verdict != "refused" and not all(i.stages)
    ] == []


def test_a_declared_order_holds_however_the_pair_is_given(found, attach, pairs):
    ordered = [interaction for interaction in found if interaction.verdict == "ordered"]
    assert ordered
    for interaction in ordered:
        acting = []
        for given in (interaction.pair, interaction.pair[::-1]):
            attachment = attach(given, interaction.optimizer)
            stages = {stage for c in attachment.corrections for stage in c.needs.stages}
            acting.append(
                {s: [c.name for c in attachment.corrections if s in c.needs.stages] for s in stages}
            )
            moved = given[0] != interaction.first
            assert (interaction.reason in str(attachment)) == moved, str(attachment)
        first = {c.name for c in pairs.made([interaction.first])}
        assert acting[0] == acting[1]
        assert all(acting[0][stage][0] in first for stage in interaction.shared)


def test_a_refusal_names_both_and_the_reason_and_leaves_nothing_attached(found, attach, pairs):
    import regrad

    refused = [interaction for interaction in found if interaction.verdict == "refused"]
    assert refused
    for interaction in refused:
        for given in (interaction.pair, interaction.pair[::-1]):
            with pytest.raises(regrad.RegradError) as caught:
                attach(given, interaction.optimizer)
            for name in given:
                either = {name, *(correction.name for correction in pairs.made([name]))}
                assert any(repr(part) in str(caught.value) for part in either), (name, caught.value)
        for name in interaction.pair:
            attach([name], interaction.optimizer).detach()


def test_two_that_look_ahead_are_refused_unless_one_of_them_is_told_to_allow_it(attach):
    import regrad

    with pytest.raises(
        regrad.RegradError, match="'xgrad' and 'gcw' cannot work together: both own the look-ahead"
    ):
        attach(["xgrad", "gcw"])
    for given in (
        ["xgrad:allow_double_lookahead=true", "gcw"],
        ["xgrad", "gcw:allow_double_lookahead=true"],
    ):
        assert len(attach(given).corrections) == 2


def test_a_part_beside_its_composition_is_refused_as_the_same_correction_twice(attach, pairs):
    import regrad

    loaded = {name: regrad.load(name) for name in pairs.shipped()}
    composed = [
        (n, part)
        for n, c in loaded.items()
        if isinstance(c, regrad.Composition)
        for part in c.parts
    ]
    for name, part in composed:
        with pytest.raises(
            regrad.RegradError, match=rf"got '{part}' twice in \['{name}', '{part}'\]"
        ):
            attach([name, part])


def test_without_an_opinion_centralization_is_first_then_gcw_then_clipping():
    order = importlib.import_module("regrad.order")
    create = importlib.import_module("regrad").create
    clipping = ("clip-norm", "clip-value", "agc")
    for given in itertools.permutations(["centralization", "gcw", *clipping]):
        names = [c.name for c in order.resolve_order([create(name) for name in given])[0]]
        assert names[:2] == ["centralization", "gcw"]
        assert names[2:] == [name for name in given if name in clipping]


def test_two_corrections_together_are_one_after_the_other(found, pairs):
    """On given gradients; stages before the gradient have no part in that, and one moment is added to by both."""
    tried = 0
    for interaction in found:
        last = [stages[-1] if stages else "" for stages in interaction.stages]
        if not {*last} <= {"gradient", "moment"} or last == ["moment", "moment"]:
            continue
        first = interaction.first or interaction.pair[last.index("gradient")]
        names = (first, interaction.pair[1 - interaction.pair.index(first)])
        read = [pairs.reference_gradients(), None, None]
        for step, name in enumerate(names):
            seen = pairs.read_by_the_optimizer(
                pairs.made([name]), interaction.optimizer, read[step]
            )
            read[step + 1] = [step["gradient"] for step in seen]
        both = pairs.read_by_the_optimizer(pairs.made(names), interaction.optimizer, read[0])
        for apart, together in zip(seen, both, strict=True):
            for key in ("gradient", "moment"):
                for one, other in zip(apart[key], together[key], strict=True):
                    pairs.torch.testing.assert_close(
                        one, other, rtol=1e-11, atol=1e-11, msg=str(interaction)
                    )
        tried += 1
    assert tried > 10


def test_centralization_and_adaptive_clipping_are_their_two_functions_one_after_the_other(pairs):
    torch, names = pairs.torch, ("centralization", "agc")
    centralize_ = importlib.import_module("regrad_centralization.functional").centralize_
    clip_adaptive_ = importlib.import_module("regrad_clipping.functional").clip_adaptive_
    gradients = pairs.reference_gradients()[:1]
    weight, gradient = pairs.network(scale=100.0).conv.weight.detach(), gradients[0][0].clone()
    (seen,) = pairs.read_by_the_optimizer(pairs.made(names[::-1]), "SGD with momentum", gradients)
    expected = clip_adaptive_(centralize_(gradient), weight)
    torch.testing.assert_close(seen["gradient"][0], expected, rtol=1e-12, atol=0)
    other = centralize_(clip_adaptive_(gradients[0][0].clone(), weight))
    assert (other - expected).norm() > 1e-3 * expected.norm()
