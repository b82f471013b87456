r"""GROOVE: a policy update that is itself learned (LPG), on levels chosen by algorithmic regret.

"Discovering General Reinforcement Learning Algorithms with Adversarial Environment Design", arXiv:2310.02782.
Evidence: code. Network, inner loss and its gradients through an agent's step, and the advantages agree with the authors'
release run in float64. Its level buffer and meta-loss are followed as read.

*Update network* (`LPG`, `lpg_targets`), over rollouts of T steps by B workers, from the last step to the first:

.. math::
    x_t = [r_t, d_t, \pi_t, \phi(y_t), (1 - d_t)\,\phi(y_{t+1})], \qquad h_t = \mathrm{GRU}(x_t, (1 - d_t)\, h_{t+1}), \qquad
    \hat\pi_t = \mathrm{linear}(\mathrm{relu}(h_t)), \quad \hat y_t = \mathrm{softmax}(\mathrm{linear}(\mathrm{relu}(h_t)))

with the probability :math:`\pi_t` of the action taken plus 1e-8, the agent's prediction y, a distribution over W numbers, and
a small network :math:`\phi`. The inputs are constants. A GRU's state is dropped where a step is terminal: what comes later
reaches neither this step nor earlier ones.

*Inner loss* (`lpg_inner_loss`), one step of gradient descent on which is `lpg_agent_step`:

.. math::
    L = \frac{1}{BT} \sum \log\pi_t\, \hat\pi_t + \alpha_y\, \mathrm{KL}(y_t \,\|\, \hat y_t)

*Meta-loss* (`lpg_meta_loss`) after K such steps, on a fresh rollout, with advantages A normalised over the whole batch:

.. math::
    -\overline{\log\pi\, A} - b_0 H(\pi) - b_1 H(y) + b_2 \overline{\hat\pi^2} + b_3 \overline{|\hat y|^2}

*Algorithmic regret* of a level: the return of an A2C agent trained on it from scratch, minus that of the agent that the learned
update has trained. `LevelBuffer` keeps levels by it, and replays those where it is large.

Where paper and code differ:

- The paper, as LPG before it, ascends :math:`\log\pi\,\hat\pi`. The network learns either sign; `sign="paper"` is for weights
  trained that way.
- In the code the critic behind the meta-advantages is never trained: its loss is taken of a copy that is thrown away. Here it
  is; `critic_loss(frozen_critic=True)` has the gradient that theirs has, exactly 0.
- When levels are reset, the code marks as new what is active rather than what was new, so that levels nobody has trained on
  count as evaluated with score 0. `flags="code"` does the same.
- `transform="rank"` takes the top levels, whatever the temperature. Prioritised level replay draws by rank instead.
- The code's options named relative step and log lifetime feed the raw step and lifetime; they are not offered here.

Defaults: those of the code, which are the paper's for the most part: alpha_y 0.5, b 0.05, 0.001, 0.005, 0.001; W 8, embedding
16, GRU 256; gamma 0.99, lambda 0.95; buffer 4000, replay with probability 0.5, temperature 1, K = 5, T = 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._names import choice
from .._state import checked_state, generator, save_state
from ..ops import GaeOutput, LossOutput, gae, lpg_inner_loss, reverse_gru_reset, sequence_sum
from ._about import About
from ._shared import may_look

__all__ = [
    "LPG",
    "AgentStep",
    "LPGTargets",
    "LevelBuffer",
    "LevelSample",
    "Regularisers",
    "a2c_loss",
    "about",
    "algorithmic_regret",
    "antithetic_direction",
    "antithetic_fitness",
    "critic_loss",
    "first_episode_return",
    "lpg_agent_step",
    "lpg_inner_loss",
    "lpg_meta_loss",
    "lpg_targets",
    "rollout_advantages",
]

about = About(
    name="GROOVE",
    title="Discovering General Reinforcement Learning Algorithms with Adversarial Environment Design",
    arxiv="2310.02782",
    year=2023,
    family="meta-learned objective, curriculum",
    evidence="code",
    note="the authors' release, run in float64: network, inner gradients, advantages",
)

EPS = 1e-8
TRANSFORMS = ("rank", "proportional")
FLAGS = ("intended", "code")


# ---- the update network ------------------------------------------------------------------------------------------------


class LPGTargets(NamedTuple):
    """What the network wants of every step."""

    pi_hat: Tensor
    """[..., T], any number: the adjustment of the action's probability."""
    y_hat: Tensor
    """[..., T, W], a distribution: the target of the prediction."""


