"""Reads a preference file with h5py and checks it against what the C++ test expects: FILE EXPECTED_JSON."""
import json
import sys

import h5py
import numpy as np

f = h5py.File(sys.argv[1], "r")
with open(sys.argv[2]) as text:
    expected = json.load(text)
assert f.attrs["format"] == "hestia preferences" and f.attrs["format_version"] == 1, dict(f.attrs)
assert f.attrs["producer"] == "hestia"
layers, experts, top_k = len(expected["layers"]), int(f.attrs["num_experts"]), 2
assert list(f.attrs["layers"]) == expected["layers"] and f.attrs["num_sequences_total"] == 40 and f.attrs["max_sequences"] == 17
ids = f["/sequences/id"][:]
assert ids.dtype == np.int64 and ids.tolist() == expected["ids"]
tasks = f["/sequences/task"].asstr()[:]
assert all(t == ("prose" if i % 2 == 0 else "code \u00e9") for t, i in zip(tasks, ids)), tasks
prompt, tokens = f["/sequences/num_prompt_tokens"][:], f["/sequences/num_tokens"][:]
assert prompt.dtype == np.int64 and tokens.dtype == np.int64
shape = (len(ids), layers, experts)
for router in ("baseline", "tuned"):
    g = f["/routers/" + router]
    for name, dtype in (("count", np.uint16), ("mean_probability", np.float16), ("prompt_count", np.uint16)):
        assert g[name].dtype == dtype and g[name].shape == shape, (name, g[name])
        assert g[name].chunks is not None and g[name].compression == "gzip" and g[name].maxshape == (None,) + shape[1:]
    assert (g["count"][:].reshape(len(ids), -1) == np.array(expected[router]["count"])).all()
    assert (g["prompt_count"][:].reshape(len(ids), -1) == np.array(expected[router]["prompt_count"])).all()
    assert (g["count"][:].sum(-1) == top_k * (tokens - prompt)[:, None]).all()
    assert (g["prompt_count"][:].sum(-1) == top_k * prompt[:, None]).all()
    assert np.allclose(g["mean_probability"][:].astype(np.float64).sum(-1), 1, atol=2e-3)
    a = g["aggregate"]
    assert a["count"].dtype == np.int64 and a["count"].shape == (layers, experts)
    assert a["mean_probability"].dtype == np.float64 and np.allclose(a["mean_probability"][:].sum(-1), 1, atol=1e-6)
    assert a["coactivation"].shape == a["transition"].shape == (layers, experts, experts)
    assert (np.diagonal(a["coactivation"][:], axis1=1, axis2=2) == a["count"][:]).all()
    assert (a["coactivation"][:] == a["coactivation"][:].transpose(0, 2, 1)).all()
    assert a["transition"][:].sum() > 0
    assert (a["count"][:].sum() > g["count"][:].sum())  # the aggregate covers what the reservoir passed by
if "predictor" in f:
    p = f["predictor"]
    hidden, size = p["hidden_weight"].shape
    assert p["hidden_weight"].dtype == np.float32 and p["output_weight"].shape == (layers, experts, hidden)
    assert p["hidden_bias"].shape == (hidden,) and p["output_bias"].shape == (layers, experts)
    assert np.array_equal(p["hidden_weight"][:].ravel(), np.array(expected["predictor"]["hidden_weight"], np.float32))
    assert np.array_equal(p["output_bias"][:].ravel(), np.array(expected["predictor"]["output_bias"], np.float32))
    assert p.attrs["activation"] == "relu" and p.attrs["best_by_requests"] == "predictor"
    assert list(p["report/method"].asstr()) == ["predictor", "mean_popularity"]
    assert p["report/request_recall"].shape == (2, len(p["report/slots"]))
else:
    assert sys.argv[1].endswith("preferences.h5")
