"""mllm-align plan: memory and time bounds of a config on hardware that need not be available."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from mllm_align.align.checks import check_terms
from mllm_align.config import BDHSConfig, Config, MeshConfig
from mllm_align.errors import InputError, one_line
from mllm_align.files import json_text, new_file
from mllm_align.models.config import ModelConfig
from mllm_align.models.sources import config_of
from mllm_align.plan import targets
from mllm_align.plan.chips import Topology, topology
from mllm_align.plan.compiled import compile_program
from mllm_align.plan.report import (
    Plan,
    ProgramPlan,
    heading,
    policies_text,
    program_plan,
    program_text,
    verdict,
)
from mllm_align.plan.targets import Sizes, sizes
from mllm_align.plan.worker import Job
from mllm_align.progress import progress_bar
from mllm_align.training.fitting import LADDER
from mllm_align.training.flops import decoder_flops, group_flops, pairs, train_flops, vision_flops
from mllm_align.training.run_model import base_folder

LARGEST_TENSOR = 8
"""Limit of a sweep: on more devices, communication takes longer than computation."""


def plan(
    config: Config | BDHSConfig,
    model: str | Path | ModelConfig = "llava-1.6-7b",
    where: str | None = None,
    *,
    programs: Sequence[str] | None = None,
    prefix: int | None = None,
    response: int | None = None,
    whole: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compile a config's programs for a topology, or for this machine's devices, and report their costs.

    model: a name of `families.registry.presets`, a Hugging Face folder (only config.json is read), or its
    config. where: a topology's name (see `plan.chips.topology`); None, the devices of this machine.
    programs: some of train, reference, features, prefill, decode, score, reward; with `remat auto`, train
    is compiled under every policy. prefix, response: tokens in place of the longest prompt's and 256.
    whole: make machine code too. say: gets the report, the verdict first.
    Nothing is allocated. Raises InputError for names that are not known and meshes that can't be.
    """
    name, shape_of = "" if isinstance(model, ModelConfig) else str(model), _shape_of(config, model)
    if isinstance(config, Config):
        check_terms(config.objective)
    place = topology(where) if where else None
    wanted = tuple(programs or targets.names(config))
    generation = ("features", "prefill", "decode")
    known = ("train", "reference", *generation, "score", "reward")
    for each in wanted:
        if each not in known or (each not in generation and not isinstance(config, Config)):
            kind = type(config).__name__
            raise InputError(f"a {kind} has no program {each!r}; take some of {', '.join(known)}")
    size = sizes(config, shape_of, prefix, response)
    parts: list[ProgramPlan] = []
    metadata: dict[str, Any] = {}
    policies: dict[str, ProgramPlan] = {}

    def planned(each: str, config: Config | BDHSConfig) -> ProgramPlan:
        job = Job(each, config, shape_of, size, place, Path())
        compiled = compile_program(job, place.chips if place else 0, whole)
        metadata.update({} if metadata else compiled.metadata)
        output = _output(compiled.metadata["rows"], size, config)[each]
        model_flops = _model_flops(each, config, shape_of, size) * compiled.metadata["rows"]
        return program_plan(each, compiled, place, model_flops / compiled.metadata["devices"], output)

    with progress_bar(len(wanted), "compiling", "program") as bar:
        for each in wanted:
            if each == "train" and isinstance(config, Config) and config.remat == "auto":
                policies = _policies(config, partial(planned, each), known_limit=place is not None)
                config = replace(config, remat=_chosen(policies))  # type: ignore[arg-type]
                parts.append(policies[config.remat])
            else:
                parts.append(planned(each, config))
            bar.update()
    words = verdict(parts, config, metadata["mesh"], place)
    remat = config.remat if isinstance(config, Config) else ""
    done = _plan(name, place, metadata, size, parts, words, remat, policies)
    table = [policies_text(remat, policies)] * bool(policies)
    for text in (done.verdict, heading(done), *table, *map(program_text, parts)):
        say(text)
    return done


def _shape_of(config: Config | BDHSConfig, model: str | Path | ModelConfig) -> ModelConfig:
    """The model as the config keeps it."""
    found = model if isinstance(model, ModelConfig) else config_of(base_folder(model))
    return replace(found, int8=isinstance(config, Config) and config.int8)


def _policies(
    config: Config, planned: Callable[[Config], ProgramPlan], known_limit: bool
) -> dict[str, ProgramPlan]:
    """Plans of the step under each rematerialisation of the ladder; where devices tell no limit of their
    memory, under `none` alone."""
    found: dict[str, ProgramPlan] = {}
    for remat in LADDER if known_limit else ("none", *LADDER):
        found[remat] = planned(replace(config, remat=remat))  # type: ignore[arg-type]
        if found[remat].usable is None:
            break
    return found


def _chosen(policies: dict[str, ProgramPlan]) -> str:
    """As a run chooses (`training.fitting`)."""
    if "full" not in policies:
        return "none"
    return next((each for each in LADDER if policies[each].has_room), "full")


