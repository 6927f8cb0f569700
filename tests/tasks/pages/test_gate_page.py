"""The gate's decision as a table and as Markdown."""

from tasks.pages.gate import checks, others, to_markdown
from tests.tasks.pages.test_report_page import gate


def test_every_check_is_a_row() -> None:
    cells = checks(gate(False)).cells()
    assert cells.rows == [["math", "champion", "200", "50.0", "62.5", "−12.50 ± 1.25", "0.004", "yes"]]
    assert cells.strong == {0} and checks(gate(True)).cells().strong == set()


def test_markdown_begins_with_what_became_of_the_candidate() -> None:
    lines = to_markdown(gate(False, "a | reason"), run_url="http://x/run").splitlines()
    assert lines[0] == "# ota: kept as challenger" and lines[2:4] == ["- a \\| reason", "- Second reason."]
    assert lines[-1] == "[MLflow run](http://x/run)" and to_markdown(gate(True)).startswith("# ota: promoted")


def test_a_line_for_each_of_the_other_candidates() -> None:
    text = others({"a": gate(False, "a | reason"), "b": gate(False)}, {"a": "http://x/run", "b": None})
    lines = text.splitlines()
    assert lines[:2] == ["# The other candidates", ""] and len(lines) == 4
    assert (
        lines[2].startswith("- [a](http://x/run): average ")
        and "a \\| reason" in lines[2]
        and lines[3].startswith("- b: average ")
    )
