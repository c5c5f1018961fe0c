"""Writes the goldens of the parity test: tiny random models of each family and what transformers computes with them.

    build/venv/bin/pip install transformers==5.23.0
    build/venv/bin/python tests/parity/make_goldens.py            # writes tests/parity/goldens/<case>/
    build/venv/bin/python tests/parity/make_goldens.py --check DIR...   # loads directories that Hestia saved

Every case is a model directory (config.json, model.safetensors) and golden.safetensors: tokens [S] int64, logits
[S, V] float32, and of the layers with experts router_logits [L, S, E] float32, selected [L, S, K] int64 and weights
[L, S, K] float32, the last two by falling logit as the model's own router gave them; bfloat16_errors [2] float64, how
far transformers itself is from those logits in bfloat16 under the same choices: largest difference over largest value,
squared error over squared value; bfloat16_cached_logits [S, V] bfloat16, its logits there when a key-value cache holds
what PREFILL tokens together and the others one by one left. Each switch of a family is on in one case and off in
another. Weights are far from their usual initialisation (large, norms not 1), so that a wrong norm, a
missing clip or a swapped projection moves the logits far beyond the tolerance.
"""

import argparse
import json
import pathlib
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

PINNED = "5.23.0"
FORMAT_VERSION = "3"
SEED = 20261107
PREFILL = 7  # Tokens; the rest follow one by one. Where a length decides on rope factors, these reach it.

OLMOE = dict(
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

SMALL = dict(
    vocab_size=48,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=1,
)

QWEN = dict(SMALL, num_experts=6, moe_intermediate_size=8, intermediate_size=20)

LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    original_max_position_embeddings=32,
    short_factor=[1.0, 1.3, 2.1],
    long_factor=[1.1, 4.0, 9.5],
    short_mscale=1.2,
    long_mscale=1.4,
)

YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=8.0,
    beta_fast=4.0,
    beta_slow=1.0,
    mscale=0.707,
    mscale_all_dim=0.9,
    original_max_position_embeddings=64,
)

FAMILIES = {
    "DeepseekV2": dict(SMALL, num_key_value_heads=4, n_routed_experts=6, moe_intermediate_size=8, intermediate_size=20,
                       n_shared_experts=2, first_k_dense_replace=0, kv_lora_rank=10, q_lora_rank=None,
                       qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5),
    "GptOss": dict(SMALL, num_local_experts=6, intermediate_size=8, head_dim=6, sliding_window=4),
    "Mixtral": dict(SMALL, num_local_experts=6, intermediate_size=8),
    "Olmoe": OLMOE,
    "Phimoe": dict(SMALL, num_local_experts=6, intermediate_size=8),
    "Qwen2Moe": dict(QWEN, shared_expert_intermediate_size=14),
    "Qwen3Moe": QWEN,
}

