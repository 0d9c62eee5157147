"""The repairs as functions on tensors, against their formulas written out."""

from pathlib import Path

import pytest
import torch
from repair_formulas import REFERENCE

from somf_mergekit.recipe.schema import table_rows
from somf_mergekit.repairs import formulas
from somf_mergekit.repairs.catalogue import REPAIRS, ROLE
from somf_mergekit.repairs.formulas import (
    cosine,
    critical_rows,
    entropy_rank,
    low_rank_part,
    spectrum,
)

# Several values each: thresholds that keep, that repair, and some between.
PARAMETERS = [
    ("resta", {"gamma": 0.7}),
    ("resta", {"gamma": 0.0}),
    ("safe_lora", {"threshold": 0.999}),
    ("safe_lora", {"threshold": -1.0}),
    ("safemerge", {"threshold": 0.999, "alpha": 0.3}),
    ("safemerge", {"threshold": -1.0, "alpha": 0.3}),
    ("lox", {"alpha": 1.25, "rank": 3}),
    ("lox", {"alpha": 0.5, "rank": 1000}),
    ("lssf", {"alpha": 0.8}),
    ("nlsr", {"beta": 0.4, "rank": 2, "share": 0.5, "threshold": 0.3}),
    ("nlsr", {"beta": 0.4, "rank": 100, "share": 1.0, "threshold": 0.999}),
    ("nlsr", {"beta": 0.4, "rank": 2, "share": 1.0, "threshold": -1.0}),
]
CASES = pytest.mark.parametrize(("name", "parameters"), PARAMETERS)
SHAPES = pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)


def tensors_of(name, shape, seed=0):
    """Weights of all models of a repair: a safety vector that falls off, smaller changes."""
    draw = torch.Generator().manual_seed(seed)
    aligned = torch.randn(shape, generator=draw)
    safety = torch.randn(shape, generator=draw) * 0.01
    if len(shape) == 2:
        left, values, right = torch.linalg.svd(safety, full_matrices=False)
        safety = (left * values * 0.7 ** torch.arange(len(values))) @ right
    change = torch.randn(shape, generator=draw) * 0.01
    found = {"aligned": aligned, "unaligned": aligned - safety, "fine_tuned": aligned + change}
    if "safety_tuned" in REPAIRS[name].needs:
        found["safety_tuned"] = aligned + torch.randn(shape, generator=draw) * 0.01
    return found


def repaired(name, tensors, parameters):
    return REPAIRS[name].formula(**tensors, **parameters)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@SHAPES
@CASES
def test_a_matrix_is_repaired_by_the_formula(name, parameters, shape):
    tensors = tensors_of(name, shape)
    found = repaired(name, tensors, parameters)
    close(found, REFERENCE[name](tensors, **parameters))
    assert found.dtype == torch.float32
    again = repaired(name, tensors, parameters)
    assert torch.equal(found, again)


@SHAPES
@pytest.mark.parametrize(("name", "further"), [("safe_lora", {}), ("safemerge", {"alpha": 0.0})])
def test_the_cosine_of_the_change_and_its_projection_decides(name, further, shape):
    tensors = tensors_of(name, shape)
    aligned, fine_tuned, unaligned = (
        tensors[role].double() for role in ("aligned", "fine_tuned", "unaligned")
    )
    change, safety = fine_tuned - aligned, aligned - unaligned
    projected = safety @ safety.T @ change
    angle = torch.cosine_similarity(change.flatten(), projected.flatten(), dim=0).item()
    assert 0.1 < angle < 0.9
    stored = repaired(name, tensors, {"threshold": angle - 1e-4, **further})
    assert torch.equal(stored, tensors["fine_tuned"])
    found = repaired(name, tensors, {"threshold": angle + 1e-4, **further})
    expected = safety @ safety.T @ change / safety.norm()
    if name == "safemerge":
        expected = tensors["safety_tuned"] - aligned
    close(found, aligned + expected)


def test_every_repair_has_a_case():
    assert {name for name, _ in PARAMETERS} == set(REPAIRS) == set(REFERENCE)
    for name, parameters in PARAMETERS:
        assert {ROLE, *parameters} == {p.name for p in REPAIRS[name].parameters}


@pytest.mark.parametrize("shape", [(), (16,), (3, 8, 12)], ids=str)
@CASES
def test_what_is_no_matrix_stays_fine_tuned_where_it_can_not_be_projected(name, parameters, shape):
    tensors = tensors_of(name, shape)
    found = repaired(name, tensors, parameters)
    if name == "resta":
        close(found, REFERENCE[name](tensors, **parameters))
    else:
        assert torch.equal(found, tensors["fine_tuned"])


@pytest.mark.parametrize("shape", [(12, 20), (16,)], ids=str)
@CASES
def test_without_a_safety_vector_the_model_stays_fine_tuned(name, parameters, shape):
    tensors = tensors_of(name, shape)
    tensors["unaligned"] = tensors["aligned"].clone()
    assert torch.equal(repaired(name, tensors, parameters), tensors["fine_tuned"])


@CASES
def test_a_tensor_that_fine_tuning_left_alone(name, parameters):
    tensors = tensors_of(name, (12, 20))
    tensors["fine_tuned"] = tensors["aligned"].clone()
    found = repaired(name, tensors, parameters)
    assert torch.isfinite(found).all()
    close(found, REFERENCE[name](tensors, **parameters))
    if name == "safe_lora":
        assert torch.equal(found, tensors["aligned"])


