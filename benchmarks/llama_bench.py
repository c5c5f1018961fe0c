#!/usr/bin/env python3
"""Decoding speed of llama.cpp on a shape of the OLMoE family with random weights, resident and with experts on the CPU.

    cmake -S llama.cpp -B llama.cpp/build -DGGML_CUDA=ON && cmake --build llama.cpp/build --target llama-bench
    build/venv/bin/pip install gguf==0.19.0
    build/venv/bin/python benchmarks/llama_bench.py --bench llama.cpp/build/bin/llama-bench --config OLMOE/config.json \
        --gguf olmoe_random.gguf --output benchmarks/results/llama_cpp.jsonl

Writes the GGUF file where it is not there yet: bfloat16 weights of that shape (14 GB for OLMoE-1B-7B; routers and norms
float32), then runs llama-bench once per number of layers whose experts stay on the CPU, and appends a JSON line for each.
The comparison is with `hestia bench` on the same machine: experts of one layer in four on the GPU take as much of its
memory as 16 of 64 expert slots in every layer do.
"""

import argparse
import datetime
import json
import os
import pathlib
import subprocess

import numpy as np

try:
    import gguf
except ModuleNotFoundError:
    raise SystemExit("llama_bench: needs the package gguf; build/venv/bin/pip install gguf==0.19.0") from None

POOL = 1 << 26  # random values that all matrices are cut out of


def tensors_of(config):
    """Name, shape and whether float32, in the order of the file; shapes as numpy has them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    key_width = hidden // heads * config["num_key_value_heads"]
    experts = config["num_experts"]
    yield "token_embd.weight", (config["vocab_size"], hidden), False
    yield "output_norm.weight", (hidden,), True
    yield "output.weight", (config["vocab_size"], hidden), False
    for layer in range(config["num_hidden_layers"]):
        for name, shape, wide in (
            ("attn_norm", (hidden,), True), ("attn_q", (hidden, hidden), False), ("attn_k", (key_width, hidden), False),
            ("attn_v", (key_width, hidden), False), ("attn_q_norm", (hidden,), True), ("attn_k_norm", (key_width,), True),
            ("attn_output", (hidden, hidden), False), ("ffn_norm", (hidden,), True),
            ("ffn_gate_inp", (experts, hidden), True), ("ffn_gate_exps", (experts, inner, hidden), False),
            ("ffn_up_exps", (experts, inner, hidden), False), ("ffn_down_exps", (experts, hidden, inner), False),
        ):
            yield f"blk.{layer}.{name}.weight", shape, wide


def olmoe_writer(config, path, file_type):
    """A GGUF file of an OLMoE model with all but its tensors; no tokenizer."""
    writer = gguf.GGUFWriter(str(path), "olmoe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("none")
    return writer


def write_random_gguf(config, path, seed):
    random = np.random.default_rng(seed)
    pool = random.standard_normal(POOL, dtype=np.float32) * np.float32(0.02)
    halves = (pool.view(np.uint32) >> 16).astype(np.uint16)
    writer = olmoe_writer(config, path, gguf.LlamaFileType.MOSTLY_BF16)
    tensors = list(tensors_of(config))
    for name, shape, wide in tensors:
        count = int(np.prod(shape))
        if wide:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * count)
        else:
            in_bytes = (*shape[:-1], 2 * shape[-1])
            writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), 2 * count, gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, wide in tensors:
        if name.endswith("norm.weight"):
            writer.write_tensor_data(np.ones(shape, np.float32))
            continue
        values = pool if wide else halves
        first = int(random.integers(POOL))
        cut = np.resize(np.roll(values, -first), shape)
        writer.write_tensor_data(cut if wide else cut.view(np.uint8))
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", type=pathlib.Path, required=True, help="llama-bench")
    parser.add_argument("--config", type=pathlib.Path, required=True, help="config.json of an OLMoE model")
    parser.add_argument("--gguf", type=pathlib.Path, required=True, help="the file with random weights, made if missing")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON lines are appended")
    parser.add_argument("--cpu-layers", default=None, help="layers whose experts stay on the CPU, comma separated "
                        "(default: none, half, three quarters, all)")
    parser.add_argument("--gpu-layers", default="99")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text())
    if config.get("model_type") != "olmoe":
        parser.error(f"--config: model_type must be olmoe, got {config.get('model_type')!r}")
    if not arguments.gguf.exists():
        partial = arguments.gguf.with_suffix(".partial")
        write_random_gguf(config, partial, arguments.seed)
        partial.rename(arguments.gguf)
    layers = config["num_hidden_layers"]
    wanted = arguments.cpu_layers or f"0,{layers // 2},{layers * 3 // 4},{layers}"
    for cpu_layers in (int(number) for number in wanted.split(",")):
        command = [str(arguments.bench), "-m", str(arguments.gguf), "-ngl", arguments.gpu_layers, "-ncmoe", str(cpu_layers),
                   "-t", str(arguments.threads), "-p", "0", "-n", str(arguments.new_tokens), "-d",
                   str(arguments.prompt_tokens), "-r", str(arguments.repeats), "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout)[0]
        row = {
            "engine": "llama.cpp", "llama_cpp_commit": found["build_commit"], "cpu_layers": cpu_layers, "layers": layers,
            "dtype": "bfloat16", "batch": 1, "prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.new_tokens,
            "repeats": arguments.repeats, "tokens_per_second": found["avg_ts"], "tokens_per_second_spread": found["stddev_ts"],
            "samples": found["samples_ts"], "threads": found["n_threads"], "flash_attention": found["flash_attn"],
            "command": " ".join([arguments.bench.name, "-m", arguments.gguf.name, *command[3:]]),
            "gpu": found["gpu_info"], "cpu": found["cpu_info"],
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        with arguments.output.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"experts of {cpu_layers:2d} of {layers} layers on the CPU: {found['avg_ts']:.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
