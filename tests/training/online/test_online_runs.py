"""Runs whose responses the policy makes: what they train on, and that they continue as if never stopped."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import votes
from runs import (
    MODEL,
    PAIRS,
    TINY,
    EachStep,
    bundle,
    compiling,
    events,
    flat,
    losses,
    rows,
    same,
    write_pairs,
)

from mllm_align import (
    DPO,
    IPO,
    SFT,
    Averaged,
    BDHSConfig,
    Config,
    DataConfig,
    Distorted,
    Endpoint,
    InputError,
    JudgeModel,
    MeshConfig,
    OnlineBDHS,
    OnlinePairs,
    SamplingConfig,
    SceneOracle,
    Scorer,
    bdhs,
    load,
    train,
)
from mllm_align.annotate.verdict import OUTCOMES
from mllm_align.errors import NotFinite
from mllm_align.generation import bdhs as generation
from mllm_align.generation import decode
from mllm_align.generation.sampling import random_key
from mllm_align.prepare import prepare
from mllm_align.sharding import make_mesh
from mllm_align.training import run_facts, run_folder
from mllm_align.training.online import context, rejected, rollouts

assert compiling and MODEL
SAMPLING = SamplingConfig(max_tokens=12)
HASHED = OnlinePairs(annotator=Scorer("votes:hashed"), sampling=SAMPLING)
ONLINE = replace(TINY, online=HASHED)
METHOD = {"similarity": "lexical", "iterations": 1, "sentence_tokens": 8, "sampling": SAMPLING}
SOURCES = {
    "pairs": HASHED,
    "mixed": replace(HASHED, offline_share=0.5),
    "stale": replace(HASHED, stale=True),
    "bdhs": OnlineBDHS(**METHOD),
    "distorted": Distorted(),
}


class Stop(Exception):
    pass


def stop_after(step):
    def stop(values):
        if values["step"] == step:
            raise Stop

    return stop


SLOW = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in SOURCES if kind not in ("stale", "distorted")
]


@pytest.fixture(scope="module", params=["stale", *SLOW])
def whole(request, tmp_path_factory):
    """(kind, config, model, folder) of an undisturbed run of each kind."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    config = replace(TINY, online=SOURCES[request.param], steps=4, save_every=1)
    return request.param, config, train(config, bundle(), PAIRS, out), out


def test_a_run_trains_and_says_what_it_did(whole):
    kind, _, model, out = whole
    lines = events(out, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5), "policy and reference are the same yet"
    assert any(np.abs(leaf).max() > 0 for leaf in flat(model.trained).values())
    for line in lines:
        assert line["rollout/seconds"] > 0 and 0 < line["groups_used"] <= 1
        if kind in ("bdhs", "distorted"):
            assert line["rejected_usable"] > 0
            continue
        assert line["rollout/tokens_per_second"] > 0 and line["annotate/ranked"] > 0
        assert line["online_share"] == 1 or kind == "mixed"
        assert line["staleness"] == (1.0 if kind == "stale" and line["step"] > 1 else 0.0)
        if kind != "stale":  # one step of 1e-2 moves the policy
            assert 0 <= line["rollout/logp_gap"] < 1e-4
            compiled = line["seconds_per_step"] is None
            assert line["update/seconds"] is None if compiled else line["update/seconds"] > 0
        elif line["step"] > 1:
            assert line["rollout/logp_gap"] > 1e-3
    shown = events(out, "example")
    assert {line["step"] for line in shown} <= {1, 2, 3, 4} and len(shown) >= 2
    assert all(line["id"] and len(line["responses"]) == 2 for line in shown)
    if kind not in ("bdhs", "distorted"):
        assert {line["outcome"] for line in shown} <= set(OUTCOMES)
        assert any(line["outcome"] == "ranked" and all(line["responses"]) for line in shown)
    if kind == "mixed":
        assert 0 < np.mean([line["online_share"] for line in lines]) < 1


