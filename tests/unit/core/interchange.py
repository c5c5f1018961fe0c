"""The other side of the interchange tests: reads what Hestia wrote with h5py and safetensors, writes what Hestia reads.

Usage: interchange.py check FOLDER | write FOLDER
"""

import pathlib
import sys

import h5py
import numpy as np
import safetensors.numpy


def check(folder: pathlib.Path) -> None:
    tensors = safetensors.numpy.load_file(folder / "hestia.safetensors")
    assert sorted(tensors) == ["a.float", "b.half", "c.int", "d.empty", "e.scalar"], sorted(tensors)
    assert tensors["a.float"].dtype == np.float32 and tensors["a.float"].shape == (2, 3)
    assert np.array_equal(tensors["a.float"].ravel(), np.arange(6, dtype=np.float32) * 0.5 - 1)
    assert tensors["b.half"].dtype == np.float16 and tensors["b.half"].tolist() == [1.0, -2.0, 0.5]
    assert tensors["c.int"].dtype == np.int64 and tensors["c.int"].tolist() == [[-7], [2**62]]
    assert tensors["d.empty"].shape == (0, 4)
    assert tensors["e.scalar"].shape == () and tensors["e.scalar"].item() == 9
    with safetensors.safe_open(folder / "hestia.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "note": "caf\u00e9"}, file.metadata()

    with h5py.File(folder / "hestia.h5") as file:
        assert file.attrs["format"] == "caf\u00e9" and file.attrs["format_version"] == 3
        assert file["/routers/tuned"].attrs["layers"].tolist() == [0, 2, 5]
        assert [text.decode() for text in file["/sequences/task"]] == ["gsm8k", "", "\u4e2d"]
        count = file["/routers/tuned/count"]
        assert count.dtype == np.uint16 and count.shape == (40, 6, 32) and count.compression == "gzip"
        assert np.array_equal(count[...].ravel(), np.arange(40 * 6 * 32, dtype=np.uint32).astype(np.uint16))
        mean = file["/routers/tuned/mean_probability"]
        assert mean.dtype == np.float16 and mean[...].tolist() == [0.25, -1.5, 65504.0]


def write(folder: pathlib.Path) -> None:
    generator = np.random.default_rng(3)
    safetensors.numpy.save_file(
        {
            "w": np.arange(12, dtype=np.float32).reshape(3, 4),
            "b": np.array([True, False, True]),
            "ids": generator.integers(0, 2**31, (5,), dtype=np.int32),
            "none": np.zeros((3, 0), dtype=np.float64),
        },
        folder / "python.safetensors",
        metadata={"framework": "numpy"},
    )
    with h5py.File(folder / "python.h5", "w") as file:
        file["/a/half"] = np.array([0.5, 2.0, -3.25], dtype=np.float16)
        file["/a/packed"] = np.arange(5000, dtype=np.int32)
        file.create_dataset("/a/gzip", data=np.arange(5000, dtype=np.uint8), chunks=(100,), compression="gzip")
        file["/a/big_endian"] = np.array([1, 258], dtype=">i4")
        file["/a/text"] = ["one", "caf\u00e9"]
        file.create_dataset("/a/ascii", data=[b"x", b"yz"], dtype=h5py.string_dtype("ascii"))
        file.attrs["name"] = "model"
        file.attrs["layers"] = [1, 2, 3]
        file.attrs["small"] = np.int16(-4)


if __name__ == "__main__":
    {"check": check, "write": write}[sys.argv[1]](pathlib.Path(sys.argv[2]))
