"""The texts of the study's page, and the order of its tables."""

TITLES = {
    "sft": "SFT",
    "sft_control": "SFT, 120 steps longer",
    "sft_unbiased": "SFT, 120 steps longer, pictures without the bias",
    "dpo_corrupted": "DPO, corrupted captions",
    "online_dpo_oracle": "Online-DPO, oracle",
    "online_dpo_self": "Online-DPO, self judge",
    "online_dpo_f1": "Online-DPO, oracle's F1",
    "mixed_dpo_oracle": "Mixed-DPO, oracle",
    "mixed_dpo_self": "Mixed-DPO, self judge",
    "rloo_f1": "RLOO, oracle's F1",
    "rloo_f1_unbiased": "RLOO, oracle's F1, pictures without the bias",
    "rloo_reward": "RLOO, reward model of corrupted captions",
    "ppo_f1": "PPO, oracle's F1",
    "bdhs_attn_0.99": "BDHS offline, attention, rho_th 0.99",
    "bdhs_attn_0.9": "BDHS offline, attention, rho_th 0.9",
    "bdhs_attn_0.5": "BDHS offline, attention, rho_th 0.5",
    "bdhs_attn_0": "BDHS offline, attention, rho_th 0",
    "bdhs_noise": "BDHS offline, noise",
    "bdhs_unguided": "BDHS offline, unguided, rho_th 0.99",
    "bdhs_online": "BDHS online, attention, rho_th 0.99",
    "povid_style": "POVID-style distortion",
    "averaged_povid": "Averaged: corrupted and POVID-style",
    "averaged_bdhs_online": "Averaged: corrupted and BDHS online",
}
# Heading -> (figure, split) of a column, in percent but for words.
COLUMNS = {
    "CHAIR_i": ("chair_i", "broken"),
    "CHAIR_s": ("chair_s", "broken"),
    "recall": ("recall", "broken"),
    "expected": ("expected_share", "broken"),
    "attribute": ("attribute_error", "broken"),
    "place": ("place_error", "broken"),
    "relation": ("relation_error", "broken"),
    "details": ("details", "broken"),
    "POPE": ("pope", "broken"),
    "unbiased CHAIR_i": ("chair_i", "unbiased"),
    "unbiased recall": ("recall", "unbiased"),
    "unbiased details": ("details", "unbiased"),
    "words": ("words", "broken"),
}
# Those that not every study's rows have.
OWN_COLUMNS = {"visual": ("visual", "held_out"), "visual margin": ("visual_margin", "held_out")}
BRIEF = ("POPE", "CHAIR_i", "CHAIR_s", "recall", "details", "unbiased CHAIR_i", "unbiased recall", "words")
PAPERS = (
    (
        "Offline, online and mixed (the paper's Table 2)",
        "The self judge's rows are there only for seeds where it can be told from chance.\n\n",
        (
            "sft",
            "sft_control",
            "dpo_corrupted",
            "online_dpo_oracle",
            "mixed_dpo_oracle",
            "online_dpo_self",
            "mixed_dpo_self",
        ),
    ),
    (
        "Rewards and policy gradients (the RLOO and PPO rows of the paper's tables)",
        "",
        (
            "sft",
            "sft_unbiased",
            "dpo_corrupted",
            "online_dpo_oracle",
            "mixed_dpo_oracle",
            "online_dpo_f1",
            "rloo_f1",
            "rloo_f1_unbiased",
            "ppo_f1",
            "rloo_reward",
        ),
    ),
    (
        "BDHS against other rejected responses (Table 6)",
        "`dpo_corrupted` stands for rejected responses that GPT-4V wrote.\n\n",
        (
            "sft",
            "dpo_corrupted",
            "povid_style",
            "bdhs_noise",
            "bdhs_unguided",
            "bdhs_attn_0",
            "bdhs_attn_0.5",
            "bdhs_attn_0.9",
            "bdhs_attn_0.99",
        ),
    ),
    (
        "BDHS online and offline (Table 9)",
        "",
        ("sft", "povid_style", "bdhs_noise", "bdhs_attn_0.99", "bdhs_online"),
    ),
    (
        "Two rejected responses, averaged (Table 15)",
        "",
        ("sft", "dpo_corrupted", "averaged_povid", "averaged_bdhs_online", "povid_style", "bdhs_online"),
    ),
)

