r"""Tree search over reasoning steps, as in MCTS-DPO (arXiv:2405.00451): PUCT selection, backup, search policy, pairs.

A node is a prefix of steps, its children are next steps. Models are called by the caller's `expand` alone; everything here runs
on the host, in double precision, and draws nothing unless a generator is given. With value(c) an evaluator's score of a prefix,
N visits, and discount :math:`\gamma`:

.. math::
    r(c) = \mathrm{value}(c) - \mathrm{value}(\mathrm{parent}), \qquad
    \mathrm{select}: \arg\max_c\; Q(c) + w\, p(c) \frac{\sqrt{N(\mathrm{parent})}}{1 + N(c)}

.. math::
    V(s) = \frac{\sum_c \max(1, N_c)\, Q_c}{\sum_c \max(1, N_c)}, \qquad Q(s) = r(s) + \gamma V(s)

A new child begins with :math:`Q = V(\mathrm{parent}) + r` and V = 0. The paper's average has no max(1, .); this follows the
released code, of whose quirks three are kept: the node that is searched counts every iteration once more than its children do;
ties go to the first child; and a child whose Q is exactly 0 has no weight in a search policy with a temperature above 0.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ._names import choice

__all__ = [
    "Node",
    "StepPair",
    "Tree",
    "backup",
    "collect_pairs",
    "completion",
    "next_child",
    "node_value",
    "puct",
    "rank_children",
    "search",
    "search_policy",
    "step_pair",
    "step_prior",
]

Worse = Literal["worst", "second", "random"]
WORSE = ("worst", "second", "random")


@dataclass(eq=False)
class Node:
    """A prefix of steps, reached from its parent by one more. A root is `Node(value)`; children come from `add`."""

    value: float = 0.0
    """The evaluator's score of this prefix."""
    prior: float = 1.0
    """p: how likely the policy finds the step, see `step_prior`."""
    terminal: bool = False
    action: Any = None
    """The step itself, whatever the caller uses for it."""
    parent: Node | None = field(default=None, repr=False)
    children: list[Node] = field(default_factory=list, repr=False)
    visits: int = 0
    v: float = 0.0
    q: float = field(init=False)
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth = 0 if self.parent is None else self.parent.depth + 1
        self.q = self.reward if self.parent is None else self.parent.v + self.reward

    @property
    def reward(self) -> float:
        """r: what the step adds to the score."""
        return self.value - (0.0 if self.parent is None else self.parent.value)

    def add(self, value: float, prior: float = 1.0, terminal: bool = False, action: Any = None) -> Node:
        """A new child."""
        child = Node(float(value), float(prior), bool(terminal), action, self)
        self.children.append(child)
        return child

    def path(self) -> list[Node]:
        """From the root to this node."""
        path = [self]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        return path[::-1]


Expansion = Iterable[tuple[Any, ...]]


def step_prior(logp: Sequence[float], length_penalty: float = 1.25) -> float:
    r""":math:`\exp(\sum_t \log\pi(a_t) / |a|^\lambda)`, the prior of a step with these token log-probs."""
    if len(logp) == 0:
        raise ValueError("logp is empty; a step has at least one token")
    return math.exp(math.fsum(float(x) for x in logp) / len(logp) ** length_penalty)


def node_value(
    confidence: float,
    parent_depth: int,
    parent_value: float,
    *,
    correct: bool | None = None,
    new_wording: bool = False,
) -> float:
    """The score of a child from the self-evaluation's confidence that it is right, as the released code forms it.

    confidence / max(parent_depth - 3, 1), so that long chains score less; the parent's value where that is 0. A terminal
    child (correct is not None) adds 1 where its answer is right, 5/4 if in a wording other than the reference solution's, and
    -1 where it is wrong.
    """
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence is {confidence}; it must lie in [0, 1]")
    value = confidence / max(parent_depth - 3, 1) or parent_value
    if correct is None:
        return value
    return value + ((5 / 4 if new_wording else 1.0) if correct else -1.0)


def puct(child: Node, w_exp: float = 1.0) -> float:
    """What selection maximises: Q + w_exp * prior * sqrt(N(parent)) / (1 + N)."""
    if child.parent is None:
        raise ValueError("child is a root; a node with a parent is expected")
    return child.q + w_exp * child.prior * math.sqrt(child.parent.visits) / (1 + child.visits)


