"""A file imports only from files on a lower floor, and the lower floors start without torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    name: floor
    for floor, names in enumerate(
        (
            "config crop_tool demo_world model_card vision_tower",
            "response_format model_utils answer_rules architecture box_frames command_line demo_model patience",
            "conversation rewards traces judge memory_model checkpoints",
            "data_check data_sheet token_view visualize rollouts benchmark_data format_parts vllm_server",
            "data_utils data_formats kv_cache sampling sharding packing vllm_generation measures step_graphs "
            "packed_linear rollout_pages row_index",
            "decoding sft_data trackers streaming",
            "generation",
            "scoring resuming",
            "trainers training inference",
            "train_sft evaluate convert_data",
            "watching web_page",
            "train_grpo",
            "demo probe",
            "train_qwenvl_25",  # --demo opens demo.py
            "configure_training example_usage web_demo",
        )
    )
    for name in names.split()
}
HEAVY = {"torch", "torchvision", "transformers", "trl", "peft", "datasets", "accelerate"}
FILES = sorted(path.stem for path in ROOT.glob("*.py"))


def imported(nodes: list[ast.AST]) -> Iterator[str]:
    """Top names of the modules that these statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when the module is imported: not function bodies, not under TYPE_CHECKING."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        yield node
        todo += ast.iter_child_nodes(node)


def breaches(name: str, source: str) -> list[str]:
    """What the file `name` imports although it may not."""
    tree = ast.parse(source)
    found = []
    for module in sorted(set(imported(list(ast.walk(tree))))):
        if module in FLOORS and FLOORS[module] >= FLOORS[name]:
            found.append(f"{name} (floor {FLOORS[name]}) imports {module} (floor {FLOORS[module]})")
    if FLOORS[name] <= 3 or name == "data_utils":
        heavy = sorted(HEAVY & set(imported(list(run_at_import(tree)))))
        found += [f"{name} (floor {FLOORS[name]}) imports {module} at start" for module in heavy]
    return found


def test_every_file_of_the_root_has_a_floor():
    assert set(FILES) - set(FLOORS) == set()


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_lower_floors_and_starts_light(name):
    assert breaches(name, (ROOT / f"{name}.py").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("crop_tool", "from conversation import Renderer", "crop_tool (floor 0) imports conversation (floor 2)"),
        ("rewards", "def f():\n    import traces", "rewards (floor 2) imports traces (floor 2)"),
        ("config", "if TYPE_CHECKING:\n    import training", "config (floor 0) imports training (floor 8)"),
        ("data_utils", "import torch.nn", "data_utils (floor 4) imports torch at start"),
        ("visualize", "try:\n    from trl import X\nexcept E:\n    pass", "visualize (floor 3) imports trl at start"),
        ("config", "class A:\n    import peft", "config (floor 0) imports peft at start"),
    ],
)
def test_a_breach_is_found_wherever_the_import_stands(name, source, message):
    assert breaches(name, source) == [message]


def test_imports_for_types_and_inside_functions_may_be_heavy():
    source = "if TYPE_CHECKING:\n    import torch\ndef f():\n    import trl\nasync def g():\n    import peft"
    assert breaches("data_utils", source) == []
