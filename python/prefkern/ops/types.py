"""What the ops return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearLogprobs(NamedTuple):
    """Per-token statistics of softmax(z), each shaped like `targets`; None where not asked for.

    float32, or float64 for float64 input. Rows whose target is `ignore_index` hold 0 (False in `is_top1`).
    """

    logp: Tensor
    """log softmax(z)[target]."""
    entropy: Tensor | None = None
    """-sum_v p_v log p_v, in nats."""
    lse: Tensor | None = None
    """log sum_v exp z_v."""
    sum_sq_probs: Tensor | None = None
    """sum_v p_v^2. Not differentiable."""
    mean_logit: Tensor | None = None
    """Mean of z over the vocabulary. Not differentiable."""
    is_top1: Tensor | None = None
    """bool: whether the target is the argmax of z, the first maximum winning ties."""


class StepMeans(NamedTuple):
    """Means over the steps of B sequences; see `step_mean`."""

    means: Tensor
    """[B, n_steps], or [B, n_steps, H] of hidden states; 0 for a step without tokens. float32, or float64 for float64."""
    counts: Tensor
    """int64 [B, n_steps]: how many tokens each step has. Not differentiable."""


class GroupAdvantages(NamedTuple):
    """Advantages of B samples, [B], and the statistics of their groups; None where not asked for.

    Statistics are [B], of the combined reward; with `normalize_then_sum` they are of each column, shaped like the rewards.
    """

    advantages: Tensor
    """float32, or float64 for float64 rewards."""
    mean: Tensor | None = None
    """Mean reward of the sample's group."""
    std: Tensor | None = None
    """Standard deviation of the group's rewards; 0 in a group of one."""
    count: Tensor | None = None  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """int64: how many rewards of the group entered its statistics."""
    min: Tensor | None = None
    """Smallest reward of the group."""
    max: Tensor | None = None
    """Largest reward of the group."""


class QuestionWeights(NamedTuple):
    """Difficulty weights of the questions that B samples answer."""

    weights: Tensor
    """[B], float32 or float64: the weight of the sample's question; 1 where it is not valid."""
    valid: Tensor
    """[B], bool: whether the rewards of the question differ."""
    scale: Tensor
    """0-d: tokens of all questions over tokens of the valid ones."""


class PairMaskedAdvantages(NamedTuple):
    """Advantages of B samples after masking pairs, each [B]."""

    advantages: Tensor
    """float32, or float64 for float64 rewards."""
    kept: Tensor
    """bool: whether a pair with a sample of another reward is left."""
    masked_pairs: Tensor
    """int64: how many pairs the sample lost."""


class LossOutput(NamedTuple):
    """A scalar loss and what to log with it."""

    loss: Tensor
    """0-d, float32, or float64 for float64 input."""
    metrics: dict[str, Tensor]
    """0-d tensors without gradient, on the device of the loss. Reading one is the caller's synchronisation."""


class GaeOutput(NamedTuple):
    """Advantages and what a critic regresses on, each shaped like the rewards; 0 at tokens that do not count."""

    advantages: Tensor
    """float32, or float64 for float64 rewards."""
    returns: Tensor
    """advantages + values: the lambda-return."""


class LevelPairs(NamedTuple):
    """Loss over the pairs that the levels of a group's rows make."""

    loss: Tensor
    """0-d: mean over the pairs; 0 without any. float32, or float64 for float64 scores."""
    pairs: Tensor
    """0-d int64: how many there are."""


class ConflictRuns(NamedTuple):
    """How far completions agree with one of the other sign in their group; int64 [B] each."""

    forward: Tensor
    """Tokens from the first on; 0 for a row whose advantage is 0."""
    backward: Tensor
    """Tokens from the last back."""
    length: Tensor
    """How many tokens of the row count."""


class BalancedLoss(NamedTuple):
    """Several losses made one."""

    loss: Tensor
    """0-d."""
    weights: Tensor
    """Of each of them; they add up to 1. Not differentiable."""
