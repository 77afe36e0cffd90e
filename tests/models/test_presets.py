"""The published models by name."""

from pathlib import Path

import numpy as np
import pytest
from jax.tree_util import tree_leaves

from mllm_align.errors import InputError
from mllm_align.models.bundle import abstract_params
from mllm_align.models.families.registry import FAMILIES, presets
from mllm_align.models.sources import config_of

PRESETS = presets()

# Parameters in billions, without the vision tower's last layer, which is not read.
BILLIONS = {
    "llava-1.5-7b": 7.05,
    "llava-1.5-13b": 13.34,
    "llava-1.6-7b": 7.05,
    "llava-1.6-mistral-7b": 7.55,
    "llava-1.6-13b": 13.34,
    "llava-1.6-34b": 34.74,
    "llava-onevision-0.5b": 0.894,
    "llava-onevision-7b": 8.03,
    "llava-onevision-72b": 73.2,
    "qwen2.5-vl-3b": 3.754622976,
    "qwen2.5-vl-7b": 8.292166656,
    "qwen2.5-vl-32b": 33.452718336,
    "qwen2.5-vl-72b": 73.410777344,
    "qwen3-vl-2b": 2.127532032,
    "qwen3-vl-4b": 4.437815808,
    "qwen3-vl-8b": 8.767123696,
    "qwen3-vl-32b": 33.357390064,
    "gemma-3-4b": 4.3,
    "gemma-3-12b": 12.19,
    "gemma-3-27b": 27.43,
    "internvl3-1b": 0.938,
    "internvl3-2b": 2.09,
    "internvl3-8b": 7.94,
    "internvl3-14b": 15.1,
    "internvl3-38b": 38.4,
    "internvl3-78b": 78.4,
    "internvl3.5-1b": 1.06,
    "internvl3.5-2b": 2.35,
    "internvl3.5-4b": 4.73,
    "internvl3.5-8b": 8.53,
    "internvl3.5-14b": 15.1,
    "internvl3.5-38b": 38.4,
    "smolvlm-256m": 0.256,
    "smolvlm-500m": 0.507,
    "smolvlm-2.2b": 2.25,
    "idefics3-8b": 8.46,
}


SLOW = {"qwen2.5-vl-7b", "qwen2.5-vl-32b", "qwen2.5-vl-72b"}  # a tower of eight stacks takes a second
SLOW |= {name for name in PRESETS if name.startswith("internvl")} - {"internvl3-1b", "internvl3-38b"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PRESETS]
)
def test_as_many_parameters_as_published(name):
    leaves = tree_leaves(abstract_params(PRESETS[name]))
    assert sum(np.prod(leaf.shape) for leaf in leaves) / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


def test_heads_make_up_the_width_of_attention():
    """But for Qwen3 and Gemma 3, whose heads have a size of their own."""
    for config in PRESETS.values():
        d = config.decoder
        assert d.heads % d.kv_heads == 0 and (d.qk_norm or d.heads * d.head_dim == d.hidden)


def test_unknown_name(tmp_path):
    with pytest.raises(InputError, match=r"'llava-7b' is no folder and none of llava-1\.5-7b"):
        config_of("llava-7b")
    with pytest.raises(InputError, match="no Hugging Face model folder"):
        config_of(tmp_path)


def test_the_readme_has_a_row_for_every_family():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2:-1] for line in readme.splitlines() if "| `" in line and "splash" in line]
    assert [row[0].strip(" `") for row in rows] == list(FAMILIES)
    assert all(cell.strip() for row in rows for cell in row)
