"""When batches are begun and finished, with which policy; and which maker a config opens."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from contexts import prepared
from runs import PAIRS, TINY, bundle, compiling

from mllm_align import Distorted, InputError, MeshConfig, OnlineBDHS, OnlinePairs, Scorer
from mllm_align.training.online.feed import Feed, open_maker
from mllm_align.training.online.maker import InFlight, Maker, MakerState, Offline
from mllm_align.training.online.rejected import RejectedByBDHS, RejectedByNoise
from mllm_align.training.online.rollouts import BestAgainstWorst

assert compiling and PAIRS


@dataclass
class Counted(InFlight):
    policy: str


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

    def saved(self, pending):
        return None if pending is None else MakerState({"batch": pending.batch, "policy": pending.policy})

    def restored(self, state, batch, group):
        assert state.metadata["batch"] == batch
        return Counted(batch, group, state.metadata["policy"])

    def close(self):
        self.calls.append("close")


def feed(maker, start=0, stop=3, saved=None):
    return Feed(iter(range(start, stop)), lambda batch: f"group {batch}", maker, stop - 1, saved)


def steps(maker, start=0, stop=3, saved=None):
    source = feed(maker, start, stop, saved)
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
    assert [saved and saved.metadata["batch"] for _, saved in taken] == [1, 2, None]


def test_a_batch_that_was_saved_is_not_begun_again():
    whole = steps(Recorder(ahead=True))
    maker = Recorder(ahead=True)
    again = steps(maker, start=1, saved=whole[0][1])
    assert [b for b, _ in again] == [b for b, _ in whole[1:]]
    assert maker.calls[0] == "begin 2 with policy 1 at 1"


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
