"""Records of what is finished: written, read after any accident, and compared in words."""

import json
import os
import random
import resource
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from unittest.mock import patch

import pytest
import torch

from guided_diffusion.config import UserError
from guided_diffusion.machine import storage
from guided_diffusion.run.records import (
    History,
    Origin,
    Records,
    Result,
    beside,
    digest_of,
    load_state,
    save_state,
)

SETTINGS = {"model_path": "a1b2", "t_T": 250, "paste_known": False}
DIGEST = digest_of(SETTINGS)
ORIGIN = Origin(stream=7, flip=False, image="1f", mask="2e")


def a_result(run: int, bytes: int = 100, origin: Origin = ORIGIN) -> Result:
    return Result(run, DIGEST, origin, bytes, 1.5)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "inpainted.run"


@pytest.fixture
def ranks(tmp_path) -> list[Records]:
    """The records of one folder, as twelve processes write them."""
    return [Records(f"{tmp_path}/inpainted", rank) for rank in range(12)]


# ---- Written and read ----


def test_what_is_noted_is_read(ranks):
    first = ranks[0]
    first.begin(1, 5, SETTINGS)
    first.finished("x.png", a_result(1))
    first.finished("sub/ü.png", a_result(1, origin=replace(ORIGIN, stream=8, flip=True)))
    assert first.history() == History(
        run=1,
        seed=5,
        settings={DIGEST: SETTINGS},
        results={
            "x.png": Result(1, DIGEST, ORIGIN, 100, 1.5),
            "sub/ü.png": Result(1, DIGEST, Origin(8, True, "1f", "2e"), 100, 1.5),
        },
    )


def test_the_lines_are_as_documented(ranks, folder):
    ranks[3].begin(2, 5, SETTINGS)
    ranks[3].set_aside(2, {"x.png": "the image changed"})
    ranks[3].finished("x.png", a_result(2))
    text = (folder / "images-3.jsonl").read_text("utf-8")
    assert text.endswith("\n")
    assert [json.loads(line) for line in text.splitlines()] == [
        {"run": 2, "seed": 5, "settings": SETTINGS, "digest": DIGEST},
        {"run": 2, "name": "x.png", "redo": "the image changed"},
        {
            **{"run": 2, "name": "x.png", "digest": DIGEST, "stream": 7, "flip": False},
            **{"image": "1f", "mask": "2e", "bytes": 100, "seconds": 1.5, "inputs": 1},
        },
    ]


def test_nothing_recorded_is_no_history(ranks, folder):
    assert ranks[0].history() == History(run=0, seed=None, settings={}, results={})
    assert not folder.exists()


def test_the_folder_lies_beside_the_results_with_or_without_a_slash():
    for results in ("log/inpainted", "log/inpainted/"):
        assert Records(results).folder == "log/inpainted.run"
        assert Records(results, 2).path == "log/inpainted.run/images-2.jsonl"


