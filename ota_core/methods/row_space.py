"""What the row spaces of task vectors tell: the scale of a merged edit, and the edit itself (docs/methods.md section 8).

An edit of W, with y = W x, is a sum of gradients ⊗ inputs: its rows span the inputs that its training saw. What another expert's edit
does to those inputs is what hurts. Legend: δ_k (out, in) is expert k's task vector of one matrix, D (out, in) the merged edit at λ = 1.
Related, from other points of view: RegMean (Jin et al. 2023, arXiv 2212.09849) with the Grams of real activations, WUDI (Cheng et al. 2025,
arXiv 2503.08099) with the task vectors as a stand-in for them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

ILL_CONDITIONED = 1e4
"""Above this bound of the condition the solve is done in float64: float32 keeps three digits below it."""


def scale_sums(edit: torch.Tensor, delta: torch.Tensor, directions: torch.Tensor) -> tuple[float, float]:
    """Σ⟨D w, δ w⟩ and Σ‖D w‖² over directions w: an expert's part in numerator and denominator of λ, before it is divided by ‖δ‖².

    edit, delta: float64 (r, in), the same rows of D and δ; directions: float64 (in, P), δᵀ z for P probes z, or δᵀ itself for the exact sums.
    """
    merged, own = edit @ directions, delta @ directions
    return float((merged * own).sum()), float((merged * merged).sum())


@dataclass(frozen=True)
class Regressed:
    """The result of a row-space regression."""

    edit: torch.Tensor
    """X, (out, in), in the type of the prior."""
    residual: float
    """‖(X − X₀) A − B‖ / ‖B‖ of the equations that were solved, Frobenius norms; 0 where there was nothing to solve."""
    double: bool
    """Whether they were solved in float64."""


def regress(deltas: Iterable[tuple[torch.Tensor, float, torch.Tensor | None]], prior: torch.Tensor, *, ridge: float) -> Regressed:
    """X = argmin Σ_k tr[(X − δ_k) C_k (X − δ_k)ᵀ] + r·‖X − X₀‖² with r = ridge × the mean diagonal of Σ C_k.

    deltas: for each expert δ_k, float32 (out, in), its weight w_k ≥ 0, and float32 (in,) that C_k's diagonal gains, or None;
    C_k = w_k (δ_kᵀδ_k / ‖δ_k‖² + diag). prior: X₀, float32 (out, in). An expert that never moved the matrix takes no part; where none did, X is X₀.
    One symmetric positive definite system, by Cholesky: (X − X₀) (Σ C_k + r I) = Σ (δ_k − X₀) C_k. One δ_k is held at a time.
    """
    gram, target = torch.zeros(prior.shape[1], prior.shape[1], device=prior.device), torch.zeros_like(prior)
    for delta, weight, diagonal in deltas:
        size = float(delta.double().pow(2).sum())
        if size == 0 or weight == 0:
            continue
        _add_products(delta, weight / size, gram, target)
        if diagonal is not None:
            gram.diagonal().add_(diagonal, alpha=weight)
            target.addcmul_(delta, diagonal.expand_as(delta), value=weight)
    shrink = ridge * float(gram.diagonal().double().mean())
    if shrink == 0:
        return Regressed(prior, 0.0, False)
    target -= prior @ gram
    gram.diagonal().add_(shrink)
    double = float(torch.linalg.matrix_norm(gram)) > ILL_CONDITIONED * shrink
    if double:
        gram, target = gram.double(), target.double()
    step = torch.cholesky_solve(target.T, torch.linalg.cholesky(gram)).T
    wanted = float(torch.linalg.matrix_norm(target))
    missing = float(torch.linalg.matrix_norm(step @ gram - target))
    return Regressed(prior + step.to(prior.dtype), missing / wanted if wanted else 0.0, double)


def regress_parts(
    deltas: Sequence[tuple[torch.Tensor, float, torch.Tensor | None]], priors: Sequence[torch.Tensor], *, ridge: float
) -> list[torch.Tensor]:
    """The experts' parts of what ``regress`` gives for the prior Σ X₀_k: X_k (Σ C + r I) = δ_k C_k + r·X₀_k, so that Σ X_k = X.

    deltas: as there. priors: each expert's part of the prior, float32 (out, in). Float32 (out, in) each; solved in float64.
    """
    total = torch.zeros(priors[0].shape[1], priors[0].shape[1], device=priors[0].device, dtype=torch.float64)
    targets = []
    for delta, weight, diagonal in deltas:
        size = float(delta.double().pow(2).sum())
        gram, target = torch.zeros_like(total, dtype=torch.float32), torch.zeros_like(delta)
        if size and weight:
            _add_products(delta, weight / size, gram, target)
            if diagonal is not None:
                gram.diagonal().add_(diagonal, alpha=weight)
                target.addcmul_(delta, diagonal.expand_as(delta), value=weight)
        total += gram
        targets.append(target)
    shrink = ridge * float(total.diagonal().mean())
    if shrink == 0:
        return list(priors)
    total.diagonal().add_(shrink)
    factor = torch.linalg.cholesky(total)
    return [
        torch.cholesky_solve((target + shrink * prior).double().T, factor).T.float()
        for target, prior in zip(targets, priors, strict=True)
    ]


def _add_products(delta: torch.Tensor, factor: float, gram: torch.Tensor, target: torch.Tensor) -> None:
    """gram += factor·δᵀδ and target += factor·δ δᵀδ, the latter in the order that multiplies less."""
    rows, columns = delta.shape
    if 2 * rows * rows < columns * columns:
        gram.addmm_(delta.T, delta, alpha=factor)
        target.addmm_(delta @ delta.T, delta, alpha=factor)
    else:
        own = delta.T @ delta
        gram.add_(own, alpha=factor)
        target.addmm_(delta, own, alpha=factor)
