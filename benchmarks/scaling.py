"""The TPU slice that each model needs, from compiling its steps for slices that need not exist here.

    python benchmarks/scaling.py            # about 30 rows, each some minutes; stop and start at will
    python benchmarks/scaling.py --page     # write docs/scaling.md from the rows that are done

Every row is a file in benchmarks/results/scaling; an existing row is not computed again. Needs libtpu
(pip install libtpu), but no TPU and no weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from math import gcd
from pathlib import Path

from mllm_align import BDHSConfig, Config, DataConfig, LoraConfig, load_config
from mllm_align.config import MeshConfig
from mllm_align.errors import InputError
from mllm_align.models.families.registry import presets
from mllm_align.plan.chips import topology
from mllm_align.plan.planner import plan, save
from mllm_align.plan.report import Plan

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "scaling", HERE.parent / "docs" / "scaling.md"
MODELS = ("llava-1.6-7b", "llava-1.6-13b", "llava-1.6-34b", "smolvlm-256m", "smolvlm-2.2b")
LONG = ("llava-onevision-0.5b", "llava-onevision-7b")  # a program takes long to compile: LoRA alone
LONG += ("qwen3-vl-2b", "qwen3-vl-8b")
QWEN25 = ("qwen2.5-vl-3b", "qwen2.5-vl-7b")
GEMMA = ("gemma-3-4b", "gemma-3-12b")
INTERNVL = ("internvl3-2b", "internvl3-8b")
SMALLEST = QWEN25 + GEMMA + INTERNVL
SLICES = {
    "v5e": ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    "v6e": ("v6e:1x1", "v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16"),
    "v5p": ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8"),
}
KINDS = {"lora": "DPO, LoRA rank 128", "full": "DPO, all of projector and decoder"}
ROUNDS = (("llava-1.6-7b", "v5e:4x4"), ("llava-1.6-34b", "v6e:8x8"))
INT8 = (  # (model, slice, LoRA's rank, pairs of a step): a model's parameters on each chip
    ("llava-1.6-7b", "v5e:1x1", 128, 1),
    ("llava-1.6-7b", "v5e:1x1", 64, 2),
    ("qwen2.5-vl-7b", "v5e:1x1", 64, 2),
    ("qwen3-vl-8b", "v5e:1x1", 64, 2),
    ("llava-1.6-13b", "v6e:1x1", 128, 2),
    ("gemma-3-12b", "v6e:1x1", 128, 2),
    ("llava-1.6-34b", "v5p:2x2x1", 128, 2),
    ("llava-1.6-34b", "v5p:2x2x1", 64, 2),
)
REMAT = ("v5e:2x2", "v6e:1x1")
WEAK = (("v5e:4x4", 16), ("v5e:8x8", 64), ("v5e:16x16", 256))
SEVERAL = (  # (model, trained, slices): the largest slice there is, and two and four of them
    ("llava-1.6-7b", "lora", "v5e:16x16"),
    ("llava-1.6-7b", "lora", "2xv5e:16x16"),
    ("llava-1.6-7b", "lora", "4xv5e:16x16"),
    ("llava-1.6-7b", "full", "v5e:16x16"),
    ("llava-1.6-7b", "full", "2xv5e:16x16"),
    ("llava-1.6-7b", "full", "4xv5e:16x16"),
    ("llava-1.6-34b", "full", "2xv6e:16x16"),
)


def dpo(kind: str, chips: int) -> Config:
    """Two rows per chip; parameters and batch sharded over all chips."""
    lora = LoraConfig(rank=128, alpha=256.0) if kind == "lora" else None
    data, mesh = DataConfig(multiple=128), MeshConfig(data=1, fsdp=-1)
    return Config(lora=lora, data=data, mesh=mesh, batch_size=2 * chips, micro_batches=2)


def ppo(chips: int) -> Config:
    """PPO against a reward model: a prompt for each chip, rollouts with weights cut over up to 8 chips."""
    base = load_config("ppo_llava16_7b")
    assert base.online is not None
    online = replace(base.online, mesh=MeshConfig(data=-1, tensor=8))
    return replace(base, online=online, batch_size=max(chips, 32))


def rows() -> list[tuple[str, str, str, str]]:
    """(name of the file, model, kind, chip), the most wanted first."""
    found = [(f"{m}_{kind}_{chip}", m, kind, chip) for m in MODELS for kind in KINDS for chip in SLICES]
    found += [(f"{m}_lora_v5e", m, "lora", "v5e") for m in LONG]
    found += [(f"{m}_lora_{chip}", m, "lora", chip) for m in SMALLEST for chip in ("v5e", "v6e")]
    return found + [(f"{m}_bdhs_v5e", m, "bdhs", "v5e") for m in MODELS]


def smallest(model: str, kind: str, chip: str) -> list[Plan]:
    """The smallest slice that the step fits, and one four times larger."""
    slices = SLICES[chip]
    for at, where in enumerate(slices):
        made = one(model, kind, where)
        print(f"  {where}: {made.verdict}", flush=True)
        if made.fits:
            larger = [w for w in slices[at + 1 :] if topology(w).chips == 4 * made.chips]
            return [made, *(one(model, kind, w) for w in larger[:1])]
    return []


def one(model: str, kind: str, where: str) -> Plan:
    if kind == "bdhs":  # tensor shares keep the weights where they are; fsdp would move them each token
        tensor = gcd(min(topology(where).chips, 8), presets()[model].decoder.heads)
        config = BDHSConfig(mesh=MeshConfig(tensor=tensor), data=DataConfig(multiple=128))
        return plan(config, model, where)
    config = dpo(kind, topology(where).chips)
    return plan(config, model, where, programs=["train"])


def in_int8(model: str, where: str, rank: int, pairs: int) -> Plan:
    """Pairs one by one; of several chips each has all parameters, as if it were alone."""
    chips = topology(where).chips
    config = Config(
        lora=LoraConfig(rank=rank, alpha=2.0 * rank, base="int8"),
        data=DataConfig(multiple=128),
        mesh=MeshConfig(data=chips),
        batch_size=pairs * chips,
        micro_batches=pairs,
    )
    return plan(config, model, where, programs=["train"])


def int8_file(model: str, where: str, rank: int, pairs: int) -> Path:
    return RESULTS / f"{model}_int8_{where.partition(':')[0]}_{rank}_{pairs}.json"


def rounds_file(model: str) -> Path:
    return RESULTS / f"{model}_ppo.json"


def remat_file(where: str) -> Path:
    return RESULTS / f"remat_{where.replace(':', '_')}.json"


def several_file(model: str, kind: str, where: str) -> Path:
    return RESULTS / f"{model}_{kind}_{where.replace(':', '_')}.json"


def make_remat() -> None:
    for where in REMAT:
        if not remat_file(where).exists():
            config = replace(dpo("lora", topology(where).chips), remat="auto")
            save(plan(config, "llava-1.6-7b", where, programs=["train"], say=print), remat_file(where))


def make() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    make_remat()
    for where, chips in WEAK:
        file = RESULTS / f"weak_{chips}.json"
        if not file.exists():
            config = Config(
                data=DataConfig(multiple=128), mesh=MeshConfig(data=1, fsdp=-1), batch_size=2 * chips
            )
            save(plan(config, "llava-1.6-7b", where, programs=["train"]), file)
    for model, kind, where in SEVERAL:
        file = several_file(model, kind, where)
        if not file.exists():
            print(file.stem, flush=True)
            save(one(model, kind, where), file)
    for row in INT8:
        if not (file := int8_file(*row)).exists():
            print(file.stem, flush=True)
            save(in_int8(*row), file)
    for model, where in ROUNDS:
        file = rounds_file(model)
        if not file.exists():
            print(file.stem, flush=True)
            save([plan(ppo(topology(where).chips), model, where)], file)
    for name, model, kind, chip in rows():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            print(name, flush=True)
            try:
                save(smallest(model, kind, chip), file)
                PAGE.write_text(page(), encoding="utf-8")
            except InputError as error:
                print(f"  {error}", flush=True)


# ---- the page --------------------------------------------------------------------------------------

HEAD = """# What it takes on TPUs

