"""The repairs: what each is called, what it takes, what its recipe may say."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, Field
from torch import Tensor

from ..recipe.schema import Parameter, parameters_of, table_rows
from .arithmetic import resta
from .low_rank import lox, lssf
from .neurons import nlsr
from .projection import safe_lora, safemerge

ROLE = "role"
ALIGNED = "aligned"
FINE_TUNED = "fine_tuned"
UNALIGNED = "unaligned"
SAFETY_TUNED = "safety_tuned"
ROLES = (FINE_TUNED, UNALIGNED, SAFETY_TUNED)

# Marks of a parameter, see ``declared.Parameter``.
_PER_TENSOR: dict[str, Any] = {"merge": True, "per_tensor": True}
_PER_MODEL: dict[str, Any] = {"merge": True, "per_model": True}


class _Settings(BaseModel):
    role: Literal["fine_tuned", "unaligned", "safety_tuned"] = Field(
        "fine_tuned",
        json_schema_extra=_PER_MODEL,
        description="What a model is: `fine_tuned`, the one to repair; `unaligned`, the aligned "
        "model before its alignment; `safety_tuned`, the aligned model fine-tuned on safe answers.",
    )


class _Resta(_Settings):
    gamma: float = Field(
        1.0,
        ge=0,
        le=100,
        json_schema_extra=_PER_TENSOR,
        description="How much of the safety vector is added. To be tuned.",
    )


class _SafeLora(_Settings):
    threshold: float = Field(
        0.5,
        ge=-1,
        le=1,
        json_schema_extra=_PER_TENSOR,
        description="A change is projected where its cosine with its projection is below; -1 "
        "leaves all as they are. To be tuned.",
    )


class _SafeMerge(_Settings):
    threshold: float = Field(
        0.5,
        ge=-1,
        le=1,
        json_schema_extra=_PER_TENSOR,
        description="A weight is merged where the cosine of its change and the projection of that "
        "is below; -1 leaves all as they are. To be tuned.",
    )
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        json_schema_extra=_PER_TENSOR,
        description="The fine-tuned model's share of a merged weight. To be tuned.",
    )


class _Lssf(_Settings):
    alpha: float = Field(
        1.0,
        ge=0,
        le=100,
        json_schema_extra=_PER_TENSOR,
        description="How much of the safety vector's principal part is added. To be tuned.",
    )


class _Lox(_Lssf):
    rank: int = Field(
        8,
        ge=1,
        json_schema_extra=_PER_TENSOR,
        description="How many singular directions the principal part has. To be tuned.",
    )


class _Nlsr(_Settings):
    beta: float = Field(
        0.5,
        ge=0,
        le=100,
        json_schema_extra=_PER_TENSOR,
        description="How far the rows that are put in lie beyond the aligned model, in safety "
        "vectors. To be tuned.",
    )
    rank: int = Field(
        8,
        ge=1,
        json_schema_extra=_PER_TENSOR,
        description="Singular directions of the safety vector that score the rows. To be tuned.",
    )
    share: float = Field(
        0.2,
        gt=0,
        le=1,
        json_schema_extra=_PER_TENSOR,
        description="Share of a weight's rows that is critical for safety. To be tuned.",
    )
    threshold: float = Field(
        0.5,
        ge=-1,
        le=1,
        json_schema_extra=_PER_TENSOR,
        description="A critical row is replaced where the cosine of its change from the unaligned "
        "model and its safety vector is below. To be tuned.",
    )


@dataclass(frozen=True)
class Repair:
    """A repair as a merge method: base_model is the aligned model, each other model has a role.

    Attributes:
        name: of the merge method.
        pretty_name: as its authors write it.
        source: the paper's page.
        formula: from the models' tensors by role, float32, and the parameters to the repaired one.
        needs: roles of the models beside the aligned one, one model each.
        may_lack: the roles among them that a recipe need not fill; the aligned model stands in.
    """

    name: str
    pretty_name: str
    source: str
    formula: Callable[..., Tensor]
    settings: type[BaseModel]
    needs: tuple[str, ...] = (FINE_TUNED, UNALIGNED)
    may_lack: tuple[str, ...] = ()

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its parameters, that of the models' roles first."""
        return tuple(parameters_of(self.settings))


REPAIRS = {
    repair.name: repair
    for repair in (
        Repair("resta", "RESTA", "https://arxiv.org/abs/2402.11746", resta, _Resta),
        Repair("safe_lora", "Safe LoRA", "https://arxiv.org/abs/2405.16833", safe_lora, _SafeLora),
        Repair(
            "safemerge",
            "SafeMERGE",
            "https://arxiv.org/abs/2503.17239",
            safemerge,
            _SafeMerge,
            needs=(FINE_TUNED, UNALIGNED, SAFETY_TUNED),
        ),
        Repair(
            "lox",
            "LoX",
            "https://arxiv.org/abs/2506.15606",
            lox,
            _Lox,
            may_lack=(FINE_TUNED,),
        ),
        Repair("lssf", "LSSF", "https://arxiv.org/abs/2602.00038", lssf, _Lssf),
        Repair("nlsr", "NLSR", "https://arxiv.org/abs/2412.12497", nlsr, _Nlsr),
    )
}


def repair_table() -> str:
    """Return the parameters of all repairs as a markdown table, as docs/repairs.md shows it."""
    head = ["| method | parameter | type | default | meaning |", "|---|---|---|---|---|"]
    (shared,) = table_rows(parameters_of(_Settings))
    rows = [f"| all, of a model {shared}"]
    for repair in REPAIRS.values():
        own = [parameter for parameter in repair.parameters if parameter.name != ROLE]
        rows += [f"| {repair.name} {row}" for row in table_rows(own)]
    return "\n".join([*head, *rows])
