"""Pure planning of a merge, with every refusal: rules, inputs, what tensors are, steps, plan."""