def test_only_files_of_lines_are_read(ranks, folder):
    ranks[0].finished("x.png", a_result(1))
    before = ranks[0].history()
    line = (folder / "images-0.jsonl").read_bytes().replace(b"x.png", b"y.png")
    for name in ("lock", "notes.txt", "unfinished/a.pt", ".images-0.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(line)
    assert ranks[0].history() == before


def test_records_that_cannot_be_read_are_a_user_error(ranks, folder):
    ranks[0].finished("x.png", a_result(1))
    with (
        patch.object(storage, "open_binary", side_effect=PermissionError(13, "Permission denied")),
        pytest.raises(UserError, match=r"cannot read the records in .*inpainted\.run: Permission"),
    ):
        ranks[0].history()


# ---- Which line counts ----


def test_the_latest_run_counts_whichever_process_wrote_it(ranks):
    for run, rank, bytes in ((1, 11, 1), (3, 0, 3), (2, 5, 2)):
        ranks[rank].begin(run, seed=10 * run, settings={"run": run})
        ranks[rank].finished("x.png", a_result(run, bytes))
    history = ranks[0].history()
    assert (history.run, history.seed) == (3, 30)
    assert history.results == {"x.png": a_result(3, 3)}
    assert history.settings == {digest_of({"run": run}): {"run": run} for run in (1, 2, 3)}


def test_within_a_run_the_later_line_counts(ranks):
    for bytes in (5, 4, 6):
        ranks[2].finished("x.png", a_result(1, bytes))
    assert ranks[0].history().results["x.png"].bytes == 6


def test_what_was_set_aside_does_not_count(ranks):
    ranks[4].finished("x.png", a_result(1))
    ranks[4].finished("y.png", a_result(1))
    ranks[0].set_aside(2, {"x.png": "the image changed", "z.png": "its file was changed"})
    ranks[0].set_aside(2, {})
    assert list(ranks[0].history().results) == ["y.png"]


@pytest.mark.parametrize("rank", [0, 1, 11])
def test_what_was_made_anew_counts_in_whichever_file_it_is(ranks, rank):
    """Files are read one after another: the line of rank 0 may come before or after."""
    ranks[rank].finished("x.png", a_result(1, 1))
    ranks[3].set_aside(2, {"x.png": "the mask changed"})
    ranks[rank].finished("x.png", a_result(2, 2))
    assert ranks[0].history().results == {"x.png": a_result(2, 2)}
    ranks[3].set_aside(3, {"x.png": "the mask changed"})
    assert ranks[0].history().results == {}


def test_the_order_of_the_files_does_not_matter(ranks):
    lines = [(run, name) for run in (1, 2, 3) for name in ascii_lowercase]
    rng = random.Random(0)
    expected = {}
    for run, name in lines:
        if rng.random() < 0.5:
            ranks[0].set_aside(run, {name: "the image changed"})
            expected.pop(name, None)
        if rng.random() < 0.5:
            expected[name] = a_result(run, rng.randrange(100))
            ranks[rng.randrange(12)].finished(name, expected[name])
    assert {result.run for result in expected.values()} == {1, 2, 3}  # each counts for some
    assert len(expected) < 26
    assert ranks[0].history().results == expected


# ---- Accidents ----


def test_a_torn_last_line_is_left_out_wherever_it_is_torn(ranks, folder):
    ranks[0].begin(1, 5, SETTINGS)
    ranks[0].finished("x.png", a_result(1))
    before, path = ranks[0].history(), folder / "images-0.jsonl"
    start = path.stat().st_size
    ranks[0].finished("ü.png", a_result(1))
    whole = path.read_bytes()
    after = ranks[0].history()
    assert before != after
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        assert ranks[0].history() == (before if end < len(whole) - 1 else after), end


@pytest.mark.parametrize("left", [1, 40, -1])
def test_what_is_written_after_a_torn_line_is_intact(ranks, folder, left):
    ranks[0].finished("x.png", a_result(1))
    line = (folder / "images-0.jsonl").read_bytes()
    (folder / "images-0.jsonl").write_bytes(line + line.replace(b"x.png", b"y.png")[:left])
    ranks[0].finished("z.png", a_result(2))
    names = ["x.png", "y.png", "z.png"] if left == -1 else ["x.png", "z.png"]
    assert list(ranks[0].history().results) == names


RUBBISH = [
    *(b"", b"[]", b"5", b"null", b"{}", b'"text"', b"\xff\xfe\x00", b"{", b"x" * 10**5),
    *(b'{"run": "1"}', b'{"run": null, "name": "x.png"}', b'{"run": 1.5}', b'{"run": [1]}'),
    *(b'{"run": 1}', b'{"run": 1, "name": "x.png"}', b'{"run": 1, "settings": {}}'),
    b'{"run": 1, "name": "x.png", "digest": "d", "bytes": 9}',
    b'{"run": 1, "name": ["x.png"], "redo": "it is a list"}',
    b'{"run": 1, "redo": "without a name"}',
    b'{"run": 1, "name": ["x.png"], "digest": "d", "stream": 1, "flip": false, "image": "1f", '
    b'"mask": "2e", "bytes": 9, "seconds": 1}',
]


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_lines_of_something_else_are_left_out(ranks, folder, rubbish):
    ranks[0].begin(1, 5, SETTINGS)
    ranks[0].finished("x.png", a_result(1))
    before = ranks[0].history()
    with (folder / "images-0.jsonl").open("ab") as file:
        file.write(rubbish + b"\n")
    (folder / "images-1.jsonl").write_bytes(rubbish)
    assert ranks[0].history() == before


# ---- Differences, in words ----


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({}, ""),
        ({"t_T": 100}, "t_T was 250, is 100"),
        ({"model_path": "c3d4"}, "the file of model_path changed"),
        ({"classifier_path": "c3d4"}, "classifier_path was at its default, is c3d4"),
        ({"paste_known": True, "t_T": 100}, "t_T was 250, is 100; paste_known was false, is true"),
        (
            {"paste_known": True, "t_T": 100, "new": 1},
            "t_T was 250, is 100; paste_known was false, is true; and 1 more",
        ),
        (
            {"paste_known": True, "t_T": 100, "new": 1, "newer": 2},
            "t_T was 250, is 100; paste_known was false, is true; and 2 more",
        ),
    ],
)
def test_what_differs_between_settings(now, words):
    history = History(settings={DIGEST: SETTINGS})
    assert history.differences(DIGEST, SETTINGS | now) == words


