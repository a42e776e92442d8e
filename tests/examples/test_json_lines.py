# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Results of a run that was killed."""

import pytest
from json_lines import append_line, read_lines


def test_an_incomplete_line_is_named_and_left_out_and_the_next_one_stands_alone(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    append_line(path, {"seed": 0})
    with path.open("a") as file:
        file.write('{"see')
    append_line(path, {"seed": 1})
    with pytest.warns(UserWarning, match=r"Line 2 of .*results\.jsonl is incomplete"):
        assert read_lines(path) == [{"seed": 0}, {"seed": 1}]


def test_no_file_has_no_rows(tmp_path):
    assert read_lines(tmp_path / "results.jsonl") == []