def test_a_stopped_run_ends_as_if_it_had_not_been(whole, tmp_path):
    _, config, model, out = whole
    with pytest.raises(Stop):
        train(config, bundle(), PAIRS, tmp_path / "run", callbacks=[EachStep(stop_after(3))])
    again = train(config, bundle(), PAIRS, tmp_path / "run")
    assert [line["step"] for line in events(tmp_path / "run", "start")] == [0, 2]
    assert same(model.trained, again.trained)
    by_step = {line["step"]: line["loss"] for line in events(tmp_path / "run", "train")}
    assert [by_step[step] for step in (1, 2, 3, 4)] == losses(out)


@pytest.mark.slow
def test_no_preference_moves_nothing(tmp_path):
    tied = replace(ONLINE, online=replace(HASHED, annotator=Scorer("votes:alike")), steps=2)
    model = train(tied, bundle(), PAIRS, tmp_path / "run")
    lines = events(tmp_path / "run", "train")
    assert [line["groups_used"] for line in lines] == [0, 0]
    assert [(line["skipped"], line["loss"]) for line in lines] == [(1, None), (1, None)]
    assert not events(tmp_path / "run", "nonfinite")
    still = replace(TINY, steps=1, optim=replace(TINY.optim, learning_rate=0.0))
    assert same(model.trained, train(still, bundle(), PAIRS, tmp_path / "start").trained)


@pytest.mark.slow
def test_the_best_is_chosen_and_the_worst_rejected(tmp_path, monkeypatch):
    """What is trained on: the samples in the scorer's order, with the sampler's log-probs."""
    given = []
    keep = context.RunContext.train_batch

    def filled(self, batch, group, made, padded, *rest, **options):
        texts = [
            None if each is None else [self.encoder.text(r.ids).strip() for r in each] for each in made
        ]
        given.append((texts, keep(self, batch, group, made, padded, *rest, **options)))
        return given[-1][1]

    monkeypatch.setattr(context.RunContext, "train_batch", filled)
    config = replace(ONLINE, online=replace(HASHED, samples=3), steps=1, objective=IPO())
    train(config, bundle(), PAIRS, tmp_path / "run")
    ((texts, trained),) = given
    seen = 0
    for each in texts:
        if each is not None:
            best, worst = (votes.hashed([type("Q", (), {"responses": (t,)})()])[0][0] for t in each)
            assert best > worst
            seen += 1
    assert seen and trained.group.responses.tokens.shape[2] == 2
    logps, mask = np.asarray(trained.group.responses.sampler), np.asarray(trained.group.responses.mask)
    assert (logps[~mask] == 0).all() and (logps[mask] <= 0).all() and (logps < -0.1).any()


@pytest.mark.slow
def test_mixed_keeps_the_pairs_of_the_data_where_chance_says_so(tmp_path, monkeypatch):
    given = []
    keep = context.RunContext.train_batch

    def filled(self, batch, group, made, padded, *rest, **options):
        given.append((made, [self.records[i] for i in batch.records]))
        return keep(self, batch, group, made, padded, *rest, **options)

    monkeypatch.setattr(context.RunContext, "train_batch", filled)
    config = replace(ONLINE, online=SOURCES["mixed"], steps=6)
    train(config, bundle(), PAIRS, tmp_path / "run")
    kept = []
    for made, records in given:
        for each, record in zip(made, records, strict=True):
            kept.append(each is not None and each[0].logps is None)
            if kept[-1]:
                assert [r.ids.tolist() for r in each] == [r.tolist() for r in record.responses]
    assert 0.2 < np.mean(kept) < 0.8


@pytest.mark.slow
def test_bdhs_in_a_run_is_bdhs_of_a_file(tmp_path, monkeypatch):
    """In the first step the policy is the base: it makes what the job over a file makes with that seed."""
    given = {}
    keep = context.RunContext.train_batch

    def filled(self, batch, group, made, padded, *rest, **options):
        for i, each in zip(batch.records, made, strict=True):
            if each is not None:
                given[self.records[i].record.id] = self.encoder.text(each[1].ids).strip()
        return keep(self, batch, group, made, padded, *rest, **options)

    monkeypatch.setattr(context.RunContext, "train_batch", filled)
    data = write_pairs(tmp_path, rows(4))
    config = replace(TINY, online=OnlineBDHS(**METHOD), steps=1)
    train(config, bundle(), data, tmp_path / "run")
    seed = int(random_key(0, "bdhs", 0)[0])
    bdhs(BDHSConfig(**METHOD, seed=seed, batch_size=4), bundle(), data, tmp_path / "made.jsonl")
    lines = map(json.loads, (tmp_path / "made.jsonl").read_text().splitlines())
    made = {row["id"]: row["rejected"] for row in lines}
    assert len(given) >= 3 and all(made[i].strip() == text for i, text in given.items())


