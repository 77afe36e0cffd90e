"""The paper's findings as claims about the study's rows, and the rule by which they are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mllm_align.evaluation.intervals import Interval
from scenes_study.rows import Rows, difference, over_pictures, unit

Verdict = Literal["holds", "contradicted", "cannot be told"]
MARGIN = 0.02  # of "not worse"


@dataclass(frozen=True)
class Claim:
    """`one` has a lower figure than `other`, or a higher one; not_worse: or is off by less than MARGIN."""

    one: str
    other: str
    figure: str = "chair_i"
    split: str = "broken"
    higher: bool = False
    not_worse: bool = False

    @property
    def words(self) -> str:
        how = "higher than" if self.higher else "lower than"
        how = "not worse than" if self.not_worse else how
        names = {"chair_i": "CHAIR_i", "details": "wrong details", "visual_margin": "visual margin"}
        name = names.get(self.figure, self.figure)
        where = "" if self.split == "broken" else f" ({self.split})"
        return f"{name}{where}: `{self.one}` {how} `{self.other}`"


@dataclass(frozen=True)
class Finding:
    """words: the paper's. meant: how it is meant on Scenes. One without claims is decided by `misleads`."""

    words: str
    meant: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Judged:
    """A claim, the difference over seeds and over pictures, and what follows from the first. unit: what
    both are multiplied by to be shown."""

    words: str
    unit: float
    over: Interval
    pictures: Interval | None
    verdict: Verdict


def _kept(name: str) -> tuple[Claim, ...]:
    """Open-ended quality is no worse than before."""
    recall = Claim(name, "sft", "recall", higher=True, not_worse=True)
    return recall, Claim(name, "sft", "details", not_worse=True)


FINDINGS = (
    Finding(
        "Offline DPO lowers hallucination most; online-DPO keeps open-ended quality; mixed-DPO gets both",
        "The oracle stands for the larger judge. Open-ended quality, which the paper has other models "
        "judge, is kept if neither recall nor details (colour, size, place, relation) get worse than "
        "SFT's: either alone can be had by saying more, or less.",
        (
            Claim("dpo_corrupted", "sft"),
            Claim("dpo_corrupted", "online_dpo_oracle"),
            Claim("mixed_dpo_oracle", "online_dpo_oracle"),
            *_kept("online_dpo_oracle"),
            *_kept("mixed_dpo_oracle"),
        ),
    ),
    Finding(
        "BDHS needs no annotator and no second model, and matches GPT-4V-made rejected responses",
        "Corrupted captions, made with the truth at hand, stand for GPT-4V's.",
        (
            Claim("bdhs_attn_0.99", "sft"),
            Claim("bdhs_attn_0.99", "sft_control"),
            Claim("bdhs_attn_0.99", "dpo_corrupted", not_worse=True),
        ),
    ),
    Finding(
        "Attention masking beats image noise; guidance beats free generation; both beat POVID-style",
        "The same methods as the paper's.",
        (
            Claim("bdhs_attn_0.99", "bdhs_noise"),
            Claim("bdhs_attn_0.99", "bdhs_unguided"),
            Claim("bdhs_attn_0.99", "povid_style"),
            Claim("bdhs_noise", "povid_style"),
        ),
    ),
    Finding(
        "Online BDHS beats offline BDHS on hallucination",
        "The same methods as the paper's.",
        (Claim("bdhs_online", "bdhs_attn_0.99"),),
    ),
    Finding(
        "Small, controlled data sets do most of the work; rejected responses that differ little teach most",
        "Only the second half is tested: the number of captions is the same everywhere. How many words "
        "corrupted captions, guided and unguided BDHS change stands under `What BDHS wrote`.",
        (Claim("dpo_corrupted", "bdhs_unguided"), Claim("bdhs_attn_0.99", "bdhs_unguided")),
    ),
    Finding(
        "CHAIR without recall misleads: always report recall beside it",
        "Reproduced if some variant has both a lower CHAIR_i and a lower recall than SFT; not reproduced "
        "if every variant with a lower CHAIR_i has a higher recall.",
        (),
    ),
)

