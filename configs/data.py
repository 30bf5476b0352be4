"""The ``data`` and ``batch`` sections."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, PathText, Section, kind_unless_said


class Select(Section):
    """Which training documents of a source are read, by the scores of a scorer."""

    scores: PathText = Field(
        min_length=1, description="path of the scores of its documents (.scores.npy)"
    )
    keep: float = Field(
        gt=0.0, le=1.0, description="share of the tokens that is kept, whole documents by score"
    )
    side: Literal["top", "middle", "bottom"] = Field(
        description="which scores are kept: the highest, those between, the lowest"
    )


class Source(Section):
    """One corpus: token files in Megatron's .bin/.idx format, named without the ending."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name in the record")
    train: PathText = Field(
        min_length=1, description="path of the training tokens, without .bin/.idx"
    )
    validation: PathText | None = Field(
        None, description="path of the held-out tokens, without .bin/.idx; null: no evaluation"
    )
    weight: float = Field(
        1.0,
        ge=0.0,
        description="share of the batch, relative to the others (with data.replay: to the others "
        "of its kind, replayed or new); 0: held-out loss alone",
    )
    max_epochs: float | None = Field(
        None,
        gt=0.0,
        description="how often the source may be read; a run whose plan reads it more often is "
        "refused; null: any number",
    )
    select: Select | None = Field(
        None, description="which training documents are read; null: all. Held-out ones stay"
    )
    kind: Literal["natural", "rephrased", "generated"] = Field(
        "natural",
        description="natural text; what a model rephrased of another source; or what it wrote "
        "without one",
    )
    parent: str | None = Field(
        None, description="rephrased: name of the data source that its documents were made from"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "natural" and self.validation is not None:
            raise ValueError(
                f"kind={self.kind} has validation={self.validation}, but held-out text is natural; "
                "set validation to null"
            )
        if self.parent is not None and self.kind != "rephrased":
            raise ValueError(
                f"parent={self.parent} is of what was rephrased, but kind={self.kind}; set kind to "
                "rephrased, or parent to null"
            )
        return self


class ReplayChange(Section):
    """Another share of replay from a place of the run on."""

    after_tokens: Count = Field(gt=0, description="tokens of the run after which it changes")
    ratio: float = Field(ge=0.0, le=1.0, description="share of the samples that are replayed then")
    over_tokens: Count = Field(
        0, ge=0, description="tokens over which it gets there, linearly; 0: at once"
    )


class Replay(Section):
    """Old data among the new: a share of the samples comes from ``sources``."""

    ratio: float = Field(ge=0.0, le=1.0, description="share of the samples that are replayed")
    sources: tuple[str, ...] = Field(
        min_length=1, description="names of the data.sources that are old; all others are new"
    )
    changes: tuple[ReplayChange, ...] = Field(
        (), description="other ratios later in the run, in order"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        free = 1
        for change in self.changes:
            if change.after_tokens < free:
                raise ValueError(
                    f"changes must follow each other, but after_tokens={change.after_tokens} is "
                    f"before {free}, where the change before it is through"
                )
            free = change.after_tokens + max(change.over_tokens, 1)
        twice = sorted({name for name in self.sources if self.sources.count(name) > 1})
        if twice:
            raise ValueError(f"sources names {twice[0]!r} twice; name it once")
        return self


class _TokenData(Section):
    """What every kind of data names: the corpora and how many tokens a sample has."""

    kind: Literal["sequences", "documents"]
    sequence_length: Count = Field(gt=0, description="tokens in a sequence")
    tokenizer: PathText | None = Field(
        None, description="tokenizer.json the token files were made with; null: do not check"
    )
    sources: tuple[Source, ...] = Field(min_length=1, description="the corpora to mix")
    replay: Replay | None = Field(None, description="old data among the new; null: none")
    allow_epochs: float | None = Field(
        None,
        gt=0.0,
        description="how often any source may be read; a run whose plan reads one more often is "
        "refused; null: 40 times",
    )
    continue_sources: bool = Field(
        False,
        description="go on in each source after what the runs that the weights come from have "
        "read of it; false: each source from its beginning",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sources must have different names, but {twice[0]!r} stands twice")
        kinds = {source.name: source.kind for source in self.sources}
        for source in self.sources:
            if source.parent is not None and kinds.get(source.parent) != "natural":
                is_not = "rephrased or generated" if source.parent in kinds else "none of them"
                raise ValueError(
                    f"source {source.name!r} has parent={source.parent}, which is {is_not}; name a "
                    f"natural one of {', '.join(kinds)}, or set parent to null"
                )
        if not any(source.weight for source in self.sources):
            raise ValueError("every source has weight 0, so there is nothing to train on")
        if self.replay is not None:
            _check_replay(self.replay, {source.name: source.weight for source in self.sources})
        return self


def _check_replay(replay: Replay, weights: dict[str, float]) -> None:
    unknown = [name for name in replay.sources if name not in weights]
    if unknown:
        raise ValueError(
            f"replay.sources names {unknown[0]!r}, which is none of data.sources "
            f"({', '.join(weights)})"
        )
    ratios = [replay.ratio, *(change.ratio for change in replay.changes)]
    old = sum(weights[name] for name in replay.sources)
    new = sum(weight for name, weight in weights.items() if name not in replay.sources)
    if not old and max(ratios) > 0.0:
        raise ValueError(
            f"replay.ratio={max(ratios)} cannot be read of replay.sources, whose weights are all 0;"
            " give one of them a weight"
        )
    if not new and min(ratios) < 1.0:
        raise ValueError(
            f"replay.ratio={min(ratios)} leaves {1.0 - min(ratios):g} of the samples to new "
            "sources, but replay.sources names every source that has a weight; name fewer there"
        )


class SequenceData(_TokenData):
    """Documents packed into sequences of one length."""

    kind: Literal["sequences"] = "sequences"
    packing: Literal["per_document", "concatenated"] = Field(
        "per_document",
        description="per_document: a document attends to itself only and its positions start at "
        "0; concatenated: a sequence is one stream of tokens",
    )


class DocumentData(_TokenData):
    """Whole documents, each laid on as many ranks as it needs (``parallel.context``)."""

    kind: Literal["documents"] = "documents"
    sequence_length: Count = Field(
        gt=0,
        description="a batch of N sequences holds the documents that begin in N windows of this "
        "many tokens",
    )
    max_document_tokens: Count = Field(
        gt=0, description="a longer document is cut into documents of this many tokens"
    )


DataConfig = Annotated[
    Annotated[SequenceData | DocumentData, Field(discriminator="kind")],
    kind_unless_said("sequences"),
]


class BatchRamp(Section):
    """Grow the batch linearly over the first tokens of the run, in whole increments."""

    start_sequences: Count = Field(gt=0, description="global batch at step 1, in sequences")
    increment_sequences: Count = Field(gt=0, description="what each increase adds, in sequences")
    over_tokens: Count = Field(gt=0, description="tokens after which the batch is full")


class BatchConfig(Section):
    """How many sequences a step holds and how they are cut up."""

    sequences: Count = Field(gt=0, description="global batch of one optimizer step, in sequences")
    micro_batch_sequences: Count = Field(
        gt=0, description="sequences that one rank runs at once; the rest is accumulated"
    )
    ramp: BatchRamp | None = Field(None, description="batch-size warm-up; null: none")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sequences % self.micro_batch_sequences:
            raise ValueError(
                f"micro_batch_sequences={self.micro_batch_sequences} must divide "
                f"sequences={self.sequences}"
            )
        if self.ramp is not None:
            start, step = self.ramp.start_sequences, self.ramp.increment_sequences
            if start >= self.sequences or (self.sequences - start) % step:
                raise ValueError(
                    f"ramp must lead from start_sequences={start} to sequences={self.sequences} "
                    f"in whole steps of increment_sequences={step}"
                )
            for name, value in (("start_sequences", start), ("increment_sequences", step)):
                if value % self.micro_batch_sequences:
                    raise ValueError(
                        f"ramp.{name}={value} must be a multiple of "
                        f"micro_batch_sequences={self.micro_batch_sequences}"
                    )
        return self
