"""Streamed answers that survive a lost connection, server or worker."""

from dataclasses import dataclass, field

from millrace.server.client.requests import Options
from millrace.v1 import generation_pb2 as pb


@dataclass(slots=True)
class ReceivedText:
    """What came of one choice. `finish`: None until it has ended."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: pb.FinishInfo | None = None


class Received:
    """What has come of an answer, over as many streams as it takes: `options` ask for what has not come yet.

        received = Received()
        while not received.is_complete:
            try:
                for event in client.stream(prompt, token_ids=True, **received.options):
                    received.add(event)
            except (Unavailable, Aborted):
                ...  # wait, take another server of equal model revision, give up

    Without `token_ids` it begins anew, and what came before comes again.
    """

    def __init__(self) -> None:
        self.started: pb.Started | None = None
        self.choices: dict[int, ReceivedText] = {}
        self.citations: dict[tuple[int, int, int], pb.Citation] = {}  # by choice, source, place in the text
        self.output_tokens = 0  # as billed, over all streams that completed
        self.is_complete = False

    def add(self, event: pb.StreamGenerateResponse) -> None:
        """Note an event of the stream."""
        match event.WhichOneof("event"):
            case "started":
                self.started = event.started
            case "deltas":
                for delta in event.deltas.choices:
                    self._add_delta(delta)
            case "citation":
                one = event.citation
                self.citations[one.choice, one.source_number, one.text_start] = one
            case "completed":
                self.output_tokens += event.completed.usage.output_tokens
                self.is_complete = True

    @property
    def options(self) -> Options:
        """None at the beginning; then the seed, and where to go on."""
        if self.started is None:
            return {}
        choices = [
            pb.ReceivedChoice(
                index=index,
                token_ids=pb.TokenIds(ids=one.token_ids),
                text_bytes=len(one.text.encode()),
                finished=one.finish is not None,
            )
            for index, one in self.choices.items()
        ]
        started = self.started
        place = pb.ContinueFrom(
            model_revision=started.model_revision, prompt_digest=started.prompt_digest, choices=choices
        )
        return {"seed": started.effective_sampling.seed, "continue_from": place}

    def _add_delta(self, delta: pb.ChoiceDelta) -> None:
        choice = self.choices.setdefault(delta.index, ReceivedText())
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        if delta.HasField("finish"):
            choice.finish = delta.finish
