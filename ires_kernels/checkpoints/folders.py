"""Which file of a folder is its model, told by the names in it; and what else it is where none is.

A folder that has neither `model.safetensors` nor an index may still hold a model, in one .safetensors file of another
name. But what lies beside weights in another format is no model: a value head, an adapter, a leftover. So one file is
taken only where nothing in the folder speaks against it, and a folder without a model is told what it looks like.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from ires_kernels.files.opening import CheckpointError

SHARD_NAME = re.compile(r".*-\d+-of-\d+\.safetensors")
ADAPTER_NAME = re.compile(r"(adapters|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_MODEL_NAME = re.compile(r"(consolidated|diffusion_pytorch_model)\.safetensors|model\.[\w-]+\.safetensors")
# What trainers leave beside weights, in the same formats.
_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state)(_|\b).*|.*\boptim\b.*"
)

MERGE_ADAPTER = (
    "Merge it into its base first, for example with peft: AutoPeftModelForCausalLM.from_pretrained(ADAPTER)"
    ".merge_and_unload().save_pretrained(NEW), then give NEW."
)


def only_file(folder: Path, kind: str, names: set[str]) -> str:
    """The file with the weights of a folder without index, in which `names` are.

    Raises CheckpointError, which says what the folder holds in place of a model.
    """
    if f"{kind}.safetensors" in names:
        return f"{kind}.safetensors"
    files = [name for name in names if name.endswith(".safetensors")]
    elsewhere = _in_another_format(folder, names) if kind == "model" else None
    if len(files) == 1 and kind == "model" and not SHARD_NAME.fullmatch(files[0]):
        alone = ADAPTER_NAME.fullmatch(files[0]) and not any(name.startswith("pytorch_model") for name in names)
        if elsewhere is None or alone or _MODEL_NAME.fullmatch(files[0]):
            return files[0]
        beside = f"{files[0]} beside is something else, or give that file itself if it is the model."
        raise CheckpointError(f"{folder}: {elsewhere} What is in {beside}")
    wanted = f"wanted {kind}.safetensors, or {kind}.safetensors.index.json and its shards"
    variants = sorted(name for name in names if re.fullmatch(r"model\.safetensors\.index\.[\w-]+\.json", name))
    if variants:
        raise CheckpointError(
            f"{folder}: holds a variant of a model, {variants[0]}; {wanted}. Copy the index, or rename it: "
            f"cp {shlex.quote(f'{folder / variants[0]}')} {shlex.quote(f'{folder}/model.safetensors.index.json')}"
        )
    if elsewhere is not None:
        raise CheckpointError(f"{folder}: {elsewhere}")
    if files:
        raise CheckpointError(
            f"{folder}: found {listed(files)} and no index; {wanted}. "
            "Download the index as well, or give one .safetensors file."
        )
    parts = sorted({path.parent.name for path in folder.glob("[!.]*/*.safetensors")})
    found = listed(names) if names else "nothing"
    if parts:
        what = "a pipeline of several models" if "model_index.json" in names else "folders with weights"
        raise CheckpointError(
            f"{folder}: holds {what}, {listed(parts)}; {wanted}. Give one of them, such as {folder / parts[0]}."
        )
    raise CheckpointError(f"{folder}: found {found}; {wanted}. Give the folder of a model, or one .safetensors file.")


def check_adapter(folder: Path, model: Iterable[str], names: set[str]) -> None:
    """Refuse a model beside which lies an adapter: loaders add it, or take it for the model."""
    adapters = sorted(name for name in names if ADAPTER_NAME.fullmatch(name))
    if adapters and "adapter_config.json" in names:
        raise CheckpointError(
            f"{folder}: holds a model ({listed(model)}) and an adapter ({listed(adapters)}), which loaders add to a "
            "model or leave alone. If it is not meant, or merged in already, move it and adapter_config.json "
            f"elsewhere. {MERGE_ADAPTER}"
        )


def listed(names: Iterable[str]) -> str:
    """Up to ten names, sorted."""
    items = sorted(names)
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


def _in_another_format(folder: Path, names: set[str]) -> str | None:
    """The weights of a folder that are in another format, and the way out; None where there are none."""
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt")) and not _STATE.fullmatch(n)]
    distributed = [n for n in names if n.endswith(".distcp") or re.fullmatch(r"global_step\d+|pytorch_model_fsdp.*", n)]
    if "snapshots" in names:
        snapshots = [f"{path}" for path in folder.glob("snapshots/*")]
        return f"is a Hub cache folder, wanted a model. Give a snapshot: {listed(snapshots)}."
    if distributed:
        return (
            f"holds a distributed checkpoint of a trainer ({listed(distributed)}). Gather it with the trainer and save "
            "the model with save_pretrained; .distcp files become one with `python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt`."
        )
    if "adapter_model.bin" in names:
        return f"holds an adapter, and no model. {MERGE_ADAPTER}"
    if any(re.fullmatch(r"consolidated\.\d+\.pth", name) for name in pickles):
        return (
            f"holds a model in Meta's original format ({listed(pickles)}). Take the model.safetensors of the same "
            "model, which are published beside it, or convert it with transformers."
        )
    if pickles:
        return (
            f"its weights are in {listed(pickles)}, which can run code when they are read. Load the model with "
            "transformers and save it: AutoModelForCausalLM.from_pretrained(PATH, dtype='auto').save_pretrained(NEW)."
        )
    if any(name.endswith(".gguf") for name in names):
        files = [name for name in names if name.endswith(".gguf")]
        return f"found {listed(files)}. GGUF files are not read: take the safetensors files of the same model."
    return None
