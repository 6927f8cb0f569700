"""Errors of losses and of what compares them against the spread over corpora drawn anew, and where there is nothing to compute."""

import math

import numpy as np
import pytest

from tasks.evaluation.loss_errors import difference_error, loss_error, recovered_error
from tasks.evaluation.scores import ModelScores
from tests.tasks.experiments.study.study_results import Read, scores

SIZES = {"math": 60, "code": 90}
DRAWS = 4000


def model(read: Read) -> ModelScores:
    return scores(dict.fromkeys(read, 0.5), read=read)


@pytest.fixture(scope="module")
def models() -> dict[str, ModelScores]:
    """Models that find the same documents hard; texts of very different lengths."""
    rng = np.random.default_rng(1)
    made: dict[str, dict[str, dict[str, tuple[float, int]]]] = {
        name: {} for name in ("base", "merge", "other", "expert", "second")
    }
    rates = {"base": 2.0, "merge": 1.5, "other": 1.52, "expert": 1.1, "second": 1.2}
    for corpus, n in SIZES.items():
        sizes, hard = rng.integers(20, 400, n), rng.normal(0, 0.3, n)
        for name, rate in rates.items():
            # The worse a model, the more the hard documents cost it.
            bits = (rate * (1 + hard) + rng.normal(0, 0.05, n)) * sizes
            made[name][corpus] = {
                f"d{i}": (float(-b * math.log(2)), int(s)) for i, (b, s) in enumerate(zip(bits, sizes, strict=True))
            }
    return {name: model(read) for name, read in made.items()}


def redrawn(models: list[ModelScores], corpus: str, rng: np.random.Generator) -> np.ndarray:
    """[DRAWS, models] bits per byte of the corpus drawn again with replacement, the same documents for all models."""
    n = len(models[0].loss_samples[corpus])
    drawn = rng.integers(n, size=(DRAWS, n))
    rates = []
    for one in models:
        nats, sizes = np.array(list(one.loss_samples[corpus].values())).T
        rates.append(-nats[drawn].sum(1) / math.log(2) / sizes[drawn].sum(1))
    return np.stack(rates, axis=1)


def test_the_error_of_one_loss(models: dict[str, ModelScores]) -> None:
    spread = redrawn([models["merge"]], "math", np.random.default_rng(2)).std()
    assert loss_error(models["merge"].loss_samples["math"]) == pytest.approx(spread, rel=0.05)


def test_the_error_of_a_difference_is_that_of_documents_drawn_together(models: dict[str, ModelScores]) -> None:
    first, second, rng = models["merge"], models["other"], np.random.default_rng(3)
    rates = {corpus: redrawn([first, second], corpus, rng) for corpus in SIZES}
    differences = np.mean([one[:, 0] - one[:, 1] for one in rates.values()], axis=0)
    found = difference_error(first, second, tuple(SIZES))
    assert found == pytest.approx(differences.std(), rel=0.05)
    alone = difference_error(first, second, ("code",))
    assert alone == pytest.approx((rates["code"][:, 0] - rates["code"][:, 1]).std(), rel=0.05)
    assert found == difference_error(second, first, tuple(SIZES))
    single = math.hypot(*(loss_error(one.loss_samples[corpus]) / 2 for one in (first, second) for corpus in SIZES))
    assert found < single / 3, "what both find hard cancels"


def test_the_error_of_what_is_recovered_is_that_of_documents_drawn_together(models: dict[str, ModelScores]) -> None:
    base, merge, rng = models["base"], models["merge"], np.random.default_rng(4)
    experts = [("math", models["expert"]), ("code", models["second"])]
    b, m, expert = redrawn([base, merge, models["expert"]], "math", rng).T
    parts = [(b - m) / (b - expert)]
    b, m, expert = redrawn([base, merge, models["second"]], "code", rng).T
    spread = np.mean([*parts, (b - m) / (b - expert)], axis=0).std()
    assert recovered_error(base, merge, experts) == pytest.approx(spread, rel=0.05)


def test_documents_are_matched_by_name_not_by_place(models: dict[str, ModelScores]) -> None:
    first, second = models["merge"], models["other"]
    turned = {corpus: dict(reversed(documents.items())) for corpus, documents in second.loss_samples.items()}
    assert difference_error(first, model(turned), ("math",)) == pytest.approx(
        difference_error(first, second, ("math",)), rel=1e-12
    )


def test_models_that_are_the_same_differ_by_nothing_for_certain(models: dict[str, ModelScores]) -> None:
    one, experts = models["merge"], [("math", models["expert"])]
    assert difference_error(one, one, tuple(SIZES)) == 0
    assert recovered_error(models["base"], models["base"], experts) == 0
    assert recovered_error(models["base"], models["expert"], experts) == pytest.approx(0, abs=1e-15)


def test_the_same_difference_on_every_byte_is_certain() -> None:
    """Half a bit a byte more on each text, whatever its length."""
    first = {"math": {"a": (-100 * math.log(2), 100), "b": (-30 * math.log(2), 10)}}
    second = {"math": {"a": (-150 * math.log(2), 100), "b": (-35 * math.log(2), 10)}}
    assert difference_error(model(first), model(second), ("math",)) == pytest.approx(0, abs=1e-15)


def test_by_hand() -> None:
    """Texts of 10 bytes, 5 and 15 bits more: the difference is 1, each text 0.25 from it (5 of 20 bytes); √(2 / 1 · 2 · 0.25²) = 0.5."""
    first = model({"math": {"a": (-15 * math.log(2), 10), "b": (-25 * math.log(2), 10)}})
    second = model({"math": {"a": (-10 * math.log(2), 10), "b": (-10 * math.log(2), 10)}})
    assert difference_error(first, second, ("math",)) == pytest.approx(0.5)


def test_one_document_and_documents_that_were_not_kept_have_no_error() -> None:
    one = model({"math": {"a": (-10.0, 10)}, "code": {"a": (-10.0, 10), "b": (-9.0, 10)}})
    bare = scores({"math": 0.5}, losses={"math": 1.0})
    assert math.isnan(loss_error(one.loss_samples["math"])) and math.isnan(loss_error({}))
    assert math.isnan(difference_error(one, one, ("math",))) and math.isnan(difference_error(one, one, ("math", "code")))
    assert difference_error(one, one, ("code",)) == 0
    assert math.isnan(difference_error(one, bare, ("math",))) and math.isnan(recovered_error(bare, one, [("math", one)]))


def test_other_documents_are_not_compared() -> None:
    first, second = ({"math": {name: (-10.0, 10), "b": (-9.0, 10)}} for name in ("a", "c"))
    with pytest.raises(AssertionError, match="math: scores of one suite are of the same documents"):
        difference_error(model(first), model(second), ("math",))
