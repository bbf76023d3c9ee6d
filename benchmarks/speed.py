"""Speed beside a peer: updates per second, the whole training loop, environment steps.

Everything runs in one process and takes turns: in every round each contender does its share of work, and a ratio is
the median over rounds of the ratio within a round, so that a busy machine slows all of them alike. Rates move with the
machine; ratios are what to quote. Nothing here asserts a time.

python benchmarks/speed.py sac       # beside stable-baselines3
python benchmarks/speed.py td3       # beside stable-baselines3, and what the masks of camel.py cost
python benchmarks/speed.py ppo       # beside stable-baselines3 and torch-ac
python benchmarks/speed.py stream    # beside the same maths written with autograd
python benchmarks/speed.py bk        # text environments and shaped PPO, beside plain stepping with captions
python benchmarks/speed.py meow      # beside the same maths written with modules and torch.optim
python benchmarks/speed.py sami      # beside the same maths written with autograd
"""
import argparse
import importlib.util
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy; one process: the peer gains from it as well
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.utils._pytree import tree_map

import envs
import knowledge
import runtime
import streamnet
from algos import bk_code, camel, meow, ppo, ppo_kian, sac, sac_kian, satesac, stream_ac, td3
from benchmarks import meow_modules, sami_direct, stream_autograd
from benchmarks.curves import write_table
from buffers import Batch, ReplayBuffer
from knowledge import history, potentials
from runtime import Means, compile_for, use_fast_matmul

PEER = "stable-baselines3==2.9.2"
PEERS = {"sac": {"stable_baselines3": PEER}, "td3": {"stable_baselines3": PEER},
         "ppo": {"stable_baselines3": PEER, "torch_ac": "torch-ac==1.4.0"},
         "stream": {}, "bk": {"crafter": "crafter==1.8.3"}, "meow": {}, "sami": {}}  # packages that a table needs
GRID = ppo.Args(env="MiniGrid-DoorKey-8x8-v0")
FILL = 2000  # transitions of uniform actions in every buffer before timing: 40 Fetch episodes
CAPACITY = 50_000  # of every buffer; SB3 looks through all of it for each HER batch, and a million would slow it down
SMALL = sac.Args(env="HalfCheetah-v5", num_envs=8, updates_per_step=1.0, her_goals=0, batch_size=256,
                 hidden="256x2", learning_rate=3e-4, gamma=0.99, tau=0.005)
BIG = replace(SMALL, env="FetchPush-v4", her_goals=4, batch_size=2048, hidden="512x3", learning_rate=1e-3, gamma=0.95,
              tau=0.05)
LOOP = replace(BIG, batch_size=256, hidden="256x2")


class Ours:
    """The functions of sac.py, or with `rules` of sac_kian.py, in the order of its main(), without logging. All that this
    file knows of them."""

    def __init__(self, args: sac.Args, compiled: bool = False, rules: str = ""):
        self.args, self.vec = args, envs.make_vec(args.env, args.num_envs, threads=torch.get_num_threads(),
                                                  time_feature=False)  # without it SB3 sees as many numbers
        self.f, self.d, self.g = envs.continuous_sizes(self.vec)
        obs = self.vec.reset(args.seed)
        self.obs, sizes, script = envs.flatten(obs), [], sac
        if rules:
            self.external = knowledge.load(rules, args.env, self.d, envs.example_of(self.vec, obs))
            self.args, sizes, script = replace_type(args, sac_kian.Args), [len(self.external)], sac_kian
        self.script, self.sizes = script, [self.d, *sizes]
        args = replace(self.args, buffer_size=CAPACITY, total_timesteps=CAPACITY)
        self.buffer, self.relabelled = script.make_buffer(args, self.vec, self.f, self.d, self.g)
        self.normalizer = envs.Normalizer(self.f, args.normalize)
        self.agent = script.make_agent(args, self.f, *self.sizes, torch.device("cpu"))
        self.learn = torch.compile(script.update, fullgraph=True, dynamic=False) if compiled else script.update
        self.scalars = runtime.Means()
        self.train(FILL, learn=False)

    def look(self, obs: torch.Tensor) -> torch.Tensor:
        if self.script is sac:
            return self.normalizer(obs)
        return sac_kian.Seen(self.normalizer(obs), knowledge.advise(self.external, envs.unflatten(obs, self.g), self.d))

    @torch.no_grad()
    def update(self, times: int) -> None:
        """Updates: sample, relabel, ask the external policies, learn, add up what is logged."""
        for _ in range(times):
            batch = self.buffer.sample(self.args.batch_size, self.relabelled)
            batch = batch._replace(obs=self.look(batch.obs), next_obs=self.look(batch.next_obs))
            noise, next_noise = (self.script.draw_noise(self.args.batch_size, *self.sizes) for _ in range(2))
            self.scalars.add(self.learn(self.agent, batch, noise, next_noise, self.args))

    @torch.no_grad()
    def train(self, steps: int, learn: bool = True) -> None:
        """The training loop for `steps` environment steps; without `learn`, uniform actions and no updates."""
        args, k = self.args, self.args.num_envs
        for _ in range(steps // k):
            action = 2 * torch.rand(k, self.d) - 1
            if learn:
                noise = self.script.draw_noise(k, *self.sizes)
                decision = self.script.decide(self.agent["actor"], self.look(self.obs), noise, args)
                action = torch.where(torch.rand(k, 1) < args.random_actions, action, decision.action)
            next_obs, reward, terminated, truncated, info = self.vec.step(self.vec.to_box(action.numpy()))
            self.buffer.add(self.obs, action, reward, terminated, truncated, envs.flatten(info["final_obs"]))
            self.normalizer.add(self.obs)
            self.obs = envs.flatten(next_obs)
            if learn:
                self.update(int(k * args.updates_per_step))


def replace_type(args: sac.Args, kind: type) -> sac_kian.Args:
    """`args` as those of a script that has all of them."""
    return kind(**vars(args))


class Peer:
    """SAC of stable-baselines3 with the same sizes, in its own loop: 8 steps of one environment, then 8 updates."""

    def __init__(self, args: sac.Args):
        from stable_baselines3 import SAC, HerReplayBuffer
        from stable_baselines3.common.logger import configure

        width, depth = map(int, args.hidden.split("x"))
        her = dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(
            n_sampled_goal=args.her_goals, goal_selection_strategy="future")) if args.her_goals else {}
        self.model = SAC("MultiInputPolicy" if her else "MlpPolicy", envs.make(args.env), device="cpu", seed=args.seed,
                         batch_size=args.batch_size, learning_rate=args.learning_rate, gamma=args.gamma, tau=args.tau,
                         ent_coef=f"auto_{args.initial_temperature}", policy_kwargs=dict(net_arch=[width] * depth),
                         buffer_size=CAPACITY, learning_starts=FILL, train_freq=8, gradient_steps=8, **her)
        self.model.set_logger(configure(None, []))  # it still averages what it would log, but prints nothing
        self.train(FILL)  # as many as learning_starts: uniform actions, no updates

    def update(self, times: int) -> None:
        """Updates, its sampling included."""
        self.model.train(times, self.model.batch_size)

    def train(self, steps: int) -> None:
        """Its training loop for `steps` environment steps."""
        self.model.learn(steps, log_interval=None, reset_num_timesteps=False)