def _plan(
    name: str,
    place: Topology | None,
    metadata: dict,
    size: Sizes,
    parts: list,
    words: str,
    remat: str,
    policies: dict[str, ProgramPlan],
) -> Plan:
    return Plan(
        topology=place.name if place else f"{metadata['devices']} x {metadata['device']}",
        vendor_name=place.vendor_name if place else None,
        chips=metadata["devices"],
        model=name,
        mesh=metadata["mesh"],
        shape=asdict(size.shape),
        tokens=size.tokens,
        programs=parts,
        kept_whole=metadata["kept_whole"],
        verdict=words,
        remat=remat,
        policies=policies,
    )


def _output(rows: int, size: Sizes, config: Any) -> dict[str, dict[str, float]]:
    """Numbers of items that one run of each program processes or generates."""
    s = size.shape
    tokens, made = rows * s.tokens(size.views), rows * targets.samples(config)
    first = rows * (s.prefix + size.responses * s.response)
    group = "pairs" if size.responses == 2 else "prompts"
    return {
        "train": {group: rows, "tokens": tokens},
        "reference": {group: rows, "tokens": first},
        "features": {"tiles": rows * s.tiles},
        "prefill": {"prompts": rows, "tokens": rows * s.prefix},
        "decode": {"responses": made, "tokens": made * size.tokens},
        "score": {"prompts": rows, "tokens": first},
        "reward": {"responses": rows * size.responses, "tokens": first},
    }


def _model_flops(program: str, config: Any, model: ModelConfig, size: Sizes) -> float:
    """Of one row."""
    s = size.shape
    if program == "features":
        return vision_flops(model, s.tiles)
    if program == "prefill":
        return decoder_flops(model, s.tiles, s.prefix, pairs(model.decoder, s.prefix), 0)
    if program == "decode":
        seen = pairs(model.decoder, size.tokens, s.prefix)
        return targets.samples(config) * decoder_flops(model, 0, size.tokens, seen, size.tokens)
    logits = "score" not in config.objective.needs and program != "reward"
    each = [
        group_flops(model, tiles, prefix, [s.response] * len(view), logits)
        for (prefix, tiles), view in zip(s.prefixes, size.views, strict=True)
    ]
    forward = each[0]
    if program in ("reference", "reward"):
        return sum(forward)
    if program == "score":  # policy, reference, and a value model, which share a frozen tower
        vision, rest = forward
        return vision + (2 + ("values" in config.objective.needs)) * rest
    tower = config.lora is None and "vision_tower" not in config.freeze
    also = {"reference": config.live_reference, "values": "values" in config.objective.needs}
    also |= {"features": config.features == "stored"}
    return sum(train_flops(one, lora=config.lora is not None, tower=tower, **also) for one in each)


def meshes(config: Config | BDHSConfig, model: ModelConfig, place: Topology) -> list[MeshConfig]:
    """Meshes of a slice that a config can run on, those that cut the parameters most first."""
    chips, d = prod(place.shape), model.decoder
    found = []
    for tensor in (n for n in (1, 2, 4, 8) if n <= LARGEST_TENSOR and chips % n == 0):
        if d.heads % tensor or d.mlp % tensor:
            continue
        left = chips // tensor
        for fsdp in (n for n in range(left, 0, -1) if left % n == 0):
            shards = left * place.slices
            if isinstance(config, Config) and config.rows_per_micro % shards:
                continue
            if d.hidden % fsdp == 0 and fsdp >= min(left, 4):
                found.append(MeshConfig(data=left // fsdp, fsdp=fsdp, tensor=tensor))
    return found


def sweep(
    config: Config | BDHSConfig,
    model: str | Path | ModelConfig,
    where: str,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> list[Plan]:
    """Plans of the config's first program for the meshes of a slice: those that fit, the fastest bound
    first."""
    shape_of = _shape_of(config, model)
    first = targets.names(config)[0] if isinstance(config, Config) else "decode"
    options = {"programs": (first,), **options}
    found = meshes(config, shape_of, topology(where))
    if not found:
        raise InputError(
            f"no mesh of {where} divides batch_size / micro_batches; take a multiple of its chips"
        )
    plans = []
    for number, mesh in enumerate(found, 1):
        at = f"[{number}/{len(found)}] data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}"
        try:
            made = plan(replace(config, mesh=mesh), model, where, **options)
        except InputError as error:
            say(f"{at}: {one_line(error, 200)}")
            continue
        done = made.programs[0]
        bound = f"bound {done.bound:.4g} s by {done.limit}, {made.verdict}" if done.bound else made.verdict
        bound = f"remat {made.remat}, {bound}" if made.policies else bound
        say(f"{at}: {bound}")
        if made.fits:
            plans.append(made)
    return sorted(plans, key=lambda p: p.programs[0].bound or 0)


def save(plans: Plan | Sequence[Plan], out: str | Path) -> None:
    """Write a plan, or several, as JSON."""
    content = plans.to_json() if isinstance(plans, Plan) else [p.to_json() for p in plans]
    with new_file(out) as file:
        file.write(json_text(content, indent=1) + "\n")
