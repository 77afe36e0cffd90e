"""The verbs of `mllm-align`. No logic: each reads its options and calls one function."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import logging
import os
import re
import sys
import time
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from mllm_align.config import (
    ANNOTATORS,
    OBJECTIVES,
    ONLINE,
    BDHSConfig,
    Config,
    DataConfig,
    DistributedConfig,
    Dtype,
    JudgeConfig,
    LoraConfig,
    MeshConfig,
    SamplingConfig,
    load_config,
)
from mllm_align.config import save_json as config_json
from mllm_align.config.checks import STEPS, check_number
from mllm_align.errors import InputError, NotFinite, Preempted, one_line, refusal
from mllm_align.files import json_text

Data = Annotated[Path, arg(name="data", metavar="FILE")]


@dataclass(frozen=True)
class Train:
    """Align a LLaVA checkpoint to preference pairs; a run folder comes out, or goes on.

    Writes config.json, run.json, log.jsonl (events start, train, example, eval, save, done; log-probs in
    nats, summed over response tokens) and checkpoints/. The same command continues a run that was stopped.
    Any field of the config can be given as an option, e.g. --optim.learning-rate 1e-6. Some options
    change a whole branch of it: --objective dpo|robust|ipo|slic|averaged|sft, --lora none|on and
    --online none|pairs|bdhs|distorted (responses that the policy makes while it trains), with --online
    pairs also --online.annotator judge|endpoint|oracle|questions|scorer; --online.mesh none|on, and
    --online.annotator.mesh none|on for a judge of its own.
    """

    config_file: Positional[Path]
    """Python file with get_config()."""
    model: Path
    """What to start from; also the reference policy. A Hugging Face LLaVA folder (1.5 or 1.6), a PEFT
    adapter's folder, the name of either in the local Hub cache, or another run's folder (its newest
    checkpoint)."""
    data_file: Data
    """Preference pairs: a file, a folder or quoted pattern of shards, or the name of a cached data set."""
    out: Path
    """Run folder."""
    eval_data: Path | None = None
    """Held-out pairs to evaluate on; of several splits, --data.eval-split is read."""
    profile: int = 0
    """Trace this many steps, after the first, to OUT/profile for XProf, TensorBoard and Perfetto."""
    allow_schedule_change: bool = False
    """Continue a run for another number of steps though the learning rates of its schedule change."""
    debug_nans: bool = False
    """Stop at the operation that makes a NaN first; slow."""
    print_config: bool = False
    """Print the resolved config as JSON and stop; needs no model, data or out."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class Score:
    """Log-probabilities of chosen and rejected responses.

    Writes one JSON line per record, in order: index, chosen_logp, rejected_logp (nats, summed over
    response tokens, end of sequence included), chosen_tokens, rejected_tokens. Beside it, OUT.log.jsonl
    says what was run.
    """

    model: Path
    """Hugging Face LLaVA folder, PEFT adapter folder, the name of either in the local Hub cache, or a run
    folder (its newest checkpoint)."""
    data_file: Data
    """Preference pairs: a file, a folder or quoted pattern of shards, or the name of a cached data set."""
    out: Path
    """File to write, JSONL."""
    batch_size: int = 8
    """Records at once, over all devices."""
    dtype: Dtype = "auto"
    """Of the computation. auto: float32 on CPU, bfloat16 elsewhere."""
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class Generate:
    """A model's responses: to one prompt, printed, or to a file of prompts.

    With --data, OUT gets one JSON line per record, in order: index, responses (null for one left out as
    over-long).
    """

    model: Path
    """Hugging Face LLaVA folder, PEFT adapter folder, the name of either in the local Hub cache, or a run
    folder (its newest checkpoint)."""
    image: tuple[Path, ...] = ()
    """Image files, in the order in which the prompt speaks of them."""
    prompt: str | None = None
    """What to ask."""
    data_file: Annotated[Path | None, arg(name="data", metavar="FILE")] = None
    """In place of --image and --prompt: records with prompts and images, a file or as train takes them."""
    out: Path | None = None
    """File to write, JSONL; needed with --data."""
    samples: int = 1
    """Responses to each prompt."""
    seed: int = 0
    """Of the sampled tokens; the same seed gives a record the same responses in any batch, but for
    near-ties."""
    batch_size: int = 8
    """Prompts at once, over all devices."""
    dtype: Dtype = "auto"
    """Of the computation. auto: float32 on CPU, bfloat16 elsewhere."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class Bdhs:
    """Preference pairs from SFT records: the model itself makes the rejected responses (BDHS).

    Writes one JSON line per record, in order: index, id, images, prompt, chosen, rejected, bdhs (how it
    was made). Beside it, OUT.log.jsonl says what was run. The same command continues a job that was
    stopped. Image paths stay as they are in the data; where OUT lies elsewhere, train with
    --data.image-root.
    """

    config_file: Positional[Path]
    """Python file with get_config() -> BDHSConfig."""
    model: Path
    """Hugging Face LLaVA folder, PEFT adapter folder, the name of either in the local Hub cache, or a run
    folder (its newest checkpoint)."""
    data_file: Data
    """SFT records, a prompt, images and one response each: a file, or as train takes them."""
    out: Path
    """File to write, JSONL."""
    shard: str = "0/1"
    """Part/parts of the records, one part for each host, written as OUT-00000-of-00004 and so on."""
    print_config: bool = False
    """Print the resolved config as JSON and stop; needs no model, data or out."""
    config: Annotated[BDHSConfig, arg(name="")] = field(default_factory=BDHSConfig)


@dataclass(frozen=True)
class Judge:
    """How often an annotator prefers the chosen responses of a file of pairs, asked in both orders.

    Prints a table; writes the figures to OUT and one JSON line per record beside it, with suffix .jsonl:
    index, id, outcome, right, scores, reason, answers. --annotator judge|endpoint|oracle|questions|scorer
    changes who is asked, --annotator.FIELD how; --annotator.mesh none|on cuts a judge by a mesh of its own.
    """

    config_file: Positional[Path]
    """Python file with get_config() -> JudgeConfig, or the Config of a run that has an annotator."""
    data_file: Data
    """Preference pairs: a file, a folder or quoted pattern of shards, or the name of a cached data set."""
    out: Path
    """File to write, JSON."""
    model: Path | None = None
    """The policy's base, as `train` takes it; needed where the annotator is it."""
    print_config: bool = False
    """Print the resolved config as JSON and stop; needs no model, data or out."""
    config: Annotated[JudgeConfig, arg(name="")] = field(default_factory=JudgeConfig)