def test_settings_that_differ_in_nothing_but_their_digest_differ():
    before = {DIGEST: SETTINGS}
    now = SETTINGS | {"more": None}
    words = History(settings=before).differences(DIGEST, now)
    assert words == "its settings are recorded in another form"


@pytest.mark.parametrize(
    "wrong",
    [
        {"digest": []},
        {"bytes": "100"},
        {"seconds": None},
        {"run": "1"},
        {"name": 5},
        {"flip": 0},
        {"image": None},
    ],
)
def test_a_result_of_wrong_types_does_not_count(ranks, wrong):
    ranks[0].finished("x.png", a_result(1))
    line = json.loads(Path(ranks[0].path).read_text())
    Path(ranks[0].path).write_text(json.dumps(line | wrong) + "\n" + "[" * 100_000 + "\n")
    assert ranks[0].history().results == {}


@pytest.mark.parametrize("wrong", [{"settings": "abc"}, {"seed": "abc"}, {"digest": {}}])
def test_a_beginning_of_wrong_types_does_not_count(ranks, wrong):
    ranks[0].begin(1, 5, SETTINGS)
    line = json.loads(Path(ranks[0].path).read_text())
    Path(ranks[0].path).write_text(json.dumps(line | wrong) + "\n")
    history = ranks[0].history()
    assert history.settings == {} and history.seed is None


def test_a_setting_that_is_gone_differs():
    now = {key: value for key, value in SETTINGS.items() if key != "t_T"}
    assert (
        History(settings={DIGEST: SETTINGS}).differences(DIGEST, now)
        == "t_T was 250, is at its default"
    )


def test_settings_that_no_line_tells_of():
    assert History().differences("0" * 32, SETTINGS) == "its settings are not known"
    assert History().differences(DIGEST, SETTINGS) == ""  # as their digest says


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({}, ""),
        ({"image": "3d"}, "the image changed"),
        ({"mask": "3d"}, "the mask changed"),
        ({"stream": 9}, "the seed changed, or its place among the images"),
        ({"flip": True}, "random_flip changed"),
        ({"image": "3d", "mask": "3d", "stream": 9, "flip": True}, "the image changed"),
        ({"mask": "3d", "stream": 9, "flip": True}, "the mask changed"),
    ],
)
def test_what_differs_between_origins(now, words):
    assert ORIGIN.differences(replace(ORIGIN, **now)) == words


def test_equal_contents_have_equal_digests_and_others_do_not():
    same = {"paste_known": False, "t_T": 250, "model_path": "a1b2"}
    assert digest_of(same) == DIGEST and len(DIGEST) == 32
    others = [
        *({}, [], SETTINGS | {"t_T": 251}, SETTINGS | {"t_T": "250"}, SETTINGS | {"t_T": 250.5}),
        *(SETTINGS | {"paste_known": None}, SETTINGS | {"more": None}, {"t_T": 250}),
    ]
    assert len({digest_of(other) for other in [*others, SETTINGS]}) == len(others) + 1


