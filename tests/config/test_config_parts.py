"""Settings that several verbs share: what is taken, what is refused and in which words."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from refusals import refusal

from mllm_align.config import (
    LORA_TARGETS,
    DataConfig,
    DistributedConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    SamplingConfig,
)
from mllm_align.errors import InputError
from mllm_align.registry import load_part

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: OptimConfig(learning_rate="1e-6"), "optim.learning_rate is '1e-6'"),
        (lambda: OptimConfig(learning_rate=NAN), "optim.learning_rate is nan"),
        (lambda: OptimConfig(projector_learning_rate=-1.0), "optim.projector_learning_rate is -1.0"),
        (lambda: OptimConfig(projector_learning_rate=INF), "optim.projector_learning_rate"),
        (lambda: OptimConfig(schedule="cosin"), "one of constant, linear, cosine"),
        (lambda: OptimConfig(warmup=1.0), "optim.warmup"),
        (lambda: OptimConfig(weight_decay=-0.1), "optim.weight_decay is -0.1; it must be 0 or more"),
        (lambda: OptimConfig(clip=0.0), "optim.clip"),
        (lambda: OptimConfig(b1=-0.1), "optim.b1 is -0.1; it must be at least 0 and below 1"),
        (lambda: OptimConfig(b2=1.0), "optim.b2"),
        (lambda: LoraConfig(rank=0), "lora.rank"),
        (lambda: LoraConfig(alpha=INF), "lora.alpha"),
        (lambda: LoraConfig(alpha=0.0), "lora.alpha is 0.0; it must be above 0"),
        (lambda: LoraConfig(targets=()), "lora.targets"),
        (lambda: LoraConfig(targets=("q", "q")), "lora.targets"),
        (lambda: LoraConfig(targets=("query",)), "some of q, k, v"),
        (lambda: DataConfig(format="csv"), "data.format is 'csv'; it must be one of auto, trl"),
        (lambda: DataConfig(pairs="some"), "data.pairs is 'some'; it must be one of best-worst, all"),
        (lambda: DataConfig(shapes=0), "data.shapes"),
        (lambda: DataConfig(multiple=8193), "data.multiple is 8193; it must be from 1 to 8192"),
        (lambda: DataConfig(threads=1025), "data.threads is 1025; it must be from 1 to 1024"),
        (lambda: DataConfig(max_length=1), "data.max_length"),
        (lambda: DataConfig(image_root=3), "data.image_root"),
        (lambda: DataConfig(image_root=("a", 3)), "data.image_root"),
        (lambda: MeshConfig(data=0), "mesh"),
        (lambda: MeshConfig(tensor=-2), "mesh"),
        (lambda: MeshConfig(data=-1, fsdp=-1), "one -1 at most"),
        (lambda: MeshConfig(slices=0), "mesh.slices is 0; it must be 1 or more"),
        (lambda: DistributedConfig(heartbeat_seconds=4), "distributed.heartbeat_seconds is 4"),
        (lambda: DistributedConfig(shutdown_seconds=86401), "it must be from 5 to 86400"),
        (lambda: SamplingConfig(temperature=-0.1), "sampling.temperature is -0.1; it must be 0 or more"),
        (lambda: SamplingConfig(temperature=NAN), "sampling.temperature is nan"),
        (lambda: SamplingConfig(temperature=INF), "sampling.temperature is inf"),
        (lambda: SamplingConfig(top_k=0), "sampling.top_k is 0; it must be 1 or more"),
        (lambda: SamplingConfig(top_k=2.0), "sampling.top_k is 2.0; it must be of type int"),
        (lambda: SamplingConfig(top_p=0), "sampling.top_p is 0; it must be above 0 and at most 1"),
        (lambda: SamplingConfig(top_p=1.1), "sampling.top_p"),
        (lambda: SamplingConfig(max_tokens=0), "sampling.max_tokens"),
    ],
)
def test_values_are_checked_where_they_are_given(make, said):
    assert said in refusal(make)


def test_whole_numbers_are_rates():
    assert OptimConfig(learning_rate=1, clip=2).learning_rate == 1


@pytest.mark.parametrize(
    "given, taken",
    [
        (None, ()),
        ("a", (Path("a"),)),
        (Path("a"), (Path("a"),)),
        (["a", Path("b")], (Path("a"), Path("b"))),
        ((), ()),
    ],
)
def test_folders_of_images_are_a_tuple_of_paths(given, taken):
    assert DataConfig(image_root=given).image_root == taken


def test_a_template_is_a_path():
    assert DataConfig(chat_template="t.jinja").chat_template == Path("t.jinja")


def test_what_reading_needs():
    config = DataConfig(format="trl", split="train", image_root="a", allow_outside=True, pairs="all")
    assert config.reading() == {
        "format": "trl",
        "split": "train",
        "max_records": None,
        "pairs": "all",
        "image_root": (Path("a"),),
        "allow_outside": True,
    }


def test_the_scale_of_the_low_rank_term():
    assert LoraConfig().scale == 2.0 and LoraConfig(rank=8, alpha=4).scale == 0.5
    assert set(LORA_TARGETS) == {"q", "k", "v", "o", "gate", "up", "down"}


def test_the_ends_of_what_is_taken():
    SamplingConfig(temperature=0, top_k=1, top_p=1, max_tokens=65536)
    OptimConfig(learning_rate=0, warmup=0, b1=0, b2=0, eps=0, projector_learning_rate=0)
    MeshConfig(data=1, fsdp=-1, tensor=2, slices=4)
    DataConfig(shapes=1, threads=1024, multiple=8192, max_length=2)
    DistributedConfig(heartbeat_seconds=5, shutdown_seconds=86400)


# ---- a reader as a function ----------------------------------------------------------------------------


def top_level(row):
    return row


def test_a_reader_may_be_a_function():
    config = DataConfig(format=top_level)  # type: ignore[arg-type]
    assert config.format == f"{__name__}:top_level"
    assert load_part(config.format, "reader") is top_level


def test_a_reader_of_a_notebook_is_found_in_it(monkeypatch):
    main = ModuleType("__main__")
    exec("def read(row):\n    return row\n", vars(main))
    monkeypatch.setitem(sys.modules, "__main__", main)
    config = DataConfig(format=main.read)
    assert config.format == "__main__:read" and load_part(config.format, "reader") is main.read


def test_a_reader_that_no_name_finds_is_refused():
    def reader(row):
        return row

    with pytest.raises(InputError, match="is no function at the top of a file or notebook"):
        DataConfig(format=reader)
