"""A prompt's template is bounded, and whatever it raises names its file."""

import pytest
from template_attacks import BROKEN, ENDLESS, RAISING

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.tasks.prompts import LONGEST, Template

FEW = [
    "loops in loops",
    "doubling by ~",
    "nested lists as JSON",
    "'%4000000000d' % 1",
    "'a' * 4000000000",
    "lipsum(4000000000)",
]


def template(tmp_path, body):
    path = tmp_path / "mine.j2"
    path.write_text("{% block user %}" + body + "{% endblock %}", encoding="utf-8")
    return Template("generic_row", path)


@pytest.mark.parametrize(
    "source", [ENDLESS[name] for name in FEW] + [*RAISING.values()], ids=[*FEW, *RAISING]
)
def test_a_prompt_that_cannot_be_made_names_its_file(source, tmp_path):
    # In a block as in a file; only a file may extend another.
    made = template(tmp_path, source.replace("extends", "include"))
    with pytest.raises(GvendiError, match=r"mine\.j2' cannot be filled: "):
        made.messages({"shots": [{"prompt": "a", "completion": "b"}]})


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_a_prompt_that_cannot_be_compiled_names_its_file(source, tmp_path):
    with pytest.raises(GvendiError, match=r"mine\.j2'"):
        template(tmp_path, source)


def test_a_file_that_is_no_prompt_is_refused_before_it_is_read_whole(tmp_path):
    path = tmp_path / "large.j2"
    with open(path, "wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(GvendiError, match=f"large.j2' has more than {LONGEST:,} characters"):
        Template("generic_row", path)
