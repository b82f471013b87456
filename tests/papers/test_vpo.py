"""VPO: worked numbers, the identity it rests on, both modes, options and refusals."""

import math
import warnings

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers import vpo

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


LOGPS = {
    "chosen_logp": vector(-10, -8), "rejected_logp": vector(-12, -7), "ref_chosen_logp": vector(-11, -7.5),
    "ref_rejected_logp": vector(-11.5, -8), "cal_logp": vector(-9, -13, -10), "ref_cal_logp": vector(-9.5, -12, -10),
}  # fmt: skip
TRAINED = ("chosen_logp", "rejected_logp", "cal_logp")


def run(**changes):
    """Loss, metrics, gradients of chosen, rejected and calibration log-probs."""
    inputs = {**LOGPS, "alpha": 0.5, **changes}
    for name in TRAINED:
        inputs[name] = inputs[name].clone().requires_grad_()
    loss, metrics = vpo.vpo_loss(**inputs)
    return loss.detach(), metrics, *torch.autograd.grad(loss, [inputs[name] for name in TRAINED], allow_unused=True)


# ---- worked numbers and identities


@pytest.mark.parametrize(("mode", "loss", "gradient"), [("online", 0.6876237145, 1), ("offline", 0.7042903811, -1)])
def test_worked_numbers(mode, loss, gradient) -> None:
    found, metrics, chosen, rejected, cal = run(mode=mode)
    close(found, loss)
    close(metrics["pair_loss"], 0.6959570478)
    close(metrics["value"], 0.0166666667)
    close(cal, [gradient * 0.0166666667] * 3)
    plain = run(alpha=0.0)
    assert chosen.equal(plain[2]) and rejected.equal(plain[3])  # those of DPO


def test_the_modes_are_two_sides_of_dpo() -> None:
    online, offline, plain = run(), run(mode="offline"), run(alpha=0.0)
    close(online[0] + offline[0], 2 * plain[0], 1e-14)
    close(plain[0], 0.6959570478)
    assert plain[4] is None
    close(plain[1]["value"], 0.0166666667)
    slope = (run(alpha=0.6)[0] - run(alpha=0.5)[0]) / 0.1
    close(slope, 0.1 * -1 / 6, 1e-12)  # beta times the mean calibration ratio


def test_the_identity_of_the_value_on_a_table() -> None:
    """Of a reward without mean under the calibration distribution, beta log Z = -beta E_cal[log pi/ref]."""
    generator = torch.Generator().manual_seed(0)
    beta = 0.3
    ref, cal = (torch.log_softmax(torch.randn(9, dtype=F64, generator=generator), 0) for _ in range(2))
    reward = torch.randn(9, dtype=F64, generator=generator)
    reward = reward - (cal.exp() * reward).sum()
    log_z = torch.logsumexp(ref + reward / beta, 0)
    policy = ref + reward / beta - log_z
    zero = torch.zeros(1, dtype=F64)
    metrics = vpo.vpo_loss(zero, zero, zero, zero, policy, ref, beta=beta, cal_weight=cal.exp()).metrics
    close(metrics["value"], beta * log_z, 1e-12)


def test_offline_with_the_chosen_responses_is_rpo() -> None:
    same = {"cal_logp": LOGPS["chosen_logp"], "ref_cal_logp": LOGPS["ref_chosen_logp"]}
    _, _, chosen, _, cal = run(mode="offline", **same)
    close(chosen + cal, run(alpha=0.0)[2] - 0.5 * 0.1 / 2, 1e-14)


# ---- options


def test_weights_replace_the_mean() -> None:
    ratio = LOGPS["cal_logp"] - LOGPS["ref_cal_logp"]
    weight = vector(1, 3, 0)
    loss, metrics, *_, cal = run(cal_weight=weight)
    close(metrics["value"], -0.1 * (ratio * weight / 4).sum(), 1e-14)
    close(cal, 0.05 * weight / 4, 1e-14)
    close(run(cal_weight=7 * weight)[0], loss, 1e-14)
    close(run(cal_weight=torch.ones(3, dtype=F64))[0], run()[0], 1e-14)


def test_lengths_divide_ratios() -> None:
    lengths = torch.tensor([3, 10, 1])
    _, metrics, *_, cal = run(cal_lengths=lengths)
    close(metrics["value"], -0.1 * ((LOGPS["cal_logp"] - LOGPS["ref_cal_logp"]) / lengths).mean(), 1e-14)
    close(cal, 0.05 / 3 / lengths.double(), 1e-14)


