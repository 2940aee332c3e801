"""Every clause of the conformance kit; of those that draw rows, the ones about one way of cutting a batch.

Their draws differ where a batch is cut otherwise, so that only means agree: test_correction.py and
test_layouts.py.
"""

from regrad_activations import WTACRS, Int8Rows, UniformRows
from regrad_testing import CorrectionSuite
from regrad_testing.rule_clauses import RuleClauses
from regrad_testing.state_clauses import StateClauses


class TestInt8Rows(CorrectionSuite):
    correction = Int8Rows


class OneWay(StateClauses, RuleClauses):
    """The clauses in which rows, parts and processes stay as they are."""

    effective_options = {"share": 0.5}
    no_effect = {"share": 1.0}

    def test_neither_the_order_of_rows_nor_the_kind_of_loop_in_the_optimizer_matters(self):
        for name in self.trains_on():
            foreach = self.train(name, foreach=True).run()
            self.require_as_corrected(name, foreach, "with foreach=True", 1e-12)

    def test_an_evaluation_sees_the_true_weights_and_the_users_criterion(self):
        """A training forward beside the loop draws too, as dropout does; so there is none here."""
        for name in self.trains_on():
            training = self.train(name)
            for index in range(self.problem.steps):
                training.evaluate(index)
                training.run([index])
            self.require_as_corrected(name, training, "with evaluations in between")


class TestUniformRows(OneWay):
    correction = UniformRows


class TestWTACRS(OneWay):
    correction = WTACRS
