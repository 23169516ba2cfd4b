"""The peers there are, by name."""

from millrace.bench.peers.base import Peer
from millrace.bench.peers.llama_cpp import LlamaCpp
from millrace.bench.peers.openvino import OpenVINO
from millrace.bench.peers.vllm_cpu import VLLM

PEERS: dict[str, Peer] = {peer.name: peer for peer in (OpenVINO(), VLLM(), LlamaCpp())}
