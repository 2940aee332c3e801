import ast

import pytest
from regrad_runner.plugins.copied_code import renamed, without_prose

SOURCE = '''"""Of someone, 2020."""

import math  # as they have it

# A line of its own.
# And another.


class Old:
    r"""Of someone.

    Someone, 2020, "A title".
    """

    name = "old"  # noqa: X1

    def rule(self, x):
        "Théy say: one line."; return x  # é

    async def later(self):
        """Alone."""

    def text(self):
        """Kept below."""
        return """no docstring  # no comment""", "#", "old_reference", f"{self.name} old"
'''


def test_docstrings_are_blank_comments_are_gone_and_the_rest_is_as_it_was():
    bare = without_prose(SOURCE)
    assert "2020" not in bare
    assert "someone" not in bare.lower()
    assert "Théy" not in bare
    assert "# A line" not in bare
    assert "# as they" not in bare
    assert "import math\n" in bare
    assert 'name = "old"  # noqa: X1' in bare
    assert '"""no docstring  # no comment""", "#", "old_reference"' in bare
    texts = [
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(bare))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert texts == ["(fill in)"] * 5


def test_names_change_in_code_and_words_in_strings_and_nothing_else():
    words = {r"(?<=_)old\b|\bold(?=_)": "new_one", r"\bold\b": "new-one"}
    new = renamed(without_prose(SOURCE), {"Old": "NewOne"}, words)
    assert "class NewOne:" in new
    assert 'name = "new-one"' in new
    assert '"new_one_reference"' in new
    assert "{self.name} new-one" in new
    assert renamed("older = old + Older.old", {"Old": "New"}, words) == "older = old + Older.old"


@pytest.mark.parametrize("source", ["", "\n", "x = 1", "x = 1  # c", "# c", "# c\n", "'doc'"])
def test_small_texts(source):
    bare = without_prose(source)
    assert "c" not in bare.replace("doc", "")
    ast.parse(bare)