@dataclass(frozen=True)
class Inspect:
    """One record as the model gets it: tokens, loss mask, positions, image tiles. Writes nothing."""

    model: Path
    """As `train` takes it; its tokenizer and image processor are read."""
    data_file: Data
    """Preference pairs (or, with --responses 1, SFT records)."""
    index: int = 0
    """Which record, from 0."""
    responses: int = 2
    """Responses a record must have, at least."""
    json: bool = False
    """Print JSON instead of a table."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class Export:
    """A run's checkpoint as a Hugging Face folder that transformers loads, or as a PEFT adapter.

    Merging into 16-bit weights rounds; what that costs is printed and logged in the run's log.jsonl.
    """

    run: Path
    """Run folder."""
    out: Path
    """Folder to make."""
    adapter: bool = False
    """Write a PEFT adapter (LoRA and projector) instead of merged weights."""
    dtype: typing.Literal["float32", "bfloat16", "float16"] | None = None
    """Of the written weights; default: as the base folder has them (adapter: float32)."""
    step: typing.Literal["last", "best"] | int = "last"
    """Which checkpoint: the newest, the one with the least held-out loss, or a step."""


@dataclass(frozen=True)
class Plan:
    """What a config takes on a TPU slice that need not be there: memory, FLOPs, a bound on time.

    Compiles the run's real programs (of a BDHS config: those of generation) with the TPU compiler, which
    the extra `plan` brings, and allocates nothing. Times are bounds from published figures, not
    measurements. Without --topology, for the devices of this machine.
    """

    config_file: Positional[Path]
    """Python file with get_config(), of `train` or of `bdhs`."""
    topology: str | None = None
    """v5e:4x4, v5p:2x2x4, v6e:16x16, ...; 2xv5e:16x16 for two slices; vendors' names too (v5p-32)."""
    model: str = "llava-1.6-7b"
    """llava-1.5-7b, -13b, llava-1.6-7b, -mistral-7b, -13b, -34b, or as for train (config.json is read)."""
    prefix: int | None = None
    """Padded tokens of a prompt; default: the model's longest, with 128 of text."""
    response: int | None = None
    """Padded tokens of a response; default: 256."""
    programs: tuple[str, ...] = ()
    """Some of train, reference, features, prefill, decode; default: those of the config."""
    sweep: bool = False
    """Rank the meshes that the topology allows, in place of the config's own."""
    json: Path | None = None
    """File to write the plan to."""
    print_config: bool = False
    """Print the resolved config as JSON and stop."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class PlanBdhs(Plan):
    __doc__ = Plan.__doc__
    config: Annotated[BDHSConfig, arg(name="")] = field(default_factory=BDHSConfig)  # type: ignore[assignment]


@dataclass(frozen=True)
class Quickstart:
    """The method on pictures that the program draws itself: SFT, BDHS, DPO, and a report to look at.

    Makes OUT/report.html and OUT/results.json; no downloads, about ten minutes on two cores and six more
    for each further seed. The same command continues a run that was stopped.
    """

    out: Path = Path("runs/quickstart")
    """Folder to make."""
    seeds: int = 1
    """Runs of SFT, BDHS and DPO from one pretrained model; with several, intervals are over them."""
    mask_rate: float = 0.99
    """Share of the image that BDHS hides."""


def main(argv: list[str] | None = None) -> None:
    """Entry of the console script.

    Exit status: 0 done, 2 bad input, 3 a number that is not finite (a loss, a gradient, or one that would
    be reported), 75 preempted with all saved, 130 interrupted; anything else is a failure, after which the
    same command may be tried again.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        _main(argv)
    except InputError as error:
        _end(2, f"error: {one_line(error, 2000)}")
    except NotFinite as error:
        _end(3, f"error: {one_line(error, 2000)}")
    except Preempted as error:
        _end(75, f"{error}; the same command goes on from there")
    except KeyboardInterrupt:
        print("mllm-align: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception:
        _lost()
        raise


def _end(status: int, said: str) -> None:
    """Say why, and by which process if there are several."""
    print(f"mllm-align:{_me()} {said}", file=sys.stderr, flush=True)
    sys.exit(status)


def _lost() -> None:
    """Say what an error of one of several processes most likely means."""
    me = _me()
    if me:
        said = "failed, as below. If a collective failed, another process died: JAX names it soon after"
        print(f"mllm-align:{me} {said} (the leader is process 0)", file=sys.stderr, flush=True)


def _me() -> str:
    """Which process this is, if it has joined others."""
    if "jax" not in sys.modules:
        return ""
    from mllm_align import processes

    return f" {processes.name()}:" if processes.joined() else ""


# what a verb's config file gives
WITH_CONFIG: dict[type, type] = {
    Train: Config,
    Bdhs: BDHSConfig,
    Judge: JudgeConfig,
    Plan: Config,
    PlanBdhs: BDHSConfig,
}
VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {}


def _main(argv: list[str]) -> None:
    VERBS.update(
        train=(Train, train),
        bdhs=(Bdhs, bdhs),
        generate=(Generate, generate),
        score=(Score, score),
        judge=(Judge, judge),
        inspect=(Inspect, inspect),
        export=(Export, export),
        plan=(Plan, plan),
        quickstart=(Quickstart, quickstart),
    )
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: mllm-align VERB ...   (mllm-align VERB --help says more)\n")
        for name, (cls, _) in VERBS.items():
            print(f"  {name:9} {(cls.__doc__ or '').splitlines()[0]}")
        return
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("mllm-align"))
        return
    if argv[0] not in VERBS:
        raise InputError(f"no verb {argv[0]!r}{_nearest(argv[0], VERBS)}; mllm-align --help lists them")
    cls, run = VERBS[argv[0]]
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax; what fails there is raised, too
    run(parse(cls, argv[0], argv[1:]))


