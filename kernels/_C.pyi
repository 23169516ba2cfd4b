from collections.abc import Sequence

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
