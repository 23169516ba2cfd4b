"""`millrace ask`: one question to a collection, the answer as it comes, then what it stands on."""

from contextlib import closing

from millrace.server.client import Client, Options, new_text
from millrace.server.terminal import shown
from millrace.v1 import generation_pb2 as pb


def ask(client: Client, question: str, options: Options) -> None:
    """Write the answer to standard output, and under it a line for each source that it cites."""
    cited: dict[int, list[pb.Citation]] = {}
    with closing(client.stream(question, **options)) as events:
        for event in events:
            print(new_text(event), end="", flush=True)
            if event.HasField("citation"):
                cited.setdefault(event.citation.source_number, []).append(event.citation)
    print()
    if cited:
        print()
    for number, citations in sorted(cited.items()):
        print(source_line(number, citations))


def source_line(number: int, citations: list[pb.Citation]) -> str:
    """`[1] docs/returns.md, page 2, bytes 120-310 and 512-600`"""
    first = citations[0]
    page = f", page {first.page}" if first.HasField("page") else ""
    spans = sorted({(citation.byte_start, citation.byte_end) for citation in citations})
    return f"[{number}] {shown(first.source)}{page}, bytes {' and '.join(f'{start}-{end}' for start, end in spans)}"
