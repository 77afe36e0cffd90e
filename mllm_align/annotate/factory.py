"""The annotator that a config names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mllm_align import config as settings
from mllm_align.annotate.judge import judge
from mllm_align.annotate.verdict import Annotator
from mllm_align.data.records import Record
from mllm_align.models.bundle import Bundle
from mllm_align.registry import load_part


def open_annotator(
    config: settings.Annotator,
    base: Bundle | None,
    folder: Path | None,
    data: settings.DataConfig | None = None,
    what: str | None = None,
    records: Sequence[Record] = (),
) -> Annotator:
    """base: the policy's, asked without what a run has trained; None where the annotator is another.
    folder: where answers of an endpoint are kept. data: of the run; its chat template is the base's.
    what: name of a progress bar for what is asked on the devices. records: whose responses will be
    asked about, as far as that is known. Raises InputError for a config that can't be followed.
    """
    if isinstance(config, settings.JudgeModel):
        return judge(config, base, data, what)
    if isinstance(config, settings.SceneQuestions):
        return load_part("mllm_align.testbed.annotators:SelfQuestions", "annotator")(
            config, base, data, what
        )
    if isinstance(config, settings.SceneOracle):
        return load_part("mllm_align.testbed.annotators:Oracle", "annotator")(config, records)
    if isinstance(config, settings.Scorer):
        from mllm_align.annotate.scorer import ScorerHook

        return ScorerHook(config)
    import jax

    from mllm_align.annotate.endpoint import endpoint

    return endpoint(config, folder, jax.process_index())