# Of rewards: the paper's own words first, then what the testbed's exact reward lets us ask.
LEARNED = (
    Finding(
        "A reward model trained on POVID collapses the policy",
        "POVID's rejected responses are corrupted captions. Collapse: more hallucination and less recall "
        "than SFT's.",
        (
            Claim("rloo_reward", "sft", higher=True),
            Claim("rloo_reward", "sft", "recall"),
        ),
    ),
    Finding(
        "Policy gradients against a reward model do not beat DPO",
        "Both learn from corrupted captions of the same seed.",
        (Claim("dpo_corrupted", "rloo_reward", not_worse=True),),
    ),
    Finding(
        "With an exact reward of what is wrong and missing, RLOO lowers CHAIR_i and keeps recall",
        "The oracle's F1, on prompts about pictures without the language bias.",
        (
            Claim("rloo_f1_unbiased", "sft"),
            Claim("rloo_f1_unbiased", "sft", "recall", higher=True, not_worse=True),
        ),
    ),
    Finding(
        "RLOO learns from rewards alone what SFT learns from the true captions of the same pictures",
        "Pictures without the bias; RLOO has their prompts, and never sees a caption.",
        (
            Claim("rloo_f1_unbiased", "sft_unbiased", not_worse=True),
            Claim("rloo_f1_unbiased", "sft_unbiased", "recall", higher=True, not_worse=True),
        ),
    ),
    Finding(
        "An exact reward can't remove a bias that the pictures of the prompts share",
        "On biased pictures the usual partner is mostly there, and naming it is rewarded.",
        (
            Claim("rloo_f1_unbiased", "rloo_f1"),
            Claim("rloo_f1_unbiased", "rloo_f1", "expected_share"),
        ),
    ),
    Finding(
        "On the same biased pictures RLOO and PPO with an exact reward lower CHAIR_i and keep recall",
        "The oracle's F1; a sample a prompt for PPO, four for RLOO.",
        (
            Claim("rloo_f1", "sft"),
            Claim("rloo_f1", "sft", "recall", higher=True, not_worse=True),
            Claim("ppo_f1", "sft"),
            Claim("ppo_f1", "sft", "recall", higher=True, not_worse=True),
        ),
    ),
    Finding(
        "A judge that ranks by errors teaches to say less; one that ranks by F1 does not",
        "Online-DPO with the oracle's two orders.",
        (
            Claim("online_dpo_oracle", "sft", "recall"),
            Claim("online_dpo_f1", "sft"),
            Claim("online_dpo_f1", "sft", "recall", higher=True, not_worse=True),
        ),
    ),
)


def judge_claim(rows: Rows, claim: Claim) -> Judged:
    one, other = rows.get(claim.one, {}), rows.get(claim.other, {})
    over = difference(one, other, claim.figure, claim.split)
    pictures = over_pictures(one, other, claim.figure, claim.split)
    return Judged(claim.words, unit(claim.figure), over, pictures, _decide(over, claim))


def _decide(over: Interval, claim: Claim) -> Verdict:
    """Comparisons with nan, where there are fewer than two seeds, are false."""
    low, high = (-over.high, -over.low) if claim.higher else (over.low, over.high)
    limit = MARGIN if claim.not_worse else 0.0
    if high < limit:
        return "holds"
    return "contradicted" if low > limit else "cannot be told"


def judge_finding(rows: Rows, finding: Finding) -> tuple[str, list[Judged]]:
    """The finding's verdict and its claims, judged."""
    if not finding.claims:
        return misleads(rows)
    judged = [judge_claim(rows, claim) for claim in finding.claims]
    found = [each.verdict for each in judged]
    if "contradicted" in found:
        return "not reproduced", judged
    return ("reproduced" if set(found) == {"holds"} else "cannot be told"), judged


def misleads(rows: Rows) -> tuple[str, list[Judged]]:
    """Whether a lower CHAIR_i came with a lower recall, against SFT; the variants with a lower CHAIR_i."""
    shown, recalls = [], []
    for name in rows:
        chair = judge_claim(rows, Claim(name, "sft"))
        if name != "sft" and chair.verdict == "holds":
            lower = judge_claim(rows, Claim(name, "sft", "recall"))
            shown += [chair, lower]
            recalls.append(lower.verdict)
    if "holds" in recalls:
        return "reproduced", shown
    same = recalls and set(recalls) == {"contradicted"}
    return ("not reproduced" if same else "cannot be told"), shown
