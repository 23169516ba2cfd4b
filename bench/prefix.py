"""What a beginning that was computed before saves: `python -m millrace.bench.prefix [--model SHAPE|DIR]`.

Two requests, one after the other, of which 1,024 tokens are the same and 32 are not: time to the first token of each.
Then a conversation: in every turn the prompt is all that was said before and 100 tokens more, the answer has 50.
"""

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

from millrace.bench.checkpoints import work_directory
from millrace.bench.engine import locate
from millrace.server.config import EngineConfig
from millrace.server.engine.engine import Engine
from millrace.server.engine.sequence import SequenceRequest
from millrace.server.errors import MillraceError
from millrace.server.model.executors import create_executor
from millrace.server.types import Sampling

COMMON, OWN = 1024, 32
TURNS, SAID, ANSWERED = 10, 100, 50
ASKED = 5.0


class Asker:
    """Requests to an engine, one at a time."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._requests = 0

    def ask(self, prompt: Sequence[int], output_tokens: int) -> tuple[float, int, list[int]]:
        """Seconds to the first token, prompt tokens that were computed, and the answer."""
        self._requests += 1
        greedy = Sampling(temperature=0)
        request = SequenceRequest(self._requests, "bench", "bench", prompt, greedy, 0, output_tokens)
        start, first, computed = time.perf_counter(), 0.0, 0
        answer: list[int] = []
        self._engine.submit(request)
        while self._engine.has_work:
            output = self._engine.step()
            for finished in output.finished:
                if finished.error:
                    raise finished.error
            computed += output.stats.prefill_tokens
            if output.tokens and not answer:
                first = time.perf_counter() - start
            answer += [token.token_id for token in output.tokens]
        return first, computed, answer


def first_tokens(asker: Asker, vocabulary: int, rounds: int) -> tuple[float, float]:
    """Median seconds to the first token of the first and the second request."""
    draw = random.Random(0)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        common = draw.choices(range(vocabulary), k=COMMON)
        for times in seconds:
            times.append(asker.ask(common + draw.choices(range(vocabulary), k=OWN), 1)[0])
    return median(seconds[0]), median(seconds[1])


def conversation(asker: Asker, vocabulary: int) -> list[int]:
    """Prompt tokens that each turn computed."""
    draw = random.Random(1)
    computed: list[int] = []
    history: list[int] = []
    for _ in range(TURNS):
        history += draw.choices(range(vocabulary), k=SAID)
        _, count, answer = asker.ask(history, ANSWERED)
        computed.append(count)
        history += answer
    return computed


def report(asker: Asker, vocabulary: int, block: int, rounds: int) -> None:
    cold, warm = first_tokens(asker, vocabulary, rounds)
    print(
        f"first token of {COMMON} + {OWN} tokens: {1e3 * cold:,.0f} ms; of as many with the first {COMMON} computed"
        f" before: {1e3 * warm:,.0f} ms, {cold / warm:.1f}x sooner (asked: {ASKED:g}x); medians of {rounds}"
    )
    # The last token of an answer was never computed: nothing came after it.
    print(f"a conversation, {SAID} tokens a turn and answers of {ANSWERED}: computed {conversation(asker, vocabulary)}")
    print(f"asked: at most {SAID + 1 + block} a turn, a block more than what is new")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of random weights, or a directory")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=work_directory())
    options = parser.parse_args()
    try:
        model, label = locate(options.model, options.work_dir)
        config = EngineConfig(
            model=str(model),
            embedding_model="off",
            quantization=options.quantization,
            max_model_len=max(COMMON + OWN + 1, TURNS * (SAID + ANSWERED)),
            max_num_seqs=4,
        )
        loaded = create_executor(config, lambda done, total: None)
        with closing(Engine(loaded.executor, loaded.info, config)) as engine:
            print(f"{label}, {options.quantization}, blocks of {loaded.executor.kv_layout.block_size} tokens")
            report(Asker(engine), loaded.info.vocab_size, loaded.executor.kv_layout.block_size, options.rounds)
    except (MillraceError, ValueError, OSError) as error:
        parser.exit(1, f"prefix: {error}\n")


if __name__ == "__main__":
    main()
