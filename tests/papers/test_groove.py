"""GROOVE: the worked network, losses, advantages and buffer, the meta-gradient against finite differences, refusals."""

import math
import re

import pytest
import torch
from torch.testing import assert_close

import prefkern
from prefkern import reference
from prefkern.papers import groove

F64 = torch.float64
NAN = math.nan


def f64(*values):
    return torch.tensor(values, dtype=F64)


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def close(actual, expected, tolerance=1e-12):
    assert_close(actual.detach(), torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def refused(message, call, error=ValueError):
    with pytest.raises(error, match=re.escape(message)):
        call()


def random_network(width=3, embedding=4, hidden=6, seed=0):
    lpg = groove.LPG(width, embedding, hidden, dtype=F64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, p in lpg.named_parameters():
            if "bias" in name:
                p.copy_(0.3 * torch.randn(p.shape, dtype=F64))
    return lpg


# ----------------------------------------------------------------------------------------------------------- the network


@pytest.fixture
def worked():
    lpg = groove.LPG(2, 1, 1, dtype=F64)
    values = {
        "embed_weight": [[1, -1]], "embed_bias": [0.1], "embed_out_weight": [[2]], "embed_out_bias": [0],
        "weight_ih": [[0.1, 0.2, 0.3, 0.4, 0.5], [-0.1, 0.2, -0.3, 0.1, 0.2], [0.5, -0.5, 0.4, 0.3, -0.2]],
        "bias_ih": [0.05] * 3, "weight_hh": [[0.7]] * 3, "bias_n": [0.1],
        "policy_weight": [[1.5]], "policy_bias": [-0.2], "target_weight": [[1], [-1]], "target_bias": [0, 0.3],
    }  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            getattr(lpg, name).copy_(torch.tensor(value, dtype=F64))
    assert set(values) == {name for name, _ in lpg.named_parameters()}
    return lpg


ROLLOUT = (f64(0.5, 0.25, 0.9), f64([0.6, 0.4], [0.1, 0.9], [0.5, 0.5]), f64([0.1, 0.9], [0.5, 0.5], [0.7, 0.3]))


def test_worked_network(worked):
    out = groove.lpg_targets(worked, f64(1, -1, 0.5), flags(0, 0, 0), *ROLLOUT)
    close(out.pi_hat, [0.4516700833212, -0.1036992715712, 0.2085213102695])
    close(out.y_hat[:, 0], [0.6385078040396, 0.4572052034156, 0.5608703515972])
    close(out.y_hat.sum(-1), [1, 1, 1])
    out = worked(f64(1, -1, 0.5)[None], flags(0, 1, 0)[None], *(t[None] for t in ROLLOUT))
    close(out.pi_hat[0], [0.2373323419332, -0.2, 0.2085213102695])
    close(out.y_hat[0, :, 0], [0.5703084647361, 0.4255574831883, 0.5608703515972])


def random_rollout(*rows, actions=3, width=3, dtype=F64):
    y, y_next = (torch.randn(*rows, width, dtype=dtype).softmax(-1) for _ in range(2))
    return torch.randn(rows, dtype=dtype), torch.rand(rows) < 0.3, torch.rand(rows, dtype=dtype), y, y_next


def test_nothing_behind_a_terminal_step_matters():
    lpg, (reward, done, pi, y, y_next) = random_network(), random_rollout(4, 7)
    done[:] = torch.arange(7) == 3
    before = lpg(reward, done, pi, y, y_next)
    reward[:, 4:] += 5
    y_next[:, 3] = NAN  # not looked at
    after = lpg(reward, done, pi, y, y_next)
    assert torch.equal(before.pi_hat[:, :4], after.pi_hat[:, :4]) and torch.equal(before.y_hat[:, :4], after.y_hat[:, :4])
    assert (before.pi_hat[:, 4:] != after.pi_hat[:, 4:]).any()


def test_inputs_are_constants_and_shapes_may_be_any():
    lpg, given = random_network(), random_rollout(2, 3, 5)
    free = [t.clone().requires_grad_() if t.is_floating_point() else t for t in given]
    out = lpg(*free)
    out.pi_hat.sum().backward()
    assert all(t.grad is None for t in free if t.is_floating_point()) and lpg.weight_hh.grad is not None
    single = lpg(*(t[1, 2] for t in given))
    close(out.pi_hat[1, 2], single.pi_hat)
    close(out.y_hat[1, 2], single.y_hat)
    assert lpg(*(t[..., :1, :] if t.dim() == 4 else t[..., :1] for t in given)).pi_hat.shape == (2, 3, 1)  # T = 1


def test_float32_and_reproducible_parameters():
    made = [groove.LPG(3, 4, 5, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    square = made[0].weight_hh.view(3, 5, 5)
    assert_close(square @ square.mT, torch.eye(5).expand(3, 5, 5))
    out = made[0](*(t.float() if t.is_floating_point() else t for t in random_rollout(2, 3)))
    assert out.pi_hat.dtype == out.y_hat.dtype == torch.float32


def test_default_widths():
    shapes = {name: tuple(p.shape) for name, p in groove.LPG().named_parameters()}
    assert shapes["weight_hh"] == (768, 256) and shapes["target_weight"] == (8, 256) and shapes["embed_weight"] == (16, 8)


def test_what_the_network_refuses():
    lpg, (reward, done, pi, y, y_next) = random_network(), random_rollout(2, 4)
    refused("reward has shape [2, 0]", lambda: lpg(reward[:, :0], done, pi, y, y_next))
    refused("done has dtype torch.int64; bool is expected", lambda: lpg(reward, done.long(), pi, y, y_next), TypeError)
    refused("done has shape [2, 3]; [2, 4] is expected", lambda: lpg(reward, done[:, :3], pi, y, y_next))
    refused("pi has shape [4]; [2, 4] is expected", lambda: lpg(reward, done, pi[0], y, y_next))
    refused("y has shape [2, 4, 2]; [2, 4, 3] is expected", lambda: lpg(reward, done, pi, y[..., :2], y_next))
    refused("y_next has shape [1, 4, 3]", lambda: lpg(reward, done, pi, y, y_next[:1]))
    refused("hidden is 0; it must be positive", lambda: groove.LPG(hidden=0))
    refused("target_width is 2.5; an integer is expected", lambda: groove.LPG(2.5), TypeError)


# -------------------------------------------------------------------------------------------------------- an agent's step


def table(agent, obs):
    """Policy and prediction of a tabular agent, one table or one for each level."""

    def at(logits):
        if logits.dim() == 2:
            return logits[obs].softmax(-1)
        return torch.stack([one[where] for one, where in zip(logits, obs, strict=True)]).softmax(-1)

    return at(agent["policy"]), at(agent["prediction"])


def experience(*rows, states=4, actions=3):
    obs, next_obs, taken = (torch.randint(n, rows) for n in (states, states, actions))
    return obs, taken, torch.randn(rows, dtype=F64), torch.rand(rows) < 0.3, next_obs


def agent_of(*lead, states=4, actions=3, width=3):
    shapes = {"policy": (*lead, states, actions), "prediction": (*lead, states, width)}
    return {name: torch.randn(shape, dtype=F64).requires_grad_() for name, shape in shapes.items()}


def unrolled(lpg, agent, rollouts, fresh, **options):
    """The meta-loss after one step per rollout."""
    regularisers = []
    for rollout in rollouts:
        step = groove.lpg_agent_step(lpg, agent, table, *rollout, lr=0.7, **options)
        agent = step.params
        regularisers.append(step.regularisers)
    obs, actions, reward, done, _ = fresh
    values = torch.linspace(-1, 1, reward.shape[-1] + 1, dtype=F64).expand(*reward.shape[:-1], -1)
    advantages = groove.rollout_advantages(reward, values, done).advantages
    mean = groove.Regularisers.mean(regularisers)
    return groove.lpg_meta_loss(table(agent, obs)[0], actions, advantages, mean, b1=0.05, b3=0.02).loss


def test_a_step_follows_the_gradient_of_the_loss():
    lpg, agent, rollout = random_network(), agent_of(), experience(5, 6)
    step = groove.lpg_agent_step(lpg, agent, table, *rollout, lr=0.7, sign="paper", create_graph=False)
    probs, y = table(agent, rollout[0])
    pi = probs.gather(-1, rollout[1][..., None])[..., 0] + 1e-8
    targets = lpg(rollout[2], rollout[3], pi, y, table(agent, rollout[4])[1])
    close(step.targets.pi_hat, targets.pi_hat)
    loss = reference.lpg_inner_loss(probs, rollout[1], y, targets.pi_hat.detach(), targets.y_hat.detach(), sign="paper").loss
    close(step.loss, loss.detach())
    for name, grad in zip(agent, torch.autograd.grad(loss, list(agent.values())), strict=True):
        close(step.params[name], agent[name] - 0.7 * grad)
        assert step.params[name].is_leaf and step.params[name].requires_grad
    after, after_y = table(step.params, rollout[0])
    close(step.regularisers.policy_entropy, -((after + 1e-8) * (after + 1e-8).log()).sum(-1).mean())
    close(step.regularisers.target_entropy, -((after_y + 1e-8) * (after_y + 1e-8).log()).sum(-1).mean())
    close(step.regularisers.pi_hat_l2, targets.pi_hat.square().mean())
    close(step.regularisers.y_hat_l2, targets.y_hat.square().sum(-1).mean())


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("sign", ["code", "paper"])
def test_meta_gradient_against_finite_differences(updates, sign, monkeypatch):
    """Through one agent step, and through two, of which the second starts where the first has led. What the network is fed are
    constants, which stay as they are while its parameters move."""
    lpg, agent = random_network(), agent_of()
    rollouts, fresh = [experience(3, 4) for _ in range(updates)], experience(3, 5)
    original, fed = groove.lpg_targets, []

    def recorded(params, reward, done, *constants):
        fed.append(constants)
        return original(params, reward, done, *constants)

    monkeypatch.setattr(groove, "lpg_targets", recorded)
    parameters = list(lpg.parameters())
    grads = torch.autograd.grad(unrolled(lpg, agent, rollouts, fresh, sign=sign), parameters)
    assert len(fed) == updates

    def at_this_point():
        again = iter(fed)
        monkeypatch.setattr(
            groove, "lpg_targets", lambda params, reward, done, *_: original(params, reward, done, *next(again))
        )
        return unrolled(lpg, agent, rollouts, fresh, sign=sign).item()

    for p, grad in zip(parameters, grads, strict=True):
        direction = torch.randn_like(p)
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                p.add_(direction, alpha=step)
            values.append(at_this_point())
        with torch.no_grad():
            p.add_(direction, alpha=1e-5)
        assert (grad * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9)
    assert all((grad != 0).any() for grad in grads)


def test_agents_side_by_side_are_agents_alone():
    lpg, agents, rollouts = random_network(), agent_of(3), experience(3, 2, 5)
    alive = flags(1, 0, 1)
    together = groove.lpg_agent_step(lpg, agents, table, *rollouts, lr=0.5, alive=alive)
    for k in range(3):
        one = {name: t[k].detach().requires_grad_() for name, t in agents.items()}
        alone = groove.lpg_agent_step(lpg, one, table, *(t[k] for t in rollouts), lr=0.5)
        for name in agents:
            if alive[k]:
                close(together.params[name][k], alone.params[name])
            else:
                assert torch.equal(together.params[name][k], agents[name][k])  # its lifetime is over


def test_what_a_step_refuses():
    lpg, agent, rollout = random_network(), agent_of(), experience(5, 6)
    refused("lr is nan; it must be finite", lambda: groove.lpg_agent_step(lpg, agent, table, *rollout, lr=NAN))
    refused("lr is '1'; a number", lambda: groove.lpg_agent_step(lpg, agent, table, *rollout, lr="1"), TypeError)
    refused("alive is torch.bool [3]", lambda: groove.lpg_agent_step(lpg, agent, table, *rollout, lr=1.0, alive=flags(1, 1, 0)))
    refused("updates is empty", lambda: groove.Regularisers.mean([]))
    refused("did you mean 'paper'?", lambda: groove.lpg_agent_step(lpg, agent, table, *rollout, lr=1.0, sign="papr"))


def test_the_loss_is_the_op():
    assert groove.lpg_inner_loss is prefkern.lpg_inner_loss


# ---------------------------------------------------------------------------------------------------------- the meta-loss


def test_worked_meta_loss():
    probs, actions, raw = f64([0.2, 0.8], [0.5, 0.5]), torch.tensor([1, 0]), f64(2, -1)
    out = groove.lpg_meta_loss(probs, actions, raw)
    close(out.loss, -0.2350018093062, 1e-8)  # eps
    terms = groove.Regularisers(*(torch.tensor(v, dtype=F64) for v in (0.6, 0.65, 1.25, 0.54)))
    out = groove.lpg_meta_loss(probs, actions, raw, terms)
    close(out.loss, -0.2588618093062, 1e-8)
    close(out.metrics["lpg"], -0.2350018093062, 1e-8)


def test_equal_advantages_are_zero():
    for value in (0.1, -3.0, 0.0):
        probs = torch.rand(3, 3, dtype=F64).softmax(-1).requires_grad_()
        out = groove.lpg_meta_loss(probs, torch.zeros(3, dtype=torch.int64), torch.full((3,), value, dtype=F64))
        assert out.loss.item() == 0 and not torch.autograd.grad(out.loss, probs)[0].any()


def test_worked_advantages():
    out = groove.rollout_advantages(f64(1, 0, 2), f64(0.5, 0.2, -0.1, 0.4), flags(0, 1, 0))
    close(out.advantages, [0.5099, -0.2, 2.496])
    close(out.returns, [1.0099, 0, 2.396])


def test_advantages_of_every_pattern_of_episodes():
    reward, values, done = torch.randn(40, 6, dtype=F64), torch.randn(40, 7, dtype=F64), torch.rand(40, 6) < 0.4
    carry, expected = torch.zeros(40, dtype=F64), []
    for t in range(5, -1, -1):
        goes_on = (~done[:, t]).double()
        carry = reward[:, t] + 0.9 * goes_on * values[:, t + 1] - values[:, t] + 0.9 * 0.8 * goes_on * carry
        expected.append(carry)
    out = groove.rollout_advantages(reward, values, done, gamma=0.9, lam=0.8)
    close(out.advantages, torch.stack(expected[::-1], 1))
    single = groove.rollout_advantages(reward[3], values[3], done[3], gamma=0.9, lam=0.8)
    close(single.advantages, out.advantages[3])


def test_the_critic_of_the_release_never_learns():
    values, returns = f64(1, 2).requires_grad_(), f64(0, 4)
    loss = groove.critic_loss(values, returns)
    close(loss, 2.5)
    close(torch.autograd.grad(loss, values)[0], [1, -2])
    frozen = groove.critic_loss(values, returns, frozen_critic=True)
    close(frozen, 2.5)
    assert not torch.autograd.grad(frozen, values)[0].any()


def test_a2c_loss():
    logits, values = torch.randn(4, 5, 3, dtype=F64).requires_grad_(), torch.randn(4, 6, dtype=F64).requires_grad_()
    _, actions, reward, done, _ = experience(4, 5)
    probs = logits.softmax(-1)
    out = groove.a2c_loss(probs, actions, reward, values, done)
    a, returns = groove.rollout_advantages(reward, values, done)
    a = (a - a.mean()) / (a.std(correction=0) + 1e-8)
    policy = -(a * probs.gather(-1, actions[..., None])[..., 0].log()).mean()
    entropy = -(probs * probs.log()).sum(-1).mean()
    close(out.loss, policy - 0.01 * entropy + (returns - values[:, :-1]).square().mean(), 1e-6)
    by_values = torch.autograd.grad(out.loss, values)[0]
    close(by_values[:, :-1], 2 * (values[:, :-1] - returns) / 20)
    assert not by_values[:, -1].any()


def test_what_losses_refuse():
    reward, values, done = torch.randn(2, 3), torch.randn(2, 4), torch.zeros(2, 3, dtype=torch.bool)
    refused("values has shape [2, 3]; [2, 4] is expected", lambda: groove.rollout_advantages(reward, values[:, 1:], done))
    refused("done is torch.int64 [2, 3]", lambda: groove.rollout_advantages(reward, values, done.long()))
    refused("reward has shape [2, 0]", lambda: groove.rollout_advantages(reward[:, :0], values, done))
    refused("gamma is 1.5", lambda: groove.rollout_advantages(reward, values, done, gamma=1.5))
    probs, actions = torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    refused("advantages has shape [2]; [2, 3]", lambda: groove.lpg_meta_loss(probs, actions, reward[:, 0]))
    refused("probs has shape [2, 3, 4] and actions [2]", lambda: groove.lpg_meta_loss(probs, actions[:, 0], reward[:, 0]))
    refused("values has shape [2, 4] and returns [2, 3]", lambda: groove.critic_loss(values, reward))


# ---------------------------------------------------------------------------------------------------- evolution strategies


def test_fitness_of_pairs():
    first, second = groove.antithetic_fitness(f64(1, 2, 3), f64(0, 2, 4))
    close(first, [1, 0, 0])
    close(second, [0, 1, 1])  # of equal ones the second
    refused("second[1] is NaN", lambda: groove.antithetic_fitness(f64(1, 2), f64(0, NAN)))
    refused("second has shape [1]; [2] is expected", lambda: groove.antithetic_fitness(f64(1, 2), f64(0)))


def test_direction_of_pairs():
    noise = f64([1, 0], [0, 2], [1, 1])
    close(groove.antithetic_direction(noise, f64(1, 0, 1), f64(0, 1, 0), sigma=0.5), [2 / 3, -1 / 3])
    refused("sigma is 0; it must be positive", lambda: groove.antithetic_direction(noise, f64(1, 0, 1), f64(0, 1, 0), sigma=0))
    refused("first [2]", lambda: groove.antithetic_direction(noise, f64(1, 0), f64(0, 1), sigma=1))
    # It climbs: of a linear return it is a positive multiple of the slope, on average.
    slope = f64(1, -2, 0.5)
    noise = torch.randn(4000, 3, dtype=F64)
    fitness = groove.antithetic_fitness(noise @ slope, -(noise @ slope))
    found = groove.antithetic_direction(noise, *fitness, sigma=1.0)
    assert torch.cosine_similarity(found, slope, 0) > 0.99


# ----------------------------------------------------------------------------------------------------------------- levels


def test_worked_returns_and_regret():
    returns = groove.first_episode_return(f64([1, 2, 3], [0.5, -1, 4]), flags([0, 1, 0], [0, 0, 0]))
    close(returns, [3, 3.5])
    close(groove.first_episode_return(f64(1, 2), flags(1, 1)), 1.0)
    close(groove.algorithmic_regret(f64([1, 2], [0, 0.5]), f64([0.5, 0.5], [1, 1])), [1, -0.75])
    close(groove.algorithmic_regret(f64(1, 2), f64([0.5, 0.7, 0.6], [1, 1, 4])), [0.4, 0])
    same = torch.randn(5, 64, dtype=F64)
    assert not groove.algorithmic_regret(same, same).any()  # the same agent
    refused("ret_agent[0, 1] is NaN", lambda: groove.algorithmic_regret(same, torch.where(same == same[0, 1], NAN, same)))
    refused("ret_agent is of 4 levels; 5 are expected", lambda: groove.algorithmic_regret(same, same[1:]))
    refused("ret_antagonist has shape [0]", lambda: groove.algorithmic_regret(same[:0, 0], same[:0, 0]))
    refused("done is torch.bool [2]", lambda: groove.first_episode_return(f64([1, 2]), flags(1, 1)))


def worked_buffer(**options):
    buffer = groove.LevelBuffer(5, **options)
    buffer.scores.copy_(f64(0.3, 0, 1.2, -0.4, 0.9))
    buffer.new.copy_(flags(0, 1, 0, 0, 0))
    buffer.active.copy_(flags(0, 0, 0, 0, 1))
    return buffer


def test_worked_buffer():
    buffer = worked_buffer()
    close(buffer.replay_probabilities(), [0.2527685476813, 0, 0.6217103062795, 0.1255211460392, 0])
    assert buffer.replay(0, 2).tolist() == [2, 0]
    assert buffer.reset(2).tolist() == [1, 3]
    assert buffer.new.tolist() == [False, True, False, True, False] and buffer.scores[3] == 0
    assert buffer.levels.tolist() == [0, 5, 2, 6, 4] and buffer.made == 7
    assert worked_buffer(flags="code").reset(5).tolist() == [1, 3, 0, 2, 4]  # active ones last


def test_flags_of_the_code():
    buffer = worked_buffer(flags="code")
    buffer.new[0] = True
    buffer.reset(1)  # the first new one
    # What was new and untouched counts as evaluated, with score 0; what is active is new.
    assert buffer.new.tolist() == [True, False, False, False, True]
    assert buffer.replayable.tolist() == [False, True, True, True, False]
    intended = worked_buffer()
    intended.new[0] = True
    intended.reset(1)
    assert intended.new.tolist() == [True, True, False, False, False]


def test_ties_go_to_the_lower_slot():
    buffer = groove.LevelBuffer(4)
    buffer.new[:] = False
    assert buffer.replay(0, 3).tolist() == [0, 1, 2] and buffer.reset(2).tolist() == [0, 1]


def test_scores_of_any_size():
    for scale in (1e4, -1e4):
        buffer = groove.LevelBuffer(3, temperature=0.5)
        buffer.new[:] = False
        buffer.scores.copy_(scale * f64(1, 1, 1) + f64(0, 0.5, 0))
        close(buffer.replay_probabilities(), (f64(0, 1, 0)).softmax(0))


def test_proportional_replay_follows_the_probabilities():
    buffer = worked_buffer(transform="proportional")
    first = torch.tensor([buffer.replay(step, 2).tolist() for step in range(4000)])
    counts = torch.bincount(first[:, 0], minlength=5).double()
    p = buffer.replay_probabilities()
    assert not counts[[1, 4]].any()
    chi_square = ((counts - 4000 * p).square() / (4000 * p).clamp_min(1e-9))[[0, 2, 3]].sum()
    assert chi_square < 13.8  # 2 degrees of freedom, 0.1 per cent
    both = ((first == 0).any(1) & (first == 2).any(1)).double().mean()  # without replacement
    expected = p[0] * p[2] / (1 - p[0]) + p[2] * p[0] / (1 - p[2])
    assert abs(both - expected) < 0.03
    far = groove.LevelBuffer(3, transform="proportional")
    far.new[:] = False
    far.scores.copy_(f64(0, 2000, 1000))  # exp of the difference is 0, and yet there is an order
    assert far.replay(0, 3).tolist() == [1, 2, 0]


def test_a_run_of_the_buffer():
    buffer = groove.LevelBuffer(20, p_replay=0.5, seed=3)
    first = buffer.sample(0, 4)
    assert not first.replayed.any() and first.slots.unique().numel() == 4  # nothing to replay yet
    assert buffer.active.sum() == 4
    buffer.update(first.slots, [0.5, 2.0, -1.0, 1.0])
    best = first.levels[1]
    replayed = 0
    for step in range(1, 40):
        batch = buffer.sample(step, 4)
        assert buffer.active.sum() == 4 and batch.slots.unique().numel() == 4
        assert torch.equal(buffer.levels[batch.slots], batch.levels)
        replayed += int(batch.replayed.sum())
        if batch.replayed.any():
            assert best in batch.levels[batch.replayed]  # the highest score is always among them
        # A level keeps its score: that of its number.
        buffer.update(batch.slots, torch.where(batch.levels == best, 2.0, -batch.levels.double() / 1000))
    assert 0.4 < replayed / (39 * 4) < 0.6
    assert buffer.made == 20 + 4 + 39 * 4 - replayed


def test_levels_have_numbers_of_their_own():
    buffer = groove.LevelBuffer(8, p_replay=0.0)
    numbers = []
    for step in range(5):
        batch = buffer.sample(step, 3)
        numbers += batch.levels.tolist()
        buffer.update(batch.slots, [0.0] * 3)
    assert len(set(numbers)) == 15


def test_a_resumed_buffer_draws_the_same():
    options = {"transform": "proportional", "seed": 5}
    buffer = groove.LevelBuffer(12, **options)
    for step in range(6):
        batch = buffer.sample(step, 2)
        buffer.update(batch.slots, batch.levels.double() / 10)
    state = buffer.state_dict()
    resumed = groove.LevelBuffer(12, **{**options, "seed": 0})
    resumed.load_state_dict(state)
    for step in range(6, 12):
        ours, theirs = buffer.sample(step, 2), resumed.sample(step, 2)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for each, one in ((buffer, ours), (resumed, theirs)):
            each.update(one.slots, one.levels.double() / 10)
    assert all(torch.equal(getattr(buffer, n), getattr(resumed, n)) for n in ("scores", "new", "active", "levels"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "state is of 'LevelBuffer', version 2"),
        ({"class": "Other"}, "state is of 'Other'"),
        ({"scores": torch.zeros(6, dtype=F64)}, "state['scores'] is torch.float64 [6]; torch.float64 [5] is expected"),
        ({"new": torch.zeros(5)}, "state['new'] is torch.float32 [5]"),
        ({"scores": f64(0, 0, NAN, 0, 0)}, "state['scores'] has numbers that are not finite"),
        ({"levels": torch.arange(1, 6)}, "state['levels'] has numbers outside [0, 5)"),
        ({"made": 5.0}, "state['made'] is a float"),
    ],
)
def test_corrupted_states(change, message):
    buffer = worked_buffer()
    before = buffer.scores.clone()
    refused(message, lambda: buffer.load_state_dict({**buffer.state_dict(), **change}))
    assert torch.equal(buffer.scores, before)


def test_what_the_buffer_refuses():
    buffer = worked_buffer()
    for options, message in (
        ({"size": 0}, "size is 0; it must be positive"),
        ({"transform": "ranks"}, "transform is 'ranks'; accepted: 'rank', 'proportional'; did you mean 'rank'?"),
        ({"flags": "paper"}, "flags is 'paper'; accepted: 'intended', 'code'"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"temperature": math.inf}, "temperature is inf; it must be finite"),
        ({"p_replay": 1.5}, "p_replay is 1.5; it must lie in [0, 1]"),
    ):
        refused(message, lambda options=options: groove.LevelBuffer(**options))
    refused("seed is 1.5; an integer", lambda: groove.LevelBuffer(seed=1.5), TypeError)
    refused("scores[0] is nan; a finite number", lambda: buffer.update([4], [NAN]))
    refused("scores[0] is inf", lambda: buffer.update([4], [math.inf]))
    refused("slots[0] is 2, which is not active", lambda: buffer.update([2], [0.0]))
    refused("slots[0] is 5; it must lie in [0, 5)", lambda: buffer.update([5], [0.0]))
    refused("slots is [4, 4]; each may come once", lambda: buffer.update([4, 4], [0.0, 1.0]))
    refused("slots is torch.int64 [1] and scores has shape [2]", lambda: buffer.update([4], [0.0, 1.0]))
    refused("slots is torch.float32 [1]", lambda: buffer.update([4.0], [1.0]))
    assert buffer.active[4] and buffer.scores[4] == 0.9
    refused("count is 4, but 3 levels are replayable", lambda: buffer.replay(0, 4))
    refused("count is 6; there are 5 levels", lambda: buffer.reset(6))
    refused("count is 5, but only 4 of 5 levels are inactive", lambda: buffer.sample(0, 5))
    refused("count is 0; it must be positive", lambda: buffer.sample(0, 0))
    refused("step is None; an integer", lambda: buffer.sample(None), TypeError)
    fresh = groove.LevelBuffer(3)
    refused("no level is replayable", fresh.replay_probabilities)
    refused("count is 1, but 0 levels are replayable", lambda: fresh.replay(0))
    assert len(fresh) == 3


def test_about():
    assert groove.about.arxiv == "2310.02782" and groove.about.evidence == "code"


def test_agents_side_by_side_are_normalised_by_themselves():
    probs, actions = torch.rand(3, 4, 2, dtype=F64).softmax(-1), torch.randint(2, (3, 4))
    raw = torch.randn(3, 4, dtype=F64) * f64(1, 10, 100)[:, None]
    together = groove.lpg_meta_loss(probs, actions, raw, per_agent=True).loss
    alone = [groove.lpg_meta_loss(probs[k], actions[k], raw[k]).loss for k in range(3)]
    close(together, torch.stack(alone).mean())
    refused(
        "[G, ..., T] is expected with per_agent", lambda: groove.lpg_meta_loss(probs[0], actions[0], raw[0], per_agent=True)
    )
