"""How second moments are estimated, as a recipe or the command says it."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ota_core.recipe.values import Positive, Strict, no_switch


class EstimateSettings(Strict):
    """How second moments are estimated where training kept none: the mean squared gradient of the loss over batches of documents."""

    data: str | None = Field(
        None,
        description="Texts: JSON lines or plain text (a file or s3://…), or a suite, of which each expert has its own capability's documents. "
        "{capability} and {expert} stand for the expert's own.",
    )
    data_dir: str | None = Field(None, description="Data of a local suite: a folder or s3://….")
    samples: Annotated[int, BeforeValidator(no_switch), Field(ge=1)] = Field(256, description="Documents.")
    batch: Annotated[int, BeforeValidator(no_switch), Field(ge=1)] = Field(
        8, description="Documents of a batch, as in training; a divisor of samples."
    )
    max_length: Annotated[int, BeforeValidator(no_switch), Field(ge=2)] = Field(
        512, description="Tokens of a document at most; never more than the model takes."
    )
    clip: Annotated[Positive | None, BeforeValidator(lambda value: None if value == "none" else value)] = Field(
        1.0, description="Largest norm of a batch's gradient, as in training; none: not clipped."
    )
    points: Annotated[int, BeforeValidator(no_switch), Field(ge=1)] = Field(
        1,
        description="Points on the way from the base to the expert, the expert the last of them, that share the batches: what Adam saw along the way.",
    )
    random_tokens: bool = Field(False, description="Random tokens instead of texts.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Decides which documents are taken.")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="Of the model in memory; by default as it is stored."
    )
    replace: bool = Field(False, description="In a recipe: estimate also where second moments were kept.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.data is None) is not self.random_tokens:
            raise ValueError("estimate: expected either data, the texts, or random_tokens: true")
        if self.samples % self.batch:
            raise ValueError(
                f"estimate: samples {self.samples} is no multiple of batch {self.batch}; batches are full, as in training"
            )
        if self.samples // self.batch < self.points:
            raise ValueError(
                f"estimate: {self.points} points need as many batches; samples {self.samples} in batches of {self.batch} are fewer"
            )
        return self

    def decisive(self) -> dict[str, Any]:
        """What decides an estimate's numbers beside the model and the texts themselves."""
        return self.model_dump(mode="json", exclude={"data", "data_dir", "replace"})