Made by `benchmarks/scaling.py`. No TPU was used: each step is compiled for the slice by the real TPU
compiler, from shapes alone (`mllm-align plan`). Memory is what that compiler lays out. **Times are
bounds, not measurements**: the slowest of matrix products at the chip's published peak, memory traffic
at its published bandwidth and collectives at its published links, all else hidden behind it. A real
step is slower.

Rows are of a model's longest prompt: 3,072 + 256 tokens and five tiles for LLaVA-1.6, 1,280 + 256 (256M) or
1,536 + 256 (2.2B) tokens and 17 tiles for SmolVLM, 8,960 + 256 tokens and 37 tiles for LLaVA-OneVision.
For Qwen2.5-VL and Qwen3-VL they are of an image of 1,280 embeddings, 1,408 + 256 tokens; for Gemma 3 they
are of 384 + 256 tokens; for InternVL3 of 3,456 + 256 tokens and 13 tiles. Parameters, optimizer and batch
are cut over all chips (`mesh.data 1, mesh.fsdp -1`).

## DPO: the smallest slice that fits, and one four times larger

Two pairs a chip, run one after the other (`micro_batches 2`); reference computed in the step.

GiB, TFLOP and GB sent are of one chip and one step.

| model | trained | slice | chips | GiB | TFLOP | GB sent | bound, s | pairs/s | limit |
|---|---|---|--:|--:|--:|--:|--:|--:|---|
"""

IN_INT8 = """
## A base in int8, on one chip

