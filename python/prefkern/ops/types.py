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


class GroupAdvantages(NamedTuple):
    """Advantages of B samples and the statistics of their groups, each [B]."""

    advantages: Tensor
    """float32, or float64 for float64 rewards."""
    mean: Tensor
    """Mean reward of the sample's group."""
    std: Tensor
    """Standard deviation of the group's rewards with ddof 1; 0 in a group of one."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """int64: size of the group."""


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