class Delayed:
    """The functions of td3.py or camel.py in the order of its main(), without logging. camel.py masks at epsilon 0.5,
    around the policy that ships for the environment."""

    def __init__(self, script, compiled: bool = False):
        self.script, self.args = script, script.Args(env="Hopper-v4", buffer_size=CAPACITY)
        self.vec = envs.make_vec(self.args.env, 1)
        self.f, self.d, g = envs.continuous_sizes(self.vec)
        obs = self.vec.reset(self.args.seed)
        self.box = lambda obs: obs
        if script is camel:
            external = knowledge.load("llm:hopper", self.args.env, self.d, envs.example_of(self.vec, obs))
            self.box = partial(camel.add_box, external=external, g=g, d=self.d, args=self.args)
        self.rows, self.updates = self.box(envs.flatten(obs)), 0
        self.agent = script.make_agent(self.args, self.f, self.d, torch.device("cpu"))
        self.buffer, _ = script.make_buffer(self.args, self.vec, self.f, self.d, g)
        self.learn = torch.compile(script.update, fullgraph=True, dynamic=False) if compiled else script.update
        self.step(FILL)

    def look(self, rows: torch.Tensor) -> torch.Tensor:
        return camel.Seen(rows[:, :self.f], *rows[:, self.f:].chunk(2, 1)) if self.script is camel else rows

    @torch.no_grad()
    def update(self, times: int) -> None:
        """Updates: sample, draw masks, learn; the actor every second time."""
        for _ in range(times):
            self.updates += 1
            batch = self.buffer.sample(self.args.batch_size)
            inputs = [batch._replace(obs=self.look(batch.obs), next_obs=self.look(batch.next_obs)),
                      torch.randn(self.args.batch_size, self.d)]
            if self.script is camel:
                masks = camel.draw_masks(0.5, (2, self.args.batch_size, 1), self.updates, self.args)
                inputs += [masks, torch.tensor(0.5)]
            self.learn(self.agent, *inputs, self.updates % self.args.policy_delay == 0, self.args)

    @torch.no_grad()
    def step(self, steps: int) -> None:
        """Environment steps with uniform actions, stored; in camel.py each state is asked for its box."""
        for _ in range(steps):
            action = 2 * torch.rand(1, self.d) - 1
            next_obs, reward, terminated, truncated, info = self.vec.step(self.vec.to_box(action.numpy()))
            final_rows = self.box(envs.flatten(info["final_obs"]))
            self.buffer.add(self.rows, action, reward, terminated, truncated, final_rows)
            self.rows = self.box(envs.flatten(next_obs)) if (terminated | truncated).any() else final_rows