LoRA with `--lora.base int8`. Pairs of a step run one by one, each with the model's longest prompt and the
reference in the step. The 34B's rows are of one of four chips that each hold all parameters: v5p's 95 GiB
are nearest to a GPU's 80 GB, for which there is no plan.

| model | LoRA rank | pairs a step | chip | GiB of | GiB | TFLOP | bound, s | pairs/s | limit |
|---|--:|--:|---|--:|--:|--:|--:|--:|---|
"""
BDHS = """
## BDHS: the smallest v5e slice

Heads and feed-forward are cut over up to 8 chips, where they divide.

"""
PPO = """
## Rounds of PPO

`ppo_llava16_7b` with a LoRA policy, value model and reward model over one base; a prompt for each chip, at
least 32. A round is features, prefill, decode, score and reward once, then train for every update (four in
this config). Rollouts have a copy of the weights cut over 8 chips (`--online.mesh.tensor 8`): cut as in
training, every token would gather all of them, and the 34B's decode on v5e:8x8 is bound at 119 s.

"""


REMAT_HEAD = """
## Rematerialisation

LLaVA-1.6-7B, LoRA DPO, as in the first table, by what a block keeps for its backward pass (`--remat`);
`--remat auto` takes what is set in bold.

| slice | remat | GiB | TFLOP | bound, s | pairs/s | of full's bound |
|---|---|--:|--:|--:|--:|--:|
"""


def page() -> str:
    text, missing = HEAD, []
    for name, model, kind, chip in rows():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            missing.append(name)
        elif kind != "bdhs":
            plans = json.loads(file.read_text())
            text += "".join(line(model, KINDS[kind], p) for p in plans)
            if not plans:
                text += f"| {model} | {KINDS[kind]} | {chip} | none of {len(SLICES[chip])} fits |||||||\n"
    text += IN_INT8 + "".join(int8_line(*row) for row in INT8 if int8_file(*row).exists())
    files = [(model, RESULTS / f"{name}.json") for name, model, kind, _ in rows() if kind == "bdhs"]
    text += BDHS + programs(files)
    text += PPO + programs([(model, rounds_file(model)) for model, _ in ROUNDS])
    text += remat() + weak() + several()
    if missing:
        text += "\n## Not made yet\n\n" + "".join(f"- {name}\n" for name in missing)
    return text


def programs(files: list[tuple[str, Path]]) -> str:
    """A line for every program of the plans in the files that are there."""
    text = "| model | slice | program | GiB a chip | bound, s | at the bound | limit |\n"
    text += "|---|---|---|--:|--:|---|---|\n"
    for model, file in files:
        for made in json.loads(file.read_text()) if file.exists() else ():
            for p in made["programs"]:
                rates = ", ".join(f"{value:,.3g} {what}" for what, value in p["rates"].items())
                needs = f"{p['needed'] / 2**30:.1f}"
                place = f"{made['topology']} ({made['vendor_name']})"
                text += f"| {model} | {place} | {p['program']} | {needs} | {p['bound']:.3g} "
                text += f"| {rates} | {p['limit']} |\n"
    return text


def sent(program: dict, across: bool | None = None) -> float:
    """GB that a chip sends in a step: across slices, within them, or both."""
    each = program["collectives"]
    return sum(c["sent"] for c in each if across is None or (c["slices"] > 1) == across) / 1e9


def line(model: str, kind: str, made: dict) -> str:
    p = made["programs"][0]
    cells = [model, kind, f"{made['topology']} ({made['vendor_name']})", str(made["chips"])]
    cells += [f"{p['needed'] / 2**30:.1f}", f"{p['flops'] / 1e12:.0f}", f"{sent(p):.1f}"]
    cells += [f"{p['bound']:.2f}", f"{p['rates'].get('pairs/s', 0):.1f}", p["limit"]]
    return f"| {' | '.join(cells)} |\n"


def int8_line(model: str, where: str, rank: int, pairs: int) -> str:
    made, chip = json.loads(int8_file(model, where, rank, pairs).read_text()), topology(where).chip
    p = made["programs"][0]
    cells = [model, str(rank), str(pairs), chip.name, f"{chip.usable / 2**30:.1f}"]
    if not p["fits"]:
        return f"| {' | '.join(cells)} | does not fit |||||\n"
    cells += [f"{p['needed'] / 2**30:.1f}", f"{p['flops'] / 1e12:.0f}", f"{p['bound']:.2f}"]
    cells += [f"{p['rates']['pairs/s'] / made['chips']:.2f}", p["limit"]]
    return f"| {' | '.join(cells)} |\n"


def remat() -> str:
    done = [json.loads(file.read_text()) for file in map(remat_file, REMAT) if file.exists()]
    if not done:
        return ""
    text = REMAT_HEAD
    for made in done:
        place = f"{made['topology']} ({made['vendor_name']})"
        least = made["policies"]["full"]["bound"]
        for name, p in made["policies"].items():
            taken = f"**{name}**" if name == made["remat"] else name
            if p["memory"] is None:
                text += f"| {place} | {taken} | does not fit |||||\n"
                continue
            room = "" if p["fits"] else ", does not fit"
            text += f"| {place} | {taken} | {p['needed'] / 2**30:.1f} of {p['usable'] / 2**30:.1f}{room} "
            text += f"| {p['flops'] / 1e12:.0f} | {p['bound']:.2f} | {p['rates']['pairs/s']:.1f} "
            text += f"| {p['bound'] / least:.2f} |\n"
    return text


def weak() -> str:
    files = [(chips, RESULTS / f"weak_{chips}.json") for _, chips in WEAK]
    done = [(chips, json.loads(file.read_text())) for chips, file in files if file.exists()]
    if not done:
        return ""
    text = (
        "\n## Weak scaling\n\nLLaVA-1.6-7B, LoRA DPO, two pairs a chip at once, v5e: what each chip does "
        "when chips and batch grow together.\n\n"
        "| slice | chips | pairs a step | GiB | TFLOP | GB sent | bound, s | pairs/s |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    for chips, made in done:
        p = made["programs"][0]
        text += f"| {made['topology']} | {chips} | {p['rows']} | {p['needed'] / 2**30:.2f} "
        text += f"| {p['flops'] / 1e12:.1f} | {sent(p):.2f} | {p['bound']:.3f} "
        text += f"| {p['rates']['pairs/s']:.1f} |\n"
    return text


SEVERAL_HEAD = """
## Several slices

