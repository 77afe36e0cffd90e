"""`mllm-align configs`."""

from mllm_align.config import named_configs


def test_every_config_has_a_line_with_its_verb(run):
    status, out, err = run("configs")
    lines = {line.split()[0]: line for line in out.split("\n\n")[0].splitlines()}
    assert (status, err) == (0, "") and list(lines) == list(named_configs())
    assert lines["dpo_llava16_7b"].split(maxsplit=2)[1:] == [
        "train",
        "DPO with LoRA on LLaVA 1.6-7B, with settings that arXiv 2407.02477 (section 6) searched.",
    ]
    assert lines["bdhs"].split()[1] == "bdhs" and lines["judge"].split()[1] == "judge"
    assert str(named_configs()["bdhs"].parent) in out
