"""The quickstart in small: all of its phases within a minute."""

from mllm_align.testbed.quickstart.phases import Recipe
from mllm_align.testbed.scenes.world import Settings

PICTURES = 40
SIZES = ("train", "held_out", "unbiased", "broken", "lessons")
MINIATURE = Recipe(
    scenes=Settings(bias=0.8, grain=10.0, fog=0.2, **dict.fromkeys(SIZES, PICTURES)),
    batch=8,
    seeing=(1, 1, 1, 2),
    sft=6,
    dpo=4,
    pairs=16,
)