def backup(path: Sequence[Node], gamma: float = 1.0) -> None:
    """Visits, V and Q along a path that begins at the searched node, from its last node back. Children whose value is NaN are
    left out of the averages."""
    leaf = path[-1]
    leaf.q = leaf.reward + gamma * leaf.v
    leaf.visits += 1
    for node in reversed(path[:-1]):
        known = _known(node)
        node.v = sum(max(1, c.visits) * c.q for c in known) / sum(max(1, c.visits) for c in known)
        node.visits += 1
        if node.parent is not None:
            node.q = node.reward + gamma * node.v


def search(
    root: Node,
    expand: Callable[[Node], Expansion],
    *,
    n_iters: int,
    depth_limit: int,
    w_exp: float = 1.0,
    gamma: float = 1.0,
    strict: bool = False,
) -> Node:
    """Grow the tree below `root` by n_iters iterations; returns `root`.

    An iteration goes down by `puct` to a node without children, and goes on expanding and selecting until it meets a terminal
    node, the depth limit, or a node that `expand` gives no children; then comes the backup.

    Args:
        root: may be a node of a tree that was searched before: what is there is kept.
        expand: returns the children of a node as (value, prior, terminal) or (value, prior, terminal, action) tuples. Each node
            is expanded once, or again if it was given none, and terminal nodes never.
        n_iters: as given; the paper's runs search four times as long at the first step, which is the caller's to pass.
        depth_limit: steps below `root`.
        w_exp: the weight of exploration.
        gamma: discount, in [0, 1].
        strict: a NaN value is a ValueError. Else such a child is never selected and counts in no average.
    """
    _check_int("n_iters", n_iters, 0)
    _check_int("depth_limit", depth_limit, 1)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it must lie in [0, 1]")
    if not (math.isfinite(w_exp) and w_exp >= 0):
        raise ValueError(f"w_exp is {w_exp}; a finite number that is not negative is expected")

    def ends(node: Node) -> bool:
        return node.terminal or node.depth - root.depth >= depth_limit

    for _ in range(n_iters):
        root.visits += 1
        path = [root]
        while not ends(path[-1]):
            node = path[-1]
            if not node.children:
                _expand(node, expand, strict)
            known = _known(node)
            if not known:
                break
            path.append(max(known, key=lambda child: puct(child, w_exp)))
        backup(path, gamma)
    return root


