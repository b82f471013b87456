"""What only a GPU can show: graph capture, no synchronisation, other streams, more than 2^31 logits."""

import pytest
import torch
from torch.testing import assert_close

import prefkern

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and prefkern.capabilities()["cuda_compiled"]),
        reason="needs an NVIDIA GPU and a build with CUDA",
    ),
]

N, H, V = 96, 64, 5003


class Step:
    """One training step through every op, on tensors that stay where they are."""

    def __init__(self, dtype: torch.dtype) -> None:
        g = torch.Generator("cuda").manual_seed(0)
        self.hidden = torch.randn(N, H, generator=g, device="cuda", dtype=dtype).requires_grad_()
        self.weight = torch.randn(V, H, generator=g, device="cuda", dtype=dtype).mul_(0.1).requires_grad_()
        self.targets = torch.randint(V, (N,), generator=g, device="cuda").index_fill_(0, torch.tensor([3], device="cuda"), -100)
        self.old = torch.randn(8, N // 8, generator=g, device="cuda") * 0.1 - 8
        self.mask = self.targets.view(8, -1) != -100
        self.rewards = torch.rand(8, generator=g, device="cuda")
        self.group = torch.arange(8, device="cuda") // 4
        self.a = torch.randn(4, H, generator=g, device="cuda", dtype=dtype).mul_(0.1).requires_grad_()
        self.b = torch.randn(V, 4, generator=g, device="cuda", dtype=dtype).mul_(0.1).requires_grad_()
        kept = torch.rand(N, V, generator=g, device="cuda") < 0.01
        kept[torch.arange(N, device="cuda"), self.targets.clamp_min(0)] = True
        offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
        self.keep = (offsets, kept.nonzero()[:, 1].contiguous())

    def __call__(self) -> tuple[torch.Tensor, ...]:
        head = prefkern.linear_logprobs(self.hidden, self.weight, self.targets, outputs=("entropy", "lse", "is_top1"))
        advantages = prefkern.group_advantages(self.rewards, self.group).advantages
        loss, metrics = prefkern.policy_loss(
            head.logp.view(8, -1), self.old, advantages, self.mask, ref_logp=self.old, beta=0.1
        )
        logits = self.hidden @ self.weight.T
        again = prefkern.logits_logprobs(logits, self.targets, outputs=("entropy",), inplace_backward=True)
        replayed = prefkern.linear_logprobs(
            self.hidden,
            self.weight,
            self.targets,
            keep=self.keep,
            lora=(self.a, self.b, 0.5),
            logits_dtype="bfloat16",
            outputs=("entropy", "mean_logit"),
        )
        rounded = prefkern.linear_logprobs(self.hidden, self.weight, self.targets, logits_dtype="bfloat16")
        total = loss + 0.01 * head.entropy.sum() + 0.01 * (again.logp + replayed.logp + replayed.entropy + rounded.logp).sum()
        grads = torch.autograd.grad(total, (self.hidden, self.weight, self.a, self.b))
        return total.detach(), metrics["approx_kl"], head.is_top1, replayed.mean_logit, *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_can_be_captured_in_a_graph(dtype: torch.dtype) -> None:
    step = Step(dtype)
    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        step.rewards.add_(0.0)
    graph.replay()
    for a, e in zip(captured, expected, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_synchronises(dtype: torch.dtype) -> None:
    step = Step(dtype)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_gives_the_same() -> None:
    step = Step(torch.bfloat16)
    expected = step()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        results = step()
    torch.cuda.synchronize()
    for a, e in zip(results, expected, strict=True):
        assert_close(a, e)


def test_runs_are_equal_to_the_bit() -> None:
    step = Step(torch.bfloat16)
    first, second = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_more_logits_than_32_bits_count() -> None:
    rows, vocab = 17_000, 128_256
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 2:
        pytest.skip("needs 13 GB of free device memory")
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocab, (rows,), device="cuda")
    out = prefkern.logits_logprobs(logits, targets, outputs=("entropy",))
    out.logp.sum().backward()
    for row in (0, rows // 2, rows - 1):
        z = logits[row].detach().double().requires_grad_()
        logp = torch.log_softmax(z, -1)
        assert abs(out.logp[row].double() - logp[targets[row]]) < 1e-4
        assert abs(out.entropy[row].double() + (logp.exp() * logp).sum()) < 1e-4
        logp[targets[row]].backward()
        assert_close(logits.grad[row].double(), z.grad, rtol=1e-2, atol=1e-6)
