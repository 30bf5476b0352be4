"""Open the data of a run for all of its training stages, and check them before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from allometry.configs.run import RunConfig
from allometry.data.changes import DataStage
from allometry.data.contents import check_contents
from allometry.data.documents import DocumentStream
from allometry.data.sources import Sources
from allometry.data.stream import Stream, open_stream
from allometry.data.tokenizer import check_vocabulary
from allometry.scaling.plan import RunPlan
from allometry.scaling.stages import places_of
from allometry.trainer.repetition import check_epochs, repetitions


def open_sources(config: RunConfig) -> Stream | DocumentStream:
    """Return the data, after checking that they match the tokenizer and the vocabulary.

    For a run with training stages the data are read as in the first stage; ``in_stage`` gives the
    data of another stage (see ``Reading.in_stage``).
    """
    places = places_of(config)
    stages = [
        DataStage(
            place.config.data,
            place.first_sequence,
            place.local.sequences_before(place.steps + 1),
            place.name,
        )
        for place in places
        if place.name is not None
    ]
    stream = open_stream(places[0].config.data, config.run.seed, stages)
    check_vocabulary(config.model.vocab_size, stream.stores)
    check_contents(stream.stores)
    for store in stream.stores:
        store.vocab_size = config.model.vocab_size
    return stream


def check_data(config: RunConfig, plans: Sequence[RunPlan], stream: Sources) -> None:
    """Check that the data are sufficient for the remaining run, in all of its training stages."""
    from allometry.trainer.feed import check_steps  # imports torch, which a dry run does not need

    for number, plan in enumerate(plans):
        staged = stream.in_stage(number)
        if isinstance(staged, DocumentStream):
            check_steps(staged, plan)
    sequences = plans[-1].batch.sequences_before(plans[-1].total_steps + 1)
    stream.check_run(sequences)
    parameters = plans[-1].parameters.non_embedding
    check_epochs(config, repetitions(stream, sequences, parameters))
