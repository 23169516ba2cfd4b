"""Streams an answer with nothing but generated stubs and grpcio: no package of ours is needed.

pip install grpcio grpcio-tools
mkdir -p build/stubs
python -m grpc_tools.protoc -Iproto --python_out=build/stubs --grpc_python_out=build/stubs proto/millrace/v1/*.proto
PYTHONPATH=build/stubs python examples/plain_client.py 127.0.0.1:50051 "A queue keeps"
"""

import sys

import grpc

from millrace.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc


def main(address: str, prompt: str) -> None:
    with grpc.insecure_channel(address) as channel:
        models = model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest(), timeout=10)
        request = generation_pb2.GenerateRequest(
            model=models.models[0].name,
            text=prompt,
            sampling=generation_pb2.SamplingParams(temperature=0.7, seed=1),
            stopping=generation_pb2.StoppingCriteria(max_output_tokens=48),
        )
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for event in stub.StreamGenerate(request, timeout=60):
            for choice in event.deltas.choices:
                print(choice.text, end="", flush=True)
        print()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('usage: plain_client.py HOST:PORT "PROMPT"')
    try:
        main(*sys.argv[1:])
    except grpc.RpcError as error:
        sys.exit(f"{error.code().name}: {error.details()}")
