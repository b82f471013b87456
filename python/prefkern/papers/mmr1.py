r"""MMR1 (VAS): half of a batch from the prompts whose rollouts vary most, in reward and in what they say.

Leng et al., "MMR1: Enhancing Multimodal Reasoning with Variance-Aware Sampling and Open Resources", arXiv:2509.21268.
Evidence: code. Self-BLEU, distinct-3, edit distance, weights and the batch's split follow the authors' release.

A prompt has K rollouts with correctness :math:`v_k \in [0, 1]` and token sequences :math:`y_k`. Its variance promotion score:

.. math::
    \mathrm{OVS} = P (1 - P), \quad P = \frac1K \sum_k v_k, \qquad
    \mathrm{VPS} = \alpha\,\mathrm{OVS} + \beta\,\mathrm{TDS}(y_1, \ldots, y_K)

TDS, how diverse the rollouts are, by `tds`: `"one_minus_self_bleu"`, the default; `"self_bleu_code"`; `"distinct_3"`;
`"edit"`, the mean edit distance of two rollouts in tokens; `"edit_norm"`, the mean of each pair's over the length of its
longer one. Weights of the M prompts, with momentum :math:`\mu`, and the batch:

.. math::
    w_i \leftarrow \mu w_i + (1 - \mu) \frac{\mathrm{VPS}_i - \min}{\max - \min + 10^{-8}}, \qquad
    B_w = \lfloor \lambda B \rfloor

:math:`B_w` prompts are drawn with replacement in proportion to w, the others come from one random permutation of all prompts,
walked in order and over again, and the two are interleaved. All is a constant: there is no gradient.

Where paper and code differ:

- Sign: the code adds self-BLEU, which is similarity, so that with the paper's (0.8, 0.2) prompts with like rollouts gain. The
  default is the paper's intent; `"self_bleu_code"` reproduces the release. (The release's own configuration has beta 0.)
- Padding: the code counts n-grams of pad tokens. Here sequences are what counts, without padding.
- Momentum: the code's comment says that 1 is none, while by its formula 1 keeps the first weights for ever. Default 0, as in
  its configuration.
- Min-max gives the lowest prompt a weight of exactly 0; the paper says in proportion to VPS: `weighting="raw"`.
- How often to score all prompts anew, and with how many rollouts (56 steps and 16 in the paper's table, 4 and 8 in the
  release), is the caller's: `VasSampler.update` takes the scores.

OVS is at most 0.25, self-BLEU's term 1, and an edit distance as large as a response: (alpha, beta) is not the balance that it
seems. `VpsScores.ranges` tells what each term adds at least and at most.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .._names import choice
from .._state import checked_state, generator, save_state
from ..ops import distinct_n, edit_distance, self_bleu
from ._about import About

about = About(
    name="MMR1 (VAS)",
    title="MMR1: Enhancing Multimodal Reasoning with Variance-Aware Sampling and Open Resources",
    arxiv="2509.21268",
    year=2025,
    family="sampler",
    evidence="code",
    note="the authors' release; the sign of the diversity term is the paper's",
)

Tds = Literal["one_minus_self_bleu", "self_bleu_code", "distinct_3", "edit", "edit_norm"]
TDS: tuple[str, ...] = ("one_minus_self_bleu", "self_bleu_code", "distinct_3", "edit", "edit_norm")
WEIGHTINGS: tuple[str, ...] = ("minmax", "raw")
Sequences = Sequence[Sequence[Sequence[int] | Tensor]]


class PackedRollouts(NamedTuple):
    """The rollouts of M prompts, R in all, as the ops of `prefkern` take them."""

    ids: Tensor
    """[N], int64 or int32."""
    cu_seqlens: Tensor
    """int32 [R + 1], where each rollout begins and ends."""
    cu_prompts: Tensor
    """int32 [M + 1], where the rollouts of each prompt begin and end."""


class VpsScores(NamedTuple):
    """Of M prompts, float64 [M] each."""

    vps: Tensor
    """alpha OVS + beta TDS."""
    ovs: Tensor
    """P (1 - P), in [0, 0.25]."""
    tds: Tensor
    """As asked for; 0 for a prompt with one rollout, except for distinct_3."""
    accuracy: Tensor
    """P."""
    ranges: dict[str, tuple[float, float]]
    """Least and largest value of "ovs" and "tds" as they enter the sum, times alpha and beta, and of "vps"."""


def pack_rollouts(sequences: Sequences) -> PackedRollouts:
    """Tokens of each rollout of each prompt, `sequences[i][k]`, as lists or 1-d tensors, packed. Without padding."""
    lengths, counts, parts = [], [], []
    for i, rollouts in enumerate(sequences):
        counts.append(len(rollouts))
        for k, tokens in enumerate(rollouts):
            row = torch.as_tensor(tokens, device="cpu")
            if row.dim() != 1 or (row.numel() and (row.is_floating_point() or row.dtype == torch.bool)):
                raise TypeError(f"sequences[{i}][{k}] is {row.dtype} {list(row.shape)}; a list of token ids is expected")
            lengths.append(len(row))
            parts.append(row.long())
    ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return PackedRollouts(ids, _offsets(lengths), _offsets(counts))


def vps_scores(
    correct: Tensor | Sequence[Sequence[float]],
    sequences: PackedRollouts | Sequences,
    *,
    alpha: float = 0.8,
    beta: float = 0.2,
    tds: Tds = "one_minus_self_bleu",
) -> VpsScores:
    """The variance promotion scores of M prompts, on the CPU.

    Args:
        correct: v, in [0, 1]: for each prompt those of its rollouts, as many as it has; or a tensor [M, K], or [R] in the
            order of the rollouts; or [M], the means P.
        sequences: the tokens of each rollout of each prompt, `sequences[i][k]`, without padding; or packed.
        alpha, beta: finite, not negative.
        tds: see above.

    ValueError: naming the argument, what came and what is accepted.
    """
    choice("tds", tds, TDS)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}; it must be finite and not negative")
    packed = sequences if isinstance(sequences, PackedRollouts) else pack_rollouts(sequences)
    counts = packed.cu_prompts.diff().long()
    if bool((counts < 1).any()):
        raise ValueError(f"sequences[{int((counts < 1).nonzero()[0])}] is empty; every prompt needs a rollout")
    accuracy = _accuracy(correct, counts)
    ovs = accuracy * (1 - accuracy)
    diversity = _diversity(packed, tds, counts)
    terms = {"ovs": alpha * ovs, "tds": beta * diversity}
    terms["vps"] = terms["ovs"] + terms["tds"]
    ranges = {name: (term.min().item(), term.max().item()) if len(term) else (0.0, 0.0) for name, term in terms.items()}
    return VpsScores(terms["vps"], ovs, diversity, accuracy, ranges)


def minmax_weights(scores: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(s - min) / (max - min + eps) of scores [M]: float64, in [0, 1), all 0 where they are equal."""
    s = _finite_scores(scores)
    return (s - s.min()) / (s.max() - s.min() + eps) if len(s) else s


