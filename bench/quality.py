"""What a narrower width costs in quality: `python -m millrace.bench.quality [--model DIR] [--text FILE]`.

The text is cut into windows; after every token but the last of a window the model predicts the next one. For each
width: perplexity, its ratio to float32's (the reference executor, which needs PyTorch) with the standard error that
another text of that length may be expected to move it by, the mean divergence KL(float32 || width) in nats, and how
often both find the same token most likely. Beside ours stands the perplexity of
each peer that is installed, of the same checkpoint on the same windows. At int4 an engine is compared with ours of as
many inputs to a scale: it stands in the rows of that group.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from millrace.bench.checkpoints import work_directory
from millrace.bench.comparison import OURS
from millrace.bench.peers.base import PeerError
from millrace.bench.peers.choice import chosen, names
from millrace.bench.peers.registry import PEERS
from millrace.bench.perplexity import WIDTHS, Cut, Quality, measure, measure_peer, peer_width, windows
from millrace.server.config import EngineConfig
from millrace.server.errors import MillraceError
from millrace.server.text.tokenizer import Tokenizer

SHOP = Path(__file__).parent.parent / "examples" / "docs"


def compare(options: argparse.Namespace, checkpoint: Path, cut: Cut, peers: Sequence[str]) -> Iterator[str]:
    """The lines of the table, then for each width ours beside the best peer, then what could not be measured."""
    rows: list[Quality] = []
    broken: list[str] = []
    yield f"{'width':14}{'engine':12}{'perplexity':>10}{'ratio':>10}{'error':>9}{'KL':>12}{'top-1':>9}"
    for ours in measure(options.model, cut, options.widths):
        rows.append(ours)
        yield row(ours, rows[0])
        for peer in (PEERS[name] for name in peers if peer_width(PEERS[name], ours.width)):
            try:
                rows.append(measure_peer(peer, ours.width, checkpoint, cut, options.work_dir))
            except PeerError as error:
                broken.append(f"not measured: {peer.name} {ours.width}: {error}")
            else:
                yield row(rows[-1], rows[0])
    yield from best_peers(rows)
    yield from broken


def row(found: Quality, exact: Quality) -> str:
    """`exact`: float32's."""
    divergence = "-" if found.divergence is None else f"{found.divergence:.2e}"
    agreement = "-" if found.agreement is None else f"{found.agreement:.3f}"
    ratio, error = found.over(exact)
    of_exact = f"{ratio:10.4f}{error:9.4f}"
    return f"{found.width:14}{found.engine:12}{found.perplexity:10.3f}{of_exact}{divergence:>12}{agreement:>9}"


def best_peers(rows: Sequence[Quality]) -> Iterator[str]:
    """For each width that a peer has too."""
    for ours in (row for row in rows if row.engine == OURS):
        peers = [row for row in rows if row.width == ours.width and row.engine != OURS]
        if peers:
            best = min(peers, key=lambda row: row.perplexity)
            ratio, error = ours.over(best)
            yield f"{ours.width}: our perplexity is {ratio:.4f} of the best peer's ({best.engine}), error {error:.4f}"


def shop() -> str:
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(SHOP.glob("*.md")))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="builtin", help="checkpoint directory; default: the built-in model")
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: the pages of the example shop")
    parser.add_argument("--window", type=int, default=256, help="tokens that are predicted in one go; default 256")
    parser.add_argument("--windows", type=int, default=40, help="at most so many; default 40")
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    engines = parser.add_mutually_exclusive_group()
    engines.add_argument("--peers", type=names(list(PEERS)), help=f"of {','.join(PEERS)}; default: those installed")
    engines.add_argument("--only", choices=["ours"], help="no peers")
    parser.add_argument("--work-dir", type=Path, default=work_directory(), help="of the peers; %(default)s")
    options = parser.parse_args()
    if options.window < 2:
        parser.error("--window: at least 2 tokens, one to predict the other")
    if options.windows < 1:
        parser.error("--windows: at least 1")
    options.work_dir = options.work_dir.resolve()
    if options.only:
        options.peers = []
    return options


def main() -> None:
    options = parse()
    try:
        checkpoint = EngineConfig(model=options.model).checkpoint.resolve()
        text = options.text.read_text(encoding="utf-8") if options.text else shop()
        cut = windows(Tokenizer.load(checkpoint).encode(text), options.window, options.windows)
        peers = chosen(options.peers, options.work_dir, lambda line: print(line, file=sys.stderr))
        source = options.text or "the example shop"
        print(f"{options.model}, {sum(map(len, cut)):,} tokens of {source} in windows of {options.window}")
        for line in compare(options, checkpoint, cut, peers):
            print(line, flush=True)
    except (MillraceError, PeerError, OSError, UnicodeDecodeError, ValueError) as error:
        sys.exit(f"quality: {error}")


if __name__ == "__main__":
    main()