@pytest.mark.slow
@pytest.mark.parametrize("online", [OnlineBDHS(**METHOD), Distorted()], ids=["bdhs", "distorted"])
def test_the_averaged_loss_takes_three_responses(tmp_path, online):
    config = replace(TINY, objective=Averaged(pair=DPO(beta=0.2)), online=online, steps=2)
    train(config, bundle(), PAIRS, tmp_path / "run", PAIRS)
    first = events(tmp_path / "run", "train")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert {"rewards/margin", "policy/rewards/margin"} <= set(first)
    (held_out,) = events(tmp_path / "run", "eval")
    assert "policy/rewards/margin" not in held_out and np.isfinite(held_out["loss"])


@pytest.mark.slow
def test_micro_batches_and_devices_change_nothing_but_rounding(tmp_path):
    one = train(replace(ONLINE, steps=2), bundle(), PAIRS, tmp_path / "one")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=1), jax.devices()[:4])
    many = load(MODEL, "float32", mesh)
    train(replace(ONLINE, steps=2, micro_batches=2), bundle(), PAIRS, tmp_path / "micro")
    own = replace(ONLINE, steps=2, online=replace(HASHED, mesh=MeshConfig(data=2, tensor=2)))
    train(own, many, PAIRS, tmp_path / "own")
    full = replace(own, lora=None, freeze=("vision_tower",))
    train(full, many, PAIRS, tmp_path / "full")
    assert events(tmp_path / "full", "train")[1]["rollout/logp_gap"] < 1e-4
    for other in ("micro", "own"):
        left, right = events(tmp_path / "one", "train"), events(tmp_path / other, "train")
        assert [x["rollout/tokens"] for x in left] == [x["rollout/tokens"] for x in right]
        np.testing.assert_allclose(losses(tmp_path / other), losses(tmp_path / "one"), atol=2e-5)
    assert one.trained


@pytest.mark.slow
def test_what_bdhs_needs_is_made_once(tmp_path, monkeypatch):
    """Over two epochs; what each step makes is what a decoder of its own makes with the policy as it is."""
    made, decoded, steps = [], [], []
    keep, stops, make = decode.Generator.__init__, generation.full_stops, rejected.RejectedByBDHS.make

    def init(self, *given):
        made.append(self)
        keep(self, *given)

    def full_stops(*given):
        decoded.append(given)
        return stops(*given)

    def bdhs_of(self, batch, group, trained):
        out = make(self, batch, group, trained)
        steps.append((self.bdhs, jax.tree.map(np.asarray, trained), batch.records, self.bdhs.seed, out[0]))
        return out

    monkeypatch.setattr(decode.Generator, "__init__", init)
    monkeypatch.setattr(generation, "full_stops", full_stops)
    monkeypatch.setattr(rejected.RejectedByBDHS, "make", bdhs_of)
    train(replace(TINY, online=SOURCES["bdhs"], steps=3), bundle(), PAIRS, tmp_path / "run")
    assert (len(made), len(decoded), len(steps)) == (1, 1, 3)
    assert len({seed for *_, seed, _ in steps}) == 2
    maker, trained, records, seed, told = steps[-1]
    policy = replace(bundle(), lora=TINY.lora, trained=trained)
    own = decode.Generator(policy, SAMPLING, maker.generator.size)
    fresh = generation.BDHS(own, maker.encoder, maker.config, maker.similarity, seed)
    _, encoded, _ = prepare(bundle(), PAIRS, TINY.data, 1)
    again = {each.index: each.rejected for each in fresh([encoded[i] for i in records])}
    for index, ids in zip(records, told, strict=True):
        assert ids is None or maker.encoder.text(ids).strip() == again[index].strip()