def sb3_td3(args: td3.Args) -> Callable[[int], None]:
    """Updates of TD3 in stable-baselines3 with the same sizes, sampling included."""
    from stable_baselines3 import TD3
    from stable_baselines3.common.logger import configure

    width, depth = map(int, args.hidden.split("x"))
    model = TD3("MlpPolicy", envs.make(args.env), device="cpu", seed=args.seed, batch_size=args.batch_size,
                learning_rate=args.learning_rate, gamma=args.gamma, tau=args.tau, policy_delay=args.policy_delay,
                target_policy_noise=args.policy_noise, target_noise_clip=td3.NOISE_CLIP, buffer_size=CAPACITY,
                policy_kwargs=dict(net_arch=[width] * depth), learning_starts=FILL)
    model.set_logger(configure(None, []))
    model.learn(FILL, log_interval=None)  # uniform actions, no updates
    return lambda times: model.train(times, model.batch_size)


def products_of_td3(args: td3.Args, f: int, d: int) -> Callable[[int], None]:
    """The matrix products of an update of TD3, and nothing else: no float32 code with the same library is faster."""
    b, hidden = args.batch_size, runtime.hidden_layers(args.hidden)
    actor, critic = ([(n, m) for n, m in zip(sizes, sizes[1:])] for sizes in ([f, *hidden, d], [f + d, *hidden, 1]))
    always = [(1, b, n, m) for n, m in actor]  # the target's action
    always += 2 * [(2, b, n, m) for n, m in critic]  # both critics, and their targets
    always += [(2, n, b, m) for n, m in critic] + [(2, b, m, n) for n, m in critic[1:]]  # back to weights, to inputs
    delayed = [(1, b, n, m) for n, m in actor + critic]
    delayed += [(1, b, m, n) for n, m in critic + actor[1:]] + [(1, n, b, m) for n, m in actor]
    operands = [[(torch.rand(k, i, j), torch.rand(k, j, m), torch.empty(k, i, m)) for k, i, j, m in group]
                for group in (always, delayed)]

    def run(times: int) -> None:
        for i in range(times):
            for x, y, out in operands[0] + (operands[1] if i % args.policy_delay else []):
                torch.bmm(x, y, out=out)
    return run


def time_td3(full: bool, rounds: int) -> list[dict]:
    """Updates beside stable-baselines3; what masks add to an update and to a step."""
    torch.compiler.reset()
    torch.manual_seed(1)
    fast = "medium" if use_fast_matmul(torch.device("cpu")) else "highest"
    peer, ours, masks = sb3_td3(td3.Args(env="Hopper-v4")), Delayed(td3), Delayed(camel)
    contenders = [Contender("SB3", peer), Contender('SB3, matmul "medium"', peer, "medium"),
                  Contender("ours, eager", ours.update, fast), Contender("ours, eager, masks", masks.update, fast)]
    if full:
        contenders += [Contender("ours, compiled", Delayed(td3, compiled=True).update, fast),
                       Contender("ours, compiled, masks", Delayed(camel, compiled=True).update, fast)]
    contenders += [Contender("products alone", products_of_td3(ours.args, ours.f, ours.d), fast)]
    work = "one update of the critics, every second time of actor and targets, sampling included"
    rows = measure("updates, TD3", f"{work}; Hopper-v4, batch 256, networks 256x2", "updates", contenders,
                   100 if full else 10, rounds)
    contenders = [Contender("td3", ours.step), Contender("camel, a box around llm:hopper", masks.step)]
    return rows + measure("stepping, masks", "Hopper-v4, one environment, uniform actions, stored", "steps", contenders,
                          1000 if full else 100, rounds)


class Gym:
    """Environments of gym.make, stepped one after another."""

    def __init__(self, env_id: str, num_envs: int, seed: int):
        self.envs = [envs.make(env_id) for _ in range(num_envs)]
        self.obs = [env.reset(seed=seed + i)[0] for i, env in enumerate(self.envs)]

    def step(self, action: np.ndarray) -> list[dict]:
        """Observations after a step; where an episode ended, the first one of the next."""
        for i, env in enumerate(self.envs):
            self.obs[i], _, terminated, truncated, _ = env.step(action[i])
            if terminated or truncated:
                self.obs[i], _ = env.reset()
        return self.obs


class Stream:
    """stream_ac's functions in the order of its main(), without logging."""

    def __init__(self, impl: str):
        args = stream_ac.Args()
        self.impl, self.args = impl, args
        torch.manual_seed(args.seed)
        self.env = envs.StreamEnv(args.env)
        self.agent, self.nets = stream_ac.make_agent(args, self.env)
        self.low, self.high = self.env.action_space.low, self.env.action_space.high
        self.row = torch.zeros(self.env.size + 3, dtype=torch.float64)
        self.begin(args.seed)
        self.learn = stream_ac.step if impl != "compiled" else compile_for(
            stream_ac.step, streamnet.COMPILED, self.agent, self.nets, self.state, self.action, self.row,
            torch.zeros(len(self.low)), 1, args)

    def begin(self, seed: int | None = None) -> None:
        obs = torch.from_numpy(self.env.reset(seed))
        self.state = streamnet.observe(self.agent["obs"], obs, None, 1, self.args.normalize_obs)
        self.action = stream_ac.choose(self.agent, self.nets, self.state, torch.randn(len(self.low)), self.args)

    @torch.no_grad()
    def train(self, steps: int) -> None:
        """The training loop for `steps` environment steps."""
        update = stream_autograd.update_ac if self.impl == "autograd" else stream_ac.update
        with mock.patch.object(stream_ac, "update", update):
            self.loop(steps)

    def loop(self, steps: int) -> None:
        raw = self.row.numpy()
        for _ in range(steps):
            obs, reward, _, _, over = self.env.step(np.clip(self.action.numpy(), self.low, self.high))
            raw[:-3], raw[-3], raw[-2], raw[-1] = obs, reward, over, 0.0 if over else self.args.gamma
            self.state, self.action, *_ = self.learn(self.agent, self.nets, self.state, self.action, self.row,
                                                     torch.randn(len(self.low)), 1, self.args)
            if over:
                self.begin()


