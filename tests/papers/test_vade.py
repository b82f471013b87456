"""VADE: the numbers of its page, the sampler's life, and what it must refuse."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from prefkern import beta_thompson_topk
from prefkern.papers import vade
from prefkern.papers.vade import VadeSampler, count_successes, expected_utility, select_from_draws

F64, F32 = torch.float64, torch.float32
NAN = math.nan


def holding(alpha, beta, **options) -> VadeSampler:
    sampler = VadeSampler(len(alpha), options.pop("batch_size", 1), dtype=F64, **options)
    sampler.alpha, sampler.beta = torch.tensor(alpha, dtype=F64), torch.tensor(beta, dtype=F64)
    return sampler


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.tensor(expected, dtype=F64), rtol=0, atol=atol)


# ---- the paper's numbers


def test_an_update_decays_the_selected_fast_and_the_others_slowly() -> None:
    sampler = holding([1.0, 5, 3], [1.0, 2, 7])
    sampler.update(torch.tensor([1]), torch.tensor([6]), 8)
    close(sampler.alpha, [0.999, 7, 2.997])
    close(sampler.beta, [0.999, 2.4, 6.993])
    sampler = holding([1.0, 5, 3], [1.0, 2, 7], lam1=0.5, lam2=0.9)
    sampler.update(torch.tensor([1]), torch.tensor([6]), torch.tensor([8]))
    close(sampler.alpha, [0.9, 8.5, 2.7])
    close(sampler.beta, [0.9, 3, 6.3])


def test_the_numbers_of_the_figure() -> None:
    sampler = holding([0.1, 2.7, 9], [8.4, 5.3, 0.2])
    sampler.update(torch.tensor([1, 0]), torch.tensor([4, 1]), 8)
    close(sampler.alpha, [1.02, 4.54, 8.991])
    close(sampler.beta, [8.68, 5.06, 0.1998])


def test_expected_utilities() -> None:
    sampler = holding([0.0, 4, 2], [0.0, 1, 6])
    close(sampler.expected_utility(), [0.0833333333, 0.0595238095, 0.1272727273])
    close(expected_utility(sampler.alpha, sampler.beta, utility="p1mp"), [0.1666666667, 0.1785714286, 0.1909090909])
    close(sampler.success_probability(), [0.5, 5 / 7, 0.3], atol=1e-12)


def test_draws_from_elsewhere() -> None:
    p = torch.tensor([0.33, 0.5, 0.1, 0.9], dtype=F64)
    ids, utilities = select_from_draws(p, 2)
    assert ids.tolist() == [0, 1]
    close(utilities, [0.148137, 0.125, 0.081, 0.009])
    assert select_from_draws(p, 3, utility="p1mp").ids.tolist() == [1, 0, 2]
    eligible = torch.tensor([False, True, True, True])
    assert select_from_draws(p, 2, eligible=eligible).ids.tolist() == [1, 2]
    ties = select_from_draws(torch.tensor([0.0, 1, 0.5, 0, 0.5]), 4)
    assert ties.ids.tolist() == [2, 4, 0, 1] and ties.utilities[:2].tolist() == [0, 0]


def test_the_sampler_selects_from_its_draws() -> None:
    sampler = VadeSampler(500, 32, seed=3)
    sampler.alpha, sampler.beta = torch.rand(2, 500) * 10
    draws = beta_thompson_topk(sampler.alpha, sampler.beta, 1, seed=3, step=0, return_draws=True).draws
    assert torch.equal(sampler.sample(), select_from_draws(draws, 32).ids)
    mean = VadeSampler(500, 32, mode="mean")
    mean.alpha, mean.beta = sampler.alpha, sampler.beta
    assert torch.equal(mean.sample(0), mean.expected_utility().sort(descending=True, stable=True).indices[:32])
    assert torch.equal(mean.sample(0), mean.sample(99))


# ---- what decay does


def test_a_prompt_of_every_step_keeps_a_window_of_evidence() -> None:
    sampler = VadeSampler(3, 1, dtype=F64)
    for _ in range(60):
        sampler.update(torch.tensor([1]), torch.tensor([3]), 8)
    assert (sampler.alpha + sampler.beta)[1].item() == pytest.approx(8 / (1 - 0.2), abs=1e-9)
    assert sampler.success_probability()[1].item() == pytest.approx((3 / 0.8 + 1) / (10 + 2))
    assert sampler.step == 60


def test_a_prompt_that_is_not_visited_is_believed_less() -> None:
    sampler = holding([9.0, 0], [0.0, 0])
    means = []
    for _ in range(2000):
        sampler.update(torch.tensor([1]), torch.tensor([4]), 8)
        means.append(sampler.success_probability()[0].item())
    assert all(b < a for a, b in itertools.pairwise(means)) and 0.5 < means[-1] < 0.7
    plain = holding([9.0, 0], [0.0, 0], lam1=1.0, lam2=1.0)
    for _ in range(5):
        plain.update(torch.tensor([1]), torch.tensor([4]), 8)
    close(plain.alpha, [9, 20])
    close(plain.beta, [0, 20])


def test_dropped_and_fractional_rollouts() -> None:
    sampler = holding([5.0, 5], [5.0, 5])
    sampler.update(torch.tensor([0, 1]), torch.tensor([0.0, 2.5]), torch.tensor([0, 4]))
    close(sampler.alpha, [1, 3.5])
    close(sampler.beta, [1, 2.5])


def test_it_finds_the_prompts_that_disagree() -> None:
    p = torch.tensor([0.0] * 40 + [0.35] * 10 + [1.0] * 40)
    generator, sampler = torch.Generator().manual_seed(0), VadeSampler(90, 10, seed=1)
    chosen = []
    for _ in range(60):
        ids = sampler.sample()
        successes = torch.binomial(torch.full((10,), 8.0), p[ids], generator=generator)
        sampler.update(ids, successes, 8)
        chosen.append(((ids >= 40) & (ids < 50)).double().mean().item())
    assert sum(chosen[30:]) / 30 > 0.5  # by chance 1/9


# ---- successes


def test_successes_of_groups() -> None:
    rewards = torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 1]])
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    assert [t.tolist() for t in count_successes(rewards)] == [[3, 1], [4, 4]]
    assert [t.tolist() for t in count_successes(rewards, mask)] == [[2, 0], [3, 0]]
    graded = torch.tensor([[0.2, 0.9, -1.0]])
    assert [t.tolist() for t in count_successes(graded, threshold=0.5)] == [[1], [3]]
    with pytest.raises(ValueError, match=r"rewards\[0, 0\] is 0.2.*unless a threshold is given"):
        count_successes(graded)
    with pytest.raises(ValueError, match=r"rewards\[0, 1\] is nan; a number"):
        count_successes(torch.tensor([[0.2, NAN]]), threshold=0.5)
    assert count_successes(torch.tensor([[1.0, NAN]]), torch.tensor([[True, False]])).successes.tolist() == [1]
    with pytest.raises(ValueError, match=r"mask is torch.float32 \[1, 3\]; bool"):
        count_successes(graded, torch.ones(1, 3), threshold=0.5)
    with pytest.raises(ValueError, match=r"rewards has shape \[3\]"):
        count_successes(graded[0])


# ---- eligible prompts, short batches


def test_who_may_be_chosen() -> None:
    sampler = VadeSampler(20, 5, allow_short=False)
    eligible = torch.arange(20) % 4 == 0
    assert (sampler.sample(eligible=eligible) % 4 == 0).all()
    eligible[0] = False
    with pytest.raises(ValueError, match="k is 5; 4 prompts are eligible"):
        sampler.sample(eligible=eligible)
    short = VadeSampler(20, 5, allow_short=True)
    assert sorted(short.sample(eligible=eligible).tolist()) == [4, 8, 12, 16]
    assert short.sample(eligible=torch.zeros(20, dtype=torch.bool)).tolist() == []
    assert len(VadeSampler(3, 5, allow_short=True).sample()) == 3
    with pytest.raises(ValueError, match=r"eligible is torch.bool \[19\]; bool \[20\]"):
        sampler.sample(eligible=eligible[1:])


# ---- states


def played(sampler: VadeSampler, steps: int) -> list[list[int]]:
    batches = []
    for _ in range(steps):
        ids = sampler.sample()
        batches.append(ids.tolist())
        sampler.update(ids, ids % 9 % 8, 8)
    return batches


def test_a_resumed_sampler_draws_what_would_have_followed(tmp_path) -> None:
    sampler = VadeSampler(200, 16, seed=5, lam1=0.4, utility="p1mp")
    played(sampler, 7)
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    followed = played(sampler, 5)
    resumed = VadeSampler(200, 4, seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (resumed.step, resumed.batch_size, resumed.lam1, resumed.utility) == (7, 16, 0.4, "p1mp")
    assert played(resumed, 5) == followed
    assert played(VadeSampler(200, 16, seed=6, lam1=0.4, utility="p1mp"), 12)[7:] != followed


def test_a_state_is_a_copy() -> None:
    sampler = VadeSampler(10, 2)
    state = sampler.state_dict()
    played(sampler, 3)
    assert not state["alpha"].any() and state["step"] == 0
    sampler.load_state_dict(state)
    played(sampler, 1)
    assert not state["alpha"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "VasSampler"}, "state is of 'VasSampler', version 1; one of 'VadeSampler'"),
        ({"version": 2}, "version 2; one of 'VadeSampler', version 1"),
        ({"alpha": torch.zeros(9)}, r"state\['alpha'\] is torch.float32 \[9\]; torch.float32 \[10\]"),
        ({"beta": torch.zeros(10, dtype=F64)}, r"state\['beta'\] is torch.float64 \[10\]"),
        ({"alpha": torch.full((10,), NAN)}, r"state\['alpha'\]\[0\] is nan; a count is finite"),
        ({"beta": torch.tensor([0.0] * 9 + [-1])}, r"state\['beta'\]\[9\] is -1"),
        ({"step": -1}, r"state\['step'\] is -1; accepted: 0 to"),
        ({"step": 1.0}, r"state\['step'\] is a float; a int"),
        ({"seed": "0"}, r"state\['seed'\] is a str"),
        ({"lam1": 1.5}, "state: lam1 is 1.5; it must lie in"),
        ({"lam2": NAN}, "state: lam2 is nan"),
        ({"batch_size": 11}, "state: batch_size is 11; there are 10 prompts"),
        ({"batch_size": 0}, "state: batch_size is 0"),
        ({"mode": "max"}, "state: mode is 'max'; accepted: 'thompson', 'mean'"),
        ({"utility": "p"}, "state: utility is 'p'"),
        ({"allow_short": 1}, r"state\['allow_short'\] is a int; a bool"),
        ({"more": 1}, r"missing \[\], unknown \['more'\]"),
    ],
)
def test_corrupted_states(change, message) -> None:
    sampler = VadeSampler(10, 2, seed=4)
    played(sampler, 2)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**before, **change})
    after = sampler.state_dict()
    assert all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())
    incomplete = {name: value for name, value in before.items() if name != "beta"}
    with pytest.raises(ValueError, match=r"missing \['beta'\]"):
        sampler.load_state_dict(incomplete)
    with pytest.raises(TypeError, match="state is a NoneType"):
        sampler.load_state_dict(None)


# ---- loaders


def test_batches_for_a_loader() -> None:
    sampler, seen = VadeSampler(50, 4, seed=2), []
    loader = DataLoader(list(range(50)), batch_sampler=sampler.batches(6), num_workers=0)
    assert len(loader) == 6
    for batch in loader:
        seen.append(batch.tolist())
        sampler.update(batch, batch % 3, 8)
    assert seen == [b for b in played_by_thirds(VadeSampler(50, 4, seed=2), 6)]
    ahead = list(VadeSampler(50, 4, seed=2).batches(3))  # nothing is updated in between
    fresh = VadeSampler(50, 4, seed=2)
    assert ahead == [fresh.sample(i).tolist() for i in range(3)] and ahead[0] != ahead[1]
    with pytest.raises(ValueError, match="steps is 0"):
        sampler.batches(0)


def played_by_thirds(sampler: VadeSampler, steps: int) -> list[list[int]]:
    batches = []
    for _ in range(steps):
        ids = sampler.sample()
        batches.append(ids.tolist())
        sampler.update(ids, ids % 3, 8)
    return batches


# ---- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_prompts": 0}, ValueError, "n_prompts is 0"),
        ({"batch_size": 11}, ValueError, "batch_size is 11; there are 10 prompts, and allow_short is False"),
        ({"batch_size": -1}, ValueError, "batch_size is -1"),
        ({"batch_size": 2.0}, TypeError, "batch_size is 2.0; an integer"),
        ({"lam1": -0.1}, ValueError, "lam1 is -0.1; it must lie in"),
        ({"lam2": 1.01}, ValueError, "lam2 is 1.01"),
        ({"lam2": "1"}, TypeError, "lam2 is '1'"),
        ({"utility": "variance"}, ValueError, "utility is 'variance'; accepted: 'p1mp2', 'p1mp'"),
        ({"mode": "random"}, ValueError, "mode is 'random'"),
        ({"seed": None}, TypeError, "seed is None"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype is torch.bfloat16; accepted"),
    ],
)
def test_constructor_refuses(options, error, message) -> None:
    with pytest.raises(error, match=message):
        VadeSampler(**{"n_prompts": 10, "batch_size": 2, **options})


def test_updates_and_draws_refuse() -> None:
    sampler = VadeSampler(10, 2)
    with pytest.raises(ValueError, match="ids holds 3 twice"):
        sampler.update(torch.tensor([3, 3]), torch.tensor([1, 1]), 8)
    with pytest.raises(ValueError, match=r"successes\[0\] is 9; it must lie between 0 and n\[0\], 8"):
        sampler.update(torch.tensor([3]), torch.tensor([9]), 8)
    with pytest.raises(ValueError, match=r"ids\[0\] is 10"):
        sampler.update(torch.tensor([10]), torch.tensor([1]), 8)
    assert sampler.step == 0
    with pytest.raises(ValueError, match="step is -1"):
        sampler.sample(-1)
    p = torch.tensor([0.5, 0.2])
    for bad, message in (
        (torch.tensor([0.5, 1.1]), r"p\[1\] is 1.1"),
        (torch.tensor([NAN, 1.0]), r"p\[0\] is nan"),
        (p[None], r"p is torch.float32 \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            select_from_draws(bad, 1)
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k is {k}; accepted: 1 to the 2 eligible"):
            select_from_draws(p, k)
    with pytest.raises(ValueError, match="k is 2; accepted: 1 to the 1 eligible"):
        select_from_draws(p, 2, eligible=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="utility is 'q'"):
        expected_utility(p, p, utility="q")
    assert vade.about.evidence == "part"
