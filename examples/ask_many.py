"""Asks eight questions at once over one connection, with the asyncio client.

python examples/ask_many.py
"""

import asyncio
import os

from millrace.server.client import DEFAULT_ADDRESS, AsyncClient


async def main() -> None:
    async with AsyncClient(os.environ.get("MILLRACE_ADDRESS", DEFAULT_ADDRESS)) as client:
        prompts = [f"A {noun} is" for noun in ("cache", "queue", "lock", "thread", "token", "server", "client", "disk")]
        answers = await asyncio.gather(*(client.generate(p, max_output_tokens=24, temperature=0) for p in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt}{answer.choices[0].text!r} ({answer.usage.output_tokens} tokens)")


asyncio.run(main())
