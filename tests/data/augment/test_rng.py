"""Seeds are pure functions, draws follow the stated rules, and nothing in data/ draws from anywhere
else.
"""

import ast
import textwrap

import numpy as np
import pytest
from numpy.random import PCG64, Generator

from data.augment import rng as draws


class Scripted:
    """Stands in for a generator: random() gives the listed numbers."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def test_sample_seeds_never_change():
    table = {
        (0, 0, 0): 1941048836,
        (0, 0, 1): 1433790897,
        (0, 1, 0): 1805848317,
        (1, 0, 0): 876514893,
        (7, 299, 1_281_166): 573978133,
    }
    assert {key: draws.sample_seed(*key) for key in table} == table


def test_run_seeds_never_change():
    table = {(0, 0, 0, 0): 2094613214458313471, (3, 299, 1251, 7): 2458358446358430843}
    assert {key: draws.run_seed(*key) for key in table} == table


def test_seeds_do_not_depend_on_the_kind_of_integer():
    assert draws.sample_seed(np.int64(7), np.int32(299), np.uint32(1_281_166)) == draws.sample_seed(
        7, 299, 1_281_166
    )
    assert draws.generator(np.int32(5)).random() == draws.generator(5).random()


def test_seeds_fill_their_range_without_a_pattern():
    seeds = np.array(
        [draws.sample_seed(0, epoch, position) for epoch in range(4) for position in range(2000)]
    )
    assert seeds.min() >= 0 and seeds.max() < draws.SEED_LIMIT
    assert len(np.unique(seeds)) >= 7998  # 8000 of 2**31: 0.015 collisions are expected
    assert abs(np.corrcoef(seeds[:-1], seeds[1:])[0, 1]) < 0.05
    assert all(0 <= draws.run_seed(0, 0, step, 0) < 2**63 for step in range(100))


def test_pair_seed_is_the_same_from_both_sides():
    assert draws.pair_seed(0b1100, np.int64(0b1010)) == draws.pair_seed(0b1010, 0b1100) == 0b0110
    assert draws.pair_seed(9, 9) == 0


def test_generator_is_pcg64():
    assert draws.generator(11).random() == Generator(PCG64(11)).random()


def test_uniform_scales_one_random_number():
    assert draws.uniform(Scripted(0.25), -2.0, 6.0) == 0.25 * (6.0 - -2.0) + -2.0


def test_integer_reaches_both_ends_and_no_further():
    assert draws.integer(Scripted(0.0), 3, 5) == 3
    assert draws.integer(Scripted(0.999), 3, 5) == 5
    assert draws.integer(Scripted(1.0), 3, 5) == 5
    assert draws.integer(Scripted(0.4), -1, 1) == 0


def test_gauss_and_beta_are_numpys():
    assert draws.gauss(draws.generator(1), 9.0, 0.5) == Generator(PCG64(1)).normal(9.0, 0.5)
    assert draws.beta(draws.generator(1), 0.8, 0.8) == Generator(PCG64(1)).beta(0.8, 0.8)


def test_choice_takes_the_drawn_index():
    assert [draws.choice(Scripted(u), "abc") for u in (0.0, 0.34, 0.99)] == ["a", "b", "c"]


def test_shuffle_swaps_from_the_end_and_keeps_its_argument():
    items = ["a", "b", "c", "d"]
    # i = 3 swaps with int(0.3 * 4) = 1, i = 2 with int(0.9 * 3) = 2, i = 1 with int(0.1 * 2) = 0
    assert draws.shuffle(Scripted(0.3, 0.9, 0.1), items) == ["d", "a", "c", "b"]
    assert items == ["a", "b", "c", "d"]
    assert draws.shuffle(Scripted(), ["a"]) == ["a"]


ALLOWED_NUMPY = {"Generator", "PCG64", "MT19937", "SeedSequence"}
DRAWING_METHODS = set(
    "normal_ uniform_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_".split()
)
DRAWING_FUNCTIONS = set(
    (
        "rand randn randint randperm rand_like randn_like randint_like normal bernoulli"
        " multinomial poisson"
    ).split()
)
GLOBAL_STATE = set(
    "manual_seed seed get_rng_state set_rng_state default_generator initial_seed".split()
)
MAKES_GENERATOR = {"generator", "Generator", "default_rng", "RandomState", "Random"}


def forbidden_draws(source: str) -> list[str]:
    """Where a module's source draws from, or keeps, a generator that is not an argument."""
    tree = ast.parse(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    inside = {
        id(child) for function in functions for child in ast.walk(function) if child is not function
    }
    faults = []
    for node in ast.walk(tree):
        fault = ""
        if isinstance(node, ast.Import):
            fault = ", ".join({alias.name for alias in node.names} & {"random", "numpy.random"})
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            fault = ", ".join(name for name in names if is_forbidden(node.module, name))
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).replace("np.", "numpy.")
            # drawing functions of torch may be given a generator: the calls tell
            is_call = owner == "torch" and node.attr in DRAWING_FUNCTIONS
            if is_forbidden(owner, node.attr) and not is_call:
                fault = f"{owner}.{node.attr}"
        elif isinstance(node, ast.Call):
            owner, _, name = ast.unparse(node.func).rpartition(".")
            draws_itself = name in DRAWING_METHODS or (
                owner == "torch" and name in DRAWING_FUNCTIONS
            )
            if draws_itself and "generator" not in [keyword.arg for keyword in node.keywords]:
                fault = f"{owner}.{name} without generator="
            elif name in MAKES_GENERATOR and id(node) not in inside:
                fault = f"{name}() at module level"
        if fault:
            faults.append(f"line {node.lineno}: {fault}")
    return faults


def is_forbidden(module: str | None, name: str) -> bool:
    """Whether a module's name draws from, or is about, a global generator."""
    if module == "numpy.random":
        return name not in ALLOWED_NUMPY
    if module in ("torch", "torch.random"):
        return name in DRAWING_FUNCTIONS | GLOBAL_STATE
    return module == "random"


def test_nothing_in_data_draws_from_a_global_generator(root):
    modules = sorted((root / "data").rglob("*.py"))
    assert {"rng.py", "plan.py", "randaugment.py", "decoder.py"} <= {
        module.name for module in modules
    }
    faults = {
        module.name: forbidden_draws(module.read_text(encoding="utf-8")) for module in modules
    }
    assert {name: found for name, found in faults.items() if found} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from random import shuffle",
        "import numpy as np\nx = np.random.rand(3)",
        "import numpy as np\ndef f():\n    np.random.seed(0)",
        "import numpy as np\ndef f():\n    return np.random.default_rng()",
        "from numpy.random import default_rng",
        "import torch\ndef f():\n    return torch.randperm(4)",
        "import torch\ndef f(x):\n    return x.normal_()",
        "import torch\ndef f():\n    torch.manual_seed(0)",
        "from torch import randperm",
        "from data.augment.rng import generator\nRNG = generator(0)",
        "from data.augment.rng import generator\nclass A:\n    rng = generator(0)",
    ],
)
def test_the_check_of_draws_sees(source):
    assert forbidden_draws(textwrap.dedent(source))


@pytest.mark.parametrize(
    "source",
    [
        (
            "from numpy.random import PCG64, Generator\ndef f(seed):\n    return"
            " Generator(PCG64(seed)).random()"
        ),
        "import torch\ndef f(g):\n    return torch.randperm(4, generator=g)",
        "def f(rng):\n    return rng.normal(0, 1)",
    ],
)
def test_the_check_of_draws_allows(source):
    assert forbidden_draws(source) == []
