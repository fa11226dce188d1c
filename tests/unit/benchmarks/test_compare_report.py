"""A comparison as it is printed."""

import json
from dataclasses import replace

from comparisons import comparison, measurement
from headrace.benchmarks.compare_report import json_line, markdown, remarks
from headrace.benchmarks.comparison import StartUp


def test_the_tables_have_a_row_per_target_and_width_and_a_column_per_peer() -> None:
    found = comparison(
        measurement("headrace", 300, width=1),
        measurement("headrace", 310, width=1, round_number=1),
        measurement("vllm", 100, width=1),
        measurement("headrace", 1234, width=8),
        measurement("openvino", 500, width=8),
    )
    found.start_ups.append(StartUp("headrace", 3.25, True))
    lines = markdown(found).splitlines()
    assert "| 1 | headrace | 2 | 305 (300 to 310) | 10.0 (10.0 to 10.0)" in "\n".join(lines)
    assert "| 1 | headrace | 3.00, 1.00, 1.00 | - |" in [line.replace("-, -, -", "-") for line in lines]
    assert "| 8 | openvino | 1 | 500 | 10.0 | 10.0 | 5.00 | 5.00 | - | 1.50 |" in lines
    assert "| headrace | 3.25 |" in lines
    assert "| headrace, 8 streams: tok/s over that of the best peer | >= 2.7 | 2.47 | NO |" in lines


def test_every_row_of_a_table_has_its_headers_columns() -> None:
    for table in markdown(comparison(measurement("headrace", 300), measurement("vllm", 100))).split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_remarks_say_what_the_tables_do_not() -> None:
    short = measurement("openvino", 50)
    short = replace(short, summary={**short.summary, "num_ok": 0, "failures": {"worker": 1}, "output_tokens_mean": 1.0})
    found = comparison(measurement("headrace", 300, paused={"vllm": 0.97}), measurement("vllm", 100), short)
    found.left_out["llama.cpp"] = "it ended with exit code 1"
    said = "\n".join(remarks(found))
    assert "the first wave (all prompts at once) is counted" in said
    assert "openvino: in-process" in said
    assert "headrace: vllm did not rest beside 1 measurements (up to 97% of a core): stopped" in said
    assert "openvino: round 1, 8 streams: 0 of 1 requests ended well {'worker': 1}" in said
    assert "mean output 1 tokens, SHORTER than the 3 asked" in said
    assert "llama.cpp is left out: it ended with exit code 1" in said


def test_nothing_measured_is_printed_all_the_same() -> None:
    found = comparison()
    assert "not measured" in markdown(found)
    assert json.loads(json_line(found))["medians"] == []


def test_the_json_line_has_medians_ratios_and_floors() -> None:
    found = json.loads(json_line(comparison(measurement("headrace", 300), measurement("vllm", 100))))
    assert {"target": "vllm", "width": 8, "figure": "itl_ms.p99"}.items() <= found["medians"][-1].items()
    ratios = {(ratio["peer"], ratio["figure"]): ratio["median"] for ratio in found["ratios"]}
    assert ratios["vllm", "output_tokens_per_s"] == ratios["the best peer", "output_tokens_per_s"] == 3.0
    assert {floor["is_met"] for floor in found["floors"]} == {True, False, None}