# ---- verbs -----------------------------------------------------------------------------------------


def train(options: Train) -> None:
    if options.print_config:
        print(config_json(options.config), end="")
        return
    check_number("--profile", options.profile, 0, STEPS)
    _begin(options.config.distributed)
    _quiet()
    import jax

    from mllm_align.training.loop import train as run

    jax.config.update("jax_debug_nans", options.debug_nans)
    files = options.model, options.data_file, options.out, options.eval_data
    allowed = options.allow_schedule_change
    run(options.config, *files, profile=options.profile, allow_schedule_change=allowed)


def score(options: Score) -> None:
    _begin()
    from mllm_align.prepare import name_weights
    from mllm_align.training.score import score as run

    began = time.time()
    with _result(options.out, options.data_file) as file:  # refused before the work, not after
        bundle = _open(options.model, options.dtype, options.mesh)
        lines = run(bundle, options.data_file, config=options.data, batch_size=options.batch_size)
        name_weights(bundle.folder)
        file.writelines(json_text(line) + "\n" for line in lines)
    skipped = [line for line in lines if "left_out" in line]
    _log_beside(
        options.out,
        event="score",
        model=options.model,
        model_fingerprint=bundle.folder.fingerprint,
        data=options.data_file,
        dtype=str(bundle.dtype),
        records=len(lines),
        skipped=[line["index"] for line in skipped],
        seconds=round(time.time() - began, 3),
    )
    why = " and ".join(
        f"{n} {reason}" for reason, n in Counter(each["left_out"] for each in skipped).items()
    )
    note = f", {why} records left out" if skipped else ""
    _tell(f"{len(lines) - len(skipped)} records scored to {options.out}{note}")


