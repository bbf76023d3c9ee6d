"""What an external policy is, and the table of the rules that ship with this repository."""

from collections.abc import Callable

import torch

from errors import UserError

Obs = torch.Tensor | dict[str, torch.Tensor]
Policy = Callable[[Obs], torch.Tensor]


def copy_of(obs: Obs) -> Obs:
    """What a policy is handed: it may write into its observations, which are views of what is stored."""
    return {name: x.clone() for name, x in obs.items()} if isinstance(obs, dict) else obs.clone()


class KnowledgeError(UserError):
    """Knowledge that cannot be used; the message is one line: what was found and what to do."""


# A rule is found by its name and the longest prefix of the environment id, so one name
# ("fetch.get_behind_object") may stand for different functions in different tasks.
_rules: dict[str, dict[str, Policy]] = {}  # {rule name: {env prefix: function}}, in order of definition
_groups: dict[str, list[str]] = {}  # {group: [rule name]}
_families: dict[str, dict[str, list[str]]] = {}  # {group: {env prefix: [rule name]}}, declared by `group`
_auto: set[str] = set()  # groups that `auto` stands for


def rule(
    name: str, envs: str | tuple[str, ...], group: str = "", auto: bool = False
) -> Callable[[Policy], Policy]:
    """Decorator: register a function as the rule `name` for every env id that starts with one of `envs`.

    It joins `group`, if given. `auto` marks `group` as what `--knowledge auto` stands for in these environments.
    """

    def register(function: Policy) -> Policy:
        for prefix in (envs,) if isinstance(envs, str) else envs:
            if prefix in _rules.setdefault(name, {}):
                raise ValueError(f"rule {name} is defined twice for {prefix}")
            _rules[name][prefix] = function
        if group and name not in _groups.setdefault(group, []):
            _groups[group].append(name)
        if auto:
            _auto.add(group)
        return function

    return register


def group(name: str, rules: list[str], envs: str | tuple[str, ...], auto: bool = False) -> None:
    """Let `name` stand for these rules, in this order, on every env id that starts with one of `envs`: for rules that
    many tasks share, each task with its own choice. Of several prefixes that fit, the longest counts."""
    for prefix in (envs,) if isinstance(envs, str) else envs:
        if prefix in _families.setdefault(name, {}) or name in _groups:
            raise ValueError(f"group {name} is defined twice for {prefix}")
        _families[name][prefix] = rules
    if auto:
        _auto.add(name)


def rules_for(env_id: str) -> dict[str, Policy]:
    """The rules defined for `env_id`, {name: function}, in order of definition."""
    found = {}
    for name, by_prefix in _rules.items():
        fits = [prefix for prefix in by_prefix if env_id.startswith(prefix)]
        if fits:
            found[name] = by_prefix[max(fits, key=len)]
    return found


def groups_for(env_id: str) -> dict[str, list[str]]:
    """The groups with a rule for `env_id`, {group: [rule names]}; `auto` is one of the keys if it has a meaning."""
    rules = rules_for(env_id)
    groups = {group: [name for name in names if name in rules] for group, names in _groups.items()}
    groups = {group: names for group, names in groups.items() if names}
    for group, by_prefix in _families.items():
        fits = [prefix for prefix in by_prefix if env_id.startswith(prefix)]
        if fits:
            groups[group] = by_prefix[max(fits, key=len)]
    default = [name for group, names in groups.items() if group in _auto for name in names]
    return groups | ({"auto": default} if default else {})
