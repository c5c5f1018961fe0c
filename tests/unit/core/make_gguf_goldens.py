"""Writes the goldens of the GGUF reader: a small file by the gguf package's own writer, and its dequantised values.

    python3 -m venv VENV && VENV/bin/pip install gguf==0.19.0 safetensors==0.8.0
    VENV/bin/python tests/unit/core/make_gguf_goldens.py          # writes tests/unit/core/goldens/

python.gguf has metadata of every kind and random blocks of every type that Hestia dequantises (and of one that it does
not); gguf_values.safetensors has what the package makes of those blocks.
"""

import pathlib

import gguf
import numpy as np
from safetensors.numpy import save_file

SEED = 20261126
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q6_K"]
SHAPE = (3, 64)  # rows, columns
K_SHAPE = (2, 256)


def random_blocks(kind, shape, generator):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind == gguf.GGMLQuantizationType.F32:
        return generator.standard_normal(shape).astype(np.float32)
    if kind == gguf.GGMLQuantizationType.F16:
        return (8 * generator.standard_normal(shape)).astype(np.float16)
    count = shape[0] * shape[1] // block
    blocks = generator.integers(0, 256, (count, size), dtype=np.uint8)
    if kind == gguf.GGMLQuantizationType.BF16:  # exponents of ordinary numbers
        blocks[:, 1] = generator.choice([0x3F, 0xBF, 0x40, 0xC0, 0x3C], count)
    else:  # scale (and minimum): ordinary halves
        for first in range(0, {"Q4_1": 4}.get(kind.name, 2), 2):
            scales = generator.standard_normal(count).astype(np.float16)
            blocks[:, first:first + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def main():
    generator = np.random.default_rng(SEED)
    folder = pathlib.Path(__file__).resolve().parent / "goldens"
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "python.gguf", "llama")
    writer.add_custom_alignment(64)
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"golden.uint{bits}", 2**bits - 1 if bits < 64 else 2**62 + 1)
        getattr(writer, f"add_int{bits}")(f"golden.int{bits}", -(2 ** (bits - 1)))
    writer.add_float32("golden.float32", 0.1)
    writer.add_float64("golden.float64", 0.1)
    writer.add_bool("golden.yes", True)
    writer.add_bool("golden.no", False)
    writer.add_string("golden.text", "caf\u00e9 \u4e2d")
    writer.add_array("golden.ints", [1, -2, 3])
    writer.add_array("golden.floats", [0.5, -0.25])
    writer.add_array("golden.texts", ["a", "", "\u4e2d b"])
    values = {}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        blocks = random_blocks(kind, K_SHAPE if name.endswith("_K") else SHAPE, generator)
        writer.add_tensor(f"t.{name}", blocks, raw_dtype=kind)
        if not name.endswith("_K"):
            raw = blocks.view(np.uint8) if name in ("F32", "F16") else blocks
            values[f"t.{name}"] = np.ascontiguousarray(gguf.dequantize(raw, kind), dtype=np.float32).reshape(SHAPE)
            assert np.isfinite(values[f"t.{name}"]).all(), name
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(values, folder / "gguf_values.safetensors", metadata={"gguf": "0.19.0"})


if __name__ == "__main__":
    main()