class LPG(nn.Module):
    """The parameters of the update network; calling it is `lpg_targets`.

    target_width: W. embedding_width: of the network that makes a number of a prediction. hidden: of the GRU, whose gates lie in
    the order r, z, n. Weights are normal with variance 1 / inputs, those from state to state orthogonal, biases 0; drawn from
    `generator`.
    """

    def __init__(
        self,
        target_width: int = 8,
        embedding_width: int = 16,
        hidden: int = 256,
        *,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"target_width": target_width, "embedding_width": embedding_width, "hidden": hidden}
        for name, size in sizes.items():
            _positive(name, size)

        def weight(*shape: int) -> nn.Parameter:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])
            return nn.Parameter(drawn.to(dtype))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype))

        square = torch.randn(3, hidden, hidden, generator=generator, dtype=torch.float64)
        self.embed_weight, self.embed_bias = weight(embedding_width, target_width), zeros(embedding_width)
        self.embed_out_weight, self.embed_out_bias = weight(1, embedding_width), zeros(1)
        self.weight_ih, self.bias_ih = weight(3 * hidden, 5), zeros(3 * hidden)
        self.weight_hh = nn.Parameter(torch.linalg.qr(square)[0].reshape(3 * hidden, hidden).to(dtype))
        self.bias_n = zeros(hidden)
        self.policy_weight, self.policy_bias = weight(1, hidden), zeros(1)
        self.target_weight, self.target_bias = weight(target_width, hidden), zeros(target_width)

    def forward(self, reward: Tensor, done: Tensor, pi: Tensor, y: Tensor, y_next: Tensor) -> LPGTargets:
        return lpg_targets(self, reward, done, pi, y, y_next)


def lpg_targets(params: LPG, reward: Tensor, done: Tensor, pi: Tensor, y: Tensor, y_next: Tensor) -> LPGTargets:
    """The targets of rollouts of T steps. Gradient to `params`; everything else is a constant, whether it requires one or not.

    params: an `LPG`, or anything with its attributes. reward: [..., T], of a shape such as [B, T]. done: bool [..., T], whether
    the episode ends with this step. pi: [..., T], the probability of the action taken, as it is fed (the release adds 1e-8). y,
    y_next: [..., T, W], the agent's predictions in the state and in the one behind it; the latter are not looked at where done.
    """
    rows = reward.shape
    if reward.dim() < 1 or not rows[-1]:
        raise ValueError(f"reward has shape {list(rows)}; [..., T] with T >= 1 is expected")
    if done.dtype != torch.bool:
        raise TypeError(f"done has dtype {done.dtype}; bool is expected")
    width = params.embed_weight.shape[1]
    for name, t, shape in (
        ("done", done, rows),
        ("pi", pi, rows),
        ("y", y, (*rows, width)),
        ("y_next", y_next, (*rows, width)),
    ):
        if t.shape != shape:
            raise ValueError(f"{name} has shape {list(t.shape)}; {list(shape)} is expected")
    dtype = params.weight_ih.dtype
    inputs = [reward, done, pi, *(_embedded(params, t.detach().to(dtype)) for t in (y, y_next))]
    inputs[-1] = torch.where(done, 0.0, inputs[-1])
    x = torch.stack([t.detach().to(dtype) if k < 3 else t for k, t in enumerate(inputs)], -1)
    hidden = reverse_gru_reset(
        x.reshape(-1, *x.shape[-2:]),
        done.reshape(-1, rows[-1]),
        params.weight_ih,
        params.weight_hh,
        params.bias_ih,
        params.bias_n,
    )
    features = F.relu(hidden).reshape(*rows, -1)
    pi_hat = F.linear(features, params.policy_weight, params.policy_bias).squeeze(-1)
    return LPGTargets(pi_hat, F.linear(features, params.target_weight, params.target_bias).softmax(-1))


def _embedded(params: LPG, y: Tensor) -> Tensor:
    inner = F.relu(F.linear(y, params.embed_weight, params.embed_bias))
    return F.linear(inner, params.embed_out_weight, params.embed_out_bias).squeeze(-1)