def test_a_change_at_right_angles_to_the_safety_vector_is_taken_back():
    aligned = torch.zeros(4, 6)
    unaligned, fine_tuned = aligned.clone(), aligned.clone()
    unaligned[0, 0] = -1.0
    fine_tuned[2] = 0.5
    tensors = {"aligned": aligned, "unaligned": unaligned, "fine_tuned": fine_tuned}
    assert torch.equal(repaired("safe_lora", tensors, {"threshold": 0.1}), aligned)
    assert torch.equal(repaired("safe_lora", tensors, {"threshold": 0.0}), fine_tuned)


def test_nlsr_takes_the_critical_rows_that_have_lost_their_safety_vector():
    aligned = torch.ones(5, 4)
    safety = torch.zeros(5, 4)
    safety[0, 0], safety[1, 1], safety[2, 2] = 3.0, 2.0, 1.0
    change = torch.zeros(5, 4)
    # The first is turned back to before its alignment, the second grows, the others change.
    change[0], change[1], change[2:] = -safety[0], safety[1], 4.0
    tensors = {"aligned": aligned, "unaligned": aligned - safety, "fine_tuned": aligned + change}
    values = {"beta": 0.5, "rank": 3, "threshold": 0.5}
    found = repaired("nlsr", tensors, {"share": 0.4, **values})
    assert torch.equal(found[0], aligned[0] + 0.5 * safety[0])
    assert torch.equal(found[1:], tensors["fine_tuned"][1:])
    # All rows count: the third has changed away, and the last have no safety vector.
    found = repaired("nlsr", tensors, {"share": 1.0, **values, "threshold": 0.7})
    assert torch.equal(found[2], aligned[2] + 0.5 * safety[2])
    assert torch.equal(found[3:], tensors["fine_tuned"][3:])


@pytest.mark.parametrize(
    ("share", "rows", "count"), [(0.1, 30, 3), (0.1, 31, 4), (1.0, 7, 7), (0.001, 5, 1)]
)
def test_a_share_of_the_rows_is_rounded_up(share, rows, count):
    safety = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    assert critical_rows(safety, 2, share).sum() == count


@SHAPES
def test_the_spectrum_is_that_of_a_singular_value_decomposition(shape):
    matrix = tensors_of("lssf", shape)["aligned"] * 1e-6
    squares, vectors = spectrum(matrix)
    expected = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(squares.sqrt(), expected, rtol=1e-6, atol=1e-9 * expected[0].item())
    identity = torch.eye(min(shape), dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, identity)


@SHAPES
def test_a_spectrum_does_not_depend_on_the_blocks_that_it_is_added_up_in(shape, monkeypatch):
    matrix = tensors_of("lssf", shape)["aligned"]
    whole = low_rank_part(matrix, 4)
    monkeypatch.setattr(formulas, "_BLOCK", 100)
    torch.testing.assert_close(low_rank_part(matrix, 4), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "rank"),
    [([1.0], 1), ([5.0, 0.0, 0.0], 1), ([2.0] * 7, 7), ([3.0, 3.0, 1e-9], 2), ([0.0, 0.0], 0)],
)
def test_so_many_equal_singular_values_count_as_so_many(values, rank):
    assert entropy_rank(torch.tensor(values, dtype=torch.float64) ** 2) == rank


def test_lssf_adds_the_whole_of_a_safety_vector_of_equal_directions_and_the_head_of_others():
    tensors = {"aligned": torch.eye(6), "fine_tuned": torch.ones(6, 6)}
    flat = {**tensors, "unaligned": torch.zeros(6, 6)}
    close(repaired("lssf", flat, {"alpha": 1.0}), (torch.ones(6, 6) + torch.eye(6)).double())
    steep = torch.diag(torch.tensor([8.0, 0.01, 0.01, 0.01, 0.01, 0.01]))
    found = repaired("lssf", {**tensors, "unaligned": torch.eye(6) - steep}, {"alpha": 1.0})
    added = found - torch.ones(6, 6)
    # Little entropy: the first direction and the one that it is rounded up to.
    assert torch.linalg.matrix_rank(added, atol=1e-4) == 2


def test_cosine_of_rows_and_of_all():
    first = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1e-12, 1e-12]])
    second = torch.tensor([[1.0, 1.0], [1.0, 2.0], [-3.0, -3.0]])
    expected = torch.tensor([0.5**0.5, 0.0, -1.0])
    torch.testing.assert_close(cosine(first, second, dim=1), expected)
    assert cosine(first, torch.zeros(3, 2)).item() == 0


def test_documentation_has_the_parameters_of_every_repair():
    text = (Path(__file__).parent.parent / "docs/repairs.md").read_text()
    rows = ["| method | parameter | type | default | meaning |", "|---|---|---|---|---|"]
    role, *_ = REPAIRS["resta"].parameters
    assert role.name == ROLE
    rows += [f"| all, of a model {row}" for row in table_rows([role])]
    for repair in REPAIRS.values():
        rows += [f"| {repair.name} {row}" for row in table_rows(repair.parameters[1:])]
    assert "\n".join(rows) in text
    for repair in REPAIRS.values():
        assert f"| `{repair.name}` |" in text
        assert f"({repair.source})" in text
