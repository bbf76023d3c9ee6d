"""How far a policy in training lags behind the agent that has knowledge to lean on."""
import math

import torch


class Trust:
    """Returns of two kinds of training episodes: those the inner policy plays alone, and those of the whole agent.

    `doubt` says how much worse the inner policy does alone than the agent did at its best, in standard deviations of
    returns: 1 while nothing is known, never above. A learned critic cannot say that: the inner policy maximises the
    critic's errors, so it looks better to the critic than it is. Below MARGIN the inner policy is trusted, once and for
    all, and doubt fades from there: dropped at once, what doubt is there for would be missed until the critic knows the
    states that the inner policy leads to.

    The best of a noisy mean is high by luck alone. So trust is also given where over all episodes so far the agent is
    not ahead by MARGIN: there knowledge has not `helped`, nothing is to be missed, and doubt is gone at once.
    """

    MARGIN = 0.2
    FADE = 0.002  # of the doubt that is left, per episode after trust: half of it lasts 350 episodes
    RATE = 0.02  # of the running means: about the last 50 episodes of a kind
    FIRST = 400  # episodes, both kinds counted together, before the means are compared
    FEWEST = 20  # of each kind

    def __init__(self, num_envs: int, trusted: bool = False):
        self.current = torch.full((num_envs,), math.nan, dtype=torch.float64)  # return so far; nan: does not count
        self.alone = self.agent = self.best = float("nan")  # running means; best: the highest that `agent` has been
        self.doubt, self.trusted, self.helped = float(not trusted), trusted, True
        self.played = {kind: [0, 0.0] for kind in ("alone", "agent")}  # episodes and sum of returns
        self.count, self.mean, self.square = 0, 0.0, 0.0  # of all returns; square: summed squared deviations

    def add(self, reward: torch.Tensor, alone: torch.Tensor, ended: torch.Tensor, learning: bool = True) -> None:
        """One step of every environment: rewards, who plays alone, whose episode is over, (num_envs,) each. Episodes
        that begin before `learning` do not count: their actions are uniform, of neither kind."""
        self.current += reward
        for i in ended.nonzero().squeeze(1).tolist():
            value, kind = self.current[i].item(), "alone" if alone[i] else "agent"
            if math.isnan(value):
                continue
            deviation, self.count = value - self.mean, self.count + 1
            self.mean += deviation / self.count
            self.square += deviation * (value - self.mean)
            old = getattr(self, kind)
            setattr(self, kind, value if math.isnan(old) else old + self.RATE * (value - old))
            self.played[kind] = [self.played[kind][0] + 1, self.played[kind][1] + value]
            if self.count >= self.FIRST and not self.agent <= self.best:  # also where best is nan: none yet
                self.best = self.agent
            if self.trusted:
                self.doubt *= 1 - self.FADE
        self.current[ended] = 0.0 if learning else math.nan
        fewest = min(episodes for episodes, _ in self.played.values())
        if not self.trusted and self.count >= self.FIRST and fewest >= self.FEWEST:
            std = max((self.square / self.count) ** 0.5, 1e-8)
            alone, agent = (total / episodes for episodes, total in self.played.values())
            lag, ahead = (self.best - self.alone) / std, (agent - alone) / std
            self.doubt = min(1.0, max(0.0, lag))
            self.trusted = min(lag, ahead) < self.MARGIN
            if self.trusted:
                self.helped = ahead >= self.MARGIN
                self.doubt = self.MARGIN * self.helped

    @property
    def caution(self) -> float:
        """1 until trust is given, then doubt as a share of what it is where rules helped: at once 0 where not."""
        return self.doubt / self.MARGIN if self.trusted else 1.0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)
