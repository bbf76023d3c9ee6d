"""SaTESAC's update written plainly, with autograd: what benchmarks/speed.py compares algos/satesac.py with, and what
tests hold it to. One call of nn.LSTM per kind of window, every network and every optimiser for itself."""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F


class Direct:
    """The agent of algos/satesac.py as modules."""

    def __init__(self, agent: dict, args):
        self.args = args
        self.encoder, self.matrix = Encoder(agent["critic"]), nn.Parameter(agent["critic"]["bilinear"].clone())
        self.critics = [network(agent["critic"], "q", k) for k in (0, 1)]
        self.targets, self.target_encoder = copy.deepcopy(self.critics), copy.deepcopy(self.encoder)
        self.actor = network(agent["actor"], "actor")
        self.log_alpha = nn.Parameter(agent["temperature"]["log_alpha"].clone())
        critic = [*self.encoder.parameters(), self.matrix, *(p for q in self.critics for p in q.parameters())]
        self.steps = {name: torch.optim.Adam(params, args.learning_rate) for name, params in (
            ("critic", critic), ("actor", self.actor.parameters()), ("temperature", [self.log_alpha]))}

    def act(self, state: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.actor(state).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        before = mean + log_std.exp() * noise
        log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(before).sum(-1)
        return before.tanh(), log_prob - torch.log(1 - before.tanh().square() + 1e-6).sum(-1)

    def take(self, name: str, loss: torch.Tensor) -> None:
        self.steps[name].zero_grad()
        loss.backward()
        self.steps[name].step()

    def update(self, batch, contrast, noise: torch.Tensor, next_noise: torch.Tensor) -> None:
        args, d = self.args, batch.action.shape[1]
        alpha = self.log_alpha.exp().detach()
        half = contrast.windows.shape[1] // 2
        positive, negative = contrast.windows.split(half, 1)
        with torch.no_grad():
            next_state = torch.cat([batch.next_obs[-1, :, :-d - 1], self.target_encoder(batch.next_obs)], 1)
            action, log_prob = self.act(next_state, next_noise)
            next_q = torch.min(*(q(torch.cat([next_state, action], 1))[:, 0] for q in self.targets))
            target_q = batch.reward[:, 0] + args.gamma * (1 - batch.terminated[:, 0]) * (next_q - alpha * log_prob)
            positive_keys, negative_keys = self.target_encoder(positive), self.target_encoder(negative)

        state = torch.cat([batch.obs[-1, :, :-d - 1], self.encoder(batch.obs)], 1)
        inputs = torch.cat([state, batch.action], 1)
        critic_loss = sum(0.5 * F.mse_loss(q(inputs)[:, 0], target_q) for q in self.critics)
        query = F.normalize(self.encoder(positive), dim=1)
        own, other = (F.normalize(keys @ self.matrix, dim=1) for keys in (positive_keys, negative_keys))
        contrast_loss = -(F.logsigmoid(query @ own.T / 0.1).mean() + F.logsigmoid(-query @ other.T / 0.1).mean())
        self.take("critic", critic_loss + contrast.weight * contrast_loss)

        state = state.detach()
        action, log_prob = self.act(state, noise)
        q = torch.min(*(q(torch.cat([state, action], 1))[:, 0] for q in self.critics))
        self.take("actor", (alpha * log_prob - q).mean())
        self.take("temperature", -self.log_alpha * (log_prob.detach().mean() - d))
        with torch.no_grad():
            for mine, theirs in zip([*self.targets, self.target_encoder], [*self.critics, self.encoder]):
                for p, q in zip(mine.parameters(), theirs.parameters()):
                    p.lerp_(q, args.tau)


class Encoder(nn.Module):
    """nn.LSTM, ReLU, linear: windows (W, B, f + d + 1) -> contexts (B, c)."""

    def __init__(self, params: dict):
        super().__init__()
        width, hidden = params["encoder.input"].shape[0], params["encoder.state"].shape[0]
        self.lstm, self.linear = nn.LSTM(width, hidden, bias=False), nn.Linear(*params["encoder.weight"].shape)
        with torch.no_grad():
            self.lstm.weight_ih_l0.copy_(params["encoder.input"].T)
            self.lstm.weight_hh_l0.copy_(params["encoder.state"].T)
            self.linear.weight.copy_(params["encoder.weight"].T)
            self.linear.bias.copy_(params["encoder.bias"])

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        output, _ = self.lstm(windows[..., :-1] * windows[..., -1:])
        return self.linear(F.relu(output[-1])) * windows[-1, :, -1:]


def network(params: dict, name: str, k: int | None = None) -> nn.Sequential:
    """The ReLU network `name` of a dict of tensors, the k-th of two side by side."""
    layers = []
    for i in range(sum(f"{name}.{i}.weight" in params for i in range(len(params)))):
        weight, bias = params[f"{name}.{i}.weight"], params[f"{name}.{i}.bias"]
        if k is not None:
            weight, bias = weight[k], bias[k, 0]
        linear = nn.Linear(*weight.shape)
        with torch.no_grad():
            linear.weight.copy_(weight.T)
            linear.bias.copy_(bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
