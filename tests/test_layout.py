"""Data flows one way: a module imports only modules that stand above it in ORDER."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tappa"
ORDER = [
    "versions",
    "errors",
    "wording",
    "arguments",
    "files",
    "hooks",
    "interrupts",
    "fetching",
    "cache_argument",
    "adapters",
    "tensor_parallel",
    "head_counts",
    "texts",
    "checkpoint",
    "gguf_files",
    "models",
    "rope",
    "kernels",
    "similarity",
    "attention_profile",
    "theory",
    "interface",
    "without_weights",
    "rotary_probe",
    "capture",
    "channels",
    "query_model",
    "layer_statistics",
    "figures",
    "patterns",
    "columns",
    "analysis",
    "experiments",
    "compression",
    "pruning",
    "evaluation",
    "verification",
    "report",
    "cluster",
    "integrations",
    "display",
    "cli",
    "__main__",
]
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def top_module(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """The modules of tappa, by their top name, that a source imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("tappa.")}


def against_the_order(module: str, source: str) -> set[str]:
    """What a module imports although it stands below it, or nowhere, in ORDER."""
    position = ORDER.index(module)
    return imported(source) - set(ORDER[: position + 1])


def flags_named(source: str) -> list[str]:
    """Strings of a source, docstrings left out, that name an option of the command line."""
    tree = ast.parse(source)
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    found = [n.value for n in texts if isinstance(n.value, str) and id(n) not in told]
    return [text for text in found if re.search(r"(^|[ (])--[a-z]", text)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_the_command_line_names_its_options(path):
    others = "with 'ray start --head', or"  # an option of another program
    named = [text for text in flags_named(path.read_text()) if others not in text]
    assert named == [] or top_module(path) == "cli"


def test_the_check_sees_an_option():
    assert flags_named('"""Of --force."""\nraise E(f"{x}: choose --force")') == [": choose --force"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_from_above(path):
    assert top_module(path) in ORDER, "give the new module its place in ORDER"
    assert against_the_order(top_module(path), path.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import tappa.capture",
        "from tappa.capture import LayerView",
        "from tappa import capture",
        "def late():\n    from tappa.capture import LayerView",
    ],
)
def test_the_check_sees_an_import_from_below(source):
    assert against_the_order("rope", source) == {"capture"}
    assert against_the_order("analysis", source) == set()