# ---- an agent's step ---------------------------------------------------------------------------------------------------


class Regularisers(NamedTuple):
    """What the meta-loss weighs with b0 to b3, each 0-d, a mean over all steps."""

    policy_entropy: Tensor
    target_entropy: Tensor
    pi_hat_l2: Tensor
    y_hat_l2: Tensor

    @classmethod
    def mean(cls, updates: Sequence[Regularisers]) -> Regularisers:
        """Over the K updates of an agent."""
        if not updates:
            raise ValueError("updates is empty; at least one is expected")
        return cls(*(torch.stack(terms).mean() for terms in zip(*updates, strict=True)))


class AgentStep(NamedTuple):
    params: dict[str, Tensor]
    loss: Tensor
    """0-d, before the step."""
    targets: LPGTargets
    regularisers: Regularisers
    """Entropies are those of the agent after the step, on the observations of the rollout, as in the release."""


Apply = Callable[[Mapping[str, Tensor], Tensor], tuple[Tensor, Tensor]]


def lpg_agent_step(
    params: LPG,
    agent: Mapping[str, Tensor],
    apply: Apply,
    obs: Tensor,
    actions: Tensor,
    reward: Tensor,
    done: Tensor,
    next_obs: Tensor,
    *,
    lr: float,
    alpha_y: float = 0.5,
    sign: Literal["code", "paper"] = "code",
    alive: Tensor | None = None,
    create_graph: bool = True,
) -> AgentStep:
    """One step of gradient descent of an agent on the inner loss. What comes out depends on `params` differentiably.

    The meta-gradient goes through the updates, and stops where the network is fed: its inputs are constants, in later updates
    too.

    agent: tensors that require gradients, by name; or, with `alive`, those of G agents side by side along the first dimension.
    apply: gives of those and of observations probs [..., T, A] and y [..., T, W]; with `alive`, [G, ..., T, A] and so on.
    actions: int64 [..., T]; reward, done: [..., T]. lr: the step. alive: bool [G]: whose lifetime is not over. The others keep
    their parameters, and each agent's gradient is that of its own mean. create_graph: False where no meta-gradient is wanted.
    """
    _finite("lr", lr)
    probs, y = apply(agent, obs)
    with torch.no_grad():
        y_next = apply(agent, next_obs)[1]
        pi = probs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1) + EPS
    targets = lpg_targets(params, reward, done, pi, y, y_next)
    loss = lpg_inner_loss(probs, actions, y, *targets, alpha_y=alpha_y, sign=sign).loss
    agents = 1
    if alive is not None:
        agents = alive.shape[0]
        if alive.dtype != torch.bool or alive.dim() != 1 or any(t.shape[:1] != alive.shape for t in agent.values()):
            raise ValueError(
                f"alive is {alive.dtype} {list(alive.shape)}; bool [G] is expected, where every tensor of the agent is [G, ...]"
            )
    grads = torch.autograd.grad(loss * agents, list(agent.values()), create_graph=create_graph)
    new = {}
    for (name, old), grad in zip(agent.items(), grads, strict=True):
        moved = old - lr * grad
        new[name] = moved if alive is None else torch.where(alive.view(-1, *(1,) * (old.dim() - 1)), moved, old)
    if not create_graph:
        new = {name: t.detach().requires_grad_() for name, t in new.items()}
    after_probs, after_y = apply(new, obs)
    l2 = targets.pi_hat.square().mean(), targets.y_hat.square().sum(-1).mean()
    return AgentStep(new, loss, targets, Regularisers(_entropy(after_probs), _entropy(after_y), *l2))


def _entropy(p: Tensor) -> Tensor:
    shifted = p + EPS
    return -(shifted * shifted.log()).sum(-1).mean()


# ---- the meta-loss -----------------------------------------------------------------------------------------------------


