"""What a change of the code puts out of date: all that it may change, and nothing else."""

import ast
import functools
import importlib
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import nbformat
import pytest

from avit_lib import halting, losses, model, packed, starts
from avit_lib.data import images
from avit_lib.evaluation import metrics
from avit_lib.study import figures, fingerprint, get_profile, study, tables
from avit_lib.study.fingerprint import fingerprint as hash_of
from avit_lib.study.fingerprint import used_by
from avit_lib.study.study import ingredients
from avit_lib.training import loop, processes, seed_everything

PROFILES = ("smoke", "caltech24", "imagenet")
RUNS = {name: get_profile(name).runs for name in PROFILES}
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def hashes() -> dict[tuple[str, str], str]:
    """The fingerprint of every run."""
    of_code = functools.cache(hash_of)  # runs share it
    return {
        (profile, run.name): of_code(*ingredients(run))
        for profile in PROFILES
        for run in RUNS[profile]
    }


def runs(chosen) -> set[tuple[str, str]]:
    """Those runs for which ``chosen`` says so."""
    return {(profile, run.name) for profile in PROFILES for run in RUNS[profile] if chosen(run)}


SOURCE = functools.cache(fingerprint.source)
BEFORE = hashes()


def retrained() -> set[tuple[str, str]]:
    """The runs whose fingerprint is another one now."""
    return {run for run, value in hashes().items() if value != BEFORE[run]}


@pytest.fixture(autouse=True)
def sources_are_read_once(monkeypatch):
    """To read a file is slow, and this module does it again and again."""
    monkeypatch.setattr(fingerprint, "source", SOURCE)


@pytest.fixture
def rewrite(monkeypatch):
    """Puts something in the place of a piece of the source of a function or class."""

    def replaced(thing, before: str, after: str) -> None:
        thing = thing.fget if isinstance(thing, property) else thing
        source = fingerprint.source
        assert before in source(thing)
        ast.parse(source(thing).replace(before, after))

        def changed(one) -> str:
            return source(one).replace(before, after) if one is thing else source(one)

        monkeypatch.setattr(fingerprint, "source", functools.cache(changed))

    return replaced


def everyone(run) -> bool:
    return True


def halts(run) -> bool:
    return run.halting is not None


def halts_packed(run) -> bool:
    return halts(run) and run.training.execution == "packed"


def halts_masked(run) -> bool:
    return halts(run) and run.training.execution != "packed"


def packs(run) -> bool:
    return halts_packed(run) or run.saved > 0


def fitted(run) -> bool:
    return halts(run) and run.halting.start != "beta"


def test_there_are_runs_of_every_kind():
    kinds = (
        halts,
        halts_packed,
        halts_masked,
        fitted,
        lambda run: not halts(run),
        lambda run: run.teacher,
    )
    assert all(runs(kind) for kind in kinds)


