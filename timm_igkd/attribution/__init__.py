"""Tensors in, attribution maps out; no dataset and no file is known here."""