def test_a_floor_bounds_the_online_term() -> None:
    loss, metrics, *_, cal = run(cal_floor=-10.5)
    close(cal, [0.05 / 3, 0, 0.05 / 3], 1e-14)
    close(metrics["value"], -0.1 * (0.5 + 1.5 + 0) / 3, 1e-14)
    lower = run(cal_floor=-10.5, cal_logp=vector(-9, -1e6, -10))[0]
    assert lower == loss
    assert run(cal_logp=vector(-9, -1e6, -10))[0] < -1000  # without it there is no bound


def test_one_pair_and_one_response() -> None:
    one = {name: value[:1] for name, value in LOGPS.items()}
    loss, metrics, *_ = run(**one)
    close(loss, math.log1p(math.exp(-0.15)) + 0.05 * 0.5, 1e-14)
    assert metrics["pairs"] == 1


def test_without_calibration_responses() -> None:
    nothing = {"cal_logp": None, "ref_cal_logp": None}
    inputs = {**LOGPS, **nothing}
    loss, metrics = vpo.vpo_loss(**inputs, alpha=0)
    close(loss, 0.6959570478)
    assert metrics["value"] == 0
    for missing in (nothing, {"cal_logp": LOGPS["cal_logp"][:0], "ref_cal_logp": LOGPS["cal_logp"][:0]}):
        with pytest.raises(ValueError, match=r"cal_logp or ref_cal_logp has no responses; alpha 0.5 needs some"):
            vpo.vpo_loss(**{**LOGPS, **missing}, alpha=0.5)


def test_calibrating_offline_with_the_rejected_responses_warns() -> None:
    rejected = {"cal_logp": LOGPS["rejected_logp"], "ref_cal_logp": LOGPS["ref_rejected_logp"]}
    with pytest.warns(UserWarning, match="the calibration responses are the rejected ones"):
        run(mode="offline", **rejected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(mode="online", **rejected)
        run(mode="offline")
        run(mode="offline", alpha=0.0, **rejected)


def test_precision() -> None:
    single = {name: value.bfloat16() for name, value in LOGPS.items()}
    loss, metrics, *_ = run(**single)
    assert loss.dtype == torch.float32 and all(m.dim() == 0 and not m.requires_grad for m in metrics.values())
    assert_close(loss.double(), run()[0], rtol=1e-6, atol=0)


def test_online_explores_where_dpo_does_not() -> None:
    """Arms that were sampled for calibration lose probability online and keep it offline."""
    start = torch.zeros(6, dtype=F64)
    ref = torch.log_softmax(start, 0)

    def mass(mode, alpha):
        logits = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([logits], lr=1.0)
        for _ in range(15):
            logp = torch.log_softmax(logits, 0)
            loss = vpo.vpo_loss(
                logp[[0]], logp[[1]], ref[[0]], ref[[1]], logp[[1, 2]], ref[[1, 2]], beta=0.5, alpha=alpha, mode=mode
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(torch.softmax(logits.detach(), 0)[2])

    online, plain, offline = mass("online", 0.2), mass("online", 0.0), mass("offline", 0.2)
    assert online < plain - 0.02 and offline > plain + 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "both"}, "mode is 'both'; accepted: 'online', 'offline'"),
        ({"alpha": -0.1}, "alpha is -0.1; it must not be negative"),
        ({"chosen_logp": vector(-1, math.nan)}, r"^chosen_logp\[1\] is nan; a log-prob is expected"),
        ({"ref_cal_logp": vector(-1, math.nan, -1)}, r"^ref_cal_logp\[1\] is nan"),
        ({"ref_cal_logp": vector(-1)}, r"ref_cal_logp has shape \[1\]; \[3\] is expected"),
        ({"cal_weight": vector(1, -1, 1)}, r"cal_weight\[1\] is -1.0; finite weights"),
        ({"cal_weight": vector(0, 0, 0)}, "cal_weight is 0 everywhere"),
        ({"cal_weight": vector(1, 1)}, r"cal_weight has shape \[2\]; \[3\]"),
        ({"cal_lengths": torch.tensor([1, 0, 1])}, r"cal_lengths\[1\] is 0; every calibration response needs a token"),
    ],
)
def test_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        vpo.vpo_loss(**{**LOGPS, "alpha": 0.5, **changes})