def generate(options: Generate) -> None:
    _begin()
    from mllm_align.generate.respond import generate as run

    def responses(data: Any) -> list[list[str]]:
        return run(
            _open(options.model, options.dtype, options.mesh),
            data,
            options.sampling,
            samples=options.samples,
            seed=options.seed,
            batch_size=options.batch_size,
            config=options.data,
        )

    if (options.prompt is None) == (options.data_file is None):
        raise InputError("generate needs either --prompt (with --image) or --data FILE --out FILE")
    if options.data_file is None:
        if options.out is not None:
            raise InputError("generate --prompt prints its responses; --out goes with --data FILE")
        options = dataclasses.replace(options, batch_size=1)
        for text in responses([{"prompt": options.prompt, "images": [str(i) for i in options.image]}])[0]:
            _tell(text)
        return
    if options.out is None or options.image:
        raise InputError("generate --data FILE needs --out FILE, and takes images from the file alone")
    with _result(options.out, options.data_file) as file:
        lines = [
            {"index": i, "responses": texts or None} for i, texts in enumerate(responses(options.data_file))
        ]
        file.writelines(json_text(line) + "\n" for line in lines)
    _tell(f"responses to {sum(bool(line['responses']) for line in lines)} records in {options.out}")


def bdhs(options: Bdhs) -> None:
    if options.print_config:
        print(config_json(options.config), end="")
        return
    _begin(options.config.distributed)
    from mllm_align.generate.bdhs_job import Shard
    from mllm_align.generate.bdhs_job import bdhs as run

    shard, config = Shard.parse(options.shard), options.config
    bundle = _open(options.model, config.dtype, config.mesh)
    summary = run(config, bundle, options.data_file, options.out, shard)
    left = f", {len(summary['left_out'])} left out (empty or equal)" if summary["left_out"] else ""
    _tell(f"{summary['pairs']} pairs in {shard.name(options.out)}{left}; share that differs enough after")
    _tell("  ".join(f"try {i + 1}: {share:.3f}" for i, share in enumerate(summary["differ_after"])))


def judge(options: Judge) -> None:
    if options.print_config:
        print(config_json(options.config), end="")
        return
    config, out, beside = options.config, options.out, _lines_beside(options.out)
    _begin(config.distributed)
    from mllm_align.annotate.accuracy import accuracy, table
    from mllm_align.models.bundle import load
    from mllm_align.training.run_folder import open_base

    asked = config.annotator.asks_base
    if asked and options.model is None:
        raise InputError("judge needs --model: the annotator is the policy's own base")
    with _result(beside, options.data_file) as lines_file, _result(out, options.data_file) as file:
        base = None
        if asked and options.model:  # a run's policy, as it would be the base of another
            base = load(open_base(options.model), config.dtype, config.mesh)
        summary, lines = accuracy(config, options.data_file, base, out.with_suffix(".answers"))
        about = {"data": str(options.data_file), "model": str(options.model) if asked else None}
        file.write(json_text(about | summary, indent=2) + "\n")
        lines_file.writelines(json_text(line) + "\n" for line in lines)
    _tell(table(summary))