# name: family, changed settings, rope settings, spelling of config.json ("hub" or "transformers5"), tokens
CASES = {
    "hub_plain": ("Olmoe", dict(), dict(rope_theta=10000.0, rope_type="default"), "hub", 19),
    "normalised_gqa": (
        "Olmoe",
        dict(norm_topk_prob=True, num_key_value_heads=2, num_experts_per_tok=3, num_hidden_layers=3, num_experts=6),
        dict(rope_theta=500000.0, rope_type="default"),
        "transformers5",
        23,
    ),
    "clipped_tied": (
        "Olmoe",
        dict(clip_qkv=0.7, tie_word_embeddings=True, num_key_value_heads=1, vocab_size=67),
        dict(rope_theta=1000.0, rope_type="default"),
        "transformers5",
        17,
    ),
    "odd_sizes_linear_rope": (
        "Olmoe",
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
        "Olmoe",
        dict(attention_bias=True, num_experts=6, num_experts_per_tok=1, hidden_size=48, num_attention_heads=2,
             num_key_value_heads=2),
        dict(rope_theta=25000.0, rope_type="default"),
        "transformers5",
        13,
    ),
    # A window that is not in use must not be read as one.
    "qwen2_plain": (
        "Qwen2Moe",
        dict(sliding_window=5),
        dict(rope_theta=1e6, rope_type="default"),
        "hub",
        15,
    ),
    # Experts in layers 1 and 5 only; windowed by the default pattern, layers 0 and 2.
    "qwen2_dense_layers": (
        "Qwen2Moe",
        dict(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3], qkv_bias=False, norm_topk_prob=True,
             tie_word_embeddings=True, num_key_value_heads=4, use_sliding_window=True, sliding_window=4,
             max_window_layers=3, num_experts_per_tok=3, rms_norm_eps=1e-4),
        dict(rope_theta=10000.0, rope_type="linear", factor=2.0),
        "hub",
        17,
    ),
    "qwen2_layer_types": (
        "Qwen2Moe",
        dict(use_sliding_window=True, sliding_window=3, layer_types=["full_attention", "sliding_attention"],
             num_key_value_heads=1, num_experts_per_tok=1),
        dict(rope_theta=1000.0, rope_type="default"),
        "transformers5",
        13,
    ),
    "qwen3_plain": (
        "Qwen3Moe",
        dict(head_dim=10, norm_topk_prob=True),
        dict(rope_theta=1e6, rope_type="default"),
        "hub",
        15,
    ),
    "qwen3_windowed": (
        "Qwen3Moe",
        dict(num_hidden_layers=3, mlp_only_layers=[1], attention_bias=True, use_sliding_window=True, sliding_window=4,
             tie_word_embeddings=True, num_key_value_heads=1, num_experts_per_tok=4),
        dict(rope_theta=10000.0, rope_type="linear", factor=1.5),
        "transformers5",
        17,
    ),
    "mixtral_plain": (
        "Mixtral",
        dict(),
        dict(rope_theta=1e6, rope_type="default"),
        "hub",
        15,
    ),
    "mixtral_windowed": (
        "Mixtral",
        dict(sliding_window=5, head_dim=8, num_local_experts=7, num_experts_per_tok=3, tie_word_embeddings=True,
             num_key_value_heads=4, rms_norm_eps=1e-4),
        dict(rope_theta=10000.0, rope_type="linear", factor=3.0),
        "transformers5",
        17,
    ),
    "phimoe_short": (
        "Phimoe",
        dict(attention_bias=True, lm_head_bias=True, router_jitter_noise=0.4, sliding_window=128),
        LONGROPE,
        "hub",
        17,
    ),
    # Longer than the original length; the window is in use.
    "phimoe_long": (
        "Phimoe",
        dict(attention_bias=True, lm_head_bias=True, router_jitter_noise=0.2, sliding_window=5, rms_norm_eps=1e-3,
             num_key_value_heads=1),
        dict(LONGROPE, original_max_position_embeddings=6),
        "transformers5",
        19,
    ),
    "phimoe_plain": (
        "Phimoe",
        dict(tie_word_embeddings=True, num_key_value_heads=4, num_local_experts=5),
        dict(rope_theta=1e6, rope_type="default"),
        "hub",
        13,
    ),
    # Group sizes that are not in use must not limit the choice.
    "deepseek_v2_plain": (
        "DeepseekV2",
        dict(n_group=3, topk_group=1),
        dict(rope_theta=10000.0, rope_type="default"),
        "hub",
        15,
    ),
    "deepseek_v2_groups": (
        "DeepseekV2",
        dict(num_hidden_layers=3, first_k_dense_replace=1, q_lora_rank=9, topk_method="group_limited_greedy",
             n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=4, routed_scaling_factor=2.5,
             attention_bias=True, n_shared_experts=1, rms_norm_eps=1e-3),
        YARN,
        "hub",
        17,
    ),
    "deepseek_v2_normalised": (
        "DeepseekV2",
        dict(norm_topk_prob=True, tie_word_embeddings=True, num_experts_per_tok=3, qk_nope_head_dim=4, v_head_dim=16,
             kv_lora_rank=4),
        dict(YARN, truncate=False, attention_factor=1.3, mscale=1.0),
        "transformers5",
        13,
    ),
    "deepseek_v2_one_scale": (
        "DeepseekV2",
        dict(routed_scaling_factor=0.5, num_experts_per_tok=1),
        {key: value for key, value in YARN.items() if not key.startswith("mscale")},
        "transformers5",
        13,
    ),
    # Windowed by the default pattern; values reach the clamp.
    "gpt_oss_plain": (
        "GptOss",
        dict(num_hidden_layers=3, swiglu_limit=0.6),
        dict(rope_type="yarn", rope_theta=150000.0, factor=8.0, beta_fast=4.0, beta_slow=1.0, truncate=False,
             original_max_position_embeddings=32),
        "hub",
        15,
    ),
    "gpt_oss_mxfp4": (
        "GptOss",
        dict(hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_local_experts=4, swiglu_limit=2.5),
        dict(rope_type="default", rope_theta=10000.0),
        "transformers5",
        13,
    ),
    "qwen3_fp8": (
        "Qwen3Moe",
        dict(head_dim=10, norm_topk_prob=True),
        dict(rope_theta=1e6, rope_type="default"),
        "hub",
        15,
    ),
    "gpt_oss_unbiased": (
        "GptOss",
        dict(attention_bias=False, tie_word_embeddings=True, num_experts_per_tok=3, num_key_value_heads=1, head_dim=8,
             num_local_experts=5, swiglu_alpha=1.1, layer_types=["full_attention", "sliding_attention"]),
        dict(rope_type="default", rope_theta=10000.0),
        "transformers5",
        17,
    ),
}


