"""multislerp, nuslerp, karcher and model_stock, bound to a plan: weighted sums of the models, with factors that products between them tell.

A factor holds for a whole tensor, for one row or for one column. Those of whole tensors come from a pass of their own over all tensors;
those of rows are found in the block itself; those of columns need every row of the tensor, which is worked on as one block.
"""

import math
from collections.abc import Sequence
from threading import local
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.exact import pair_count, pair_index
from ota_core.errors import RecipeError
from ota_core.files.rows import Rows
from ota_core.fused.products import add_column_products, add_up_block, products_of, row_products
from ota_core.fused.task_vectors import Part, combine_block, linear_block
from ota_core.methods.numbers import NOTHING
from ota_core.methods.spans import arc_factors, arc_factors_of_each, karcher, multislerp, stock_factors_of_each, stock_ratio
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import WholeFacts
from ota_core.plan.views import Block, TensorJob, block_elements, parts
from ota_core.plan.whole import columns_bytes, is_vector, scope_of
from ota_core.recipe.methods import WITHOUT_BASE
from ota_core.recipe.recipe import MergeRecipe
from ota_core.rules.base import Rule

if TYPE_CHECKING:
    import torch

F64 = NDArray[np.float64]


class SpanRule(Rule):
    """θ₀ + λ·Σ f·(θ − θ₀), or Σ f·θ without a base, with the method's factors f."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        self._method = plan.recipe.merge_method
        self._base = None if self._method in WITHOUT_BASE else plan.base
        self._weights = [plan.recipe.setting("weight", i) for i in range(len(plan.experts))]
        self._sums: dict[str, list[float]] = {}
        self._factors: dict[str, list[float]] = {}
        self._columns = local()
        if self._method == "multislerp" and plan.recipe.setting("normalize_weights") and sum(self._weights) == 0:
            raise RecipeError(
                f"multislerp: the weights {self._weights} add up to 0; they cannot be normalised. Set normalize_weights: false or other weights"
            )

    def _scope(self, job: TensorJob) -> str:
        """What one factor holds for: ``tensor``, ``row`` or ``column``."""
        return scope_of(self._plan.recipe, job)

    # Factors

    def _prepare(self) -> None:
        """The products between all models of every tensor that is worked on with one factor."""
        plan, cut = self._plan, []
        for job in plan.merged_jobs():
            if self._scope(job) == "tensor":
                cut += [(job, 0, job.rows)] if is_vector(job) else plan.blocks([job])
        found = plan.stream.map(self._products, cut, what="products", size=block_elements, ahead=self.prefetch)
        rows: dict[str, list[F64]] = {}
        for block, products in zip(cut, found, strict=True):
            rows.setdefault(block[0].name, []).append(products)
        self._sums = {name: [math.fsum(pair) for pair in np.concatenate(one).T.tolist()] for name, one in rows.items()}

    def _products(self, block: Block) -> F64:
        """⟨x_a, x_b⟩ of every row, float64 (r, pairs); a vector counts as one row."""
        job, start, stop = block
        if self._can_fuse(job):
            base = self._base.stored(job.name, start, stop) if self._base else None
            thetas = [expert.stored(job.name, start, stop) for expert in self._plan.experts]
            return row_products(base, thetas, 1 if is_vector(job) else stop - start)
        pieces = [block] if is_vector(job) else parts(block, self._plan.tensor_elements)
        return np.concatenate([self._products_of_tensors(piece) for piece in pieces])

    def _products_of_tensors(self, block: Block) -> F64:
        import torch

        vectors = torch.stack(self._vectors(block)[1])
        if is_vector(block[0]):
            vectors = vectors.reshape(vectors.shape[0], 1, -1)
        return products_of(vectors.cpu().numpy())

    def _vectors(self, block: Block) -> "tuple[torch.Tensor | None, list[torch.Tensor]]":
        """θ₀, where it takes part, and every model's weights less it, float64 (r, C)."""
        from ota_core.rules.rows import base_rows, expert_rows

        base = base_rows(self._plan, block)
        thetas = expert_rows(self._plan, block, base)
        if self._base is None or base is None:
            return None, thetas
        return base, [theta - base for theta in thetas]

    def _of_tensor(self, job: TensorJob) -> list[float]:
        """The factors of a whole tensor."""
        found = self._factors.get(job.name)
        if found is None:
            found = self._factors[job.name] = self._from_products(self._sums[job.name])
        return found

    def _from_products(self, products: list[float]) -> list[float]:
        setting, count = self._plan.recipe.setting, len(self._plan.experts)
        gram = [[products[pair_index(min(a, b), max(a, b), count)] for b in range(count)] for a in range(count)]
        if self._method == "multislerp":
            return multislerp(gram, self._weights, normalize=setting("normalize_weights"), eps=setting("eps"))
        if self._method == "karcher":
            return karcher(gram, max_iter=setting("max_iter"), tol=setting("tol"))
        if self._method == "nuslerp":
            return list(arc_factors(gram[0][0], gram[1][1], gram[0][1], self._t))
        return [stock_ratio(np.array(products), count) / count] * count

    @property
    def _t(self) -> float:
        """nuslerp's position between its two models; the middle where their weights cancel."""
        total = sum(self._weights)
        return 0.5 if abs(total) < NOTHING else self._weights[1] / total

    def _of_rows(self, products: F64) -> F64:
        """The factors of each row or column, float64 (M, G), from its products (G, pairs)."""
        factors = np.empty((len(self._plan.experts), products.shape[0]))
        if self._method == "nuslerp":
            arc_factors_of_each(products, self._t, factors)
        else:
            stock_factors_of_each(products, len(self._plan.experts), factors)
        return factors

    def _of_columns(self, job: TensorJob) -> F64:
        """The factors of each place along the first axis, float64 (M, D), from one look at the whole tensor. Kept while its thread is at it."""
        if getattr(self._columns, "name", None) != job.name:
            sums = np.zeros((job.elements // job.shape[0], pair_count(2)))
            for block in self._plan.blocks([job]):
                self._add_columns(block, sums)
            self._columns.name, self._columns.factors = job.name, self._of_rows(sums)
        factors: F64 = self._columns.factors
        return factors

    def _add_columns(self, block: Block, sums: F64) -> None:
        job, start, stop = block
        if self._can_fuse(job):
            base = self._base.stored(job.name, start, stop) if self._base else None
            add_column_products(base, [expert.stored(job.name, start, stop) for expert in self._plan.experts], start, sums)
            return
        for piece in parts(block, self._plan.tensor_elements):
            a, b = (one.cpu().numpy() for one in self._vectors(piece)[1])
            for i in range(a.shape[0]):
                at = ((piece[1] + i) * a.shape[1]) % sums.shape[0]
                sums[at : at + a.shape[1]] += np.stack([a[i] * a[i], a[i] * b[i], b[i] * b[i]], axis=1)

    # The sum

    def reweighted(self, recipe: MergeRecipe) -> "SpanRule":
        other = super().reweighted(recipe)
        other._factors, other._columns = {}, local()
        return other

    def _can_fuse(self, job: TensorJob) -> bool:
        if self._base is None and self._plan.matched_rows(job):
            return False  # what stands in for a row that a model lacks is made of tensors
        return self._plan.can_fuse(self._plan.experts, job, base=self._base is not None)

    def prefetch(self, block: Block) -> None:
        for view in [*([self._base] if self._base else []), *self._plan.experts]:
            view.prefetch(*block)

    def blocks(self, jobs: Sequence[TensorJob]) -> tuple[list[Block], list[Block]]:
        refined, others = super().blocks(jobs)
        whole = [job for job in dict.fromkeys(block[0] for block in others) if not job.copy and self._scope(job) == "column"]
        names = {job.name for job in whole}
        at_once = sorted([*refined, *((job, 0, job.rows) for job in whole)], key=lambda block: -block_elements(block))
        return at_once, [block for block in others if block[0].name not in names]

    @property
    def whole_at_once(self) -> int:
        whole = [columns_bytes(job) for job in self._plan.merged_jobs() if self._scope(job) == "column"]
        return max(1, min(super().whole_at_once, self._plan.stream.memory // max(whole, default=1)))

    def _merge_fused(self, block: Block, out: Rows) -> None:
        job, start, _ = block
        scope, lam = self._scope(job), self.scale_of(job)
        pieces = self._plan.blocks([job]) if scope == "column" and block == (job, 0, job.rows) else [block]
        for piece in pieces:
            base = self._base.stored(job.name, *piece[1:]) if self._base else None
            thetas = [expert.stored(job.name, *piece[1:]) for expert in self._plan.experts]
            target = Rows(out.dtype, out.held[piece[1] - start : piece[2] - start])
            if scope == "column":
                add_up_block(base, thetas, target, self._of_columns(job), first=piece[1], by_row=False, lam=lam)
            elif scope == "row":
                factors = self._of_rows(row_products(base, thetas, piece[2] - piece[1]))
                add_up_block(base, thetas, target, factors, first=0, by_row=True, lam=lam)
            elif base is None:
                linear_block(thetas, self._of_tensor(job), target, normalize=False)
            else:
                shares = [Part(theta=theta, weight=f) for theta, f in zip(thetas, self._of_tensor(job), strict=True)]
                combine_block(base, shares, target, elect=False, normalize=False, lam=lam, nothing=NOTHING)

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        base, edits = self._summands(block)
        total = edits[0]
        for edit in edits[1:]:
            total = total + edit
        return total if base is None else base + self.scale_of(block[0]) * total

    def _edits(self, block: Block) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        base, edits = self._summands(block)
        assert base is not None
        return base, [self.scale_of(block[0]) * edit for edit in edits]

    def _summands(self, block: Block) -> "tuple[torch.Tensor | None, list[torch.Tensor]]":
        """θ₀, where it takes part, and f·x of every model, float64 (r, C)."""
        import torch

        job, start, stop = block
        base, vectors = self._vectors(block)
        scope = self._scope(job)
        if scope == "tensor":
            return base, [f * vector for f, vector in zip(self._of_tensor(job), vectors, strict=True)]
        columns = vectors[0].shape[1]
        if scope == "row":
            found = self._of_rows(products_of(torch.stack(vectors).cpu().numpy()))[:, :, None]
        else:
            places = [((start + i) * columns) % (job.elements // job.shape[0]) for i in range(stop - start)]
            factors = self._of_columns(job)
            found = np.stack([factors[:, at : at + columns] for at in places], axis=1)
        return base, [torch.from_numpy(f.copy()).to(vector.device) * vector for f, vector in zip(found, vectors, strict=True)]