def _begin(distributed: DistributedConfig | None = None) -> None:
    """Join the other processes, if any; keep compiled programs. Before anything else of JAX."""
    from mllm_align import processes

    times = distributed or DistributedConfig()
    processes.start(times.heartbeat_seconds, times.shutdown_seconds)
    processes.keep_compiled()


def _quiet() -> None:
    """A save that fails raises one error; what its threads print besides would hide it."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks of that save which nobody waits for
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            before(raised)

    sys.unraisablehook = hook


def _open(model: Path, dtype: Dtype, mesh: MeshConfig) -> Any:
    """A model, or a run folder's newest checkpoint."""
    from mllm_align.models.bundle import load
    from mllm_align.training.run_folder import is_run, load_run

    return (load_run if is_run(model) else load)(model, dtype, mesh)


def inspect(options: Inspect) -> None:
    from mllm_align.data import inspect as show
    from mllm_align.models.bundle import Bundle
    from mllm_align.models.processor import load_processor
    from mllm_align.models.sources import open_model
    from mllm_align.prepare import make_encoder, read_data
    from mllm_align.training.run_folder import base_folder

    check_number("--responses", options.responses, 1, 1024)
    folder = open_model(base_folder(options.model))
    bundle = Bundle(folder, load_processor(folder.path), None, None, {})  # type: ignore[arg-type]
    encoder = make_encoder(bundle, options.data)
    records = read_data(options.data_file, options.data, options.responses)
    if not 0 <= options.index < len(records):
        held = f"{options.data_file} has records 0 to {len(records) - 1}"
        raise InputError(f"--index is {options.index}; {held}")
    encoded = encoder.encode(records[options.index], options.responses, options.index)
    described = show.describe(encoder, encoded)
    print(json_text(described) if options.json else show.text(described))


def export(options: Export) -> None:
    from mllm_align.training.run_folder import export_run

    report = export_run(
        options.run, options.out, adapter=options.adapter, dtype=options.dtype, step=options.step
    )
    with open(options.run / "log.jsonl", "a", encoding="utf-8") as file:
        event = {"event": "export", "time": round(time.time(), 3), "out": str(options.out), **report}
        file.write(json_text(event) + "\n")
    print(json_text({"out": str(options.out), **report}))


def plan(options: Plan) -> None:
    if options.print_config:
        print(config_json(options.config), end="")
        return
    from mllm_align.plan import planner

    def say(text: str) -> None:
        print(text, flush=True)

    for name in ("prefix", "response"):
        check_number(f"--{name}", getattr(options, name), 1, 2**20)
    sizes: dict[str, Any] = {"prefix": options.prefix, "response": options.response}
    if options.programs:
        sizes["programs"] = options.programs
    if options.sweep:
        if options.topology is None:
            raise InputError("plan --sweep needs --topology")
        plans: Any = planner.sweep(options.config, options.model, options.topology, say, **sizes)
    else:
        plans = planner.plan(options.config, options.model, options.topology, say=say, **sizes)
    if options.json is not None:
        planner.save(plans, options.json)


def quickstart(options: Quickstart) -> None:
    from mllm_align.testbed.quickstart.experiment import run
    from mllm_align.testbed.quickstart.phases import Recipe

    check_number("--seeds", options.seeds, 1, 1000)
    if not 0 <= options.mask_rate <= 1:
        raise InputError(f"--mask-rate is {options.mask_rate}; it must be from 0 to 1")
    run(options.out, options.seeds, Recipe(mask_rate=options.mask_rate))


@contextlib.contextmanager
def _result(out: Path, data: Path) -> Iterator[typing.IO[str]]:
    """The file `out`, whole or not at all, and no other run's meanwhile; nothing where another process of
    the job writes it. Raises InputError if it would replace its own data."""
    from mllm_align import processes
    from mllm_align.files import new_file
    from mllm_align.locks import alone

    with alone(out):
        if os.path.exists(out) and os.path.exists(data) and os.path.samefile(out, data):
            raise refusal(str(out), "is the data file itself", "give another --out")
        with new_file(out) if processes.first() else open(os.devnull, "w") as file:
            yield file


