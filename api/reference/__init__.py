"""The images a model was trained on, and how a new one compares with them."""

from unihema.reference.features import looks_of
from unihema.reference.judgement import judge
from unihema.reference.model_reference import (
    REFERENCE_FILE,
    ModelReference,
    ReferenceWarning,
    attach_reference,
    reference_of,
)


__all__ = [
    "REFERENCE_FILE",
    "ModelReference",
    "ReferenceWarning",
    "attach_reference",
    "judge",
    "looks_of",
    "reference_of",
]
