"""The result of a merge as tensors in memory, in place of files."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files.plain import size
from ires_kernels.planning.steps import Step, by_output
from ires_kernels.streaming.cpu import TORCH_DTYPES

_WITH_HEAD = re.compile(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel)$")
_BODY = re.compile(r"(^|(?<=\.))(model|transformer)\.")


def check_dtypes(steps: Sequence[Step]) -> None:
    """Raise CheckpointError for a dtype that torch does not have."""
    for step in steps:
        if step.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"tensor {step.name!r} of {step.operands[0].paths[0]} is {step.dtype}, for which torch "
                f"{torch.__version__} has no dtype. Merge it into a folder with apply."
            )


def allocate(steps: Sequence[Step], device: torch.device) -> dict[str, Tensor]:
    """Uninitialised tensors for the results, in the order of the steps.

    Raises CheckpointError for a dtype that torch does not have, MemoryError when the device is too small.
    """
    check_dtypes(steps)
    tensors = {}
    with torch.inference_mode(False):  # worker threads, which are in no such mode, will write to them
        for output in by_output(steps):
            try:
                tensors[output.name] = torch.empty(output.shape, dtype=TORCH_DTYPES[output.dtype], device=device)
            except RuntimeError as error:
                whole = size(sum(step.nbytes for step in steps))
                raise MemoryError(
                    f"the merged tensors take {whole}, and {device} has no room left at {output.name!r}: "
                    f"{f'{error}'.splitlines()[0]}"
                ) from error
    return tensors


def shared_head(target: Checkpoint) -> tuple[str, str] | None:
    """Names of the head and the embedding of a language model whose files do not hold the head: it is the embedding.

    The head of `language_model.model.embed_tokens.weight` is `language_model.lm_head.weight`, as in transformers.
    """
    embedding = names.embedding(target)
    if embedding is None or not names.is_tied(target) or any(map(names.is_head, target.tensors)):
        return None
    architectures = (target.config or {}).get("architectures")
    if isinstance(architectures, list) and not any(_WITH_HEAD.search(f"{name}") for name in architectures):
        return None
    body = _BODY.search(embedding.name)
    return (embedding.name[: body.start()] if body else "") + "lm_head.weight", embedding.name
