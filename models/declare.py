"""How a module says what each of its parameters is for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from allometry.scaling.roles import Role


@dataclass(frozen=True, slots=True)
class Declaration:
    """The role and fans of one parameter, stated by the module that makes it."""

    role: Role
    fan_in: int
    fan_out: int


class DeclaresRoles(nn.Module):
    """Base of every module that owns parameters.

    Declarations are kept by name, not on the tensor, since sharding replaces the tensors.
    """

    declarations: dict[str, Declaration]

    def declare(
        self, name: str, parameter: nn.Parameter, role: Role, fan_in: int, fan_out: int
    ) -> None:
        """Own ``parameter`` as ``self.<name>`` and state what it is for."""
        if "declarations" not in self.__dict__:
            self.declarations = {}
        assert name not in self.declarations, name
        setattr(self, name, parameter)
        self.declarations[name] = Declaration(role, fan_in, fan_out)
