"""Settings of responses made while training: what is taken, what is refused and in which words."""

import pytest
from refusals import refusal

from mllm_align import JudgeModel, SceneOracle
from mllm_align.config import ONLINE, Distorted, MeshConfig, OnlineBDHS, OnlinePairs, SamplingConfig


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: OnlinePairs(samples=1), "online.samples is 1; it must be 2 or more"),
        (lambda: OnlinePairs(samples=1025), "online.samples is 1025; it must be from 2 to 1024"),
        (lambda: OnlinePairs(offline_share=1.0), "online.offline_share is 1.0; it must be at least 0 and"),
        (lambda: OnlinePairs(offline_share=-0.1), "online.offline_share is -0.1"),
        (lambda: OnlinePairs(offline_share=float("nan")), "online.offline_share is nan"),
        (
            lambda: OnlinePairs(sampling=SamplingConfig(temperature=0)),
            "online.sampling.temperature is 0; it must be above 0: samples differ",
        ),
        (lambda: OnlinePairs(annotator="oracle"), "online.annotator is 'oracle'"),
        (lambda: OnlinePairs(mesh=4), "online.mesh is 4"),
        (lambda: Distorted(noise_steps=0), "online.noise_steps is 0; it must be from 1 to 1000"),
        (lambda: Distorted(noise_steps=1001), "online.noise_steps is 1001"),
        (lambda: OnlineBDHS(mask_rate=2), "mask_rate is 2; it must be from 0 to 1"),
        (lambda: OnlineBDHS(mesh="all"), "mesh is 'all'"),
    ],
)
def test_values_are_checked_where_they_are_given(make, said):
    assert said in refusal(make)


def test_what_it_starts_from():
    pairs = OnlinePairs()
    assert (pairs.samples, pairs.offline_share, pairs.stale, pairs.mesh) == (2, 0.0, False, None)
    assert isinstance(pairs.annotator, JudgeModel) and pairs.sampling.temperature == 1.0
    assert set(ONLINE) == {"pairs", "bdhs", "distorted", "rewards"}


def test_the_ends_of_what_is_taken():
    OnlinePairs(annotator=SceneOracle(), samples=1024, offline_share=0.999, mesh=MeshConfig(tensor=4))
    Distorted(noise_steps=1)
    Distorted(noise_steps=1000)
