"""The gate's decision as a table and as Markdown."""

from tasks.pages.gate import checks, to_markdown
from tests.tasks.pages.test_report_page import gate


def test_every_check_is_a_row() -> None:
    cells = checks(gate(False)).cells()
    assert cells.rows == [["math", "champion", "200", "50.0", "62.5", "−12.50 ± 1.25", "0.004", "yes"]]
    assert cells.strong == {0} and checks(gate(True)).cells().strong == set()


def test_markdown_begins_with_what_became_of_the_candidate() -> None:
    lines = to_markdown(gate(False, "a | reason"), run_url="http://x/run").splitlines()
    assert lines[0] == "# ota: kept as challenger" and lines[2:4] == ["- a \\| reason", "- Second reason."]
    assert lines[-1] == "[MLflow run](http://x/run)" and to_markdown(gate(True)).startswith("# ota: promoted")