# --- what trains a model again --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thing", "before", "after", "concerned"),
    [
        (halting.halting_score, "channel + rule.beta", "channel - rule.beta", halts),
        (
            halting.halting_step,
            ">= 1 - eps",
            "> 1 - eps",
            lambda run: halts_masked(run) or fitted(run),
        ),
        (halting.trace_of, "1 - before", "2 - before", halts_packed),
        (losses.ponder_loss, "ponder.mean()", "ponder.sum()", halts),
        (
            losses.distillation_loss,
            "temperature**2",
            "temperature",
            everyone,
        ),  # all that use TaskLoss, taught or not
        (losses.TaskLoss, "task + self", "task - self", everyone),
        (losses.AdaptiveLoss, "alpha_distr: float = 0.1", "alpha_distr: float = 0.2", halts),
        (packed.packed_attention, "layout, dropout, bias)", "layout, 0.0, bias)", packs),
        (packed.attend_buckets, "mask, dropout)", "mask, 0.0)", packs),
        (model.AViT.embed, "self.norm_pre", "self.norm", halts),
        (model.AViT.rule, "self.gamma", "-self.gamma", halts),
        (model.AViT.__init__, '("beta", beta)', '("beta", eps)', halts),
        (model.run_masked, "tokens * active[..., None]", "tokens", halts_masked),
        (
            model.masked_block,
            "keys = (active",
            "keys = (~active",
            lambda run: halts_masked(run) or fitted(run),
        ),
        (starts.class_attention, "~active[:, 1:, None]", "active[:, 1:, None]", fitted),
        (starts.scale_channel_rate, "torch.lerp(old,", "torch.lerp(-old,", fitted),
        (model.register, '"out_indices", 3', '"out_indices", 4', everyone),
        (images.Images, "self.transform(self.images[index])", "self.images[index]", everyone),
        (images.EachByItself, "self(image) for", "image for", everyone),
        (images.decode, "BICUBIC", "BILINEAR", everyone),
        (images.loader, "drop_last=shuffle", "drop_last=False", everyone),
        (loop.train_epoch, "zero_grad(set_to_none=True)", "zero_grad()", everyone),
        (loop.train_epoch, "10_007", "10_009", everyone),
        (loop.gains_by_bfloat16, "torch.cuda.is_bf16_supported()", "True", everyone),
        (seed_everything, "torch.manual_seed(seed)", "torch.manual_seed(0)", everyone),
        (processes.average_gradients, "/ count()", "", everyone),
    ],
    ids=lambda value: (
        getattr(value, "__name__", None) if isinstance(value, (FunctionType, type)) else None
    ),
)
def test_a_changed_formula_trains_those_again_that_use_it(rewrite, thing, before, after, concerned):
    rewrite(thing, before, after)
    assert retrained() == runs(concerned)


@pytest.mark.parametrize(
    ("module", "name", "value", "concerned"),
    [
        (starts, "RIDGE", 3.0, fitted),
        (starts, "SPREAD", 0.25, fitted),
        (study, "FIT_IMAGES", 256, lambda run: fitted(run) or run.saved),
        (images, "CROP_AREA", (0.4, 1.0), everyone),
        (images, "CROP_AREA", (1.0, 0.5), everyone),
        (images, "STATISTICS", images.STATISTICS[::-1], everyone),
        (
            model,
            "SHAPES",
            {name: shape | {"depth": 13} for name, shape in model.SHAPES.items()},
            everyone,
        ),
    ],
)
def test_a_changed_constant_trains_those_again_that_use_it(
    monkeypatch, module, name, value, concerned
):
    monkeypatch.setattr(module, name, value)
    assert retrained() == runs(concerned)


# --- what does not --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thing", "before", "after"),
    [
        (packed.predict_packed, "0.0 * tokens", "1.0 * tokens"),  # inference
        (metrics, ".mean()", ".sum()"),
        (tables.figures, "1 - values", "2 - values"),
        (loop.finished_history, "!=", "=="),
    ],
)
def test_what_only_evaluates_trains_nobody_again(rewrite, thing, before, after):
    rewrite(thing, before, after)
    assert retrained() == set()


@pytest.mark.parametrize(
    ("thing", "before", "after"),
    [
        (halting.halting_score, "# h = sigmoid(gamma * t_0 + beta)", "# equation 3"),
        (halting.halting_score, "    channel = tokens", "\n    # the first\n    channel = tokens"),
        (halting.halting_score, "Halting scores h", "The scores"),
        (halting.halting_score, "rule: HaltingRule", "rule: object"),
        (halting.halting_score, ") -> Tensor", ") -> object"),
        (halting.HaltingState, "active: Tensor", "active: object"),
        (halting.HaltingRule, "When a token halts", "If a token halts"),
        (halting.halting_step, "halts = active & (", "halts = (active) & ("),
        (losses.distribution_loss, "direction must be 'paper'", "say 'paper'"),
        (losses.AdaptiveLoss, "``progress`` is the fraction of training done, 0..1", ""),
        (loop.train_epoch, "train into another folder", "train elsewhere"),
        (starts.fit_start, "leaves no patch", "leaves nothing"),
    ],
)
def test_a_change_for_readers_alone_changes_nothing(rewrite, thing, before, after):
    rewrite(thing, before, after)
    assert retrained() == set()


