"""How much of an update rounding leaves, for the table in docs/merging.md."""

import torch

import ires_kernels as ik

torch.manual_seed(0)
weights = (torch.randn(1 << 22) * 0.02).bfloat16()
print("| residual's std | rounding | error / update | effective alpha |")
print("| --- | --- | --- | --- |")
for std in (1e-5, 1e-4, 5e-4):
    residual = torch.randn(1 << 22) * std
    update = 0.3 * residual.double()
    for rounding, dtype in (("nearest", None), ("stochastic", None), ("nearest", torch.float32)):
        tally = ik.Tally()
        got = ik.add(weights, residual, alpha=0.3, rounding=rounding, seed=1, dtype=dtype, tally=tally)
        error = (got.double() - weights.double() - update).norm() / update.norm()
        how = rounding if dtype is None else "float32 output"
        print(f"| {std:g} | {how} | {error:.2g} | {tally.effective_alpha(0.3):.3f} |")
