"""Writes the goldens of the parity test: tiny random OLMoE models and what transformers computes with them.

    build/venv/bin/pip install transformers==5.23.0
    build/venv/bin/python tests/parity/make_goldens.py            # writes tests/parity/goldens/<case>/
    build/venv/bin/python tests/parity/make_goldens.py --check DIR...   # loads directories that Hestia saved

Every case is a model directory (config.json, model.safetensors) and golden.safetensors: tokens [S] int64, logits
[S, V] float32, router_logits [L, S, E] float32, selected [L, S, K] int64. Each switch of the family is on in one case
and off in another. Weights are far from their usual initialisation (large, norms not 1), so that a wrong norm, a
missing clip or a swapped projection moves the logits far beyond the tolerance.
"""

import argparse
import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file

PINNED = "5.23.0"
FORMAT_VERSION = "1"
SEED = 20261107

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=False,
    clip_qkv=None,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=1,
)

# name: changed settings, rope settings, spelling of config.json ("hub" or "transformers5"), tokens
CASES = {
    "hub_plain": (dict(), dict(rope_theta=10000.0, rope_type="default"), "hub", 19),
    "normalised_gqa": (
        dict(norm_topk_prob=True, num_key_value_heads=2, num_experts_per_tok=3, num_hidden_layers=3, num_experts=6),
        dict(rope_theta=500000.0, rope_type="default"),
        "transformers5",
        23,
    ),
    "clipped_tied": (
        dict(clip_qkv=0.7, tie_word_embeddings=True, num_key_value_heads=1, vocab_size=67),
        dict(rope_theta=1000.0, rope_type="default"),
        "transformers5",
        17,
    ),
    "odd_sizes_linear_rope": (
        dict(
            hidden_size=36,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=13,
            num_experts=7,
            num_experts_per_tok=5,
            vocab_size=71,
            rms_norm_eps=1e-3,
            clip_qkv=1.5,
            norm_topk_prob=True,
        ),
        dict(rope_theta=10000.0, rope_type="linear", factor=2.5),
        "hub",
        21,
    ),
    "biased_top1": (
        dict(attention_bias=True, num_experts=6, num_experts_per_tok=1, hidden_size=48, num_attention_heads=2,
             num_key_value_heads=2),
        dict(rope_theta=25000.0, rope_type="default"),
        "transformers5",
        13,
    ),
}


def randomise(model, generator):
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1.0 + 0.3 * values)
        elif "mlp.gate" in name:
            parameter.copy_(0.5 * values)
        else:
            parameter.copy_(0.3 * values)


def rewrite_config(path, rope, spelling):
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    config.pop("rope_theta", None)
    config.pop("rope_scaling", None)
    if spelling == "hub":
        config["rope_theta"] = rope["rope_theta"]
        scaling = {"type": rope["rope_type"], "factor": rope["factor"]} if rope["rope_type"] != "default" else None
        config["rope_scaling"] = scaling
    else:
        config["rope_parameters"] = rope
    path.write_text(json.dumps(config, indent=2) + "\n")


def run(model, tokens):
    with torch.no_grad():
        output = model(input_ids=tokens.unsqueeze(0), output_router_logits=True, use_cache=False)
    router_logits = torch.stack([layer.reshape(len(tokens), -1) for layer in output.router_logits])
    return output.logits[0], router_logits


def write_case(directory, name, settings, rope, spelling, num_tokens, generator):
    config = transformers.OlmoeConfig(**{**BASE, **settings}, rope_parameters=dict(rope))
    model = transformers.OlmoeForCausalLM(config).eval()
    with torch.no_grad():
        randomise(model, generator)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    rewrite_config(directory / "config.json", rope, spelling)
    tokens = torch.randint(0, config.vocab_size, (num_tokens,), generator=generator)
    # Through the directory, so that the config as written is what the golden belongs to.
    reloaded = transformers.OlmoeForCausalLM.from_pretrained(directory, attn_implementation="eager", experts_implementation="eager").eval()
    logits, router_logits = run(reloaded, tokens)
    selected = router_logits.softmax(-1).topk(config.num_experts_per_tok, -1).indices
    gap = (lambda v: (v[..., :-1] - v[..., 1:]).min())(router_logits.sort(-1, descending=True).values)
    assert gap > 1e-5, f"{name}: two router logits are nearly equal; change SEED"
    save_file(
        {
            "tokens": tokens,
            "logits": logits.float().contiguous(),
            "router_logits": router_logits.float().contiguous(),
            "selected": selected.contiguous(),
        },
        directory / "golden.safetensors",
        metadata={"golden_version": FORMAT_VERSION, "transformers": transformers.__version__},
    )
    print(f"{name}: max |logit| {logits.abs().max():.3f}, smallest router gap {gap:.2e}")


def check(directory):
    """Runs a model directory in transformers and compares with logits.safetensors beside it."""
    expected = load_file(directory / "logits.safetensors")
    model = transformers.OlmoeForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32).eval()
    logits, router_logits = run(model, expected["tokens"])
    for name, ours, theirs in (("logits", expected["logits"], logits),
                               ("router_logits", expected["router_logits"], router_logits)):
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        print(f"{directory.name}, {name}: largest difference {error:.2e} of the largest value")
        assert error < 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=pathlib.Path, metavar="DIR", nargs="+")
    arguments = parser.parse_args()
    if arguments.check:
        for directory in arguments.check:
            check(directory)
        return
    if transformers.__version__ != PINNED:
        raise SystemExit(f"make_goldens.py: transformers must be {PINNED}, got {transformers.__version__}; "
                         f"run pip install transformers=={PINNED}")
    torch.set_num_threads(1)
    root = pathlib.Path(__file__).resolve().parent / "goldens"
    for index, (name, (settings, rope, spelling, num_tokens)) in enumerate(CASES.items()):
        directory = root / name
        directory.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(SEED + index)
        write_case(directory, name, settings, rope, spelling, num_tokens, generator)


if __name__ == "__main__":
    main()