# ---- States of unfinished batches ----

BATCH = [ORIGIN, replace(ORIGIN, stream=8)]


def test_the_path_of_a_state_depends_on_all_that_it_follows_from(ranks, folder):
    def path(digest: str = DIGEST, batch: list[Origin] = BATCH, rank: int = 0) -> str:
        return ranks[rank].state_path(digest, batch)

    assert Path(path()).parent == folder / "unfinished" and path().endswith(".state")
    assert path() == path(batch=[replace(origin) for origin in BATCH], rank=5)
    changed = [replace(ORIGIN, **{key: "else"}) for key in Origin.__annotations__]
    others = [
        path(digest="0" * 32),
        *(path(batch=batch) for batch in (BATCH[:1], BATCH[1:], BATCH[::-1], [*BATCH, ORIGIN])),
        *(path(batch=[first, BATCH[1]]) for first in changed),
        *(path(batch=[BATCH[0], second]) for second in changed),
    ]
    assert len({path(), *others}) == 1 + len(others) == 16


def test_a_state_comes_back_to_the_bit(tmp_path):
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    streams = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    path = str(tmp_path / "new" / "state.pt")
    save_state(path, {"position": 3, "x": x, "streams": streams})
    state = load_state(path)
    assert state.keys() == {"position", "x", "streams"} and state["position"] == 3
    assert torch.equal(state["x"], x) and state["x"].stride() == x.stride()
    assert len(state["streams"]) == 2 and all(map(torch.equal, state["streams"], streams))


def test_no_state_is_none(tmp_path):
    assert load_state(str(tmp_path / "nowhere" / "state.pt")) is None


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_state_that_was_cut_off(tmp_path, left):
    path = tmp_path / "of.state"
    save_state(str(path), {"x": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match="damaged"):
        load_state(str(path))


def test_a_single_bit_of_a_state(tmp_path):
    path = tmp_path / "of.state"
    save_state(str(path), {"x": torch.zeros(1000)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # among the numbers, where torch would not notice
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load_state(str(path))


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "state.pt"
    save_state(str(path), {"position": 3})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(OSError) as error:
            save_state(str(path), {"position": 4, "x": torch.zeros(10**5)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path] and load_state(str(path)) == {"position": 3}


def test_states_are_forgotten_and_nothing_else(ranks, folder):
    ranks[0].begin(1, 5, SETTINGS)
    for origin in BATCH:
        save_state(ranks[0].state_path(DIGEST, [origin]), {"position": 3})
    assert len(list((folder / "unfinished").iterdir())) == 2
    ranks[7].forget_states()
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["images-0.jsonl"]
    ranks[7].forget_states()


# ---- Beside the results ----


def test_all_paths_to_a_folder_lead_to_the_same_records(tmp_path, monkeypatch):
    (tmp_path / "out" / "inpainted").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "out" / "inpainted")
    monkeypatch.chdir(tmp_path)
    paths = ["out/inpainted", "out/inpainted/", "out//inpainted", "out/inpainted/."]
    paths += ["link", f"{tmp_path}/link", "out/../out/inpainted"]
    assert {beside(path, ".run") for path in paths} == {"out/inpainted.run"}
    monkeypatch.chdir(tmp_path / "out" / "inpainted")
    assert beside(".", ".run") == f"{tmp_path}/out/inpainted.run"
    assert beside("gs://bucket/out/", ".run") == "gs://bucket/out.run"


# ---- One run at a time ----


def test_a_second_run_is_kept_out_until_the_first_ends(tmp_path):
    first, second = (Records(f"{tmp_path}/inpainted") for _ in range(2))
    first.lock()
    first.lock()  # it has it already
    with pytest.raises(UserError) as error:
        second.lock()
    assert f"another run is writing these results (process {os.getpid()}" in str(error.value)
    assert f"{tmp_path}/inpainted.run/lock" in str(error.value)
    Records(f"{tmp_path}/others").lock()  # results of its own
    del first, error
    second.lock()


def test_a_folder_that_cannot_be_locked_is_a_user_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write in .*file/inpainted\.run: Not a directory"):
        Records(f"{tmp_path}/file/inpainted").lock()