def _lines_beside(out: Path) -> Path:
    """result.json -> result.jsonl. Raises InputError where that is something else's."""
    if out.is_dir():
        raise refusal(str(out), "this is a folder", "name a file")
    beside = out.with_suffix(".jsonl")
    if beside == out:
        raise refusal(str(out), "is named as the lines beside it", "give --out a name that ends in .json")
    if beside.exists() and not out.exists():
        raise refusal(str(beside), "is there without its .json, so it is not ours", "give another --out")
    return beside


def _tell(text: str) -> None:
    """Print a result, once for all processes of a job."""
    from mllm_align import processes

    if processes.first():
        print(text, flush=True)


def _log_beside(out: Path, **fields: Any) -> None:
    from mllm_align import processes

    if not processes.first():
        return
    with open(out.with_name(out.name + ".log.jsonl"), "a", encoding="utf-8") as file:
        file.write(json_text({"time": round(time.time(), 3), **fields}) + "\n")


# ---- options ---------------------------------------------------------------------------------------


def parse(cls: type, verb: str, argv: list[str]) -> Any:
    """Options of a verb. Raises InputError, in one line, where tyro would print a box."""
    default, argv = None, list(argv)
    helping = bool({"-h", "--help"} & set(argv))
    if cls in WITH_CONFIG and not (helping and argv[0].startswith("-")):
        if not argv or argv[0].startswith("-"):
            raise InputError(f"{verb} needs a config file first: mllm-align {verb} CONFIG.py --model ...")
        if cls is Plan:  # of either kind
            default = load_config(argv[0], (Config, BDHSConfig))
            cls = PlanBdhs if isinstance(default, BDHSConfig) else Plan
        elif WITH_CONFIG[cls] is JudgeConfig:
            default = _judging(argv[0], load_config(argv[0], (JudgeConfig, Config)))
        else:
            default = load_config(argv[0], WITH_CONFIG[cls])
        if isinstance(default, Config | JudgeConfig):
            default, argv = _choices(default, argv)
    _check_names(cls, default, argv)
    alone = "--print-config" in argv
    if not (helping or alone):
        _check_required(cls, verb, argv)
    said, shown = io.StringIO(), io.StringIO()
    kind: Any = tyro.conf.AvoidSubcommands[cls]
    if default is not None:
        missing: Any = tyro.MISSING_NONPROP
        paths = dict.fromkeys(_required(cls), Path() if alone else missing)
        default = cls(**paths, config_file=missing, config=default)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
            return tyro.cli(kind, args=argv, default=default, prog=f"mllm-align {verb}")
    except SystemExit as stop:
        if not stop.code:
            print(shown.getvalue(), end="")
            raise
        raise InputError(f"{verb}: {_flatten(said.getvalue() + shown.getvalue())}") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{verb}: {one_line(error, 300)}") from error


def _judging(file: str, config: JudgeConfig | Config) -> JudgeConfig:
    """What judge takes of a run's config."""
    if isinstance(config, JudgeConfig):
        return config
    if config.online is None or config.online.annotator is None:
        found = f"its Config has no annotator (online is {type(config.online).__name__})"
        raise refusal(file, found, "give a JudgeConfig, or a Config with online=OnlinePairs(...)")
    c = config
    return JudgeConfig(config.online.annotator, c.data, c.mesh, c.distributed, c.dtype)


def _branches(config: Config | JudgeConfig) -> dict[str, dict[str, Any]]:
    """Options that replace a whole branch of a config, and what each of their values puts there."""
    annotators: dict[str, Any] = {name: kind() for name, kind in ANNOTATORS.items()}
    mesh: dict[str, Any] = {"none": None, "on": MeshConfig()}
    if isinstance(config, JudgeConfig):
        return {"--annotator": annotators, "--annotator.mesh": mesh}
    return {
        "--objective": {name: kind() for name, kind in OBJECTIVES.items()},
        "--lora": {"none": None, "on": LoraConfig()},
        "--online": {"none": None, **{name: kind() for name, kind in ONLINE.items()}},
        "--online.annotator": annotators,
        "--online.annotator.mesh": mesh,
        "--online.mesh": mesh,
    }


