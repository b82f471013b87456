"""The tree search of MCTS-DPO: worked numbers, every rule, and what holds for any tree."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prefkern
from prefkern import mcts
from prefkern.mcts import (
    Node,
    backup,
    collect_pairs,
    completion,
    next_child,
    node_value,
    puct,
    rank_children,
    search,
    search_policy,
    step_pair,
    step_prior,
)

NAN = math.nan


def family(q, *, visits=None, prior=None, parent_visits=0):
    """A root with children of these Q."""
    root = Node(visits=parent_visits)
    for i, value in enumerate(q):
        child = root.add(value, 1.0 if prior is None else prior[i])
        child.visits = 0 if visits is None else visits[i]
    return root


def wide_tree(seed, width=3):
    """A deterministic expansion: children depend on the path alone."""

    def expand(node):
        names = tuple(n.action for n in node.path()[1:])
        rng = random.Random(f"{seed}{names}")
        count = rng.choice(range(1, width + 1))
        return [(rng.random(), rng.random(), len(names) >= 2 and rng.random() < 0.5, k) for k in range(count)]

    return expand


def nodes(root):
    yield root
    for child in root.children:
        yield from nodes(child)


def test_selection() -> None:
    root = family([0.2, -0.1, 0.3], prior=[0.5, 0.9, 0.1], visits=[2, 0, 4], parent_visits=8)
    assert [puct(c) for c in root.children] == pytest.approx([0.6714045208, 2.445584412, 0.3565685425], abs=1e-9)
    assert [puct(c, 0.0) for c in root.children] == [0.2, -0.1, 0.3]
    with pytest.raises(ValueError, match="child is a root"):
        puct(root)


def test_prior() -> None:
    assert step_prior([-0.2, -0.4, -0.1], 1.25) == pytest.approx(0.8375326815, abs=1e-10)
    assert step_prior([-0.2, -0.4, -0.1]) == step_prior([-0.2, -0.4, -0.1], 1.25)
    assert step_prior([-0.3], 2.0) == pytest.approx(math.exp(-0.3))
    with pytest.raises(ValueError, match="logp is empty"):
        step_prior([])


def test_backup() -> None:
    root = Node()
    a, b = root.add(0.4), root.add(-0.2)
    c = a.add(0.9, terminal=True)
    assert (a.reward, b.reward, c.reward) == (0.4, -0.2, 0.5)
    backup([root, a, c])
    assert (c.q, a.v, a.q, root.v) == pytest.approx((0.5, 0.5, 0.9, 0.35))
    assert (root.visits, a.visits, b.visits, c.visits) == (1, 1, 0, 1)
    backup([root, b])
    assert (b.q, root.v) == pytest.approx((-0.2, 0.35))
    assert root.q == 0  # the root's own is left alone
    backup([root, a, c], gamma=0.5)
    assert a.q == pytest.approx(0.4 + 0.5 * 0.5)


@pytest.mark.parametrize(
    ("arguments", "options", "value"),
    [
        ((0.8, 0, 0.3), {}, 0.8),
        ((0.8, 4, 0.3), {}, 0.8),
        ((0.8, 5, 0.3), {}, 0.4),
        ((0.0, 1, 0.3), {}, 0.3),
        ((0.8, 1, 0.3), {"correct": True}, 1.8),
        ((0.8, 1, 0.3), {"correct": True, "new_wording": True}, 2.05),
        ((0.8, 1, 0.3), {"correct": False, "new_wording": True}, -0.2),
        ((0.0, 9, 0.3), {"correct": False}, -0.7),
    ],
)
def test_values_of_nodes(arguments, options, value) -> None:
    assert node_value(*arguments, **options) == pytest.approx(value)


def test_confidence_is_a_probability() -> None:
    with pytest.raises(ValueError, match=r"confidence is 1\.5; it must lie in \[0, 1\]"):
        node_value(1.5, 0, 0.0)


def test_a_search_by_hand() -> None:
    """Two iterations over one level: the first child on a tie, then what the visits make of it."""
    root = Node()
    assert search(root, lambda node: [(0.5, 1.0, True), (0.5, 1.0, True)], n_iters=1, depth_limit=1) is root
    first, second = root.children
    assert (first.visits, second.visits, root.visits) == (1, 0, 2)  # the searched node is counted twice
    search(root, lambda node: [], n_iters=1, depth_limit=1)
    assert (first.visits, second.visits, root.visits) == (1, 1, 4)
    assert root.v == 0.5


def released(seed, n_iters, depth_limit, w_exp, gamma):
    """The same search as a table from path to (N, V, Q), written the way of the release, on plain dictionaries."""
    expand, table = wide_tree(seed), {}

    def new(path, value, terminal, prior):
        parent = table.get(path[:-1]) if path else None
        reward = value - (parent["value"] if parent else 0)
        table[path] = {"N": 0, "V": 0.0, "Q": (parent["V"] if parent else 0) + reward, "r": reward, "value": value}
        table[path] |= {"terminal": terminal, "p": prior, "kids": None}

    def ends(path):
        return table[path]["terminal"] or len(path) >= depth_limit

    def best(path):
        n = table[path]["N"]
        score = {k: table[k]["Q"] + w_exp * table[k]["p"] * math.sqrt(n) / (1 + table[k]["N"]) for k in table[path]["kids"]}
        return max(score, key=score.get)

    new((), 0.0, False, 1.0)
    for _ in range(n_iters):
        table[()]["N"] += 1
        path = [()]
        while table[path[-1]]["kids"] and not ends(path[-1]):
            path.append(best(path[-1]))
        while not ends(path[-1]):
            stand_in = Node()
            for action in path[-1]:
                stand_in = Node(parent=stand_in, action=action)
            kids = []
            for value, prior, terminal, action in expand(stand_in):
                new((*path[-1], action), value, terminal, prior)
                kids.append((*path[-1], action))
            table[path[-1]]["kids"] = kids
            path.append(best(path[-1]))
        leaf = table[path[-1]]
        leaf["Q"] = leaf["r"] + gamma * leaf["V"]
        leaf["N"] += 1
        for at in reversed(path[:-1]):
            kids = [table[k] for k in table[at]["kids"]]
            table[at]["V"] = sum(max(1, k["N"]) * k["Q"] for k in kids) / sum(max(1, k["N"]) for k in kids)
            table[at]["N"] += 1
            if at:
                table[at]["Q"] = table[at]["r"] + gamma * table[at]["V"]
    return {path: (t["N"], t["V"], t["Q"]) for path, t in table.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("w_exp", "gamma"), [(1.0, 1.0), (0.3, 0.9)])
def test_a_search_is_that_of_the_release(seed, w_exp, gamma) -> None:
    root = search(Node(), wide_tree(seed), n_iters=40, depth_limit=4, w_exp=w_exp, gamma=gamma)
    found = {tuple(n.action for n in node.path()[1:]): (node.visits, node.v, node.q) for node in nodes(root)}
    assert found == released(seed, 40, 4, w_exp, gamma)


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 4))
def test_properties_of_a_tree(seed, n_iters, depth_limit) -> None:
    root = search(Node(), wide_tree(seed), n_iters=n_iters, depth_limit=depth_limit)
    everything = list(nodes(root))
    ends = [n for n in everything if n.terminal or n.depth == depth_limit]
    assert sum(n.visits for n in ends) == n_iters
    assert root.visits == 2 * n_iters
    for node in everything:
        assert node.depth <= depth_limit
        if node.children and node.visits:
            assert min(c.q for c in node.children) - 1e-12 <= node.v <= max(c.q for c in node.children) + 1e-12
            if node is not root:
                assert node.visits == sum(c.visits for c in node.children)
        if node.terminal:
            assert not node.children


def test_a_search_goes_on_where_it_was() -> None:
    one, two = Node(), Node()
    search(one, wide_tree(7), n_iters=20, depth_limit=3)
    search(two, wide_tree(7), n_iters=12, depth_limit=3)
    search(two, wide_tree(7), n_iters=8, depth_limit=3)
    assert [(n.visits, n.v, n.q) for n in nodes(one)] == [(n.visits, n.v, n.q) for n in nodes(two)]
    child = max(one.children, key=lambda c: c.visits)
    before = child.visits
    search(child, wide_tree(7), n_iters=5, depth_limit=3)  # depth counts from where the search begins
    assert child.visits == before + 10 and max(n.depth for n in nodes(child)) <= 4


def test_no_children_end_an_iteration() -> None:
    root = search(Node(0.25), lambda node: [], n_iters=3, depth_limit=2)
    assert root.children == [] and root.visits == 6 and root.q == 0.25


def test_nan_is_never_selected() -> None:
    def expand(node):
        return [(NAN, 1.0, False), (0.5, 0.1, True)]

    root = search(Node(), expand, n_iters=6, depth_limit=3)
    assert [c.visits for c in root.children] == [0, 6] and root.v == 0.5
    assert rank_children(root) == [root.children[1]] and step_pair(root) is None
    assert next_child(root) is root.children[1] and search_policy(root) == [0, 1]
    assert search_policy(root, 1.0) == [0, 1]
    all_nan = search(Node(), lambda node: [(NAN, 1.0, False)], n_iters=2, depth_limit=2)
    assert all_nan.children[0].visits == 0 and all_nan.v == 0
    with pytest.raises(ValueError, match="expand gave child 0 of a node at depth 0 the value nan"):
        search(Node(), expand, n_iters=1, depth_limit=3, strict=True)


def test_search_policy() -> None:
    root = family([0.5, -1.0, 0.0, 0.5], visits=[3, 1, 3, 0])
    root.children[1].add(0.0)
    assert search_policy(root) == [0.5, 0, 0.5, 0]
    weights = [math.exp(0.5), 2 * math.exp(-1.0), 0, math.exp(0.5)]  # a Q of exactly 0 has none
    assert search_policy(root, 1.0) == pytest.approx([w / sum(weights) for w in weights])
    squares = [w**2 for w in weights]
    assert search_policy(root, 0.5) == pytest.approx([w / sum(squares) for w in squares])
    plain = [math.exp(0.5), math.exp(-1.0), 0, math.exp(0.5)]
    assert search_policy(root, 1.0, diversity=False) == pytest.approx([w / sum(plain) for w in plain])
    assert search_policy(root, 1e-4) == pytest.approx([0.5, 0, 0, 0.5])  # and no overflow
    assert search_policy(family([0.0, 0.0]), 1.0) == [0.5, 0.5]
    for temperature in (-1.0, NAN):
        with pytest.raises(ValueError, match="temperature is"):
            search_policy(root, temperature)
    with pytest.raises(ValueError, match="node has no child"):
        search_policy(Node())


def test_the_next_child() -> None:
    root = family([0.1, 0.9, 0.2], visits=[4, 4, 3])
    assert next_child(root) is root.children[1]  # equal visits: the larger Q
    for visits in (5, 1):  # a spread of 4 among its own children
        root.children[2].add(0.0).visits = visits
    assert next_child(root) is root.children[2]  # 3 * (1 + 4)
    assert next_child(root, diversity=False) is root.children[1]
    assert next_child(family([0.1, 0.1], visits=[1, 1])) is not None
    drawn = [next_child(root, 1.0, rng=random.Random(seed)) for seed in range(200)]
    shares = [sum(c is child for c in drawn) / 200 for child in root.children]
    assert shares == pytest.approx(search_policy(root, 1.0), abs=0.12)
    with pytest.raises(ValueError, match=r"rng is None; temperature above 0 needs a random\.Random"):
        next_child(root, 1.0)
    with pytest.raises(ValueError, match="node has no child"):
        next_child(Node())


def test_pairs() -> None:
    root = family([0.3, 0.1, 0.9, 0.5], visits=[5, 1, 7, 2])
    a, b, c, d = root.children
    assert rank_children(root) == [b, a, d, c]
    pair = step_pair(root)
    assert (pair.better, pair.worse, pair.better_visits, pair.worse_visits) == (c, b, 7, 1) and pair.prefix is root
    c.visits = 100
    assert pair.better_visits == 7  # as it was when the pair was made
    assert step_pair(root, worse="second").worse is d
    drawn = {step_pair(root, worse="random", rng=random.Random(seed)).worse.q for seed in range(40)}
    assert drawn == {0.3, 0.1, 0.5}
    assert step_pair(family([0.3])) is None and step_pair(Node()) is None
    with pytest.raises(ValueError, match=r"worse is 'wrost'; accepted: 'worst', 'second', 'random'.*did you mean 'worst'"):
        step_pair(root, worse="wrost")
    with pytest.raises(ValueError, match=r"rng is None; worse 'random' needs"):
        step_pair(root, worse="random")


def test_ties_are_broken_in_order() -> None:
    """By Q, then policy, reward, value, visits; what is equal in all stays in order."""
    root = family([0.5, 0.5, 0.5], visits=[1, 3, 2])
    assert [c.visits for c in rank_children(root)] == [1, 2, 3]  # the policy of the most visited is 1
    same = family([0.5, 0.5])
    assert rank_children(same) == same.children


def test_collecting_pairs() -> None:
    tree = collect_pairs(Node(), wide_tree(3), n_iters=10, depth_limit=3)
    assert tree.leaf.terminal or not tree.leaf.children
    on_the_way = tree.leaf.path()
    for pair in tree.pairs:
        assert pair.prefix in on_the_way and pair.better.parent is pair.worse.parent
        assert pair.better is not pair.worse
    assert [p.prefix.depth for p in tree.pairs] == sorted({p.prefix.depth for p in tree.pairs})
    root = on_the_way[0]
    assert root.visits == 2 * 40  # four times as many at the first step
    again = collect_pairs(Node(), wide_tree(3), n_iters=10, depth_limit=3, root_iters=5)
    assert again.leaf.path()[0].visits == 2 * 5
    drawn = collect_pairs(
        Node(), wide_tree(3), n_iters=10, depth_limit=3, worse="random", temperature=1.0, rng=random.Random(0)
    )
    assert drawn.leaf.depth >= 1
    nothing = collect_pairs(Node(), lambda node: [], n_iters=1, depth_limit=2)
    assert nothing.pairs == [] and nothing.leaf.depth == 0


def test_a_completion_takes_steps_without_alternative() -> None:
    root = Node()
    a = root.add(0.1, action="a")
    b = a.add(0.2, action="b")
    b.add(0.3, action="c")
    b.add(0.4, action="d")
    assert completion(a) == ["a", "b"] and completion(b.children[0]) == ["c"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_iters": -1}, ValueError, "n_iters is -1; it must be at least 0"),
        ({"n_iters": 2.5}, TypeError, r"n_iters is 2\.5; an integer"),
        ({"depth_limit": 0}, ValueError, "depth_limit is 0; it must be at least 1"),
        ({"depth_limit": True}, TypeError, "depth_limit is True"),
        ({"gamma": 1.5}, ValueError, r"gamma is 1\.5; it must lie in \[0, 1\]"),
        ({"w_exp": -1.0}, ValueError, r"w_exp is -1\.0"),
        ({"w_exp": NAN}, ValueError, "w_exp is nan"),
        ({"expand": lambda node: [(0.5, 1.0)]}, TypeError, r"expand gave \(0\.5, 1\.0\); \(value, prior, terminal\)"),
        ({"expand": lambda node: [0.5]}, TypeError, r"expand gave 0\.5"),
        ({"expand": lambda node: [(0.5, -1.0, True)]}, ValueError, r"the prior -1\.0; 0 or more is expected"),
        ({"expand": lambda node: [(0.5, NAN, True)]}, ValueError, "the prior nan"),
    ],
)
def test_refusals(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        search(**{"root": Node(), "expand": wide_tree(0), "n_iters": 2, "depth_limit": 2, **changes})


def test_it_is_loaded_when_asked_for() -> None:
    assert prefkern.mcts is mcts
    assert all(getattr(mcts, name).__doc__ for name in mcts.__all__)
