"""The repairs: what each is called, what it takes, what its recipe may say."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, Field
from torch import Tensor

from ..recipe.schema import Parameter, parameters_of
from .formulas import lox, lssf, nlsr, resta, safe_lora, safemerge

ROLE = "role"
ALIGNED = "aligned"
FINE_TUNED = "fine_tuned"
UNALIGNED = "unaligned"
SAFETY_TUNED = "safety_tuned"
ROLES = (FINE_TUNED, UNALIGNED, SAFETY_TUNED)


def _tuned(default: float, description: str, **limits: Any) -> Any:
    """Return a number that may differ between tensors; see ``schema.Parameter`` for the marks."""
    marks: dict[str, Any] = {"merge": True, "per_tensor": True}
    text = f"{description} To be tuned."
    return Field(default, json_schema_extra=marks, description=text, **limits)


class _Settings(BaseModel):
    role: Literal["fine_tuned", "unaligned", "safety_tuned"] = Field(
        "fine_tuned",
        json_schema_extra={"merge": True, "per_model": True},
        description="What a model is: `fine_tuned`, the one to repair; `unaligned`, the aligned "
        "model before its alignment; `safety_tuned`, the aligned model fine-tuned on safe answers.",
    )


class _Resta(_Settings):
    gamma: float = _tuned(1.0, "How much of the safety vector is added.", ge=0, le=100)


class _SafeLora(_Settings):
    threshold: float = _tuned(
        0.5,
        "A change is projected where its cosine with its projection is below; -1 leaves all as "
        "they are.",
        ge=-1,
        le=1,
    )


class _SafeMerge(_Settings):
    threshold: float = _tuned(
        0.5,
        "A weight is merged where the cosine of its change and the projection of that is below; -1 "
        "leaves all as they are.",
        ge=-1,
        le=1,
    )
    alpha: float = _tuned(0.5, "The fine-tuned model's share of a merged weight.", ge=0, le=1)


class _Lssf(_Settings):
    alpha: float = _tuned(
        1.0, "How much of the safety vector's principal part is added.", ge=0, le=100
    )


class _Lox(_Lssf):
    rank: int = _tuned(8, "How many singular directions the principal part has.", ge=1)


class _Nlsr(_Settings):
    beta: float = _tuned(
        0.5,
        "How far the rows that are put in lie beyond the aligned model, in safety vectors.",
        ge=0,
        le=100,
    )
    rank: int = _tuned(8, "Singular directions of the safety vector that score the rows.", ge=1)
    share: float = _tuned(0.2, "Share of a weight's rows that is critical for safety.", gt=0, le=1)
    threshold: float = _tuned(
        0.5,
        "A critical row is replaced where the cosine of its change from the unaligned model and "
        "its safety vector is below.",
        ge=-1,
        le=1,
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
