"""Bars are for people at a terminal only."""

from __future__ import annotations

import sys

import pytest

from msa2conv.progress import track


def test_silent_when_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "count", show=True)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_bar_at_a_terminal_unless_told_otherwise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track(range(3), "count", show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track(iter(range(3)), "count", show=True, total=3)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert "count" in captured.err and captured.out == ""
