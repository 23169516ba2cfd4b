from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def isa() -> str: ...
def available_isas() -> list[str]: ...
def sample(
    *,
    logits: NDArray[np.float32],
    temperature: NDArray[np.float32],
    top_p: NDArray[np.float32],
    top_k: NDArray[np.int32],
    min_p: NDArray[np.float32],
    presence_penalty: NDArray[np.float32],
    frequency_penalty: NDArray[np.float32],
    repetition_penalty: NDArray[np.float32],
    seed: NDArray[np.uint64],
    choice: NDArray[np.int32],
    position: NDArray[np.int32],
    top_n: NDArray[np.int32],
    bias_offsets: NDArray[np.int32],
    bias_ids: NDArray[np.int32],
    bias_values: NDArray[np.float32],
    history_offsets: NDArray[np.int32],
    history_ids: NDArray[np.int32],
    history_prompt_lens: NDArray[np.int32],
    masks: Sequence[tuple[int, NDArray[np.uint32]]],
) -> tuple[
    NDArray[np.int32], NDArray[np.float32], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]
]: ...
def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], eps: float, out: NDArray[np.float32]) -> None: ...
def layer_norm(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32], eps: float, out: NDArray[np.float32]
) -> None: ...
def rotary_turns(
    positions: NDArray[np.int32],
    frequencies: NDArray[np.float32],
    factor: float,
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> None: ...
def rotate(x: NDArray[np.float32], dim: int, cosine: NDArray[np.float32], sine: NDArray[np.float32]) -> None: ...
def embed_rows(
    table: NDArray[Any], stored: str, ids: NDArray[np.int32], accumulate: bool, out: NDArray[np.float32]
) -> None: ...
def add_rows(x: NDArray[np.float32], out: NDArray[np.float32]) -> None: ...
def mean_rows(x: NDArray[np.float32], out: NDArray[np.float32]) -> None: ...
def normalize(x: NDArray[np.float32]) -> None: ...
def activate(x: NDArray[np.float32], kind: str, out: NDArray[np.float32]) -> None: ...
def exp(x: NDArray[np.float32], out: NDArray[np.float32]) -> None: ...