def search_policy(node: Node, temperature: float = 0.0, *, diversity: bool = True) -> list[float]:
    r"""The probability of each child.

    At temperature 0 uniform over the most visited; else proportional to :math:`(e^Q (1 + k))^{1/T}`, k being the number of the
    child's own children (`diversity=False`: without that factor). There a child with Q exactly 0 has probability 0, as in the
    released code; if all have, all are alike (the code would divide by zero).
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; a finite number that is not negative is expected")
    known = [not math.isnan(child.q) for child in node.children]
    if not any(known):
        raise ValueError("node has no child whose value is known")
    if temperature == 0:
        most = max(child.visits for child, ok in zip(node.children, known, strict=True) if ok)
        weights = [float(ok and child.visits == most) for child, ok in zip(node.children, known, strict=True)]
    else:
        logs = [
            (child.q + math.log1p(len(child.children) if diversity else 0)) / temperature if ok and child.q != 0 else -math.inf
            for child, ok in zip(node.children, known, strict=True)
        ]
        top = max(logs)
        weights = [float(ok) if top == -math.inf else math.exp(x - top) for x, ok in zip(logs, known, strict=True)]
    total = math.fsum(weights)
    return [w / total for w in weights]


def next_child(node: Node, temperature: float = 0.0, *, diversity: bool = True, rng: random.Random | None = None) -> Node:
    """The child to go on from. Temperature 0: the largest N (1 + the spread, largest minus smallest, of its own children's N);
    ties by Q, then V, then the first. Above 0: drawn from `search_policy` by rng."""
    if temperature > 0:
        probabilities = search_policy(node, temperature, diversity=diversity)
        return _rng(rng, "temperature above 0").choices(node.children, probabilities)[0]
    known = _known(node)
    if not known:
        raise ValueError("node has no child whose value is known")

    def spread(child: Node) -> int:
        visits = [c.visits for c in child.children]
        return max(visits) - min(visits) if visits and diversity else 0

    return max(known, key=lambda child: (child.visits * (1 + spread(child)), child.q, child.v))


def rank_children(node: Node, temperature: float = 0.0, *, diversity: bool = True) -> list[Node]:
    """Children whose value is known, the best last: by Q, search policy, reward, value, visits; equal ones in order."""
    if not _known(node):
        return []
    policy = search_policy(node, temperature, diversity=diversity)
    order = sorted(
        (i for i, child in enumerate(node.children) if not math.isnan(child.q)),
        key=lambda i: (
            node.children[i].q, policy[i], node.children[i].reward, node.children[i].value, node.children[i].visits
        ),
    )  # fmt: skip
    return [node.children[i] for i in order]


@dataclass(frozen=True, eq=False)
class StepPair:
    """Two steps from one prefix, as they stood when the pair was made."""

    better: Node
    worse: Node
    better_visits: int
    worse_visits: int

    @property
    def prefix(self) -> Node:
        """The node that both continue."""
        assert self.better.parent is not None
        return self.better.parent


def step_pair(
    node: Node,
    *,
    worse: Worse = "worst",
    temperature: float = 0.0,
    diversity: bool = True,
    rng: random.Random | None = None,
) -> StepPair | None:
    """The best child of a node and a worse one; None if it has fewer than two.

    worse: "worst", the paper's; "second", the next best; "random", any but the best, drawn by rng: what the released runs did,
    since their option for it cannot be switched off.
    """
    choice("worse", worse, WORSE)
    ranked = rank_children(node, temperature, diversity=diversity)
    if len(ranked) < 2:
        return None
    *rest, best = ranked
    other = rest[0] if worse == "worst" else rest[-1]
    if worse == "random":
        other = _rng(rng, "worse 'random'").choice(rest)
    return StepPair(best, other, best.visits, other.visits)


@dataclass(frozen=True)
class Tree:
    """What `collect_pairs` found."""

    pairs: list[StepPair]
    leaf: Node
    """Where the walk ended. The released code drops all pairs of a tree whose leaf has no correct answer (its `filter`)."""


def collect_pairs(
    root: Node,
    expand: Callable[[Node], Expansion],
    *,
    n_iters: int,
    depth_limit: int,
    root_iters: int | None = None,
    w_exp: float = 1.0,
    gamma: float = 1.0,
    worse: Worse = "worst",
    temperature: float = 0.0,
    temperature_decay: float = 0.75,
    diversity: bool = True,
    rng: random.Random | None = None,
) -> Tree:
    """Search, make a pair, move to the selected child, and again, until it is terminal or has no children.

    Args:
        root_iters: iterations of the first search; None: 4 * n_iters, the released code's.
        depth_limit: of every search, below the node it begins at.
        temperature_decay: the search policy's temperature at depth d is temperature * temperature_decay^d.
        worse, rng: as for `step_pair`. Others as for `search` and `search_policy`.
    """
    pairs: list[StepPair] = []
    node = root
    while not node.terminal:
        first = 4 * n_iters if root_iters is None else root_iters
        iters = first if node is root else n_iters
        search(node, expand, n_iters=iters, depth_limit=depth_limit, w_exp=w_exp, gamma=gamma)
        if not _known(node):
            break
        heat = temperature * temperature_decay**node.depth
        pair = step_pair(node, worse=worse, temperature=heat, diversity=diversity, rng=rng)
        if pair is not None:
            pairs.append(pair)
        node = next_child(node, heat, diversity=diversity, rng=rng)
    return Tree(pairs, node)


def completion(node: Node) -> list[Any]:
    """The actions of a step and of those behind it that have no alternative: what is trained on as one response."""
    actions = [node.action]
    while len(node.children) == 1:
        node = node.children[0]
        actions.append(node.action)
    return actions


def _known(node: Node) -> list[Node]:
    return [child for child in node.children if not math.isnan(child.q)]


def _expand(node: Node, expand: Callable[[Node], Expansion], strict: bool) -> None:
    for k, child in enumerate(expand(node)):
        if not isinstance(child, tuple) or len(child) not in (3, 4):
            raise TypeError(f"expand gave {child!r}; (value, prior, terminal) or (value, prior, terminal, action) is expected")
        value, prior = float(child[0]), float(child[1])
        if strict and math.isnan(value):
            raise ValueError(f"expand gave child {k} of a node at depth {node.depth} the value nan")
        if math.isnan(prior) or prior < 0:
            raise ValueError(f"expand gave child {k} of a node at depth {node.depth} the prior {prior}; 0 or more is expected")
        node.add(*child)


def _rng(rng: random.Random | None, what: str) -> random.Random:
    if rng is None:
        raise ValueError(f"rng is None; {what} needs a random.Random")
    return rng


def _check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; an integer is expected")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
