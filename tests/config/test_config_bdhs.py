"""Settings of BDHS: what is taken, what is refused and in which words."""

import pytest
from refusals import refusal

from mllm_align.config import BDHSConfig, BDHSMethod, SamplingConfig

NAN = float("nan")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: BDHSConfig(distortion="blur"), "distortion is 'blur'; it must be one of attention, noise"),
        (lambda: BDHSConfig(mask_rate=1.01), "mask_rate is 1.01; it must be from 0 to 1"),
        (lambda: BDHSConfig(mask_rate=NAN), "mask_rate is nan"),
        (lambda: BDHSConfig(noise_steps=0), "noise_steps is 0; it must be from 1 to 1000"),
        (lambda: BDHSConfig(noise_steps=1001), "noise_steps is 1001; it must be from 1 to 1000"),
        (lambda: BDHSConfig(iterations=0), "iterations is 0; it must be 1 or more"),
        (lambda: BDHSConfig(sentence_tokens=0), "sentence_tokens"),
        (lambda: BDHSConfig(similarity=""), "similarity is ''; it must be a name or a folder"),
        (lambda: BDHSConfig(threshold=NAN), "threshold is nan; it must be a finite number"),
        (lambda: BDHSConfig(sampling={"top_k": 1}), "sampling is {'top_k': 1}"),
        (lambda: BDHSConfig(guided=1), "guided is 1; it must be of type bool"),
        (lambda: BDHSConfig(batch_size=65537), "batch_size is 65537; it must be from 1 to 65536"),
        (lambda: BDHSConfig(seed=-1), "seed is -1"),
    ],
)
def test_values_are_checked_where_they_are_given(make, said):
    assert said in refusal(make)


def test_the_ends_of_what_is_taken():
    for rate in (0, 1):
        BDHSMethod(mask_rate=rate)
    for steps in (1, 1000):
        BDHSMethod(noise_steps=steps)
    BDHSMethod(threshold=-1000, iterations=1000, sampling=SamplingConfig(temperature=0))


def test_a_job_starts_from_the_methods_settings():
    """As the paper gives them (arXiv 2407.02477): rho_th 0.99, five tries, guided."""
    method, job = BDHSMethod(), BDHSConfig()
    assert (method.mask_rate, method.iterations, method.guided) == (0.99, 5, True)
    assert {name: getattr(job, name) for name in vars(method)} == vars(method)