def lpg_meta_loss(
    probs: Tensor,
    actions: Tensor,
    advantages: Tensor,
    regularisers: Regularisers | None = None,
    *,
    b0: float = 5e-2,
    b1: float = 1e-3,
    b2: float = 5e-3,
    b3: float = 1e-3,
    per_agent: bool = False,
) -> LossOutput:
    """The meta-loss of trained agents on a fresh rollout. Gradient to probs, and through them and the regularisers to the
    update network; advantages are constants.

    probs: [..., T, A]. actions: int64 [..., T]. advantages: [..., T], as estimated; normalised here by mean and population
    standard deviation over everything, plus 1e-8: 0 where all are equal. regularisers: None for none. per_agent: the first
    dimension is one of agents, each of which is normalised by itself.

    Metrics: lpg, the loss without regularisers.
    """
    a = _normalised(advantages, actions, per_agent)
    lpg = -(_log_prob(probs, actions) * a).mean()
    loss = lpg
    if regularisers is not None:
        r = regularisers
        loss = lpg - b0 * r.policy_entropy - b1 * r.target_entropy + b2 * r.pi_hat_l2 + b3 * r.y_hat_l2
    return LossOutput(loss, {"lpg": lpg.detach()})


def rollout_advantages(reward: Tensor, values: Tensor, done: Tensor, *, gamma: float = 0.99, lam: float = 0.95) -> GaeOutput:
    r"""Generalised advantages of rollouts in which episodes end and others begin,
    :math:`A_t = r_t + \gamma (1 - d_t) V_{t+1} - V_t + \gamma\lambda (1 - d_t) A_{t+1}`, and what the critic regresses on,
    A + V.

    reward: [..., T]. values: [..., T + 1], the last that of the state behind the rollout. done: bool [..., T]. No gradient.
    """
    rows = reward.shape
    if reward.dim() < 1 or not reward.numel():
        raise ValueError(f"reward has shape {list(rows)}; [..., T] with at least one step is expected")
    if values.shape != (*rows[:-1], rows[-1] + 1):
        raise ValueError(f"values has shape {list(values.shape)}; {[*rows[:-1], rows[-1] + 1]} is expected: one more per row")
    if done.shape != rows or done.dtype != torch.bool:
        raise ValueError(f"done is {done.dtype} {list(done.shape)}; bool {list(rows)} is expected")
    # Every step may be the last of an episode, so there are as many packed sequences, those of the other steps being empty:
    # their number is known without looking.
    steps = rows[-1]
    last = done.clone()
    last[..., -1] = True
    place = torch.arange(1, last.numel() + 1, device=done.device)
    ends = torch.where(last.reshape(-1), place, 0).cummax(0).values
    cu_seqlens = F.pad(ends, (1, 0)).to(torch.int32)
    behind = values[..., -1:].expand(rows).reshape(-1)
    out = gae(
        reward.reshape(-1), values[..., :steps].reshape(-1), finished=done.reshape(-1), gamma=gamma, lam=lam,
        bootstrap="critic", last_values=behind, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return GaeOutput(*(t.reshape(rows) for t in out))


def critic_loss(values: Tensor, returns: Tensor, *, frozen_critic: bool = False) -> Tensor:
    """The mean squared error of a critic, 0-d. Gradient to values; with `frozen_critic` it is exactly 0, as in the release."""
    if values.shape != returns.shape or not values.numel():
        raise ValueError(f"values has shape {list(values.shape)} and returns {list(returns.shape)}; equal ones are expected")
    loss = (returns.detach() - values).square().mean()
    return loss.detach() + 0.0 * values.sum() if frozen_critic else loss


def a2c_loss(
    probs: Tensor,
    actions: Tensor,
    reward: Tensor,
    values: Tensor,
    done: Tensor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    entropy_coef: float = 0.01,
    per_agent: bool = False,
) -> LossOutput:
    """The loss of the antagonist: normalised advantages, an entropy bonus, and the critic's squared error.

    probs: [..., T, A]; values: [..., T + 1]; gradients to both, to the last values none. actions, reward, done: [..., T].
    per_agent: as for `lpg_meta_loss`.

    Metrics: policy, entropy, critic, each a mean; loss = policy - entropy_coef entropy + critic.
    """
    advantages, returns = rollout_advantages(reward, values, done, gamma=gamma, lam=lam)
    policy = -(_log_prob(probs, actions) * _normalised(advantages, actions, per_agent)).mean()
    entropy, critic = _entropy(probs), critic_loss(values[..., :-1], returns)
    metrics = {"policy": policy, "entropy": entropy, "critic": critic}
    return LossOutput(policy - entropy_coef * entropy + critic, {name: t.detach() for name, t in metrics.items()})


def _log_prob(probs: Tensor, actions: Tensor) -> Tensor:
    if probs.shape[:-1] != actions.shape or not actions.numel():
        raise ValueError(
            f"probs has shape {list(probs.shape)} and actions {list(actions.shape)}; [..., A] and [...] with at "
            "least one step are expected"
        )
    return (probs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1) + EPS).log()


