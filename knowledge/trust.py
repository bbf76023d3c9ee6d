"""How far a policy in training lags behind the agent that has knowledge to lean on."""
import math
import sys

import torch
from tqdm import tqdm

from knowledge.registry import KnowledgeError


class Trust:
    """Returns of two kinds of training episodes: those the inner policy plays alone, and those of the whole agent.
    Beside them, the uniform ones of the start, before there is anything to choose with.

    `doubt` says how much worse the inner policy does alone than the agent did at its best, in standard deviations of
    returns: 1 while nothing is known, never above. A learned critic cannot say that: the inner policy maximises the
    critic's errors, so it looks better to the critic than it is. Below MARGIN the inner policy is trusted, once and for
    all, and doubt fades from there: dropped at once, what doubt is there for would be missed until the critic knows the
    states that the inner policy leads to.

    The best of a noisy mean is high by luck alone. So trust is also given where over all episodes so far the agent is
    not ahead by MARGIN: there knowledge has not `helped`, nothing is to be missed, and doubt is gone at once. Then
    `learned` is False if practice was no better than the uniform episodes: the inner policy has seen nothing that is
    worth learning from, and had better start afresh. Where no episode was uniform to its end, as without hindsight, it
    is taken to have learned.
    """

    MARGIN = 0.2
    FADE = 0.002  # of the doubt that is left, per episode after trust: half of it lasts 350 episodes
    RATE = 0.02  # of the running means: about the last 50 episodes of a kind
    FIRST = 400  # episodes, both kinds counted together, before the means are compared
    FEWEST = 20  # of each kind
    LEARNED = 0.5  # standard deviations that practice has to be above the start: few episodes make its mean a rough one

    def __init__(self, num_envs: int, trusted: bool = False):
        self.current = torch.zeros(num_envs, dtype=torch.float64)  # return so far of each open episode
        self.uniform = torch.zeros(num_envs, dtype=torch.bool)  # whether it began with uniform actions
        self.alone = self.agent = self.best = float("nan")  # running means; best: the highest that `agent` has been
        self.doubt, self.trusted, self.helped, self.learned = float(not trusted), trusted, True, True
        self.played = {kind: [0, 0.0] for kind in ("start", "alone", "agent")}  # episodes and sum of returns
        self.count, self.mean, self.square = 0, 0.0, 0.0  # of both kinds' returns; square: summed squared deviations

    def add(self, reward: torch.Tensor, alone: torch.Tensor, ended: torch.Tensor, uniform: bool = False) -> None:
        """One step of every environment: rewards, who plays alone, whose episode is over, (num_envs,) each, and whether
        all actions were uniform. An episode that changes from these to others counts for nothing."""
        self.current += reward
        self.uniform |= uniform
        for i in ended.nonzero().squeeze(1).tolist():
            if self.uniform[i] and not uniform:
                continue
            value, kind = self.current[i].item(), "start" if uniform else "alone" if alone[i] else "agent"
            self.played[kind] = [self.played[kind][0] + 1, self.played[kind][1] + value]
            if kind == "start":
                continue
            deviation, self.count = value - self.mean, self.count + 1
            self.mean += deviation / self.count
            self.square += deviation * (value - self.mean)
            old = getattr(self, kind)
            setattr(self, kind, value if math.isnan(old) else old + self.RATE * (value - old))
            if self.count >= self.FIRST and not self.agent <= self.best:  # also where best is nan: none yet
                self.best = self.agent
            if self.trusted:
                self.doubt *= 1 - self.FADE
        self.current[ended], self.uniform[ended] = 0.0, False
        enough = self.count >= self.FIRST and min(self.played["alone"][0], self.played["agent"][0]) >= self.FEWEST
        if enough and not self.trusted:
            std = max((self.square / self.count) ** 0.5, 1e-8)
            start, alone, agent = (total / n if n else -math.inf for n, total in self.played.values())
            lag, ahead = (self.best - self.alone) / std, (agent - alone) / std
            self.doubt = min(1.0, max(0.0, lag))
            self.trusted = min(lag, ahead) < self.MARGIN
            if self.trusted:
                self.helped, self.learned = ahead >= self.MARGIN, (alone - start) / std >= self.LEARNED
                self.doubt = self.MARGIN * self.helped
                verdict = "the trained policy begins to act" if self.helped else "rules were of no help and are dropped"
                anew = "" if self.helped or self.learned else ", the agent begins anew"
                tqdm.write(f"after {self.count} episodes: {verdict}{anew}", file=sys.stderr)

    @property
    def caution(self) -> float:
        """1 until trust; from then on doubt / MARGIN, which falls from 1 where rules helped, and is 0 where not."""
        return self.doubt / self.MARGIN if self.trusted else 1.0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """Raises KnowledgeError for what another version has saved."""
        if state.keys() != vars(self).keys() or state["played"].keys() != self.played.keys():
            raise KnowledgeError("the run was saved by another version of knowledge/trust.py; go on with that commit")
        vars(self).update(state)
