"""When batches are begun and finished, with which policy; and which maker a config opens."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
from contexts import prepared
from runs import PAIRS, TINY, bundle, compiling

from mllm_align import Distorted, InputError, MeshConfig, OnlineBDHS, OnlinePairs, OnlineRewards, Scorer
from mllm_align.align.policy_gradient import RLOO
from mllm_align.training.online.feed import Feed, open_maker
from mllm_align.training.online.maker import InFlight, Maker, MakerState, Offline
from mllm_align.training.online.rejected import RejectedByBDHS, RejectedByNoise
from mllm_align.training.online.rollouts import BestAgainstWorst

assert compiling and PAIRS


@dataclass
class Counted(InFlight):
    policy: str
    step: int = 0
    metrics: dict = field(default_factory=dict)


class Recorder(Maker[Counted]):
    """Writes down what it is asked for."""

    def __init__(self, ahead):
        self.ahead, self.calls = ahead, []

    def begin(self, batch, group, trained, step):
        self.calls.append(f"begin {batch} with {trained} at {step}")
        return Counted(batch, group, trained)

    def finish(self, pending):
        self.calls.append(f"finish {pending.batch}")
        return pending

    def complete(self, round):
        if len(round) > 1:
            self.calls.append(f"complete {[each.batch for each in round]}")

    def saved(self, round):
        if not round:
            return None
        return MakerState({"batches": [each.batch for each in round], "policy": round[0].policy})

    def restored(self, state, batches):
        assert state.metadata["batches"] == [batch for batch, _ in batches]
        return [Counted(*each, state.metadata["policy"]) for each in batches]

    def close(self):
        self.calls.append("close")


def feed(maker, start=0, stop=3, saved=None, config=TINY):
    rounds = config.rounds
    ahead = iter(range(rounds.first(start), rounds.begun(stop)))
    return Feed(ahead, lambda batch: f"group {batch}", maker, config, stop, start, saved)


def steps(maker, start=0, stop=3, saved=None, config=TINY):
    source = feed(maker, start, stop, saved, config)
    return [(source(f"policy {step}", step), source.saved()) for step in range(start, stop)]


def test_a_batch_is_made_by_the_policy_of_its_step():
    maker = Recorder(ahead=False)
    taken = steps(maker)
    assert [(b.batch, b.group, b.policy) for b, _ in taken] == [
        (i, f"group {i}", f"policy {i}") for i in range(3)
    ]
    assert maker.calls[:4] == [
        "begin 0 with policy 0 at 0",
        "finish 0",
        "begin 1 with policy 1 at 1",
        "finish 1",
    ]
    assert all(saved is None for _, saved in taken)


def test_ahead_a_batch_is_begun_before_the_step_on_the_one_before():
    maker = Recorder(ahead=True)
    taken = steps(maker)
    assert [b.policy for b, _ in taken] == ["policy 0", "policy 0", "policy 1"]
    assert maker.calls == [
        "begin 0 with policy 0 at 0",
        "begin 1 with policy 0 at 0",
        "finish 0",
        "begin 2 with policy 1 at 1",
        "finish 1",
        "finish 2",
    ], "nothing is begun that no step takes"
    assert [saved and saved.metadata["batches"] for _, saved in taken] == [[1], [2], None]


def test_a_batch_that_was_saved_is_not_begun_again():
    whole = steps(Recorder(ahead=True))
    maker = Recorder(ahead=True)
    again = steps(maker, start=1, saved=whole[0][1])
    assert [b for b, _ in again] == [b for b, _ in whole[1:]]
    assert maker.calls[0] == "begin 2 with policy 1 at 1"


ROUNDS = replace(
    TINY, objective=RLOO(), online=OnlineRewards(Scorer("votes:short"), minibatches=3, epochs=2)
)


def test_a_round_is_begun_at_once_and_updated_on_in_epochs():
    maker = Recorder(ahead=False)
    taken = steps(maker, stop=14, config=ROUNDS)
    assert maker.calls[:4] == [*(f"begin {i} with policy 0 at 0" for i in range(3)), "complete [0, 1, 2]"]
    batches = [b.batch for b, _ in taken]
    assert batches[:3] == [0, 1, 2] and sorted(batches[3:6]) == [0, 1, 2]
    assert batches[6:9] == [3, 4, 5] and sorted(batches[9:12]) == [3, 4, 5] and batches[12:] == [6, 7]
    assert [b.policy for b, _ in taken[5:7]] == ["policy 0", "policy 6"]
    assert [b.step for b, _ in taken] == list(range(14))
    assert [b.metrics["staleness"][0] for b, _ in taken[:7]] == [0, 1, 2, 3, 4, 5, 0]
    assert [bool(saved) for _, saved in taken[:7]] == [True] * 5 + [False, True]


@pytest.mark.parametrize("done", range(1, 13))
def test_a_round_goes_on_after_any_of_its_updates(done):
    whole = steps(Recorder(ahead=False), stop=13, config=ROUNDS)
    again = steps(Recorder(ahead=False), done, 13, whole[done - 1][1], ROUNDS)
    assert [b for b, _ in again] == [b for b, _ in whole[done:]]


def test_closing_gives_up_what_is_in_flight():
    maker = Recorder(ahead=True)
    feed(maker).close()
    assert maker.calls == ["close"]


SCORER = OnlinePairs(annotator=Scorer("votes:hashed"))


@pytest.mark.parametrize(
    "online, kind, on_policy",
    [
        (None, Offline, False),
        (SCORER, BestAgainstWorst, True),
        (replace(SCORER, stale=True), BestAgainstWorst, False),
        (OnlineBDHS(similarity="lexical"), RejectedByBDHS, True),
        (Distorted(), RejectedByNoise, True),
    ],
)
def test_the_maker_of_a_config(tmp_path, online, kind, on_policy):
    encoder, records = prepared()
    maker = open_maker(replace(TINY, online=online), bundle(), encoder, records, tmp_path / "run")
    assert type(maker) is kind
    assert (maker.on_policy, maker.ahead) == (on_policy, online is not None and not on_policy)
    maker.close()
    assert not list(tmp_path.iterdir()), "opening writes nothing"


def test_a_maker_of_ones_own_is_named_by_its_place(tmp_path):
    """No kind of maker is known to the loop: a config names the class."""
    encoder, records = prepared()
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def __init__(self, context, online):\n        self.rows = context.rows\n"
    )
    online = SimpleNamespace(maker=f"{tmp_path}/mine.py:Mine", mesh=None)
    config = SimpleNamespace(
        online=online, rows_per_micro=2, batch_size=4, micro_batches=2, data=TINY.data, lora=TINY.lora
    )
    assert open_maker(config, bundle(), encoder, records, tmp_path).rows == 2
    online.maker = f"{tmp_path}/mine.py:Other"
    with pytest.raises(InputError, match=r"maker of responses .*Other.* can't be loaded"):
        open_maker(config, bundle(), encoder, records, tmp_path)


def test_a_mesh_that_does_not_fit_the_batch_is_refused(tmp_path):
    encoder, records = prepared()
    online = replace(SCORER, mesh=MeshConfig(data=2))
    with pytest.raises(InputError, match="does not make 1 devices"):
        open_maker(replace(TINY, online=online), bundle(), encoder, records, tmp_path)
