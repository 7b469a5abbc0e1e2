"""The quick sampler must choose among many answers better than RePaint does in 2,410 evaluations.

RePaint's TV with the centre known, in the paper's setting: 0.727 at s = 0.6, 0.930 at s = 0.3.
"""

import json

import pytest

from tests import exact_mixture
from tests.exact_mixture import Scores, Task, draw_exactly, draw_langevin


def scores(known: str, std: float, evaluations: int | None) -> Scores:
    """evaluations: None: the exact answer."""
    task = Task(known, std)
    return task.score(draw_langevin(task, evaluations) if evaluations else draw_exactly(task))


def test_exact_samples_have_the_scores_of_the_truth():
    exact = scores("centre", 0.3, None)
    assert exact.tv < 0.05 and exact.ok > 0.99 and exact.res == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("known", "std", "tv", "ok"), [("centre", 0.6, 0.6, 0.75), ("centre", 0.3, 0.86, 0.3)]
)
def test_it_chooses_better_than_repaint(known, std, tv, ok):
    found = scores(known, std, 48)
    assert found.tv < tv and found.ok > ok and 0.9 < found.res < 1.1


def test_half_a_picture_leaves_no_choice():
    found = scores("half", 0.6, 48)
    assert found.tv < 0.03 and found.ok > 0.97


def test_json_has_every_row(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["exact_mixture.py", "--json"])
    monkeypatch.setattr(exact_mixture, "SETTINGS", (("half", 0.6),))
    monkeypatch.setattr(exact_mixture, "BUDGETS", (16,))
    exact_mixture.main()
    exact, quick = json.loads(capsys.readouterr().out)
    assert exact["sampler"] == "exact" and quick["evaluations"] in (15, 16)
    assert set(quick["settings"]["half, s = 0.6"]) == {"tv", "ok", "res"}