def _choices(config: Any, argv: list[str]) -> tuple[Any, list[str]]:
    """Apply the options that replace a whole branch; one that names the kind that is there changes
    nothing."""
    kinds = _branches(config)
    rest: list[str] = []
    chosen: dict[str, Any] = {}
    i = 0
    while i < len(argv):
        name, equals, value = argv[i].partition("=")
        if name not in kinds:
            rest.append(argv[i])
            i += 1
            continue
        if not equals:
            i += 1
            value = argv[i] if i < len(argv) else ""
        if value not in kinds[name] and not (name == "--objective" and ":" in value):
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(kinds[name])}")
        own = None if value in kinds[name] else _default_of(OBJECTIVES.find(value), value)
        chosen[name.removeprefix("--")] = own or kinds[name][value]
        i += 1
    return _replaced(config, chosen), rest


def _default_of(part: Any, name: str) -> Any:
    """A user's part with its default settings."""
    try:
        return part()
    except InputError:
        raise
    except Exception as error:  # it is the user's program: anything may come out of it
        raise InputError(f"{name} can't be made without arguments ({one_line(error, 200)})") from error


def _fields(config: Any) -> list[str]:
    return [] if config is None else [each.name for each in dataclasses.fields(config)]


def _replaced(config: Any, branches: dict[str, Any], path: str = "") -> Any:
    """The config with these branches, of one level at once as one may need the other, then of the levels
    below. A branch that is of the wanted kind already stays as it is."""
    for name in branches:
        if name.partition(".")[0] not in _fields(config):
            raise InputError(f"--{path}{name} does not go with {path[:-1]} {type(config).__name__}")
    here = {k: v for k, v in branches.items() if "." not in k}
    differ = {k: v for k, v in here.items() if type(getattr(config, k)) is not type(v)}
    config = dataclasses.replace(config, **differ)  # type: ignore[type-var]
    for first in dict.fromkeys(k.partition(".")[0] for k in branches if "." in k):
        below = {k.partition(".")[2]: v for k, v in branches.items() if k.startswith(f"{first}.")}
        made = _replaced(getattr(config, first), below, f"{path}{first}.")
        config = dataclasses.replace(config, **{first: made})
    return config


def _check_names(cls: type, config: Any, argv: list[str]) -> None:
    """Refuse an unknown option with the nearest name there is."""
    known = {"-h", "--help", *_names(cls, config)}
    for item in argv:
        name = item.split("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known and not re.match(r"--?\d", name):
            raise InputError(f"unknown option {one_line(name)}{_nearest(name, known)}")


def _check_required(cls: type, verb: str, argv: list[str]) -> None:
    """Name the options without a default that are not given."""
    given = {item.split("=")[0].replace("_", "-") for item in argv}
    missing = []
    for each in _required(cls):
        name = "--data" if each == "data_file" else "--" + each.replace("_", "-")
        if name not in given:
            missing.append(name)
    if missing:
        raise InputError(f"{verb} needs {', '.join(missing)}; mllm-align {verb} --help says more")


def _required(cls: type) -> list[str]:
    """Fields without a default, but for the config file."""

    def bare(each: Any) -> bool:
        return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING

    return [f.name for f in dataclasses.fields(cls) if bare(f) and f.name != "config_file"]


def _names(cls: Any, value: Any = None, prefix: str = "--") -> set[str]:
    names = set()
    hints = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        name, kind = each.name.replace("_", "-"), hints[each.name]
        if each.name == "config":
            names |= _names(WITH_CONFIG[cls], value, prefix)
            continue
        name = "data" if each.name == "data_file" else name
        below = getattr(value, each.name, None)
        options = [k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)]
        if value is not None and options:
            options = [type(below)] if dataclasses.is_dataclass(below) else []
        for option in options:
            names |= _names(option, below, f"{prefix}{name}.")
        if not options:
            names.add(prefix + name)
            if kind is bool:
                names.add(f"{prefix.removesuffix('.')}{'.' if prefix != '--' else ''}no-{name}")
    return names


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _flatten(box: str) -> str:
    """The sentences of tyro's box, on one line, without its frame and hints."""
    text = " ".join(re.sub(r"[╭╮╰╯│─]+|-{5,}", " ", box).split())
    text = re.split(r"Got errors:|Argument helptext:|For full helptext|[Uu]sage:", text)[0]
    titles = "Value error|Parsing error|Invalid choice|Missing argument|Unrecognized options"
    text = re.sub(rf"^({titles}) |Error parsing (?!-)\S+: ", "", text)
    return one_line(text, 400) or "the options can't be read"


if __name__ == "__main__":
    main()