def _normalised(advantages: Tensor, actions: Tensor, per_agent: bool) -> Tensor:
    if advantages.shape != actions.shape:
        raise ValueError(f"advantages has shape {list(advantages.shape)}; {list(actions.shape)} is expected, as actions")
    a = advantages.detach()
    over = tuple(range(1 if per_agent else 0, a.dim()))
    if not over:
        raise ValueError(f"advantages has shape {list(a.shape)}; [G, ..., T] is expected with per_agent")
    centred = a - a.mean(over, keepdim=True)
    scaled = centred / (centred.square().mean(over, keepdim=True).sqrt() + EPS)
    return torch.where(a.amin(over, keepdim=True) == a.amax(over, keepdim=True), 0.0, scaled)


# ---- evolution strategies ----------------------------------------------------------------------------------------------


def antithetic_fitness(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Fitness of the two candidates of each pair, which were judged on the same level: 1 for the one with the larger return, 0
    for the other. Of equal returns the second gets 1, as in the release.

    first, second: returns, [P]. NaN is an error.
    """
    if first.shape != second.shape:
        raise ValueError(f"second has shape {list(second.shape)}; {list(first.shape)} is expected, as first")
    for name, t in (("first", first), ("second", second)):
        _no_nan(name, t)
    wins = (first > second).to(first.dtype if first.is_floating_point() else torch.float32)
    return wins, 1 - wins


def antithetic_direction(noise: Tensor, first: Tensor, second: Tensor, *, sigma: float) -> Tensor:
    """The direction of ascent [D] that pairs of candidates, at +sigma noise and -sigma noise, show by their fitness: the mean
    of fitness times noise over all 2 P of them, over sigma.

    noise: [P, D]. first, second: fitness, [P].
    """
    if noise.dim() != 2 or not noise.shape[0] or first.shape != noise.shape[:1] or second.shape != first.shape:
        raise ValueError(
            f"noise has shape {list(noise.shape)}, first {list(first.shape)}, second {list(second.shape)}; [P, D], [P] and [P] "
            "with at least one pair are expected"
        )
    if not _finite("sigma", sigma) > 0:
        raise ValueError(f"sigma is {sigma}; it must be positive")
    return (first - second).to(noise.dtype) @ noise / (2 * noise.shape[0] * sigma)


# ---- levels ------------------------------------------------------------------------------------------------------------


def first_episode_return(reward: Tensor, done: Tensor) -> Tensor:
    """Undiscounted reward up to the first terminal step, which counts; of the whole row where there is none.

    reward: [..., T]; done: bool [..., T]. Returns [...], float32, or float64 for float64.
    """
    if done.shape != reward.shape or done.dtype != torch.bool or reward.dim() < 1:
        raise ValueError(f"done is {done.dtype} {list(done.shape)}; bool {list(reward.shape)} is expected, as reward")
    before = done.long().cumsum(-1) - done.long()
    flat = reward.reshape(-1, reward.shape[-1])
    return sequence_sum(flat, (before == 0).reshape(flat.shape)).reshape(reward.shape[:-1])


def algorithmic_regret(ret_antagonist: Tensor, ret_agent: Tensor) -> Tensor:
    """Algorithmic regret of levels, [L]: the mean return of the antagonist's workers minus that of the agent's.

    ret_antagonist, ret_agent: [L], or [L, workers], each its own number of workers; as from `first_episode_return`. NaN is an
    error.
    """
    for name, t in (("ret_antagonist", ret_antagonist), ("ret_agent", ret_agent)):
        if t.dim() not in (1, 2) or not t.numel():
            raise ValueError(f"{name} has shape {list(t.shape)}; [L] or [L, workers] with a level is expected")
        _no_nan(name, t)
    if ret_antagonist.shape[0] != ret_agent.shape[0]:
        raise ValueError(
            f"ret_agent is of {ret_agent.shape[0]} levels; {ret_antagonist.shape[0]} are expected, as ret_antagonist"
        )
    antagonist, agent = (t.mean(-1) if t.dim() == 2 else t for t in (ret_antagonist, ret_agent))
    return antagonist - agent


class LevelSample(NamedTuple):
    """Levels to train on next, each [n] on the CPU."""

    slots: Tensor
    """int64: where the buffer keeps them; what `LevelBuffer.update` wants back."""
    levels: Tensor
    """int64: their numbers. The same number is the same level: a seed for whoever makes it."""
    replayed: Tensor
    """bool."""


class LevelBuffer:
    r"""Levels with their scores, of which those are replayed whose score is high.

    A slot holds a level's number, its score, whether it is *new* (never evaluated) and whether it is *active* (an agent trains
    on it). `sample` draws the next levels, some of them replayed, the others new; `update` takes their scores when an agent's
    lifetime is over.

    Replayed are evaluated, inactive levels with probabilities :math:`\propto \exp(\mathrm{score} / \mathrm{temperature})`:
    `transform="rank"` takes those of the highest, `"proportional"` draws without replacement. New levels take the slots of
    other new ones first, then of the lowest scores, of active ones last. Of equal scores the lower slot comes first.

    Args:
        size: how many levels.
        temperature: positive; of no effect with "rank".
        flags: "code" marks as new, when levels are reset, whatever is active, and nothing else but those; "intended" only the
            reset ones.
        p_replay: the probability that a level of a sample is a replayed one, as far as there are any.
        seed: draws depend on it and on the step that `sample` is told, so that a resumed run makes the same.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """

    _VERSION = 1

    def __init__(
        self,
        size: int = 4000,
        *,
        transform: Literal["rank", "proportional"] = "rank",
        temperature: float = 1.0,
        flags: Literal["intended", "code"] = "intended",
        p_replay: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.size = _positive("size", size)
        for name, value, accepted in (("transform", transform, TRANSFORMS), ("flags", flags, FLAGS)):
            choice(name, value, accepted)
        if not _finite("temperature", temperature) > 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        if not 0 <= _finite("p_replay", p_replay) <= 1:
            raise ValueError(f"p_replay is {p_replay}; it must lie in [0, 1]")
        self.transform, self.temperature, self.flags, self.p_replay = transform, float(temperature), flags, float(p_replay)
        self.seed = _integer("seed", seed)
        self.scores = torch.zeros(size, dtype=torch.float64)
        self.new = torch.ones(size, dtype=torch.bool)
        self.active = torch.zeros(size, dtype=torch.bool)
        self.levels = torch.arange(size)
        self.made = size
        """How many levels there have been; the number of the next."""

    def __len__(self) -> int:
        return self.size

    @property
    def replayable(self) -> Tensor:
        """bool [size]: evaluated and inactive."""
        return ~self.new & ~self.active

    def sample(self, step: int, count: int = 1) -> LevelSample:
        """The next `count` levels, which become active. They must fit beside those that already are."""
        count = _positive("count", count)
        idle = int((~self.active).sum())
        if count > idle:
            raise ValueError(f"count is {count}, but only {idle} of {self.size} levels are inactive")
        random = generator(self.seed, _integer("step", step), 0)
        wanted = int((torch.rand(count, dtype=torch.float64, generator=random) < self.p_replay).sum())
        again = min(wanted, int(self.replayable.sum()))
        fresh = self.reset(count - again) if again < count else torch.zeros(0, dtype=torch.int64)
        old = self.replay(step, again) if again else torch.zeros(0, dtype=torch.int64)
        order = torch.randperm(count, generator=random)
        slots = torch.cat([old, fresh])[order]
        replayed = (torch.arange(count) < again)[order]
        self.active[slots] = True
        return LevelSample(slots, self.levels[slots].clone(), replayed)

    def update(self, slots: Tensor | Sequence[int], scores: Tensor | Sequence[float]) -> None:
        """Scores of active levels whose agents have finished. They become inactive and evaluated."""
        where = torch.as_tensor(slots)
        values = torch.as_tensor(scores).detach().to("cpu", torch.float64)
        if where.dim() != 1 or where.dtype == torch.bool or where.is_floating_point() or values.shape != where.shape:
            raise ValueError(
                f"slots is {where.dtype} {list(where.shape)} and scores has shape {list(values.shape)}; integers [n] and [n] "
                "are expected"
            )
        where = where.to("cpu", torch.int64)
        for i, (slot, score) in enumerate(zip(where.tolist(), values.tolist(), strict=True)):
            if not 0 <= slot < self.size:
                raise ValueError(f"slots[{i}] is {slot}; it must lie in [0, {self.size})")
            if not self.active[slot]:
                raise ValueError(f"slots[{i}] is {slot}, which is not active; accepted are slots of a sample, once")
            if not math.isfinite(score):
                raise ValueError(f"scores[{i}] is {score}; a finite number is expected")
        if len(where.unique()) < len(where):
            raise ValueError(f"slots is {where.tolist()}; each may come once")
        self.scores[where] = values
        self.new[where] = False
        self.active[where] = False

    def replay_probabilities(self) -> Tensor:
        """float64 [size], adding up to 1. Without a replayable level there are none: ValueError."""
        open_slots = self.replayable
        if not bool(open_slots.any()):
            raise ValueError("no level is replayable: none is both evaluated and inactive; take a new one")
        return (self.scores / self.temperature).masked_fill(~open_slots, -math.inf).softmax(0)

    def replay(self, step: int, count: int = 1) -> Tensor:
        """Slots of `count` replayable levels, the best first, or in the order of their draw; int64 [count]. ValueError if there
        are fewer."""
        count, available = _positive("count", count), int(self.replayable.sum())
        if count > available:
            raise ValueError(f"count is {count}, but {available} levels are replayable: evaluated and inactive; take new ones")
        keys = self.scores.clone()
        if self.transform == "proportional":
            # By the largest score plus Gumbel noise: a draw without replacement, in which no probability becomes 0.
            uniform = torch.rand(self.size, dtype=torch.float64, generator=generator(self.seed, _integer("step", step), 1))
            keys = keys / self.temperature - (-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
        keys = keys.masked_fill(~self.replayable, -math.inf)
        return keys.argsort(descending=True, stable=True)[:count]

    def reset(self, count: int) -> Tensor:
        """Put `count` new levels in place of others; their slots, int64 [count]."""
        count = _positive("count", count)
        if count > self.size:
            raise ValueError(f"count is {count}; there are {self.size} levels")
        keys = self.scores.masked_fill(self.new, -math.inf).masked_fill(self.active, math.inf)
        slots = keys.argsort(stable=True)[:count]
        if self.flags == "code":
            self.new = self.active.clone()
        self.new[slots], self.active[slots], self.scores[slots] = True, False, 0.0
        self.levels[slots] = torch.arange(self.made, self.made + count)
        self.made += count
        return slots

    def _fields(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in ("scores", "new", "active", "levels")}
        return {**tensors, "made": self.made, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """All that changes, and the seed. Options are the constructor's."""
        return save_state(self, self._VERSION, self._fields())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of `state_dict`; ValueError that names what is wrong with it, and then nothing has changed."""
        taken = checked_state(self, self._VERSION, state, self._fields())
        if not bool(taken["scores"].isfinite().all()):
            raise ValueError("state['scores'] has numbers that are not finite")
        if bool(((taken["levels"] < 0) | (taken["levels"] >= taken["made"])).any()):
            raise ValueError(
                f"state['levels'] has numbers outside [0, {taken['made']}), as many as state['made'] says there were"
            )
        for name, value in taken.items():
            setattr(self, name, value)


# ---- arguments ---------------------------------------------------------------------------------------------------------


def _integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; an integer is expected")
    return int(value)


def _positive(name: str, value: Any) -> int:
    if _integer(name, value) < 1:
        raise ValueError(f"{name} is {value}; it must be positive")
    return int(value)


def _finite(name: str, value: Any) -> float:
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r}; a number is expected")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")
    return float(value)


def _no_nan(name: str, values: Tensor) -> None:
    """If that may be looked at."""
    if may_look(values) and bool(values.isnan().any()):
        raise ValueError(f"{name}{values.isnan().nonzero()[0].tolist()} is NaN; a number is expected")