DPO as in the first table. Parameters and optimizer are cut over the chips of a slice, and each slice has
a copy: between slices only gradients are summed, over the hosts' network. GB sent, within a slice and
across slices, are of one chip and one step; `network` is the time of the latter alone.

| model | trained | slices | chips | GiB | GB within | GB across | network, s | bound, s | pairs/s | limit |
|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|
"""


def several() -> str:
    found = [(row, several_file(*row)) for row in SEVERAL]
    done = [(row, json.loads(file.read_text())) for row, file in found if file.exists()]
    return SEVERAL_HEAD + "".join(several_line(*row[:2], made) for row, made in done) if done else ""


def several_line(model: str, kind: str, made: dict) -> str:
    p = made["programs"][0]
    cells = [model, KINDS[kind], made["topology"], f"{made['chips']:,}"]
    cells += [f"{p['needed'] / 2**30:.1f}", f"{sent(p, False):.1f}", f"{sent(p, True):.2f}"]
    cells += [f"{p['parts'].get('network', 0):.2f}", f"{p['bound']:.2f}"]
    cells += [f"{p['rates']['pairs/s']:.0f}", p["limit"]]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only write docs/scaling.md")
    options = parser.parse_args()
    try:
        if not options.page:
            make()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        PAGE.write_text(page(), encoding="utf-8")
