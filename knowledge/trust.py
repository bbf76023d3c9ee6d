"""How far a policy in training lags behind the agent that has knowledge to lean on."""
import torch


class Trust:
    """Returns of two kinds of training episodes: those the inner policy plays alone, and those of the whole agent.

    `lag()` says how much worse the inner policy does alone than the agent did at its best. A learned critic cannot say
    that: the inner policy maximises the critic's errors, so it looks better to the critic than it is. Trust is given
    once: two policies that take turns within an episode can be worse than either, so the time of doubt is kept short.
    """

    MARGIN = 0.2  # lag, in standard deviations of returns, at which the inner policy is trusted
    RATE = 0.02  # of the running means: about the last 50 episodes of a kind
    FIRST = 400  # episodes before the means are compared

    def __init__(self, num_envs: int):
        self.current = torch.zeros(num_envs, dtype=torch.float64)  # return so far of each open episode
        self.alone = self.agent = self.best = float("nan")  # running means; best: the highest that `agent` has been
        self.trusted = False
        self.count, self.mean, self.square = 0, 0.0, 0.0  # of all returns; square: summed squared deviations

    def add(self, reward: torch.Tensor, alone: torch.Tensor, ended: torch.Tensor) -> None:
        """One step of every environment: rewards, who plays alone, whose episode is over, (num_envs,) each."""
        self.current += reward
        for i in ended.nonzero().squeeze(1).tolist():
            value, kind = self.current[i].item(), "alone" if alone[i] else "agent"
            deviation, self.count = value - self.mean, self.count + 1
            self.mean += deviation / self.count
            self.square += deviation * (value - self.mean)
            old = getattr(self, kind)
            setattr(self, kind, value if old != old else old + self.RATE * (value - old))
            if self.count >= self.FIRST and not self.agent <= self.best:
                self.best = self.agent
        self.current[ended] = 0.0
        self.trusted = self.trusted or self.lag() < self.MARGIN

    def lag(self) -> float:
        """(best - alone) / standard deviation of returns, in [0, 1]; 1 while nothing is known, 0 once trusted."""
        if self.trusted or self.best != self.best or self.alone != self.alone:
            return 0.0 if self.trusted else 1.0
        return min(1.0, max(0.0, (self.best - self.alone) / max((self.square / self.count) ** 0.5, 1e-8)))

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)