def randomise(model, generator):
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1.0 + 0.3 * values)
        elif name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            parameter.copy_(0.5 * values)
        else:
            parameter.copy_(0.3 * values)


def rewrite_config(path, family, rope, spelling):
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    config.pop("rope_theta", None)
    config.pop("rope_scaling", None)
    if spelling == "hub":
        config.pop("layer_types", None)
        if family.startswith("Qwen") and "num_local_experts" in config:
            config["num_experts"] = config.pop("num_local_experts")
        config["rope_theta"] = rope["rope_theta"]
        scaling = {("type" if key == "rope_type" else key): rope[key] for key in rope if key != "rope_theta"}
        config["rope_scaling"] = scaling if rope["rope_type"] != "default" else None
    else:
        config["rope_parameters"] = rope
    path.write_text(json.dumps(config, indent=2) + "\n")


def quantise_mxfp4(tensors, generator):
    """Replaces the experts by random MXFP4 blocks and scales."""
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        tensors[name + "_blocks"] = torch.randint(0, 256, (experts, rows, width // 32, 16), generator=generator,
                                                  dtype=torch.uint8)
        tensors[name + "_scales"] = torch.randint(122, 126, (experts, rows, width // 32), generator=generator,
                                                  dtype=torch.uint8)
    return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                                "model.embed_tokens", "lm_head"]}


def quantise_fp8(tensors, generator):
    """Stores every projection as E4M3 with a scale for each block, the last blocks partly filled."""
    rows, columns = 9, 16
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        scale = torch.rand((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), generator=generator)
        scale = 0.001 + 0.004 * scale
        spread = scale.repeat_interleave(rows, 0)[:weight.shape[0]].repeat_interleave(columns, 1)[:, :weight.shape[1]]
        tensors[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [rows, columns],
            "modules_to_not_convert": ["lm_head"]}


QUANTISED = {"gpt_oss_mxfp4": quantise_mxfp4, "qwen3_fp8": quantise_fp8}


def quantise(directory, function, generator):
    tensors = load_file(directory / "model.safetensors")
    settings = function(tensors, generator)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = settings
    path.write_text(json.dumps(config, indent=2) + "\n")


def routers(model):
    return [module for name, module in model.named_modules() if name.endswith((".mlp.gate", ".mlp.router"))]