def batch_split(batch_size: int, mixture: float = 0.5) -> tuple[int, int]:
    """How many of a batch are drawn by weight, floor(mixture * batch_size), and how many come from the permutation.

    mixture: in [0, 1]. A product that falls short of an integer by rounding alone, as 0.29 * 100, counts as that integer.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; a positive integer is expected")
    if not 0 <= mixture <= 1:
        raise ValueError(f"mixture is {mixture}; a number in [0, 1] is expected")
    weighted = math.floor(mixture * batch_size + 1e-9 * batch_size)
    return weighted, batch_size - weighted


class VasSampler(Sampler[list[int]]):
    """Batches of prompts, a part of them drawn by weight.

        sampler = VasSampler(len(prompts), 128)
        for step in range(steps):
            if step % 56 == 0:
                sampler.update(vps_scores(correct, sequences).vps)   # of fresh rollouts for all prompts
            batch = sampler.sample(step)

    It is a batch sampler, too: `DataLoader(data, batch_sampler=sampler)` gives `len(sampler)` batches, a walk through all
    prompts' worth, from `sampler.step` on, which a state holds. Where workers fetch batches ahead, `step` is ahead with them:
    set it when a state is saved or loaded.

    Args:
        n_prompts: M.
        batch_size: B.
        mixture: lambda in [0, 1]; see `batch_split`.
        momentum: mu in [0, 1]: the part of the old weights that an update keeps; the first takes the new ones as they are. 1
            keeps these for ever.
        weighting: `"minmax"`, or `"raw"`: the scores themselves, which must not be negative then.
        seed: of every draw. The batch of a step depends on the seed, the step and the weights alone.

    Until there are scores, and while all weights are 0 (which `update` warns of, and `uniform` tells), the weighted part is
    drawn uniformly.
    """

    VERSION = 1

    def __init__(
        self,
        n_prompts: int,
        batch_size: int,
        *,
        mixture: float = 0.5,
        momentum: float = 0.0,
        weighting: Literal["minmax", "raw"] = "minmax",
        seed: int = 0,
    ) -> None:
        if isinstance(n_prompts, bool) or not isinstance(n_prompts, int) or n_prompts < 1:
            raise ValueError(f"n_prompts is {n_prompts!r}; a positive integer is expected")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}; a number in [0, 1] is expected")
        choice("weighting", weighting, WEIGHTINGS)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed is {seed!r}; an integer is expected")
        self.n_weighted, self.n_uniform = batch_split(batch_size, mixture)
        self.n_prompts = n_prompts
        self.batch_size = batch_size
        self.mixture = float(mixture)
        self.momentum = float(momentum)
        self.weighting = weighting
        self.seed = seed
        self.step = 0
        """The step that iteration goes on with."""
        self.updates = 0
        """How often there were scores."""
        self._weights = torch.zeros(n_prompts, dtype=torch.float64)
        self._permutation = torch.randperm(n_prompts, generator=generator(seed, -1))

    @property
    def weights(self) -> Tensor:
        """float64 [M]: a copy."""
        return self._weights.clone()

    @property
    def uniform(self) -> bool:
        """Whether the weighted part is drawn uniformly, there being no weight above 0."""
        return not bool((self._weights > 0).any())

    def update(self, scores: Tensor) -> Tensor:
        """Take over new scores [M] of all prompts, such as `VpsScores.vps`; returns the new weights.

        ValueError, and nothing has changed: scores that are not finite, or negative with `weighting="raw"`, or another number
        of them.
        """
        s = _finite_scores(scores)
        if len(s) != self.n_prompts:
            raise ValueError(f"scores has shape {list(s.shape)}; [{self.n_prompts}], one for each prompt, is expected")
        if self.weighting == "raw" and bool((s < 0).any()):
            i = int((s < 0).nonzero()[0])
            raise ValueError(f"scores[{i}] is {s[i].item()}; with weighting 'raw' no score may be negative")
        fresh = minmax_weights(s) if self.weighting == "minmax" else s
        self._weights = fresh.clone() if self.updates == 0 else torch.lerp(fresh, self._weights, self.momentum)
        self.updates += 1
        if self.uniform and self.n_weighted:
            warnings.warn("all weights are 0: the weighted part of a batch is drawn uniformly", stacklevel=2)
        return self.weights

    def sample(self, step: int) -> Tensor:
        """The prompts of a step, int64 [B]: weighted, uniform, weighted, ..., then what is left of the more numerous."""
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step is {step!r}; an integer from 0 on is expected")
        weighted = self._drawn(torch.rand(self.n_weighted, dtype=torch.float64, generator=generator(self.seed, step)))
        places = (step * self.n_uniform + torch.arange(self.n_uniform)) % self.n_prompts
        walked = self._permutation[places]
        both = min(self.n_weighted, self.n_uniform)
        pairs = torch.stack([weighted[:both], walked[:both]], 1).flatten()
        return torch.cat([pairs, weighted[both:], walked[both:]])

    def _drawn(self, u: Tensor) -> Tensor:
        """The prompts at u in [0, 1) of the summed weights; one without a weight has no room there."""
        if self.uniform:
            return (u * self.n_prompts).long().clamp_max(self.n_prompts - 1)
        sums = self._weights.cumsum(0)
        last = int((self._weights > 0).nonzero()[-1])  # u times the sum may round up to it
        return torch.searchsorted(sums, u * sums[-1], right=True).clamp_max(last)

    def __len__(self) -> int:
        """Batches of one iteration: as many as hold all prompts once, if each were of its own."""
        return math.ceil(self.n_prompts / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            step, self.step = self.step, self.step + 1
            yield self.sample(step).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Weights, steps and settings; the permutation follows from the seed."""
        return save_state(self, self.VERSION, self._fields())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave: the same batches come. ValueError, naming the field, for a state of other settings
        or with values that no sampler has; nothing has changed then."""
        fields = checked_state(self, self.VERSION, state, self._fields())
        for name in ("batch_size", "mixture", "momentum", "weighting", "seed", "n_prompts"):
            if fields[name] != getattr(self, name):
                raise ValueError(f"state[{name!r}] is {fields[name]!r}; this sampler has {getattr(self, name)!r}")
        for name in ("step", "updates"):
            if fields[name] < 0:
                raise ValueError(f"state[{name!r}] is {fields[name]}; it must not be negative")
        weights = fields["weights"]
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError("state['weights'] has numbers that are negative or not finite")
        self.step, self.updates, self._weights = fields["step"], fields["updates"], weights

    def _fields(self) -> dict[str, Any]:
        names = ("n_prompts", "batch_size", "mixture", "momentum", "weighting", "seed", "step", "updates")
        return {name: getattr(self, name) for name in names} | {"weights": self._weights}


def _diversity(packed: PackedRollouts, tds: str, counts: Tensor) -> Tensor:
    where: dict[str, Any] = {"cu_seqlens": packed.cu_seqlens, "cu_prompts": packed.cu_prompts}
    if tds == "distinct_3":
        return distinct_n(packed.ids, n=3, **where)
    if tds in ("edit", "edit_norm"):
        found = edit_distance(packed.ids, normalize=tds == "edit_norm", **where)
    else:
        found = self_bleu(packed.ids, **where)
        found = 1 - found if tds == "one_minus_self_bleu" else found
    return torch.where(counts > 1, found, 0.0)


def _accuracy(correct: Tensor | Sequence[Sequence[float]], counts: Tensor) -> Tensor:
    """P of each prompt. A tensor [M] holds the means; where every prompt has one rollout that is the same."""
    prompts, rollouts = len(counts), int(counts.sum())
    if not isinstance(correct, Tensor):
        lengths = [len(row) for row in correct]
        if lengths != counts.tolist():
            raise ValueError(f"correct has {lengths} values; as many as there are rollouts, {counts.tolist()}, are expected")
        correct = torch.tensor([v for row in correct for v in row], dtype=torch.float64)
    v = correct.detach().double().cpu()
    means = v.shape == (prompts,)
    if v.dim() == 2 and v.shape[0] == prompts and bool((counts == v.shape[1]).all()):
        v = v.flatten()
    if not means and v.shape != (rollouts,):
        raise ValueError(f"correct has shape {list(correct.shape)}; [M, K], [R] or [M] is expected, for {prompts} prompts "
                         f"with {rollouts} rollouts")  # fmt: skip
    good = (v >= 0) & (v <= 1)
    if not bool(good.all()):
        i = int((~good).nonzero()[0])
        raise ValueError(f"correct has {v[i].item()} at {i}; numbers in [0, 1] are expected")
    if means:
        return v
    prompt = torch.arange(prompts).repeat_interleave(counts)
    return torch.zeros(prompts, dtype=torch.float64).index_add(0, prompt, v) / counts


def _finite_scores(scores: Tensor) -> Tensor:
    if not isinstance(scores, Tensor) or scores.dim() != 1:
        came = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores is {came}; a tensor [M] is expected")
    s = scores.detach().double().cpu()
    if not bool(s.isfinite().all()):
        i = int((~s.isfinite()).nonzero()[0])
        raise ValueError(f"scores[{i}] is {s[i].item()}; a finite number is expected")
    return s


def _offsets(counts: Sequence[int]) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64).cumsum(0)]).int()
