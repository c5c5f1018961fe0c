"""Checks `hestia export --to gguf` with llama.cpp: the logits of the patched file change as the routers did.

    build/venv/bin/python -m venv --system-site-packages build/llama-venv
    build/llama-venv/bin/pip install gguf==0.19.0 llama-cpp-python==0.3.36    # compiles llama.cpp: minutes
    build/llama-venv/bin/python tests/parity/check_llama_cpp.py [--router-type F32|F16]

By hand, no part of the test suite. checkpoints/tiny becomes a float32 model directory (so that `--to hf` rounds no
more than the GGUF file does) and a GGUF file, written here with the gguf package. Its routers are tuned for a few steps
on generated text, and llama.cpp runs the file before and after the export. Both are compared with `hestia logits` on
the base and on the `--to hf` export of the same run. All files go to a temporary folder.

With F16 routers llama.cpp rounds hidden states to F16 before it multiplies, so that now and then another expert is
chosen: there the median over tokens is held to the tolerance instead of the largest difference.
"""

import argparse
import ctypes
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

import gguf
import llama_cpp
import numpy as np
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from llama_bench import olmoe_writer  # noqa: E402

TINY = ROOT / "checkpoints" / "tiny"
TOLERANCE = {"F32": 1e-4, "F16": 1e-3}  # of the largest logit

RECIPE = """recipe_version: 1
task: finetune
run_dir: {run_dir}
seed: 5
model: {{path: {model}, dtype: float32, device: cpu}}
data:
  sequence_length: 64
  held_out_fraction: 0.2
  train: [letters]
  evaluate: [letters]
  corpora:
    - {{domain: letters, paths: [{text}]}}
losses:
  cache_simulation: {{weight: 1.0}}
  reuse: {{weight: 0.3}}
train: {{steps: 20, rows_per_batch: 2, learning_rate: 1.0e-2, log_every: 10, evaluate_tokens: 500}}
control: {{enabled: false}}
"""

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
}


def load_directory(directory):
    tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def write_base(directory, router_type):
    """checkpoints/tiny with float32 weights, and routers in the type they will have in the GGUF file."""
    directory.mkdir()
    tensors = {}
    for shard in sorted(TINY.glob("*.safetensors")):
        tensors.update(load_file(shard))
    tensors = {name: tensor.half() if router_type == "F16" and name.endswith(".mlp.gate.weight") else tensor.float()
               for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(TINY / name, directory)


def write_olmoe_gguf(directory, path, router_type):
    config = json.loads((directory / "config.json").read_text())
    tensors = load_directory(directory)
    writer = olmoe_writer(config, path, gguf.LlamaFileType.ALL_F32)
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", tensors["model.norm.weight"])
    writer.add_tensor("output.weight", tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).copy())
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for theirs, name in NAMES.items():
            values = tensors[f"{prefix}{theirs}.weight"]
            if name == "ffn_gate_inp" and router_type == "F16":
                values = values.astype(np.float16)
            writer.add_tensor(f"blk.{layer}.{name}.weight", values)
        for part in ("gate", "up", "down"):
            stacked = np.stack([tensors[f"{prefix}mlp.experts.{expert}.{part}_proj.weight"]
                                for expert in range(config["num_experts"])])
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", stacked)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@llama_cpp.llama_log_callback
def say_nothing(level, text, user_data):
    pass


def llama_logits(path, tokens):
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"{path}: llama.cpp does not load it"
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
    settings.type_k = settings.type_v = 0  # float32 key-value cache
    settings.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = token
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    assert llama_cpp.llama_decode(context, batch) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    values = np.ctypeslib.as_array(
        ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float)), (len(tokens), size)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return values


def hestia(*arguments):
    return subprocess.run([ROOT / "build/bin/hestia", *map(str, arguments)], check=True, stdout=subprocess.PIPE,
                          text=True, cwd=ROOT).stdout


def hestia_logits(directory, tokens, folder):
    output = folder / "logits.safetensors"
    hestia("logits", directory, "--tokens", ",".join(map(str, tokens)), "--output", output)
    return load_file(output)["logits"].numpy()


def difference(ours, theirs, router_type):
    per_token = np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max()
    return per_token.max() if router_type == "F32" else np.median(per_token)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router-type", choices=["F32", "F16"], default="F32")
    arguments = parser.parse_args()
    llama_cpp.llama_log_set(say_nothing, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        words = random.Random(3)
        (folder / "text").mkdir()
        for number in range(40):
            (folder / "text" / f"{number}.txt").write_text(
                " ".join(words.choice(["alpha", "beta", "gamma", "delta", "eta"]) for _ in range(300)))
        recipe = folder / "recipe.yaml"
        base = folder / "base"
        write_base(base, arguments.router_type)
        recipe.write_text(RECIPE.format(run_dir=folder / "run", model=base, text=folder / "text"))
        base_gguf = folder / "base.gguf"
        write_olmoe_gguf(base, base_gguf, arguments.router_type)
        hestia("finetune", recipe, "--quiet")
        tuned = hestia("export", recipe, "--to", "hf").strip()
        tuned_gguf = hestia("export", recipe, "--to", "gguf", "--gguf", base_gguf).strip()
        tokens = [words.randrange(4, 4096) for _ in range(96)]
        llama_base = llama_logits(base_gguf, tokens)
        llama_tuned = llama_logits(tuned_gguf, tokens)
        ours_base = hestia_logits(base, tokens, folder)
        ours_tuned = hestia_logits(tuned, tokens, folder)
        kind = arguments.router_type
        tolerance = TOLERANCE[kind]
        changed = difference(ours_tuned, ours_base, "F16")
        rows = [("llama.cpp and hestia, base", difference(llama_base, ours_base, kind), tolerance),
                ("llama.cpp and hestia, tuned", difference(llama_tuned, ours_tuned, kind), tolerance),
                ("change of the logits, llama.cpp and hestia",
                 difference(llama_tuned - llama_base, ours_tuned - ours_base, kind), 10 * tolerance)]
        print(f"routers {kind}, {len(tokens)} tokens; tuning changed the logits of the median token by {changed:.3f} "
              "of the largest")
        for text, value, limit in rows:
            print(f"{text}: difference {value:.2e} (at most {limit:.0e})")
        assert changed > 100 * tolerance, "the tuned routers do not change the logits enough to tell"
        assert all(value <= limit for _, value, limit in rows)


if __name__ == "__main__":
    main()
