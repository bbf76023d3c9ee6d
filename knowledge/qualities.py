"""Rules of Fetch and of MiniGrid's DoorKey made weak or wrong on purpose, to compare forms of knowledge. Every rule of
`fetch.v4` and of DoorKey's `minigrid.official` has two variants, `-half` and `-mirrored`. Each variant forms a group.

    fetch.v4-half        right for half of all goals, so in half of the episodes; for the others an action at random
    minigrid.official-half   right in half of all views, in the others an action at random
    fetch.v4-mirrored, minigrid.official-mirrored    wrong always: away from where the rule goes

Rules have no memory, so chance depends on the state alone: in a state a rule is always right, or always wrong in the
same way. For the same reason all rules of a `-half` group are wrong in the same states, with the same random action. On
grids a rule that has nothing to say stays silent. docs/forms_of_knowledge.md has the use.
"""
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from knowledge.registry import Policy, group, groups_for, rule, rules_for

PRIME = 1009
LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE, DONE, ACTIONS = *range(7), 7
OPPOSITE = {LEFT: RIGHT, RIGHT: LEFT, FORWARD: DONE, PICKUP: DROP, DROP: PICKUP, TOGGLE: DONE, DONE: FORWARD}


def chance(x: Tensor, count: int) -> Tensor:
    """Numbers of states (B, n), read in whole units -> `count` numbers in [0, 1) for each, (B, count), that depend on
    its row alone. Sums of whole numbers below 2^24 are exact, so a row has the same ones in every batch."""
    weights = torch.tensor([float(pow(31, i, PRIME)) for i in range(1, x.shape[1] + 1)], dtype=x.dtype, device=x.device)
    factors = torch.tensor([float(pow(17, i, PRIME)) for i in range(1, count + 1)], dtype=x.dtype, device=x.device)
    whole = (x.round().remainder(PRIME) * weights).sum(1, keepdim=True).remainder(PRIME)  # (B, 1)
    return (whole * factors).remainder(PRIME) / PRIME


def of_arm(obs: dict[str, Tensor], count: int) -> Tensor:
    """`chance` of a Fetch state: the first number by the goal alone, so it stays for an episode, the others by gripper,
    object and goal, all in millimetres: (B, count)."""
    goal = obs["desired_goal"]
    where = torch.cat([obs["observation"][:, :6], goal], 1)
    return torch.cat([chance(1000 * goal, 1), chance(1000 * where, count - 1)], 1)


def of_grid(obs: dict[str, Tensor], count: int) -> Tensor:
    """`chance` of a MiniGrid view: (B, count)."""
    return chance(obs["image"].flatten(1).float(), count)


def half_of_arm(policy: Policy) -> Policy:
    def half(obs: dict[str, Tensor]) -> Tensor:
        drawn = of_arm(obs, 5)
        return torch.where(drawn[:, :1] < 0.5, policy(obs), 2 * drawn[:, 1:] - 1)
    return half


def mirrored_of_arm(policy: Policy) -> Policy:
    """The opposite move; fingers open where they should close."""
    return lambda obs: -policy(obs)


def half_of_grid(policy: Policy) -> Policy:
    def half(obs: dict[str, Tensor]) -> Tensor:
        advice, drawn = policy(obs), of_grid(obs, 2)
        other = one_hot((ACTIONS * drawn[:, 1]).long(), ACTIONS).to(advice)
        wrong = (drawn[:, :1] >= 0.5) & (advice > 0).any(1, keepdim=True)
        return torch.where(wrong, other, advice)
    return half


def mirrored_of_grid(policy: Policy) -> Policy:
    """Right for left; where it should go on or toggle, do nothing; drop for pick up."""
    def mirrored(obs: dict[str, Tensor]) -> Tensor:
        advice = policy(obs)
        swapped = torch.zeros_like(advice)
        for action, opposite in OPPOSITE.items():
            swapped[:, opposite] += advice[:, action]
        return swapped.clamp(max=1)
    return mirrored


for env in ("FetchReach", "FetchPush", "FetchSlide", "FetchPickAndPlace"):
    for name in groups_for(env)["fetch.v4"]:
        rule(f"{name}-half", env, group="fetch.v4-half")(half_of_arm(rules_for(env)[name]))
        rule(f"{name}-mirrored", env, group="fetch.v4-mirrored")(mirrored_of_arm(rules_for(env)[name]))

DOORKEY = "MiniGrid-DoorKey"
for kind, change in (("half", half_of_grid), ("mirrored", mirrored_of_grid)):
    names = groups_for(DOORKEY)["minigrid.official"]
    for name in names:
        rule(f"{name}-{kind}", DOORKEY)(change(rules_for(DOORKEY)[name]))
    group(f"minigrid.official-{kind}", [f"{name}-{kind}" for name in names], DOORKEY)
