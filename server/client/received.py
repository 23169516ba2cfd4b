"""Streamed answers that survive a lost connection, server or worker."""

from dataclasses import dataclass, field
from typing import Unpack

from millrace.server.client.requests import Options
from millrace.v1 import generation_pb2 as pb


@dataclass(slots=True)
class ReceivedText:
    """What came of one choice. `finish`: None until it has ended."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: pb.FinishInfo | None = None


class Received:
    """What has come of an answer, over as many streams as it takes.

        received = Received()
        while not received.is_complete:
            try:
                for event in client.stream(prompt, **received.options(token_ids=True, temperature=0.8)):
                    received.add(event)
            except (Unavailable, Aborted):
                ...  # wait, take another server of equal model revision, give up

    Only an answer with `token_ids` goes on. Another one begins anew, and what was received of it is forgotten.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
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

    def options(self, **given: Unpack[Options]) -> Options:
        """Those of the request, `given`, for the next stream: with the seed of the first one, and where to go on.

        A request_id stands for one call, so it is left out of those that go on.
        """
        if self.started is None or not self._can_go_on:
            self._forget()
            return given
        choices = [
            pb.ReceivedChoice(
                index=index,
                token_ids=pb.TokenIds(ids=one.token_ids),
                text_bytes=len(one.text.encode()),
                finished=one.finish is not None,
            )
            for index, one in self.choices.items()
        ]
        options: Options = {**given}
        options.pop("request_id", None)
        options["seed"] = self.started.effective_sampling.seed
        options["continue_from"] = pb.ContinueFrom(
            model_revision=self.started.model_revision, prompt_digest=self.started.prompt_digest, choices=choices
        )
        return options

    @property
    def _can_go_on(self) -> bool:
        """A model writes it, and its tokens came with its text."""
        has_tokens = all(one.token_ids or not one.text for one in self.choices.values())
        return has_tokens and self.started is not None and bool(self.started.prompt_digest)

    def _add_delta(self, delta: pb.ChoiceDelta) -> None:
        choice = self.choices.setdefault(delta.index, ReceivedText())
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        if delta.HasField("finish"):
            choice.finish = delta.finish
