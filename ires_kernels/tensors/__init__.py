"""Operations on torch tensors: checks of arguments, launches, torch.library; no files here."""