class Grid:
    """The functions of ppo.py, or of ppo_kian.py with its external policies, in the order of their main(), without
    logging."""

    def __init__(self, script, args):
        self.script, self.args, self.vec = script, args, envs.make_vec(args.env, args.num_envs)
        torch.manual_seed(args.seed)
        obs = envs.to_tensors(self.vec.reset(args.seed))
        shape, actions = envs.discrete_sizes(self.vec)
        external = knowledge.load("auto", args.env, actions, obs, lowest=0.0) if script is ppo_kian else {}
        self.agent = (ppo_kian.Agent(shape, actions, len(external), args) if external else
                      ppo.Agent(shape, actions))
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=args.learning_rate, fused=True)
        self.loop = {"obs": obs, "open_return": torch.zeros(args.num_envs, dtype=torch.float64)}

        def look(obs):
            if not external:
                return obs["image"]
            return ppo_kian.Seen(obs["image"], knowledge.advise(external, obs, actions, lowest=0.0).float())
        self.look = look

    def train(self, steps: int) -> None:
        """The training loop for `steps` environment steps."""
        script, args, scalars = self.script, self.args, Means()
        for _ in range(steps // (args.num_steps * args.num_envs)):
            rollout = script.collect(self.agent, self.vec, self.look, self.loop, scalars, args)
            for _ in range(args.epochs):
                for index in torch.randperm(len(rollout.action)).split(args.batch_size):
                    batch = tree_map(lambda x: x[index], rollout)
                    scalars.add(script.update(self.agent, self.optimizer, script.ppo_loss, batch, args))


def peer_encoder() -> torch.nn.Sequential:
    """The network of the released code, (B, 3, 7, 7) -> (B, 64)."""
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 16, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 2), nn.ReLU(),
                         nn.Conv2d(32, 64, 2), nn.ReLU(), nn.Flatten())


