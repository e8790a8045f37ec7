"""The documents say what is so: the op table is the registry's, the README's examples run."""

import re
import sys
from pathlib import Path

import pytest

from megalodon_ops import functional, registry
from megalodon_ops._table import with_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_op_table_is_the_registrys() -> None:
    assert with_table(README) == README, "run `make docs`"


def test_performance_is_what_was_measured() -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from report import TARGET, report
    finally:
        sys.path.pop(0)
    assert report() == TARGET.read_text(), "run `make docs`"


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("example", examples(README))
def test_examples_run(example: str) -> None:
    exec(compile(example, "README.md", "exec"), {})


@pytest.mark.parametrize(
    ("page", "needed"),
    [
        ("attention", []),
        ("checkpoints", ["safetensors"]),
        ("generation", ["safetensors"]),
        ("huggingface", ["transformers"]),
        ("loss", []),
        ("packing", []),
        ("tokenizers", ["tokenizers"]),
    ],
)
def test_a_pages_examples_run(
    page: str, needed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a page's examples, one after the other, in one empty folder."""
    for name in needed:
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in examples((ROOT / "docs" / f"{page}.md").read_text()):
        exec(compile(example, f"{page}.md", "exec"), names)


def test_links_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_op_has_a_function_and_a_docstring() -> None:
    for op in registry:
        text = getattr(functional, op.name).__doc__
        assert "Args:" in text
        assert "Returns:" in text
