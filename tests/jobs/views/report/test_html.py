import json
import re

from jobs.views.report.html import Html, data, element, rounded, table

EVIL = "</script><img src=x onerror=alert(1)> \x1b[2J \u202e &amp;"


def test_text_stays_text_also_in_attributes() -> None:
    made = element("p", EVIL, Html("<b>ours</b>"), title='a"b', hidden=True, id=None)
    assert made == (
        '<p title="a&quot;b" hidden>&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt; \\x1b[2J \\u202e &amp;amp;'
        "<b>ours</b></p>"
    )


def test_no_text_ends_the_block_of_data() -> None:
    block = data({"a": [EVIL, 1, None]}, "data")
    (inside,) = re.findall(r'^<script type="application/json" id="data">(.*)</script>$', block)
    assert "<" not in inside and json.loads(inside) == {"a": [EVIL, 1, None]}


def test_numbers_have_five_digits_and_json_s_forms() -> None:
    numbers = (0.123456789, 123456.7, 5.0, float("nan"), float("inf"), None)
    assert [rounded(each) for each in numbers] == [0.12346, 123460, 5, None, None, None]


def test_a_table_s_cells_name_their_column() -> None:
    made = table(["step", "time"], [["one", "<1s"]], "steps")
    assert (
        '<td role="cell" data-label="time">&lt;1s</td>' in made and '<th scope="row" role="rowheader">one</th>' in made
    )