# ---- logits that are not finite ----------------------------------------------------------------------


@pytest.fixture
def unfit(monkeypatch):
    """unfit(kind): the first of the rows made together gets logits that are not finite, of a model whose
    figures are finite everywhere else."""

    def spoil(kind):
        if kind == "distorted":
            program = rejected.distorted_program

            def distorted(*settings):
                def call(*given):
                    tokens, finite = program(*settings)(*given)
                    return tokens, finite.at[0, 0].set(False)

                return call

            monkeypatch.setattr(rejected, "distorted_program", distorted)
        elif kind == "bdhs":
            stream = decode.Generator.stream

            def spoiled(self, *given):
                for ended in stream(self, *given):
                    yield [(number, out if number else [None] * len(out)) for number, out in ended]

            monkeypatch.setattr(decode.Generator, "stream", spoiled)
        else:
            roll = rollouts.Rollouts._roll

            def rolled(self, *given):
                out = roll(self, *given)
                return out._replace(
                    finite=out.finite.at[0, 0, 0].set(False), logps=out.logps.at[0, 0, 0, 0].set(np.nan)
                )

            monkeypatch.setattr(rollouts.Rollouts, "_roll", rolled)

    return spoil


KINDS = [pytest.param(kind, marks=[] if kind == "pairs" else pytest.mark.slow) for kind in SOURCES]


@pytest.mark.parametrize("kind", KINDS)
def test_responses_from_logits_that_are_not_finite_stop_the_run(tmp_path, unfit, kind):
    unfit(kind)
    with pytest.raises(NotFinite, match=r"step 1: logits of the policy's own .* 1 of 4 records: \d; "):
        train(replace(TINY, online=SOURCES[kind], steps=1), bundle(), PAIRS, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_groups_of_them_are_left_out_and_counted_on_demand(tmp_path, unfit, kind):
    unfit(kind)
    config = replace(TINY, online=SOURCES[kind], steps=3, save_every=1, nonfinite="skip")
    whole = train(config, bundle(), PAIRS, tmp_path / "run")
    lines = events(tmp_path / "run", "train")
    assert [line["rollout/nonfinite"] for line in lines] == [0.25] * 3
    assert all(line["groups_used"] <= 0.75 and np.isfinite(line["loss"]) for line in lines)
    with pytest.raises(Stop):
        train(config, bundle(), PAIRS, tmp_path / "again", callbacks=[EachStep(stop_after(2))])
    assert same(whole.trained, train(config, bundle(), PAIRS, tmp_path / "again").trained)


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"objective": SFT(), "online": HASHED}, "objective is 'SFT'; it must be one on pairs"),
        ({"objective": Averaged(), "online": HASHED}, "objective is 'Averaged'; it must be one on pairs"),
        ({"objective": Averaged()}, "`online` must make the third response"),
        ({"online": HASHED, "reference": "stored"}, "reference is 'stored'; it must be live"),
        ({"online": OnlinePairs(annotator=JudgeModel(), stale=True)}, "online.stale is True"),
    ],
)
def test_configs_that_do_not_go_together(fields, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        Config(**fields)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: OnlinePairs(samples=1), "online.samples is 1; it must be 2 or more"),
        (lambda: OnlinePairs(offline_share=1.0), "online.offline_share is 1.0"),
        (
            lambda: OnlinePairs(sampling=SamplingConfig(temperature=0.0)),
            "online.sampling.temperature is 0.0",
        ),
        (lambda: Distorted(noise_steps=0), "online.noise_steps is 0"),
        (lambda: Averaged(gamma=1.5), "objective.gamma is 1.5"),
        (lambda: Endpoint(url="localhost"), "annotator.url is 'localhost'"),
        (lambda: Endpoint(url="http://user:key@host"), "a key belongs in the environment"),
    ],
)
def test_values_that_are_refused(make, said):
    with pytest.raises(InputError) as refused:
        make()
    assert said in str(refused.value)


