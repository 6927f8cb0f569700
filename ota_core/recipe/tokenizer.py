"""The block ``tokenizer`` of a recipe: whose vocabulary the merge takes, what single tokens begin from, and padding. mergekit's dialect.

tokenizer:
  source: union                       base, union, or a model of the recipe
  tokens:
    <|im_start|>: {source: models/chat}                                       for the models that lack the token
    <|call|>: {source: {kind: zero}, force: true}                             for all models
    <|user|>: {source: {kind: model_token, model: models/chat, token: "<s>"}} another token's row
  pad_to_multiple_of: 64              rows of the embedding
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from ota_core.recipe.values import Strict

MAX_TOKENS = 10_000
"""Tokens that a recipe may name."""


class TokenSource(Strict):
    """What a token begins from, where that is not the row that a model has for it."""

    kind: Literal["zero", "model_token"] = Field(description="Zeros, or a row of another token.")
    model: str | None = Field(None, description="With model_token: the model, as the recipe calls it, of which a row is taken.")
    token: str | None = Field(None, description="That row, by its token.")
    token_id: Annotated[int, Field(ge=0)] | None = Field(None, description="The same by its number; one of the two.")

    @model_validator(mode="after")
    def _one_row(self) -> Self:
        given = [key for key in ("model", "token", "token_id") if getattr(self, key) is not None]
        if self.kind == "zero" and given:
            raise ValueError(f"the kind zero takes no {given[0]}")
        if self.kind == "model_token" and (self.model is None or len(given) != 2):
            raise ValueError("the kind model_token takes a model and one of token and token_id")
        return self


def _form(source: Any) -> str:
    """Which of the two a source is, so that only one says what is wrong with it."""
    return "model" if isinstance(source, str) else "row"


Source = Annotated[Annotated[TokenSource, Tag("row")] | Annotated[str, Tag("model")], Discriminator(_form)]


class TokenRow(Strict):
    """What one token begins from before the merge."""

    source: Source | None = Field(
        None,
        description="A model of the recipe, whose own row is taken, or what kind of row; by default as for tokens that are not named.",
    )
    force: bool = Field(False, description="For all models, not for those alone that lack the token.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.force and self.source is None:
            raise ValueError("force: true needs a source, which all models take the token's row from")
        return self

    @property
    def model(self) -> str | None:
        """The model that it names."""
        return self.source.model if isinstance(self.source, TokenSource) else self.source


class TokenizerSettings(Strict):
    """``tokens`` and ``pad_to_multiple_of``; ``source`` is the recipe's ``tokenizer_source``."""

    source: str = Field(description="base, model:<name> or union, as tokenizer_source.")
    tokens: Annotated[dict[str, TokenRow], Field(max_length=MAX_TOKENS)] | None = Field(
        None, description="What single tokens begin from before the merge; one that no tokenizer has is added."
    )
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=2**20)] | None = Field(
        None, description="Rows of the embedding are a multiple of this; those behind the last token are the mean of all."
    )

    def moved(self, place: Callable[[str | None], str | None]) -> "TokenizerSettings":
        """The same with other names of models."""

        def row(one: TokenRow) -> TokenRow:
            source = one.source
            changed = (
                source.model_copy(update={"model": place(source.model)}) if isinstance(source, TokenSource) else place(source)
            )
            return one.model_copy(update={"source": changed})

        whose = f"model:{place(self.source.removeprefix('model:'))}" if self.source.startswith("model:") else self.source
        tokens = None if self.tokens is None else {token: row(one) for token, one in self.tokens.items()}
        return self.model_copy(update={"source": whose, "tokens": tokens})

    def decisive(self, position: Callable[[str], int]) -> dict[str, Any]:
        """What decides the merge's bytes. position: of a model among the recipe's."""

        def row(one: TokenRow) -> dict[str, Any]:
            said = one.model_dump(mode="json", exclude_none=True)
            if isinstance(one.source, str):
                return said | {"source": position(one.source)}
            if one.model is not None:
                said["source"]["model"] = position(one.model)
            return said

        tokens = {token: row(one) for token, one in sorted((self.tokens or {}).items())}
        return {"tokens": tokens, "pad_to_multiple_of": self.pad_to_multiple_of}


def tokenizer_spelling(raw: dict[str, Any], name_of: Callable[[Any], Any]) -> None:
    """Take ``tokenizer`` apart, in place: ``tokenizer_source``, and what else it says. name_of: of a model that is written as a mapping."""
    given = raw.pop("tokenizer", None)
    if not isinstance(given, Mapping):
        raw |= {} if given is None else {"tokenizer": given}
        return
    block = {key: value for key, value in given.items() if value is not None and not (key == "tokens" and value == {})}
    source = name_of(block.get("source", "union"))
    raw.setdefault("tokenizer_source", source)
    if set(block) <= {"source"} and same_source(source, raw["tokenizer_source"]):
        return
    tokens = block.get("tokens")
    if isinstance(tokens, Mapping):
        block["tokens"] = {str(token): _row(one, name_of) for token, one in tokens.items()}
    raw["tokenizer"] = block | {"source": source}


def _row(one: Any, name_of: Callable[[Any], Any]) -> Any:
    if not isinstance(one, Mapping):
        return one
    source = one.get("source")
    if isinstance(source, Mapping):
        source = {**source, "model": name_of(source["model"])} if "kind" in source and "model" in source else name_of(source)
    return {**one, "source": source}


def same_source(one: Any, other: Any) -> bool:
    """Whether two spellings of a tokenizer's source mean the same."""
    return str(one).removeprefix("model:") == str(other).removeprefix("model:")
