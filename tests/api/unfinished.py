"""A client that begins uploads and never ends them: HTTP/2 by hand, since real clients send whole messages.

    python unfinished.py PORT PATH CONNECTIONS STREAMS SIZE SECONDS [AUTHORIZATION]

Prints how many bytes it sent and how many calls had ended; then waits for its input to end.
"""

import asyncio
import struct
import sys

DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
ACK, END_HEADERS = 1, 4
WINDOW = 65535


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def text(value: str) -> bytes:
    """A string of HPACK, plain, shorter than 127 bytes."""
    return bytes([len(value)]) + value.encode()


class Uploader:
    """One connection with `streams` calls of `path`, each announcing `size` bytes and sending one less."""

    def __init__(self, port: int, path: str, streams: int, size: int, headers: dict[str, str] | None = None):
        self.port, self.size = port, size
        self.windows = {2 * i + 1: WINDOW for i in range(streams)}
        self.left = dict.fromkeys(self.windows, size - 1)
        self.connection_window, self.initial_window = WINDOW, WINDOW
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
        fields |= {"content-type": "application/grpc"} | (headers or {})
        self.header_block = b"".join(b"\0" + text(key) + text(value) for key, value in fields.items())
        self.ended: set[int] = set()
        self.sent = 0

    async def run(self, seconds: float) -> None:
        """Send all that the windows allow, for so long."""
        reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))
        for stream in self.windows:
            self.writer.write(frame(HEADERS, END_HEADERS, stream, self.header_block))
            self.send(stream, struct.pack(">BI", 0, self.size))
        try:
            async with asyncio.timeout(seconds):
                while True:
                    self.push()
                    await self.writer.drain()
                    head = await reader.readexactly(9)
                    payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                    self.take(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass

    def send(self, stream: int, payload: bytes) -> None:
        self.writer.write(frame(DATA, 0, stream, payload))
        self.windows[stream] -= len(payload)
        self.connection_window -= len(payload)
        self.sent += len(payload)

    def push(self) -> None:
        for stream, left in self.left.items():
            while left and stream not in self.ended:
                size = min(left, self.windows[stream], self.connection_window, 16384)
                if size <= 0:
                    break
                self.send(stream, bytes(size))
                left = self.left[stream] = left - size

    def take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if stream:
                self.windows[stream] += more
            else:
                self.connection_window += more
        elif kind == SETTINGS and not flags & ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == 4:
                    self.windows = {key: old + value - self.initial_window for key, old in self.windows.items()}
                    self.initial_window = value
            self.writer.write(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.writer.write(frame(PING, ACK, 0, payload))
        elif kind == 3 or (kind == HEADERS and flags & 1):
            self.ended.add(stream)


async def main(port: int, path: str, connections: int, streams: int, size: int, seconds: float, key: str) -> None:
    headers = {"authorization": key} if key else {}
    uploaders = [Uploader(port, path, streams, size, headers) for _ in range(connections)]
    await asyncio.gather(*(one.run(seconds) for one in uploaders))
    print(sum(one.sent for one in uploaders), sum(len(one.ended) for one in uploaders), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _, port, path, connections, streams, size, seconds, *key = sys.argv
    asyncio.run(main(int(port), path, int(connections), int(streams), int(size), float(seconds), key[0] if key else ""))
