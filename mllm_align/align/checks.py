"""What an objective must keep to: its class, its functions, its settings."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mllm_align.align.contract import REJECTED_IMAGES, Objective, Signals, Terms
from mllm_align.batch import Responses
from mllm_align.errors import InputError, one_line, quoted

AVAILABLE = frozenset({"reference", "references", "kl", "changes", "score", "rollout", "values"})
"""What an objective can get: the reference's log-probabilities beside the policy's, those of further
references, and the divergence of whole distributions from the reference's; which tokens of a pair differ;
or, in place of all, a score for each response; of a rollout the log-probabilities of before and advantages;
the values of a value model, with returns."""
OF_PAIRS = frozenset({"reference", "kl", "changes"})
"""Those that go with a rejected image."""
RESERVED = frozenset({"loss", "grad_norm", "skipped", "rollout/logp_gap"})
"""Metrics of the train step; also all under loss/."""
LARGE = 1e6  # no setting is meant to be larger


def check_objective(objective: Objective) -> None:
    """Raises InputError for an objective that does not keep the contract."""
    kind, name = type(objective), type(objective).__name__
    parameters = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise InputError(f"objective {name} is no frozen dataclass; put @dataclass(frozen=True) above it")
    responses = getattr(objective, "responses", None)
    if not isinstance(responses, int) or not 0 <= objective.made < responses:
        raise InputError(f"objective {name} does not say how many responses it compares (responses = 2)")
    needs = objective.needs
    if not isinstance(needs, frozenset):
        raise InputError(f"objective {name} needs {quoted(needs)}; it must be a frozenset of names")
    missing = sorted(needs - AVAILABLE)
    if missing:
        known = ", ".join(sorted(AVAILABLE))
        raise InputError(f"objective {name} needs {', '.join(missing)}; the train step has {known}")
    if "score" in needs and len(needs) > 1:
        others = ", ".join(sorted(needs - {"score"}))
        raise InputError(f"objective {name} needs score and {others}; what scores predicts no tokens")
    image = objective.rejected_image
    if image not in (None, *REJECTED_IMAGES):
        known = ", ".join(REJECTED_IMAGES)
        raise InputError(f"objective.rejected_image is {quoted(image)}; it must be one of {known}")
    if image is not None and needs - OF_PAIRS:
        others = ", ".join(sorted(needs - OF_PAIRS))
        raise InputError(f"objective {name} has a rejected image and needs {others}; keep one of them")
    standard = Objective.views.fget(objective)  # type: ignore[misc]
    if objective.views != standard:
        raise InputError(f"objective {name} has the views {objective.views}; batches have {standard}")


def check_terms(objective: Objective) -> None:
    """Raises InputError for an objective whose functions fail or do not fit together, in one line.

    They are traced with shapes alone, B = 2 groups and R = 3 tokens; nothing is computed.
    """
    real = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shape = 2, objective.responses, 3
    mask, tokens = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (bool, jnp.int32))
    given: Any = {name: real(shape) for name in objective.fields}
    if "changes" in objective.needs:
        given["changed"] = jax.ShapeDtypeStruct(shape, bool)
    if objective.references:
        given["references"] = real((2, len(objective.references), *shape[1:]))
    responses = Responses(tokens, mask, real(shape[:1]), **given)  # type: ignore[arg-type]
    logps: Any = tuple(real((2, len(view), 3)) for view in objective.views)
    reference = logps if "reference" in objective.needs else None
    scores: Any = None
    if "score" in objective.needs:
        logps, scores = (), real((2, objective.responses))
    values: Any = real(shape) if "values" in objective.needs else None
    kl: Any = real(shape) if "kl" in objective.needs else None
    signals = Signals(logps, reference, responses, objective.views, scores, values, kl)
    try:
        state = jax.eval_shape(objective.init_state)
        weights = jax.eval_shape(objective.weights, responses)
        terms = jax.eval_shape(objective, signals, state)
        problem = _problem(weights, terms)
        updated = state if problem else jax.eval_shape(objective.update, state, terms.stats)
    except InputError:
        raise
    except Exception as error:  # a user's program: anything may come out of it
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        raise InputError(f"objective {type(objective).__name__} fails ({said}); mend it") from error
    if problem is None and _described(updated) != _described(state):
        problem = "update must return a state of the same tree, shapes and dtypes as init_state"
    if problem:
        raise InputError(f"objective {type(objective).__name__}: {problem}")


def _problem(weights: Any, terms: Any) -> str | None:
    """What is wrong with W_i, or the terms."""
    if not isinstance(terms, Terms):
        return f"__call__ returns {type(terms).__name__}; it must return Terms(sums, metrics, stats)"
    if not isinstance(weights, dict) or not weights or set(weights) != set(terms.sums):
        return f"weights has the terms {sorted(weights)}, sums {sorted(terms.sums)}; they must be the same"
    for what, values in (("sum", terms.sums), ("weight", weights)):
        for name, value in values.items():
            if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
                found = f"{value.dtype}{list(value.shape)}"
                return f"the {what} of {name!r} is {found}; it must be a real scalar"
    for name, value in terms.metrics.items():
        if not isinstance(value, tuple) or len(value) != 2 or any(x.shape for x in value):
            return f"metric {name!r} must be (sum, weight), two scalars"
        if name in RESERVED or name.startswith("loss/"):
            return f"metric {name!r} has a name that the train step uses; give it another"
    return None


def _described(tree: Any) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def check_setting(name: str, value: Any, low: float, high: float = LARGE) -> None:
    """Raises InputError for a value that is no number, or not in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"objective.{name} is {quoted(value)}; it must be a number")
    if not low <= value < high:
        limit = f"at least {low:g} and below {high:g}"
        shown = f"{value:g}" if isinstance(value, float) or abs(value) < 1e300 else "far too large"
        raise InputError(f"objective.{name} is {shown}; it must be {limit}")


def check_count(name: str, value: Any, low: int, high: int) -> None:
    """Raises InputError for a value that is no whole number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"objective.{name} is {quoted(value)}; it must be a whole number")
    if not low <= value <= high:
        shown = f"{value}" if abs(value) < 10**9 else "far too large"
        raise InputError(f"objective.{name} is {shown}; it must be from {low} to {high}")


def check_flag(name: str, value: Any) -> None:
    """Raises InputError for a value that is no bool."""
    if not isinstance(value, bool):
        raise InputError(f"objective.{name} is no bool; it must be True or False")
