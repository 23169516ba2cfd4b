"""Compiles the production kernels for a Hopper GPU on a machine without one, and prints what each needs as JSON.

TRITON_INTERPRET=0 python tests/triton_compile.py
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from millrace.kernels.triton import attention, kv_cache, matmul, rows
from millrace.kernels.triton.configs import CONFIGS

ALL = "--all" in sys.argv
TARGET = GPUTarget("cuda", 90, 32)
NUMBERS = {"size": "i32", "eps": "fp32", "scale": "fp32"}


def compiled(kernel, pointers: dict[str, str], warps: int = 4, stages: int = 3, **constants) -> dict[str, object]:
    """`pointers`: types of what is pointed at; every other argument that is no constant is an int32."""
    signature = {
        name: f"*{pointers[name]}"
        if name in pointers
        else "constexpr"
        if name in constants
        else NUMBERS.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages})
    return {
        "shared": built.metadata.shared,
        "cubin": len(built.asm["cubin"]),
        "wgmma": "wgmma" in built.asm["ptx"],
    }


def row_cases():
    for out in ("bf16", "i8", "fp8e4nv"):
        quantizes = out != "bf16"
        pointers = {"x": "bf16", "residual": "bf16", "weight": "bf16", "out": out, "scales": "fp32"}
        for size, adds in ((2048, True), (16_384, False)) if ALL or not quantizes else ((4096, True),):
            yield (
                f"add_rms_norm {out} {size} {adds}",
                compiled(
                    rows.add_rms_norm_kernel, pointers, rows.warps(size), ADDS=adds, QUANTIZES=quantizes, BLOCK=size
                ),
            )
        gates = {name: kind for name, kind in pointers.items() if name in ("x", "out", "scales")}
        for activation in ("silu", "gelu", "gelu_tanh") if ALL or not quantizes else ("silu",):
            yield (
                f"gate {out} {activation}",
                compiled(rows.gate_kernel, gates, 16, ACTIVATION=activation, QUANTIZES=quantizes, BLOCK=8192),
            )


def cache_cases():
    for kind in ("bf16", "i8", "fp8e4nv"):
        pointers = {"qkv": "bf16", "q_out": "bf16", "keys": kind, "values": kind, "positions": "i32", "slots": "i32"}
        pointers |= dict.fromkeys(("cosine", "sine", "key_scales", "value_scales"), "fp32")
        for dim, rotary in ((64, 64), (80, 80), (96, 48), (128, 128), (256, 256)):
            if ALL or kind == "bf16" or dim == 128:
                yield f"rotate_and_write {kind} {dim}", compiled(
                    kv_cache.rotate_and_write_kernel, pointers, 1, heads=8, kv_heads=2, dim=dim, rotary=rotary,
                    page=64, QUANTIZES=kind != "bf16", BLOCK=triton.next_power_of_2(dim),
                )  # fmt: skip


def attention_cases():
    for kind in ("bf16", "i8", "fp8e4nv"):
        for dim in (64, 80, 96, 128, 256) if ALL or kind == "bf16" else (128,):
            for block_m, span in ((16, 256), (16, 0), (64 if dim > 128 else 128, 0)):
                pointers = {"q": "bf16", "keys": kind, "values": kind, "sums": "fp32"}
                pointers["out"] = "fp32" if span else "bf16"
                pointers |= dict.fromkeys(("block_tables", "offsets", "context_lens"), "i32")
                pointers |= dict.fromkeys(("key_scales", "value_scales"), "fp32")
                yield f"attend {kind} {dim} {block_m} {span}", compiled(
                    attention.attend_kernel, pointers, 8 if block_m == 128 else 4, 2,
                    heads=8, kv_heads=2, dim=dim, page=64, SPAN=span, CAUSAL=True, QUANTIZED=kind != "bf16",
                    UPCASTS=False, BLOCK_M=block_m, BLOCK_N=64, BLOCK_D=triton.next_power_of_2(dim),
                )  # fmt: skip
    for dim in (64, 80, 128, 256) if ALL else (80,):
        yield f"merge {dim}", compiled(
            attention.merge_kernel, {"parts": "fp32", "sums": "fp32", "out": "bf16"},
            heads=8, dim=dim, SPLITS=32, BLOCK_D=triton.next_power_of_2(dim),
        )  # fmt: skip


def matmul_cases():
    for most, config in CONFIGS["scaled"]:
        for kind in ("i8", "fp8e4nv"):
            for splits in (1, 8) if ALL else (1,):
                pointers = {"x": kind, "weights": kind, "x_scales": "fp32", "scales": "fp32"}
                pointers["out"] = "fp32" if splits > 1 else "bf16"
                yield f"scaled {kind} {most} {splits}", compiled(
                    matmul.scaled_kernel, pointers, config.warps, config.stages, UPCASTS=False, SPLITS=splits,
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP=config.group,
                )  # fmt: skip
    for most, config in CONFIGS["int4"]:
        for group in (32, 64, 128) if ALL else (32, 128):
            for kind in ("bf16", "fp16") if ALL else ("bf16",):
                pointers = {"x": kind, "weights": "u8", "scales": kind, "zeros": kind, "out": kind}
                yield f"int4 {kind} {most} {group}", compiled(
                    matmul.int4_kernel, pointers, config.warps, config.stages, GROUP_K=group, UPCASTS=False, SPLITS=1,
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP=config.group,
                )  # fmt: skip
    yield "add_splits", compiled(matmul.add_splits_kernel, {"parts": "fp32", "out": "bf16"}, SPLITS=8, BLOCK=1024)


CASES = {"rows": row_cases, "cache": cache_cases, "attention": attention_cases, "matmul": matmul_cases}

if __name__ == "__main__":
    chosen = [part for part in CASES if part in sys.argv] or list(CASES)
    print(json.dumps({name: needs for part in chosen for name, needs in CASES[part]()}))