def test_another_condition_or_kind_of_an_error_does(rewrite):
    rewrite(losses.distribution_loss, "direction not in", "direction in")
    assert retrained() == runs(halts)
    rewrite(losses.distribution_loss, "raise ValueError(", "raise KeyError(")
    assert retrained() == runs(halts)


def test_a_checkpoint_tells_whether_the_code_is_that_which_trained_it(
    rewrite, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    (tmp_path / "short.toml").write_text("extends = 'smoke'\nruns.deit.training.epochs = 1\n")
    whole = study.Study(str(tmp_path / "short.toml"), device="cpu")
    for again in (False, True):
        for name in ("deit", "avit"):
            whole.train(name)
        told = [line for line in capsys.readouterr().out.splitlines() if "training again" in line]
        assert told == (
            ["A-ViT from ImageNet: settings or code changed since it was trained; training again"]
            if again
            else []
        )
        if not again:
            rewrite(
                halting.halting_score,
                "rule.gamma * channel + rule.beta",
                "rule.beta + rule.gamma * channel",
            )


# --- modules: their names don't count, what is in them does ---------------------------------------

FORMULA = "FACTOR = 3\n\ndef formula(x):\n    return x * FACTOR\n"
USE = "def use(x):\n    return {call}(x) + 1\n"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Imports a package of so many files, which is then the one that fingerprints are of."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        sys, "dont_write_bytecode", True
    )  # it would be taken for that of a later file of the same size
    monkeypatch.setattr(fingerprint, "PACKAGE", "toy")

    def imported(**files: str) -> dict[str, ModuleType]:
        for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
            del sys.modules[name]
        folder = tmp_path / "toy"
        folder.mkdir(exist_ok=True)
        for name, code in {"__init__": "", **files}.items():
            (folder / f"{name}.py").write_text(code)
        importlib.invalidate_caches()
        return {name: importlib.import_module(f"toy.{name}") for name in files}

    yield imported
    for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
        del sys.modules[name]


def test_the_name_of_a_module_and_the_way_to_import_it_do_not_count(toy):
    found = toy(
        a=FORMULA,
        b=f'"""Another text."""\nimport math\n\n{FORMULA}\n\ndef unused(x):\n    return math.sin(x)\n',
        by_name_a="from toy.a import formula\n" + USE.format(call="formula"),
        by_name_b="from toy.b import formula\n" + USE.format(call="formula"),
        by_module_a="from toy import a\n" + USE.format(call="a.formula"),
        by_module_b="from toy import b\n" + USE.format(call="b.formula"),
        renamed="import toy.b as other\n" + USE.format(call="other.formula"),
        changed=FORMULA.replace("x * FACTOR", "x + FACTOR"),
        by_name_changed="from toy.changed import formula\n" + USE.format(call="formula"),
        by_module_changed="from toy import changed\n" + USE.format(call="changed.formula"),
        constant=FORMULA.replace("FACTOR = 3", "FACTOR = 4"),
        by_module_constant="from toy import constant\n" + USE.format(call="constant.formula"),
        itself="from toy import a\n" + USE.format(call="a.formula").replace("+ 1", "+ 2"),
    )
    same = {
        name: hash_of(found[name].use)
        for name in ("by_name_a", "by_name_b", "by_module_a", "by_module_b", "renamed")
    }
    assert len(set(same.values())) == 1
    others = ["by_name_changed", "by_module_changed", "by_module_constant", "itself"]
    changed = [hash_of(found[name].use) for name in others]
    assert changed[0] == changed[1] and len({same["renamed"], *changed}) == 4
    assert all(found[name].use(2) == 7 for name in same)  # they do compute the same


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("x * 2", "x * 3", False),
        ("self.inner(x)", "self.inner(-x)", False),
        ("TABLE[", "OTHER[", False),
        ("def decorated", "@functools.cache\ndef decorated", False),
        ("'b': second", "'b': first", False),
        ("self.value: int = 1", "self.value: float = 1", True),
        ("def unused():\n    return 1", "def unused():\n    return 2", True),
    ],
)
def test_methods_tables_decorators_and_recursion_are_followed(toy, before, after, same):
    code = """
import functools
def first(x):
    return x * 2
def second(x):
    return decorated(x)
def decorated(x):
    return x if x < 1 else first(decorated(x - 1))
TABLE = {'a': (first, 1), 'b': second}
OTHER = {}
class Holder:
    def __init__(self):
        self.value: int = 1
    @property
    def answer(self):
        return TABLE['b']
    def outer(self, x):
        return self.inner(x)
    def inner(self, x):
        return TABLE['a'][0](x)
def unused():
    return 1
"""
    assert before in code
    original = hash_of(toy(m=code)["m"].Holder)
    assert (hash_of(toy(m=code.replace(before, after))["m"].Holder) == original) == same


