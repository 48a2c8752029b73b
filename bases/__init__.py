"""The frozen model that adapters are added to: a tiny pretrained Llama that ships with loramux, or any other causal LM.

`load_base("loramux/tiny")` needs no network; a Hub id or a local folder loads the same way. `python -m
loramux.bases.pretrain` made the bundled weights, on text from `corpus.py`.
"""

from .load import BUNDLED, BaseIdentity, base_identity, load_base, load_tokenizer, resolve_base, write_base

__all__ = ["BUNDLED", "BaseIdentity", "base_identity", "load_base", "load_tokenizer", "resolve_base", "write_base"]