def torch_ac_ppo(args: ppo.Args) -> Callable[[int], None]:
    """Training with torch-ac, whose environments are a process each."""
    import gymnasium as gym
    import torch_ac
    from torch import nn

    class Model(nn.Module, torch_ac.ACModel):
        recurrent = False

        def __init__(self):
            super().__init__()
            self.encoder = peer_encoder()
            self.actor = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 7))
            self.critic = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

        def forward(self, obs):
            x = self.encoder(obs.image)
            return torch.distributions.Categorical(logits=self.actor(x)), self.critic(x).squeeze(1)

    def preprocess(batch, device=None):
        image = torch.tensor(np.array([obs["image"] for obs in batch]), dtype=torch.float)
        return torch_ac.DictList({"image": image.permute(0, 3, 1, 2)})

    tasks = [gym.make(args.env) for _ in range(args.num_envs)]
    for i, env in enumerate(tasks):
        env.reset(seed=i)
    algo = torch_ac.PPOAlgo(tasks, Model(), torch.device("cpu"), args.num_steps, args.gamma, args.learning_rate,
                            args.gae_lambda, args.entropy_coef, args.value_coef, args.max_grad_norm, 1, 1e-8, args.clip,
                            args.epochs, args.batch_size, preprocess)

    def train(steps: int) -> None:
        for _ in range(steps // (args.num_steps * args.num_envs)):
            experience, _ = algo.collect_experiences()
            algo.update_parameters(experience)
    return train


def sb3_ppo(args: ppo.Args) -> Callable[[int], None]:
    """Training with stable-baselines3, environments stepped in one process."""
    import gymnasium as gym
    from minigrid.wrappers import ImgObsWrapper
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import DummyVecEnv

    class Extractor(BaseFeaturesExtractor):
        def __init__(self, space):
            super().__init__(space, 64)
            self.encoder = peer_encoder()

        def forward(self, x):
            return self.encoder(x.permute(0, 3, 1, 2) if x.shape[1] != 3 else x)

    tasks = DummyVecEnv([lambda: ImgObsWrapper(gym.make(args.env))] * args.num_envs)
    policy = dict(features_extractor_class=Extractor, net_arch=[64], normalize_images=False)
    model = PPO("MlpPolicy", tasks, n_steps=args.num_steps, batch_size=args.batch_size, n_epochs=args.epochs,
                learning_rate=args.learning_rate, gamma=args.gamma, gae_lambda=args.gae_lambda, clip_range=args.clip,
                ent_coef=args.entropy_coef, vf_coef=args.value_coef, max_grad_norm=args.max_grad_norm, device="cpu",
                normalize_advantage=False, policy_kwargs=policy)
    model.set_logger(configure(None, []))
    return lambda steps: model.learn(steps, log_interval=None, reset_num_timesteps=False)


def step_grid(env_id: str, share: int, rounds: int) -> list[dict]:
    """Environment steps per second with random actions, after a check that all give the same bits."""
    n, seed = 16, 1
    vec, peer = envs.make_vec(env_id, n, seed), Gym(env_id, n, seed)
    actions, same = np.random.default_rng(seed).integers(0, vec.action_space.n, (700, n)), True
    for action in actions:  # longer than an episode of DoorKey-8x8, so resets are compared as well
        expected, obs = peer.step(action), vec.step(action)[0]
        same &= all(np.array_equal(obs["image"][i], expected[i]["image"]) for i in range(n))

    def drive(step: Callable, steps: int) -> None:
        for k in range(steps // n):
            step(actions[k % len(actions)])

    rows = measure("stepping", f"{env_id}, {n} environments, random actions, resets included", "steps",
                   [Contender("gym.make", partial(drive, peer.step)), Contender("ours", partial(drive, vec.step))],
                   share, rounds)
    print(f"  {len(actions)} steps of {n} environments with equal seeds and actions: observations are "
          f"{'bit-identical' if same else 'NOT IDENTICAL'}")
    return rows


def time_ppo(full: bool, rounds: int) -> list[dict]:
    """Training and stepping beside torch-ac and stable-baselines3."""
    share = GRID.num_steps * GRID.num_envs
    contenders = [Contender("torch-ac", torch_ac_ppo(GRID)), Contender("SB3", sb3_ppo(GRID)),
                  Contender("ppo.py", Grid(ppo, GRID).train),
                  Contender("ppo_kian.py, 3 external policies", Grid(ppo_kian, ppo_kian.Args(env=GRID.env)).train)]
    rows = measure("training", "DoorKey-8x8: 16 environments x 128 steps, 4 epochs, batch 256; the whole loop", "steps",
                   contenders, share * (4 if full else 1), rounds)
    return rows + step_grid(GRID.env, 16_000 if full else 1600, rounds)


class Contender(NamedTuple):
    name: str
    run: Callable[[int], None]  # does that many units of work
    precision: str = "highest"  # of float32 matrix products, a switch of the whole process that is set before each turn


class Shaped:
    """The functions of bk_code.py with a potential, in the order of its main(), without logging. `fast`: whether the
    environments are stepped in arrays, without text."""

    def __init__(self, knowledge_spec: str, fast: bool = True, env: str = "BabyAI-Text-GoToLocal-RedBall-S20"):
        self.args = args = bk_code.Args(env=env)
        self.vec, words = envs.make_vec(env, args.num_envs, fast=fast), envs.action_words(env)
        torch.manual_seed(args.seed)
        obs = envs.to_tensors(self.vec.reset(args.seed))
        shape, actions = envs.discrete_sizes(self.vec)
        self.potential = potentials.load(knowledge_spec, env, envs.clauses, words)
        self.agent = bk_code.Agent(shape, actions, False)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=args.learning_rate, fused=True)
        self.past = history.Past(obs, args.horizon, words.index("do nothing"))
        self.shaping = bk_code.Shaping(1.0, args.num_envs)
        self.loop = {"obs": obs, "open_return": torch.zeros(args.num_envs, dtype=torch.float64),
                     "phi": self.potential(self.past.now)}

    @staticmethod
    def look(obs, phi):
        return bk_code.Seen(envs.seen(obs), phi)

    def collect(self, steps: int) -> bk_code.Batch:
        """Rollouts of `steps` environment steps in all; the last one."""
        for _ in range(steps // (self.args.num_steps * self.args.num_envs)):
            rollout = bk_code.collect(self.agent, self.vec, self.look, self.loop, Means(), self.past, self.potential,
                                      self.shaping, self.args)
        return rollout

    def train(self, steps: int) -> None:
        """The training loop for `steps` environment steps."""
        args, scalars = self.args, Means()
        share = args.num_steps * args.num_envs
        for _ in range(steps // share):
            rollout = self.collect(share)
            for _ in range(args.epochs):
                for index in torch.randperm(len(rollout.action)).split(args.batch_size):
                    batch = tree_map(lambda x: x[index], rollout)
                    scalars.add(bk_code.update(self.agent, self.optimizer, bk_code.ppo_loss, batch, args))


def drive(step: Callable, read: Callable, n: int, num_actions: int, steps: int) -> None:
    """Random actions; `read` is given what `step` returns."""
    actions = np.random.default_rng(0).integers(0, num_actions, (steps // n, n))
    for action in actions:
        read(step(action))


def time_bk(full: bool, rounds: int) -> list[dict]:
    """Stepping and training beside plain environments that describe every observation."""
    import crafter

    n, env = 16, "BabyAI-Text-GoToLocal-RedBall-S20"
    vec, share = envs.make_vec(env, n, 1), 16_000 if full else 800
    rows = measure("stepping", f"{env}, {n} environments, random actions, resets included", "steps", [
        Contender("gym.make, described", partial(drive, Gym(env, n, 1).step, len, n, 7)),
        Contender("ours", partial(drive, vec.step, len, n, 7)),
        Contender("ours, all captions read", partial(drive, vec.step, lambda step: envs.captions(step[0]), n, 7))],
        share, rounds)

    class Plain:
        """crafter itself."""
        def __init__(self):
            self.env = crafter.Env(seed=1)
            self.env.reset()

        def step(self, action):
            if self.env.step(int(action[0]))[2]:
                self.env.reset()

    symbols, pixels = (envs.make_vec(f"Crafter-{kind}-Reward", 1, 1) for kind in ("Symbols", "Text"))
    rows += measure("stepping Crafter", "one environment, random actions, new worlds included", "steps", [
        Contender("crafter", partial(drive, Plain().step, id, 1, 17)),
        Contender("ours, pixels", partial(drive, pixels.step, id, 1, 20)),
        Contender("ours, symbols", partial(drive, symbols.step, id, 1, 20)),
        Contender("ours, symbols, captions read", partial(drive, symbols.step, lambda step: envs.captions(step[0]), 1,
                                                          20))], 2000 if full else 40, rounds)
    share = 128 * n * (4 if full else 1)
    work, names = f"bk_code.py, {env}: {n} environments x 128 steps", ("none", "near", "code", "pref", "goals")
    loops = {f"described, {name}": Shaped(name, fast=False) for name in ("code", "none")}
    loops |= {f"ours, {name}": Shaped(name) for name in names}
    rows += measure("collecting", f"{work}, no updates; by potential", "steps",
                    [Contender(name, loop.collect) for name, loop in loops.items()], share, rounds)
    return rows + measure("training", f"{work}, 4 epochs, batch 256; the whole loop, by potential", "steps",
                          [Contender(name, loop.train) for name, loop in loops.items()], share, rounds)


def measure(table: str, work: str, unit: str, contenders: list[Contender], share: int, rounds: int) -> list[dict]:
    """Let the contenders take turns of `share` units, print their table and return its rows. The first is the base."""
    print(f"\n{table}: {work}\n{unit} a turn: {share}, rounds: {rounds}", flush=True)
    rates = {contender.name: [] for contender in contenders}
    for k in range(rounds + 1):  # the first round does not count: graphs are compiled in it
        for contender in contenders[::1 if k % 2 else -1]:  # to and fro: nobody always follows the same one
            torch.set_float32_matmul_precision(contender.precision)
            start = time.perf_counter()
            contender.run(share)
            rates[contender.name].append(share / (time.perf_counter() - start))
    torch.set_float32_matmul_precision("highest")

    rows, base = [], rates[contenders[0].name][1:]
    print(f"  {'':32}{unit + '/s':>10}   x {contenders[0].name} (lowest, highest)")
    for name, (_, *own) in rates.items():
        ratios = sorted(a / b for a, b in zip(own, base))
        rate, ratio = statistics.median(own), statistics.median(ratios)
        print(f"  {name:32}{rate:10.2f}   {ratio:.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})", flush=True)
        rows.append({"table": table, "contender": name, "unit": f"{unit}/s", "rate": f"{rate:.5g}",
                     "ratio": f"{ratio:.3f}", "lowest": f"{ratios[0]:.3f}", "highest": f"{ratios[-1]:.3f}",
                     "rounds": rounds, "share": share})
    return rows


def learners(args: sac.Args, job: Literal["update", "train"], compiled: bool, kian: bool) -> list[Contender]:
    """SB3 and ours on `job`, each with a buffer of its own that holds the same number of transitions."""
    torch.compiler.reset()  # torch refuses to compile a function more than eight times
    torch.manual_seed(args.seed)
    fast = "medium" if use_fast_matmul(torch.device("cpu")) else "highest"
    peer, ours = Peer(args), {"ours, eager": Ours(args)}
    if compiled:
        ours["ours, compiled"] = Ours(args, compiled=True)
    if kian:
        name = f"ours, {'compiled' if compiled else 'eager'}, KIAN with 2 external policies"
        ours[name] = Ours(args, compiled, "fetch.v4")
    # A graph holds for the precision it was compiled at, and every contender keeps to one: nothing is compiled twice.
    run = getattr(peer, job)
    return [Contender("SB3", run), Contender('SB3, matmul "medium"', run, "medium"),
            *(Contender(name, getattr(engine, job), fast) for name, engine in ours.items())]


def step_arm(table: str, env_id: str, share: int, rounds: int) -> list[dict]:
    """Environment steps per second with random actions, after a check that all give the same bits."""
    n, seed = 16, 1
    vecs = {f"ours, {k} thread{'s'[:k - 1]}": envs.make_vec(env_id, n, seed, k, time_feature=False) for k in (1, 2)}
    peer = Gym(env_id, n, seed)
    actions = np.random.default_rng(seed).uniform(-1, 1, (60, n, 4)).astype(np.float32)
    same = True
    for action in actions:  # an episode has 50 steps, so resets are compared as well
        expected = peer.step(action)
        for obs in [vec.step(action)[0] for vec in vecs.values()]:
            same &= all(np.array_equal(obs[key][i], expected[i][key]) for key in obs for i in range(n))

    def drive(step: Callable, steps: int) -> None:
        for k in range(steps // n):
            step(actions[k % len(actions)])

    contenders = [Contender(name, partial(drive, env.step)) for name, env in {"gym.make": peer, **vecs}.items()]
    rows = measure(table, f"{env_id}, {n} environments, random actions, resets included", "steps", contenders,
                   share, rounds)
    print(f"  {len(actions)} steps of {n} environments with equal seeds and actions: observations are "
          f"{'bit-identical' if same else 'NOT IDENTICAL'}")
    return rows


def time_stream(share: int, rounds: int, compiled: bool) -> list[dict]:
    """Stream AC on HalfCheetah, one transition at a time, beside itself by autograd; and what memory it takes."""
    torch.compiler.reset()
    names = {"autograd, loops over tensors": "autograd", "closed form, eager": "eager"}
    if compiled:
        names["closed form, one graph"] = "compiled"
    learners = {name: Stream(impl) for name, impl in names.items()}
    agents, env = list(learners.values()), envs.StreamEnv("HalfCheetah-v4")
    env.reset(seed=1)
    action = np.zeros(6)

    def step_alone(steps: int) -> None:
        for _ in range(steps):
            if env.step(action)[-1]:
                env.reset()

    contenders = [*(Contender(name, learner.train) for name, learner in learners.items()),
                  Contender("the environment alone", step_alone)]
    title = "Stream AC on HalfCheetah-v4, networks 128x2: the whole loop, with the environment"
    rows = measure("stream", title, "steps", contenders, share, rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    agents[-1].train(10 * share)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    print(f"  {10 * share} more steps raise the peak of resident memory by {growth} KiB")
    return rows


def time_meow(share: int, rounds: int, compiled: bool) -> list[dict]:
    """Updates of MEow at Hopper's size, beside the same maths with modules, autograd and torch.optim."""
    torch.compiler.reset()
    torch.manual_seed(1)
    args, f, d, device = meow.with_preset(meow.Args(env="Hopper-v4")), 11, 3, torch.device("cpu")
    buffer = ReplayBuffer(FILL, 1, 1, f, d)
    for _ in range(FILL):
        obs, final_obs, action = torch.randn(1, f), torch.randn(1, f), 2 * torch.rand(1, d) - 1
        buffer.add(obs, action, np.ones(1), np.zeros(1, bool), np.zeros(1, bool), final_obs)

    def modules(compile_parts: bool) -> Callable[[int], None]:
        learner = meow_modules.Learner(args, f, d)
        if compile_parts:  # what torch.compile takes of modules: the functions that are differentiated
            learner.optimizer = torch.optim.Adam(learner.flow.parameters(), args.learning_rate, fused=True)
            learner.flow.q = torch.compile(learner.flow.q, fullgraph=True, dynamic=False)
            learner.target.v = torch.compile(learner.target.v, fullgraph=True, dynamic=False)

        def run(updates: int) -> None:
            for _ in range(updates):
                learner.update(buffer.sample(args.batch_size))
        return run

    def ours(compile_update: bool) -> Callable[[int], None]:
        agent, learn = meow.make_agent(args, f, d, device), runtime.compiled(meow.update, compile_update, device)

        @torch.no_grad()
        def run(updates: int) -> None:
            for _ in range(updates):
                learn(agent, buffer.sample(args.batch_size), meow.draw_kept(args), args)
        return run

    plain = modules(False)
    contenders = [Contender("modules", plain), Contender('modules, matmul "medium"', plain, "medium"),
                  Contender("ours, eager", ours(False))]
    if compiled:  # a graph holds for the precision it was compiled at
        contenders += [Contender("modules, parts compiled", modules(True)), Contender("ours, one graph", ours(True)),
                       Contender('ours, one graph, "medium"', ours(True), "medium")]
    return measure("meow", "one update of flow and target, sampling and dropout included; 11 features, 3 actions, batch "
                   "256, networks 64x2 and 256x2", "updates", contenders, share, rounds)


def time_sami(full: bool, rounds: int) -> list[dict]:
    """One update of SaTESAC beside itself by autograd, at our sizes and at the paper's; and what memory that takes."""
    f, d, rows = 18, 6, []  # HalfCheetah
    fast = "medium" if use_fast_matmul(torch.device("cpu")) else "highest"
    ours = satesac.Args()
    papers = replace(ours, hidden="512x3", encoder_hidden=128, batch_size=16_000, contrast_steps=1000)
    if not full:
        papers = replace(papers, batch_size=160, contrast_steps=10)
    for name, args, share in (("ours", ours, 60 if full else 3), ("paper", papers, 1)):
        torch.compiler.reset()
        torch.manual_seed(args.seed)

        def windows(rows: int, count: int) -> torch.Tensor:
            return torch.cat([torch.randn(rows, count, f + d), torch.ones(rows, count, 1)], 2)

        b, both = args.batch_size, windows(args.window + 1, args.batch_size)
        batch = Batch(both[:-1], torch.rand(b, d), torch.randn(b, 1), torch.zeros(b, 1), both[1:])
        contrast = satesac.Contrast(windows(args.window, args.contrast_trajectories * args.contrast_steps),
                                    torch.tensor(0.1))
        noise, next_noise = torch.randn(2, b, d)
        agents = [satesac.make_agent(args, f, d, args.context_dim, torch.device("cpu")) for _ in range(2)]
        direct = sami_direct.Direct(satesac.make_agent(args, f, d, args.context_dim, torch.device("cpu")), args)

        def autograd(times: int) -> None:
            for _ in range(times):
                direct.update(batch, contrast, noise, next_noise)

        @torch.no_grad()
        def learn(update: Callable, agent: dict, times: int) -> None:
            for _ in range(times):
                update(agent, batch, contrast, noise, next_noise, args)

        compiled = torch.compile(satesac.update, fullgraph=True, dynamic=False)
        pairs = (args.contrast_trajectories * args.contrast_steps // 2) ** 2
        title = (f"SaTESAC, {args.batch_size} transitions, networks {args.hidden}, LSTM {args.encoder_hidden}, windows of "
                 f"{args.window}, twice {pairs} pairs")
        rows += measure(f"sami, sizes of {name}", title, "updates", [
            Contender("autograd", autograd), Contender('autograd, matmul "medium"', autograd, "medium"),
            Contender("one encoder call, eager", partial(learn, satesac.update, agents[0]), fast),
            Contender("one encoder call, one graph", partial(learn, compiled, agents[1]), fast)], share, rounds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"  peak of resident memory so far, all four: {peak / 2 ** 20:.2f} GiB")
    return rows


def describe_cpu() -> str:
    """Name of the processor, as far as the system tells, and the instructions torch uses on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def time_sac(full: bool, rounds: int) -> list[dict]:
    """Updates, training and stepping beside stable-baselines3."""
    fast = "medium" if use_fast_matmul(torch.device("cpu")) else "highest"
    print(f"float32 products: ours {fast} (runtime.use_fast_matmul tests the CPU), SB3 highest (torch's default) and "
          "medium")

    one_update = "one update of critics, actor, temperature and targets, sampling included"
    rows = measure(
        "updates, small", f"{one_update}; 17 features, 6 actions, batch 256, networks 256x2, no HER", "updates",
        learners(SMALL, "update", compiled=True, kian=False), 100 if full else 10, rounds)
    rows += measure(
        "updates, big", f"{one_update}; 31 features, 4 actions, batch 2048, networks 512x3, HER (future, 4 goals). "
        "KIAN also asks two rules, before and after the step, and scores what they would do", "updates",
        learners(BIG, "update", compiled=full, kian=True), 3 if full else 1, rounds)
    rows += measure(
        "training", "FetchPush, one update per step; batch 256, networks 256x2, HER. SB3: 8 steps of 1 environment, "
        "8 updates; ours: 1 step of 8 environments, 8 updates", "steps",
        learners(LOOP, "train", compiled=full, kian=False), 200 if full else 40, rounds)
    rows += step_arm("stepping", "FetchPickAndPlace-v4", 960 if full else 160, rounds)
    rows += step_arm("stepping Franka", "FrankaPickAndPlaceSparse-v0", 3200 if full else 320, rounds)
    return rows


def main() -> int:
    """Measure, print the tables, write the CSV; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("algo", choices=list(PEERS), help="what to measure")
    parser.add_argument("--rounds", type=int, help="turns of every contender (default: 7, with --quick 2)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help="little work, only the small update compiled: a test")
    parser.add_argument("--csv", type=Path, help="file for the rows of all tables")
    flags = parser.parse_args()
    for module, package in PEERS[flags.algo].items():
        if importlib.util.find_spec(module) is None:
            print(f"speed: {module} is not installed; pip install {package}", file=sys.stderr)
            return 2
    if flags.threads or flags.algo in ("stream", "bk", "meow", "sami"):
        torch.set_num_threads(flags.threads or 1)
    if flags.csv and (not flags.csv.parent.is_dir() or flags.csv.exists() and not (
            flags.csv.is_file() and flags.csv.read_bytes().startswith(b"table,contender,"))):
        parser.error(f"--csv {flags.csv} is no table of this command, or in no folder; name another file")
    full, rounds = not flags.quick, flags.rounds or (2 if flags.quick else 7)

    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": describe_cpu()}
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"torch {machine['torch']}, {machine['threads']} threads of {os.cpu_count()} cores, {machine['cpu']}{load}")
    rows = {"sac": lambda: time_sac(full, rounds), "td3": lambda: time_td3(full, rounds),
            "ppo": lambda: time_ppo(full, rounds),
            "stream": lambda: time_stream(2000 if full else 100, rounds, compiled=full),
            "bk": lambda: time_bk(full, rounds),
            "meow": lambda: time_meow(100 if full else 5, rounds, compiled=full),
            "sami": lambda: time_sami(full, rounds)}[flags.algo]()
    if flags.csv:
        write_table(flags.csv, [*rows[0], *machine], [row | machine for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