def test_the_same_code_has_the_same_fingerprint_in_every_python(toy):
    """Python 3.12 added fields to the trees of functions, and 3.13 leaves out those that are
    empty.
    """
    holder = "class Holder:\n    x: int = 0\n\n    def f(self, *y, z=a.FACTOR):\n        return f'{a.formula(z)!r} {y}'\n"
    found = toy(a=FORMULA, m=f"from toy import a\n\n{holder}\n\n{USE.format(call='a.formula')}")[
        "m"
    ]
    assert hash_of(found.Holder, found.use) == "9d69f004435d4af0"  # of 3.10 to 3.13


# --- what a notebook uses -------------------------------------------------------------------------


def test_a_notebook_uses_what_its_cells_name_not_what_they_import():
    cells = [
        "from avit_lib.study import figures, tables\nfrom avit_lib.study.sweep import figures as unused",
        "def later():\n    return tables.summary_table",
        "x = figures.percent(1)",
    ]
    assert set(used_by(cells)) == {tables.summary_table, figures.percent}
    assert used_by(["from avit_lib.study import pictures"]) == []
    assert used_by(["from avit_lib import losses as terms\nterms.ponder_loss"]) == [
        losses.ponder_loss
    ]


def code_of(path: Path) -> list[str]:
    return [
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
    ]


def test_a_change_in_a_chart_concerns_the_notebooks_that_draw_it(rewrite):
    before = {path.stem: hash_of(*used_by(code_of(path))) for path in NOTEBOOKS}
    rewrite(figures.accuracy_against, 'accuracy: str = "accuracy"', 'accuracy: str = "f1_macro"')
    after = {path.stem: hash_of(*used_by(code_of(path))) for path in NOTEBOOKS}
    assert {name for name, value in after.items() if value != before[name]} == {"04_evaluation"}


def test_nothing_is_reached_in_a_way_that_is_not_followed(monkeypatch):
    """Followed are names and module.name: neither package.module.name nor imports inside a
    function.
    """
    visited, source = {}, fingerprint.source

    def seen(thing):
        visited[thing] = source(thing)
        return visited[thing]

    monkeypatch.setattr(fingerprint, "source", seen)
    hashes()
    for path in NOTEBOOKS:
        hash_of(*used_by(code_of(path)))
    assert len(visited) > 100
    for thing, code in visited.items():
        namespace = vars(sys.modules[thing.__module__])
        for node in ast.walk(ast.parse(code)):
            assert not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "avit_lib"
            ), thing
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = namespace.get(node.value.id)
                reached = getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
                assert not isinstance(reached, ModuleType) or not reached.__name__.startswith(
                    "avit_lib"
                ), thing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_the_library_in_the_way_that_is_followed(path):
    nodes = [node for code in code_of(path) for node in ast.walk(ast.parse(code))]
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in plain if name.split(".")[0] == "avit_lib"]
    assert [
        node
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module.startswith("avit_lib")
    ]