def test_a_mesh_of_rollouts_must_go_with_the_batch(tmp_path):
    own = replace(HASHED, mesh=MeshConfig(data=8))
    with pytest.raises(InputError, match="data 8 x fsdp 1 x tensor 1 does not make 1 devices"):
        train(replace(ONLINE, online=own), bundle(), PAIRS, tmp_path / "run")


def test_no_room_for_a_response_is_told_before_anything_is_written(tmp_path):
    config = replace(ONLINE, data=DataConfig(shapes=1, max_length=40))
    with pytest.raises(InputError, match="tokens, the limit is 40"):
        train(config, bundle(), PAIRS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "annotator, said",
    [
        (SceneOracle("nowhere"), "annotator.scenes"),
        (Scorer("nowhere:score"), "nowhere"),
        (JudgeModel(model="nowhere"), "nowhere"),
    ],
    ids=["oracle", "scorer", "judge"],
)
def test_an_annotator_that_cannot_be_had_leaves_no_run(tmp_path, annotator, said):
    """Else a run folder of the wrong configuration would stand in the way of the right one."""
    with pytest.raises(InputError, match=said):
        train(replace(TINY, online=replace(HASHED, annotator=annotator)), bundle(), PAIRS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_judge_that_has_changed_is_refused(tmp_path):
    """Before it answers anything: a run that goes on must have one judge from start to end."""
    shutil.copytree(MODEL, tmp_path / "judge")
    online = replace(HASHED, annotator=JudgeModel(model=str(tmp_path / "judge")))
    config, out = replace(TINY, online=online), tmp_path / "run"

    def described():
        return run_facts.metadata(config, bundle(), PAIRS, None, [])

    before = described()
    assert before["judge_fingerprint"] == before["model_fingerprint"]
    run_folder.start(out, config, before, 0)
    (out / "log.jsonl").write_text('{"event": "train", "step": 1}\n')
    run_folder.check(out, config, described())
    (tmp_path / "judge" / "config.json").write_text((MODEL / "config.json").read_text() + "\n")
    with pytest.raises(InputError, match=r"was started with another judge .*; give its judge, or --out"):
        run_folder.check(out, config, described())
    shutil.rmtree(tmp_path / "judge")
    with pytest.raises(InputError, match="judge"):
        train(config, bundle(), PAIRS, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_made_response_of_the_chosen_ones_tokens_is_no_pair(tmp_path, monkeypatch):
    """As where the template trims what tells them apart; and one that reads like control tokens is text."""
    said = iter(["{} ", "{} </s> <image>"] * 4)

    def made(self, records, seen=None):
        for each in records:
            text = next(said).format(each.record.responses[0])
            yield generation.BDHSResult(each.index, text, 1, True, (0.0,), 0.0, (), 0)

    monkeypatch.setattr(generation.BDHS, "__call__", made)
    template = tmp_path / "trims.jinja"
    parts = "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text | trim }}{% endfor %}"
    ask = "{% if add_generation_prompt %}assistant:{% endif %}"
    template.write_text("{% for m in messages %}{{ m.role }}:" + parts + "\n{% endfor %}" + ask)
    data = DataConfig(shapes=1, chat_template=template)
    train(replace(TINY, online=OnlineBDHS(**METHOD), steps=1, data=data), bundle(), PAIRS, tmp_path / "run")
    (line,) = events(tmp_path / "run", "train")
    assert line["rejected_usable"] == 0.5 and line["grad_norm"] > 0


def test_a_template_that_opens_answers_otherwise_is_refused(tmp_path):
    template = tmp_path / "odd.jinja"
    turn = "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
    ask = "{% if add_generation_prompt %}assistant: Well,{% endif %}"
    template.write_text("{% for m in messages %}{{ m.role }}: " + turn + "\n{% endfor %}" + ask)
    config = replace(ONLINE, online=SOURCES["mixed"], data=DataConfig(shapes=1, chat_template=template))
    with pytest.raises(InputError, match="opens an answer that is asked for otherwise"):
        train(config, bundle(), PAIRS, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    plain = replace(TINY, data=config.data, steps=1)
    assert train(plain, bundle(), PAIRS, tmp_path / "offline").trained, "nothing is made there"
