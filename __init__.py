"""loramux: MoE-style LoRA experts for many tasks on one frozen language model.

Import `loramux` (or any of its parts) before loading a saved mixture with PEFT: the import registers the
`LORAMUX` adapter type. Exported adapters are plain LoRA folders and need no import.
"""

__version__ = "0.1.0"
