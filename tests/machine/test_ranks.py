"""One process or many: who this one is, and what all of them share.

Several processes are threads here, with torch's own stores: one in memory, or one that is reached
by TCP as under torchrun.
"""

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
from torch.distributed import DistNetworkError, HashStore

from guided_diffusion.config import UserError
from guided_diffusion.machine import ranks
from guided_diffusion.machine.ranks import ALONE, Team, World, join, read_world

COMPLETE = {
    "WORLD_SIZE": "6",
    "RANK": "4",
    "LOCAL_WORLD_SIZE": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """These variables of torchrun's, and no others."""
    for name in [*COMPLETE, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def teams(size: int) -> list[Team]:
    """Processes that share a store."""
    store = HashStore()
    return [Team(World(rank, size, rank, size), store) for rank in range(size)]


def all_at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each returns, or the UserError that it raises."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=20) for future in [pool.submit(outcome, c) for c in calls]]


# ---- Who this process is ----


def test_a_complete_environment(monkeypatch):
    environment(monkeypatch, COMPLETE)
    assert read_world() == World(rank=4, size=6, local_rank=1, local_size=3)


@pytest.mark.parametrize(
    "variables",
    [{}, {"WORLD_SIZE": "1"}, {"RANK": "3", "LOCAL_RANK": "x"}, COMPLETE | {"WORLD_SIZE": "1"}],
)
def test_a_process_on_its_own(monkeypatch, variables):
    environment(monkeypatch, variables)
    assert read_world() == ALONE == World(rank=0, size=1, local_rank=0, local_size=1)


def assert_refused(name: str, found: str, accepted: str) -> None:
    with pytest.raises(UserError) as error:
        read_world()
    message = str(error.value)
    assert message.startswith(f"environment variable {name}: found {found}; accepted: {accepted}. ")
    assert "torchrun --nproc_per_node" in message and "unset WORLD_SIZE" in message
    assert "\n" not in message


ACCEPTED = {
    "RANK": "a whole number >= 0 and < 6",
    "LOCAL_WORLD_SIZE": "a whole number >= 1 and < 7",
    "LOCAL_RANK": "a whole number >= 0 and < 3",
    "MASTER_ADDR": "the address of the machine of rank 0",
    "MASTER_PORT": "a whole number >= 1 and < 65536",
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("empty", [False, True])
def test_a_part_of_the_environment_is_missing(monkeypatch, name, empty):
    rest = {key: value for key, value in COMPLETE.items() if key != name}
    environment(monkeypatch, rest | ({name: ""} if empty else {}))
    assert_refused(name, "nothing", ACCEPTED[name])


def test_a_world_size_alone(monkeypatch):
    environment(monkeypatch, {"WORLD_SIZE": "4"})
    assert_refused("RANK", "nothing", "a whole number >= 0 and < 4")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", "6"), ("RANK", "-1"), ("RANK", "one"), ("RANK", "1.0"), ("RANK", "²")),
        *(("LOCAL_RANK", "3"), ("LOCAL_RANK", "-1"), ("LOCAL_WORLD_SIZE", "0")),
        *(("LOCAL_WORLD_SIZE", "7"), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536")),
        ("MASTER_PORT", "http"),
    ],
)
def test_a_part_of_the_environment_is_wrong(monkeypatch, name, value):
    environment(monkeypatch, COMPLETE | {name: value})
    assert_refused(name, value, ACCEPTED[name])


@pytest.mark.parametrize("value", ["0", "-2", "many"])
def test_a_world_size_that_is_none(monkeypatch, value):
    environment(monkeypatch, COMPLETE | {"WORLD_SIZE": value})
    assert_refused("WORLD_SIZE", value, "a whole number >= 1")


def test_an_empty_world_size_is_no_world_size(monkeypatch):
    environment(monkeypatch, COMPLETE | {"WORLD_SIZE": ""})
    assert read_world() == ALONE


def test_the_ends_of_what_is_accepted(monkeypatch):
    ends = {"RANK": "5", "LOCAL_WORLD_SIZE": "6", "LOCAL_RANK": "5", "MASTER_PORT": "65535"}
    environment(monkeypatch, COMPLETE | ends)
    assert read_world() == World(5, 6, 5, 6)


def test_every_line_is_labelled_with_the_rank():
    assert World(3, 4).label("one\ntwo\n\nfour") == (
        "[rank 3] one\n[rank 3] two\n[rank 3] \n[rank 3] four"
    )
    assert ALONE.label("one\ntwo") == "one\ntwo"


@pytest.mark.parametrize(("rank", "before"), [(0, ""), (1, "\n")])
def test_words_of_other_ranks_begin_a_line_of_their_own(capsys, rank, before):
    """Where rank 0's progress bar may be."""
    world = World(rank, 2)
    world.say("out")
    world.say("error: no", sys.stderr)
    said = capsys.readouterr()
    assert said.out == f"[rank {rank}] out\n"
    assert said.err == f"{before}[rank {rank}] error: no\n"


# ---- What all processes share ----


def test_what_rank_0_makes_is_in_every_process():
    def share(team: Team) -> Any:
        def make() -> dict:
            assert team.is_first
            return {"rank": team.world.rank, "list": [1, None, "ü"]}

        return team.share("thing", make), team.share("other", lambda: 5)

    results = all_at_once([lambda team=team: share(team) for team in teams(4)])
    assert results == [({"rank": 0, "list": [1, None, "ü"]}, 5)] * 4


def test_what_is_shared_is_encoded_and_decoded():
    made = {1, 2, 3}
    calls = [
        lambda team=team: team.share("set", lambda: made, sorted, lambda text: {*text, "copy"})
        for team in teams(3)
    ]
    first, *others = all_at_once(calls)
    assert first is made and others == [{1, 2, 3, "copy"}] * 2


def test_alone_nothing_is_encoded():
    thing = object()
    assert join(ALONE).share("thing", lambda: thing, encode=pytest.fail) is thing


def test_what_goes_wrong_on_rank_0_is_raised_in_every_process():
    def fail() -> None:
        raise UserError("no such file: ü.png")

    first, *others = all_at_once([lambda team=team: team.share("it", fail) for team in teams(3)])
    assert str(first) == "no such file: ü.png"
    assert [str(error) for error in others] == ["rank 0 has stopped: no such file: ü.png"] * 2


def test_alone_an_error_is_raised_as_it_is():
    with pytest.raises(UserError, match=r"^wrong$"):
        join(ALONE).share("it", lambda: (_ for _ in ()).throw(UserError("wrong")))


def test_numbers_are_handed_out_once():
    found = all_at_once(
        [lambda team=team: [team.add("it", 1) for _ in range(50)] for team in teams(4)]
    )
    assert sorted(sum(found, [])) == list(range(1, 201))
    assert all(numbers == sorted(numbers) for numbers in found)


def test_sums_of_other_names_are_others():
    first, second = teams(2)
    assert (first.add("a", 3), second.add("b", 4), second.add("a", -1)) == (3, 4, 2)


@pytest.fixture
def clock() -> Iterator[list[float]]:
    now = [100.0]
    with patch.object(ranks.time, "monotonic", lambda: now[0]):
        yield now


def test_a_tally_of_several_asks_the_store_now_and_then(clock):
    team, other = teams(2)
    tally, theirs = team.tally("it"), other.tally("it")
    assert tally.add(2) == 2
    assert theirs.add(10) == 12
    clock[0] += 0.4
    assert (tally.add(3), tally.add(4)) == (2, 2)  # neither told nor asked
    assert other.add("it", 0) == 12
    clock[0] += 0.1
    assert tally.add(5) == 24
    clock[0] += 0.4  # since it was asked last
    assert tally.add(1) == 24
    assert tally.tell() == 25 and tally.tell() == 25
    assert theirs.tell() == 25
    assert tally.add(-5) == 25 and tally.tell() == 20


def test_a_tally_alone_is_always_right(clock):
    tally = join(ALONE).tally("it")
    assert [tally.add(number) for number in (1, 2, -1)] == [1, 3, 2]


def test_what_stops_one_stops_all(clock):
    first, second, third = teams(3)
    tally = third.tally("it")
    for team in (first, second, third):
        team.check()
    tally.add(1)
    second.stop("no memory")
    first.stop("stopped, because of [rank 1] no memory")  # as the first did
    for stopped in (first.check, third.check, tally.tell):
        with pytest.raises(UserError) as error:
            stopped()
        assert str(error.value) == "stopped, because of [rank 1] no memory"
    assert tally.add(1) == 1  # later
    clock[0] += 0.5
    with pytest.raises(UserError, match="stopped, because of"):
        tally.add(1)


def test_alone_nobody_else_stops():
    team = join(ALONE)
    team.stop("no memory")
    team.check()


def test_rank_0_leaves_last(monkeypatch):
    first, second, third = teams(3)
    waits = []

    def others_leave(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            second.leave()  # without waiting
        if len(waits) == 5:
            third.leave()

    monkeypatch.setattr(ranks.time, "sleep", others_leave)
    first.leave()
    assert len(waits) == 5
    join(ALONE).leave()
    assert len(waits) == 5


def test_rank_0_waits_for_nobody_for_ever(clock, monkeypatch):
    def pass_time(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(ranks.time, "sleep", pass_time)
    start = clock[0]
    teams(2)[0].leave()
    assert 60 <= clock[0] - start < 61


@pytest.mark.parametrize(
    "use",
    [
        lambda team: team.add("it", 1),
        lambda team: team.check(),
        lambda team: team.stop("reason"),
        lambda team: team.share("it", lambda: 5),
        lambda team: team.tally("it").add(1),
        lambda team: team.leave(),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_is_gone_is_a_user_error(use, rank):
    class Gone:
        def fail(self, *_: object) -> None:
            raise DistNetworkError("Connection reset by peer\nException raised from recvBytes")

        add = check = set = get = compare_set = fail

    with pytest.raises(UserError) as error:
        use(Team(World(rank, 2, rank, 2), Gone()))
    assert str(error.value) == (
        "lost contact with the other processes; run the same command again to go on "
        "(Connection reset by peer)"
    )


# ---- Meeting by TCP, as under torchrun ----


def meeting_at(monkeypatch: pytest.MonkeyPatch, port: int, **variables: str) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment(monkeypatch, COMPLETE | place | variables)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_processes_meet_and_share(monkeypatch):
    meeting_at(monkeypatch, free_port())

    def work(rank: int) -> Any:
        team = join(World(rank, 3, rank, 3))
        plan = team.share("plan", lambda: {"made by": rank})
        numbers = [team.add("batches", 1) for _ in range(20)]
        team.tally("evaluations").tell()
        team.leave()
        return plan, numbers

    results = all_at_once([lambda rank=rank: work(rank) for rank in range(3)])
    assert [plan for plan, _ in results] == [{"made by": 0}] * 3
    assert sorted(sum((numbers for _, numbers in results), [])) == list(range(1, 61))


def test_processes_that_were_restarted_begin_anew(monkeypatch):
    meeting_at(monkeypatch, free_port())
    ranks = [World(0, 2, 0, 2), World(1, 2, 1, 2)]
    before = all_at_once([lambda world=world: join(world) for world in ranks])
    assert [team.add("batches", 5) for team in before] == [5, 10]
    before[0].stop("a worker was killed")
    # The store is still there, and each agent of torchrun counts restarts of its own.
    after = all_at_once([lambda world=world: join(world) for world in ranks])
    assert [team.add("batches", 1) for team in after] == [1, 2]
    for team in after:
        team.check()
    assert before[0].add("batches", 1) == 11


def test_nobody_is_there(monkeypatch):
    monkeypatch.setattr(ranks, "JOINING", timedelta(seconds=1))
    port = free_port()
    meeting_at(monkeypatch, port)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        join(World(1, 2, 1, 2))
    message = str(error.value)
    assert message.startswith(f"cannot reach the other processes at 127.0.0.1:{port} (MASTER_ADDR")
    assert "torchrun" in message and "\n" not in message
    assert time.monotonic() - start < 15


def test_the_address_is_taken(monkeypatch):
    monkeypatch.setattr(ranks, "JOINING", timedelta(seconds=1))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        meeting_at(monkeypatch, port)
        with pytest.raises(UserError, match=f"cannot reach the other processes at .*:{port} "):
            join(World(0, 2, 0, 2))


def test_alone_nobody_is_met(monkeypatch):
    environment(monkeypatch, {})
    team = join(ALONE)
    assert team.is_first and team.add("it", 2) == 2
    assert join(ALONE).add("it", 1) == 1  # a store to itself


def test_what_is_shared_is_json(monkeypatch):
    """So that nothing which another process sends is ever executed."""
    first, _ = teams(2)
    first.share("it", lambda: [1, "two"])
    assert json.loads(first.store.get("it")) == {"made": [1, "two"]}
