"""torch, transformers and TRL, run now, against the stored goldens and against this package."""

import jax
import numpy as np
import pytest
from goldens import ALL, goldens, responses
from interpreter import needs, run

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A folder of goldens made by the versions that are installed."""
    needs("torch", "trl", "peft")
    out = tmp_path_factory.mktemp("live") / "goldens"
    run("make_goldens.py", "--out", out)
    return out


@pytest.mark.parametrize("name", ALL)
def test_this_package_computes_what_torch_computes_now(live, name):
    golden = goldens(name, live)
    batch = golden.batch()
    logps = jax.jit(lambda params: golden.model.apply({"params": params}, batch)[0])
    for tag in ("base", "policy"):
        ours = responses(np.asarray(logps(getattr(golden, tag))), np.asarray(batch.responses.mask))
        theirs = golden.rows(golden.arrays[f"{tag}/per_token_logps"])
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_the_stored_goldens_are_what_torch_computes_now(live, name):
    stored, fresh = goldens(name), goldens(name, live)
    assert stored.arrays.keys() == fresh.arrays.keys()
    for key, value in stored.arrays.items():
        np.testing.assert_allclose(fresh.arrays[key], value, atol=1e-4, rtol=1e-4, err_msg=key)
    for loss, value in stored.numbers["loss"].items():
        assert fresh.numbers["loss"][loss] == pytest.approx(value, rel=1e-4)
    for key in ("loss", "margin", "grad_norm"):
        theirs = stored.numbers["trajectory"][key]
        assert fresh.numbers["trajectory"][key] == pytest.approx(theirs, rel=1e-3, abs=1e-6)