HOW = """## How it was made

    python benchmarks/study.py --work DIR --seeds 0 1 2

On 2 CPU cores. {hours}
Each row, one variant of one seed, is a file in `benchmarks/results/study`; rows that are there are not made
again, and the command says beforehand how long the others will take.

- **Testbed**: [Scenes](scenes.md), 4,000 training pictures. A small LLaVA 1.6 learns to see and to speak
  from scratch, then SFT. All seeds share the pretraining; SFT is each seed's own.
- **Budget**: every variant starts from its seed's SFT model and takes 120 steps of 32 prompts from the
  same 1,000 captions: beta 0.3, learning rate 3e-4, full fine-tuning with the vision tower frozen. The
  control takes 120 further steps of SFT at 5e-4. Beta, rate and an SFT term on the chosen response
  (`sft_weight` 1) are the quickstart's, which were found for offline BDHS. RLOO (4 samples a prompt) and
  PPO (one, in rounds of 2 batches and 2 epochs) take beta 0.02 and rate 6e-4, as `configs/rloo_scenes.py`
  and `ppo_scenes.py` do. **No other variant was tuned by itself**. `rloo_f1_unbiased` and
  `sft_unbiased` take 1,000 other pictures, in which things are no usual partners: the first their prompts,
  the second their captions, too. The seed decides SFT, order,
  samples, masks and what is corrupted.
- **Corrupted captions** (`testbed/scenes/corrupt.py`): one to three facts of a true caption (kind, colour
  or size, place, relation) made false, all other words kept. They stand for rejected responses that GPT-4V
  writes.
- **Judges**: the oracle counts errors exactly and stands for a judge much larger than the policy. The
  self judge is the seed's SFT model, asked `Is there a cup in the picture?` for each thing that is
  mentioned. With the order `errors` the oracle ranks by wrong claims, then by recall; its `f1` counts what
  is missing as much as what is wrong.
- **Reward models** start from their seed's SFT model: 500 steps on 4,000 captions at 7e-4.
- **Measured** greedily on 300 pictures of `broken`, where no two things are usual partners, and 300 of
  `unbiased`. details: wrong claims of colour, size, place or relation, of all such claims about things
  that are there; beside recall, it stands for open-ended quality. expected: share of the hallucinated
  things whose usual partner is named. Percent; ± is half of the 95% Student-t interval over seeds;
  a cell is empty where some seed's model makes no such claim.
"""

RULE = """Claims compare two variants on the same seeds. A claim **holds** if the 95% Student-t interval
of the difference (points) over seeds leaves out 0 on the claimed side, is **contradicted** if on the
other side, and otherwise cannot be told; "not worse" has a margin of 2 points in place of 0. A finding is
**reproduced** if all of its claims hold, **not reproduced** if one is contradicted, and otherwise
**cannot be told**. With one seed nothing can be told; the last column gives the interval of the same
difference over the pictures, seeds added up: how sure it is of these models, not of others.
"""

EARLIER = """> Not of today's pictures: these rows were made with earlier ones, and an earlier recipe.
"""

MISSING = """> **Not complete**: {missing} of {all} rows are not made yet, and {whole} of {variants}
> variants have {seeds} seeds. Figures without ± are of one seed; ± over 2 seeds is wide.
"""

POPE = """POPE is at chance for every model, SFT included: this small model describes pictures and does
not learn to answer yes or no about them. POPE tells nothing here, and a judge that asks such questions
has nothing to go by.
"""

REWARDED = """Share of the held-out pairs whose chosen caption has the higher reward, in percent: of 300
pictures, with each kind of rejected response. length: Pearson's correlation of reward and number of
tokens, on pairs of the kind that the model has learned from.
"""

WRITTEN = """words changed: share of words that differ from the chosen response, by difflib. hallucinated:
CHAIR_i of the rejected responses. differ enough: by the lexical similarity, after the first try and after
all.
"""

COSTS = """Medians over seeds. Seconds of a step once compiled. Two rows were made side by side on the two
cores, beside other work, so the times are upper bounds and only roughly compare. groups used: share of
the prompts with a pair. whole: the row with data, compilation, training and measuring.
"""
