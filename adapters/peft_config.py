"""The PEFT config of a loramux adapter, and the registration that makes PEFT know its type.

PEFT dispatches through four dictionaries keyed by a `str` enum, and offers no plug-ins. The key only has to be an equal
string, so a `str` that looks like a member is registered under a name no upstream method will take.
"""

from dataclasses import dataclass, field
from typing import Any

from peft import mapping
from peft.config import PeftConfig

from ..support.errors import AdapterError
from .registry import MethodConfig, find_method, method_config

PREFIX = "loramux_"
CONTAINERS = ("loramux_branches", "loramux_routers", "loramux_banks")
"""What holds an adapter's tensors, by adapter name: one in every layer, and those of the hub for what layers share."""


class LoramuxPeftType(str):
    """A `PeftType` member that lives outside PEFT's enum."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    @property
    def name(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoramuxPeftType":
        return self


LORAMUX = LoramuxPeftType("LORAMUX")


@dataclass
class LoramuxConfig(PeftConfig):
    """An adapter made of routed LoRA experts.

    Attributes:
        method: a name that `loramux methods` lists.
        options: the method's options; missing ones take the paper's defaults and are filled in, so that a saved
            adapter does not change when a default does.
        tasks: task names in the order of the router's rows and, where experts belong to tasks, of the experts.
        excess_rank: whether experts may have a higher rank than a linear they adapt can hold. It adds nothing to what
            they can learn; a plain LoRA as large as a method of many experts may need it.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
    """

    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    excess_rank: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORAMUX
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if not isinstance(self.tasks, list) or not all(isinstance(task, str) and task for task in self.tasks):
            raise AdapterError(f"tasks must be a list of names, got {self.tasks!r}")
        if not isinstance(self.method, str) or not isinstance(self.options, dict):
            raise AdapterError(f"method must be a name and options a mapping, got {self.method!r}, {self.options!r}")
        if len(set(self.tasks)) != len(self.tasks):
            raise AdapterError(f"tasks must have different names, got {self.tasks}")
        self.options = {**find_method(self.method).options(), **self.options}
        self.build()

    def build(self) -> MethodConfig:
        """The branches and stages this config stands for.

        Raises:
            ConfigError: for an unknown method, an unknown option or a value out of range.
        """
        return method_config(self.method, tasks=self.tasks or ["all"], options=self.options)


def register(model_class: type) -> None:
    """Make PEFT dispatch the type `LORAMUX` to our config and tuner."""
    tables: list[tuple[dict[Any, Any], Any]] = [
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, LoramuxConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, model_class),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    ]
    for table, entry in tables:
        table[LORAMUX] = entry
