"""example_method: say in one sentence what it does."""

from __future__ import annotations

from pydantic import PositiveFloat

from prefopt.api import Algorithm, Batch, Comparison, Loss, Needs, Policy


class ExampleMethod(Algorithm):
    """What `prefopt plugins list` says about it."""

    name, eats = "example_method", Comparison
    paper = ""
    formula = ""

    beta: PositiveFloat = 0.1
    """What this setting does."""

    def needs(self) -> Needs:
        """`before` are columns without gradient, `during` live outputs of the policy. Ask for no more than you read."""
        return Needs(before={"reference_logps"}, during=frozenset({"logps"}))

    def loss(self, batch: Batch, policy: Policy) -> Loss:
        """A scalar. Always divide with `batch.mean(x, unit)`, so that any split of the batch gives the same number.

        For example, DPO is:
            reward = self.beta * batch.sum_tokens(policy.logps - batch.reference_logps)
            chosen, rejected = batch.pairs(reward)
            return Loss(batch.mean(preference_nll(chosen - rejected), "pairs"), batch.pair_metrics(reward))
        with `preference_nll` from `prefopt.maths`.
        """
        raise NotImplementedError("write ExampleMethod.loss in src/prefopt_example/method.py")
