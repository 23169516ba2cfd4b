"""Greedy generation over gRPC equals `transformers` on checkpoints made by `save_pretrained`."""

import random
from pathlib import Path

import pytest
import torch
import transformers

from millrace.v1 import generation_pb2 as pb

STEPS = 64
# Logits this near to each other may change places: cpu rounds to bfloat16.
TIE = {"reference": 1e-4, "cpu": 0.05}


def assert_greedy(model: torch.nn.Module, prompt: list[int], output: list[int], tie: float) -> None:
    """Every token is the best one given those before it, or lies within `tie` of the best."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    for position, (row, token) in enumerate(zip(logits, output, strict=True)):
        if int(row.argmax()) != token:
            assert float(row.max() - row[token]) <= tie, f"token {position} is {token}, not {int(row.argmax())}"


@pytest.mark.slow
@pytest.mark.parametrize(("executor", "block_size"), [("reference", "16"), ("cpu", "32")])
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_greedy_ids_over_grpc(
    architecture: str, executor: str, block_size: str, make_checkpoint, start_server, tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path / "model", architecture)
    server = start_server(
        "--model", str(directory), "--served-model-name", "tiny", "--executor", executor, "--block-size", block_size,
        "--max-num-batched-tokens", "7",
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    draw = random.Random(architecture)
    for length in (1, 15, 16, 17, 300):
        prompt = [draw.randrange(10, model.config.vocab_size) for _ in range(length)]
        reply = server.generation.Generate(
            pb.GenerateRequest(
                model="tiny",
                token_ids=pb.TokenIds(ids=prompt),
                sampling=pb.SamplingParams(temperature=0, repetition_penalty=1),
                stopping=pb.StoppingCriteria(max_output_tokens=STEPS, ignore_eos=True),
                output=pb.OutputOptions(token_ids=True),
            ),
            timeout=120,
        )
        output = list(reply.choices[0].token_ids.ids)
        assert len(output) == STEPS
        assert reply.usage == pb.Usage(prompt_tokens=length, output_tokens=STEPS)
        assert_greedy(model, prompt, output, TIE[executor])
    assert server.stop() == 0
