"""Imports inside the package run one way, and what its source must and must not hold."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import hpcloss
from hpcloss import functional
from hpcloss.losses.module import Loss

ROOT = Path(hpcloss.__file__).parent
FILES = {
    ".".join(("hpcloss", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
# Each layer may import those before it; modules of one layer do not know each other, but for what is named below.
LAYERS = [
    {"arithmetic", "operators", "reference"},
    {"checks"},
    {"plan"},
    {"backends"},
    {"primitives"},
    {"memory", "prototypes", "distributed"},
    {"losses"},
    {"functional"},
    {"compat"},
    {"__main__"},
]
# Inside a package its modules are layers as well, in this order; modules of one set do not know each other.
INSIDE = {
    "plan": [
        {"labels", "regions", "native", "philox"},
        {"sorting", "draw"},
        {"partition"},
        {"sampling"},
    ],
    "primitives": [
        {"rows"},
        {"scale", "segment_mean"},
        {"autograd"},
        {"pair_lse", "pair_mean", "pair_cross_entropy"},
        {"contrast", "one_positive"},
    ],
    "losses": [
        {"options", "reduction"},
        {"module", "views"},
        {"cells", "vectors"},
        set(),  # the families: every other module
    ],
}
APART = {"heads"}  # imports nothing of the package


def layer_name(module):
    return module.split(".")[1] if "." in module else ""


def imports(path):
    """Every module imported anywhere in the file, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            modules = [name for alias in node.names if (name := f"{node.module}.{alias.name}") in FILES]
            yield from modules if len(modules) == len(node.names) else [node.module, *modules]


def levels(layers):
    return {name: index for index, layer in enumerate(layers) for name in layer}


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    level, own = levels(LAYERS), layer_name(module)
    if not own:
        return  # the package itself names everything public
    assert own in level or own in APART, f"{module} has no layer"
    for imported in imports(FILES[module]):
        other = layer_name(imported) if imported.startswith("hpcloss") else None
        if imported == "hpcloss":
            assert own == "__main__", f"{module} imports the package itself"  # the command names its version
            continue
        if other is None or other == own:
            continue
        assert own not in APART and other not in APART, f"{module} imports {imported}"
        assert level[other] < level[own], f"{module} imports {imported}"


@pytest.mark.parametrize("package", INSIDE)
def test_imports_inside_a_package_run_one_way(package):
    modules = {module.split(".")[2]: path for module, path in FILES.items() if module.startswith(f"hpcloss.{package}.")}
    named = set().union(*INSIDE[package])
    assert named <= set(modules)
    level = levels([layer or set(modules) - named for layer in INSIDE[package]])
    assert set(level) == set(modules)
    for module, path in modules.items():
        for imported in imports(path):
            if imported.startswith(f"hpcloss.{package}."):
                other = imported.split(".")[2]
                assert level[other] < level[module], f"{package}.{module} imports {package}.{other}"


@pytest.mark.parametrize("module", FILES)
def test_nothing_but_torch_and_the_standard_library(module):
    import sys

    others = {"triton"} if module.startswith("hpcloss.backends.triton") else set()
    for imported in imports(FILES[module]):
        assert imported.split(".")[0] in sys.stdlib_module_names | {"torch", "hpcloss"} | others


def test_the_oracle_imports_torch_alone():
    for module in (module for module in FILES if layer_name(module) == "reference"):
        for imported in imports(FILES[module]):
            own = imported.startswith("hpcloss.reference.")
            assert own or imported.split(".")[0] in {"torch", "math", "collections"}, f"{module} imports {imported}"


@pytest.mark.parametrize("module", FILES)
def test_no_assert_no_print_no_drawer(module):
    assert layer_name(module) not in ("utils", "common", "registry", "config", "misc")
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        assert not isinstance(node, ast.Assert), f"assert in {module}:{node.lineno}"
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        prints = called == "print" and module != "hpcloss.__main__"  # the command prints
        assert not prints and called not in ("breakpoint", "eval", "exec"), f"{called} in {module}:{node.lineno}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except in {module}:{node.lineno}"


@pytest.mark.parametrize("module", FILES)
def test_no_global_setting_of_torch_is_touched(module):
    banned = ("set_num_threads", "manual_seed", "use_deterministic_algorithms", "set_default_dtype", "set_grad_enabled",
              "set_float32_matmul_precision")  # fmt: skip
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        assert name not in banned, f"{name} in {module}:{node.lineno}"


@pytest.mark.parametrize("module", FILES)
def test_public_things_have_a_docstring(module):
    module = importlib.import_module(module)
    assert module.__doc__
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, f"{module.__name__}.{name}"


def test_public_methods_have_a_docstring():
    for name in hpcloss.__all__:
        thing = getattr(hpcloss, name)
        if inspect.isclass(thing):
            for method, body in vars(thing).items():
                if inspect.isfunction(body) and (not method.startswith("_") and method != "extra_repr"):
                    assert body.__doc__ or method == "forward", f"{name}.{method}"


def test_all_is_complete_and_sorted():
    public = {
        name for name, thing in vars(hpcloss).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }  # fmt: skip
    assert set(hpcloss.__all__) == public | {"__version__"}
    lists = {
        "losses/__init__.py": importlib.import_module("hpcloss.losses").__all__,
        "functional.py": functional.__all__,
    }
    for file, names in lists.items():
        assert names == sorted(names), f"__all__ of hpcloss/{file} is not sorted"
        assert set(names) <= public, f"hpcloss lacks names of hpcloss/{file}"
    for module in (module for module in FILES if module.startswith("hpcloss.losses.")):
        for name, thing in vars(importlib.import_module(module)).items():
            own = getattr(thing, "__module__", None) == module and not name.startswith("_")
            if own and inspect.isclass(thing) and issubclass(thing, Loss) and thing is not Loss:
                assert name in lists["losses/__init__.py"], f"hpcloss/losses/__init__.py lacks {name}"
            if own and name.endswith("_loss"):
                assert name in lists["functional.py"], f"hpcloss/functional.py lacks {name}"


def test_the_package_is_typed():
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_short(module):
    """Docstrings do not count: those of public things have an entry for every argument."""
    source = FILES[module].read_text()
    nodes = list(ast.walk(ast.parse(source)))
    documented = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    assert source.count("\n") - sum(map(docstring_lines, documented)) <= 400
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1 - docstring_lines(node)
            assert lines <= 60, f"{module}.{node.name} has {lines} lines"


def docstring_lines(node):
    if ast.get_docstring(node) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def test_a_backend_is_named_where_the_public_option_enters():
    """Of the losses `pack` alone takes a backend, besides functions and constructors of losses themselves."""
    takers = set()
    for module in (module for module in FILES if module.startswith("hpcloss.losses.")):
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            if isinstance(node, ast.Call) and any(keyword.arg == "backend" for keyword in node.keywords):
                takers.add(ast.unparse(node.func))
    assert takers == {"pack", "super().__init__", "unchecked(region_phpc_loss)"}