def bfloat16_logits(directory, tokens, weights, selected, lengths):
    """Logits [S, V] in bfloat16 under the choices and weights of float32, from a key-value cache that is fed `lengths` tokens at a
    time."""
    model = load(directory, torch.bfloat16)
    now = slice(0, 0)
    for router, weight, choice in zip(routers(model), weights, selected):
        router.register_forward_hook(lambda module, inputs, output, weight=weight, choice=choice: (
            output[0], weight[now].bfloat16(), choice[now]))
    cache = transformers.DynamicCache(config=model.config)
    logits = []
    with torch.no_grad():
        for length in lengths:
            now = slice(now.stop, now.stop + length)
            logits.append(model(input_ids=tokens[None, now], past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(logits)


def bfloat16_errors(logits, reference):
    difference = logits.double() - reference.double()
    # Rounded: bfloat16 sums differ a little from run to run.
    return torch.stack([(difference.abs().max() / reference.double().abs().max()).round(decimals=2),
                        (difference.square().sum() / reference.double().square().sum()).round(decimals=4)])


def run(model, tokens):
    """Logits [S, V], and of each layer's router its logits [S, E], weights [S, K] and choices [S, K]."""
    routed = []
    hooks = [router.register_forward_hook(lambda module, inputs, output: routed.append(output))
             for router in routers(model)]
    with torch.no_grad():
        logits = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return (logits, *(torch.stack([output[i].reshape(len(tokens), -1) for output in routed]) for i in range(3)))


def write_case(directory, name, family, settings, rope, spelling, num_tokens, generator):
    config = getattr(transformers, family + "Config")(**{**FAMILIES[family], **settings}, rope_parameters=dict(rope))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        randomise(model, generator)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    rewrite_config(directory / "config.json", family, rope, spelling)
    if name in QUANTISED:
        quantise(directory, QUANTISED[name], generator)
    tokens = torch.randint(0, config.vocab_size, (num_tokens,), generator=generator)
    # Through the directory, so that the config as written is what the golden belongs to.
    logits, router_logits, weights, selected = run(load(directory), tokens)
    order = router_logits.gather(-1, selected).sort(dim=-1, descending=True, stable=True).indices
    gap = (lambda v: (v[..., :-1] - v[..., 1:]).min())(router_logits.sort(-1, descending=True).values)
    assert gap > 1e-5, f"{name}: two router logits are nearly equal; change SEED"
    save_file(
        {
            "tokens": tokens,
            "logits": logits.float().contiguous(),
            "router_logits": router_logits.float().contiguous(),
            "selected": selected.gather(-1, order).contiguous(),
            "weights": weights.gather(-1, order).float().contiguous(),
            "bfloat16_errors": bfloat16_errors(bfloat16_logits(directory, tokens, weights, selected, [num_tokens]), logits),
            "bfloat16_cached_logits": bfloat16_logits(directory, tokens, weights, selected,
                                                      [PREFILL] + [1] * (num_tokens - PREFILL)),
        },
        directory / "golden.safetensors",
        metadata={"golden_version": FORMAT_VERSION, "transformers": transformers.__version__},
    )
    print(f"{name}: max |logit| {logits.abs().max():.3f}, smallest router gap {gap:.2e}")


def widen_fp8(directory, folder, block):
    """The checkpoint with its values times their scales in float32: transformers' own way there wants accelerate."""
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale = tensors.pop(name)
        weight = tensors[name.removesuffix("_scale_inv")].float()
        spread = scale.repeat_interleave(block[0], 0)[:weight.shape[0]].repeat_interleave(block[1], 1)
        tensors[name.removesuffix("_scale_inv")] = weight * spread[:, :weight.shape[1]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def load(directory, dtype=torch.float32):
    stored = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
    if stored.get("quant_method") == "fp8":
        with tempfile.TemporaryDirectory() as folder:
            widen_fp8(directory, pathlib.Path(folder), stored["weight_block_size"])
            return load(pathlib.Path(folder), dtype)
    widen = dict(quantization_config=transformers.Mxfp4Config(dequantize=True)) if stored else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", dtype=dtype, **widen).eval()
    if model.config.model_type == "phimoe" and model.config.rope_parameters["rope_type"] == "longrope":
        take_long_factors(model.model.rotary_emb)
    if model.config.model_type == "deepseek_v2" and model.config.norm_topk_prob:
        for router in routers(model):
            router.register_forward_hook(normalise)
    return model


def normalise(module, inputs, output):
    """transformers 5.23 ignores norm_topk_prob of DeepSeek-V2; the model's own code divides by the sum."""
    logits, weights, selected = output
    return logits, weights / weights.sum(-1, keepdim=True), selected


def take_long_factors(rotary):
    """In sequences beyond the original length transformers 5.23 takes the long scale of Phi-3.5-MoE but leaves the
    short factors; the model's own code takes both long. Hands the length to transformers' function for the factors."""
    compute = rotary.rope_init_fn
    length = {}
    rotary.register_forward_pre_hook(
        lambda module, inputs, named: length.update(seq_len=int(named["position_ids"].max()) + 1), with_kwargs=True)
    rotary.rope_init_fn = lambda config: compute(config, **length)


def check(directory):
    """Runs a model directory in transformers and compares with logits.safetensors beside it; then generates."""
    expected = load_file(directory / "logits.safetensors")
    model = load(directory)
    logits, router_logits, _, _ = run(model, expected["tokens"])
    for name, ours, theirs in (("logits", expected["logits"], logits),
                               ("router_logits", expected["router_logits"], router_logits)):
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        print(f"{directory.name}, {name}: largest difference {error:.2e} of the largest value")
        assert error < 1e-4
    prompt = expected["generated"][None, :5]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None,
                               pad_token_id=0, max_length=expected["generated"].numel())[0]
    assert torch.equal(generated, expected["generated"]), (generated, expected["generated"])


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
    for index, (name, (family, settings, rope, spelling, num_tokens)) in enumerate(CASES.items()):
        directory = root / name
        directory.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(SEED + index)
        write_case(directory, name, family, settings, rope, spelling, num_tokens, generator)


if __name__ == "__main__":
    main()
