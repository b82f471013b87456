"""The posterior of a Gaussian process at many candidates, and its factor with one more point."""

from __future__ import annotations

import torch

from prefkern import reference
from prefkern.bench.peers import GpKernelName, Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, errors_against
from prefkern.reference.gaussian import gp_covariance

KERNELS: dict[str, GpKernelName] = {"rbf": "rbf", "matern52": "matern52"}
LENGTH, NOISE = 0.3, 0.01


class GpPosteriorWorkload(Workload):
    """Q unique points and M candidates in the unit cube. Everything is computed in float64, by everybody."""

    variants = tuple(KERNELS)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        q, candidates, dims = case.shape
        U, X = (torch.rand(n, dims, generator=self.random, dtype=torch.float64) for n in (q, candidates))
        a = torch.randn(q, generator=self.random, dtype=torch.float64)
        self.U, self.X, self.a = (t.to(self.dtype).to(device) for t in (U, X, a))
        self.L = {}
        for name, kernel in KERNELS.items():
            K = gp_covariance(U, U, kernel=kernel, length=LENGTH)
            self.L[name] = torch.linalg.cholesky(K + NOISE * torch.eye(q, dtype=K.dtype)).to(device)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        def forward() -> Outputs:
            mean, var = peer.gp_unique_posterior(self.L[variant], self.a, self.U, self.X, KERNELS[variant], LENGTH)
            return {"mean": mean, "var": var}

        return forward

    def floor(self) -> Floor:
        L = self.L["rbf"]
        k = torch.rand(len(L), len(self.X), dtype=L.dtype, device=L.device)
        out = torch.empty_like(k)
        return Floor(
            "solve_triangular of a matrix that is there", lambda: torch.linalg.solve_triangular(L, k, upper=False, out=out)
        )

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        """Against the definition, candidate by candidate as far as memory goes: it forms the whole matrix."""
        truth = reference.gp_unique_posterior(
            self.L[variant], self.a, self.U, self.X, kernel=KERNELS[variant], length=LENGTH
        )  # fmt: skip
        return errors_against(outputs, {"mean": truth.mean, "var": truth.var})


class CholAppendWorkload(Workload):
    """A factor of Q rows, and one more."""

    variants = ("append",)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        (q,) = case.shape
        points = torch.rand(q + 1, 2, generator=self.random, dtype=torch.float64)
        matrix = gp_covariance(points, points, kernel="matern52", length=LENGTH) + NOISE * torch.eye(q + 1, dtype=torch.float64)
        matrix[q] = matrix[q].to(self.dtype).double()  # what is given in the type of the case
        matrix[:, q] = matrix[q]
        self.truth = torch.linalg.cholesky(matrix)
        self.matrix, self.factor = matrix.to(device), torch.zeros(q + 1, q + 1, dtype=torch.float64, device=device)
        self.factor[:q, :q] = self.truth[:q, :q]
        self.row = matrix[q].to(self.dtype).to(device)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return lambda: {"row": peer.chol_append(self.factor, self.row, self.matrix)}

    def floor(self) -> Floor:
        q = len(self.matrix) - 1
        L, column = self.factor[:q, :q].contiguous(), self.matrix[:q, q : q + 1].contiguous()
        return Floor("solve_triangular of a vector", lambda: torch.linalg.solve_triangular(L, column, upper=False))

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        return errors_against(outputs, {"row": self.truth[-1].to(outputs["row"].device)})
