"""Text of observations and actions: what is described is in the arrays, so nobody pays for text that nobody reads."""
import numpy as np

from envs import babyai_text, crafter_text
from envs.ids import EnvError
from envs.minigrid import is_grid
from envs.vector import Observation


def clauses(obs: Observation) -> list[tuple[str, ...]]:
    """The phrases that describe each of a batch of observations: `image` (B, 7, 7, 3) of grid tasks, or `view`
    (B, 9, 7) and `status` (B, 20) of Crafter. Raises EnvError for others."""
    if isinstance(obs, dict) and "status" in obs:
        return [crafter_text.clauses(*one) for one in zip(np.asarray(obs["view"]), np.asarray(obs["status"]))]
    if isinstance(obs, dict) and "image" in obs and tuple(obs["image"].shape[1:]) == (7, 7, 3):
        return [babyai_text.clauses(image) for image in np.asarray(obs["image"])]
    seen = {name: tuple(x.shape[1:]) for name, x in obs.items()} if isinstance(obs, dict) else tuple(obs.shape[1:])
    raise EnvError(f"there are no captions for observations {seen}; BabyAI-Text, MiniGrid and Crafter tasks have some")


def captions(obs: Observation) -> list[str]:
    """A batch of observations as text (see `clauses`)."""
    return [". ".join(said) for said in clauses(obs)]


def action_words(env_id: str) -> tuple[str, ...]:
    """What each action does, in words, where there are captions too. Raises EnvError for other tasks."""
    if crafter_text.is_crafter(env_id):
        return crafter_text.ACTION_WORDS
    if is_grid(env_id):
        return babyai_text.ACTION_WORDS
    raise EnvError(f"{env_id} has no words for its actions; BabyAI-Text, MiniGrid and Crafter tasks have some")
