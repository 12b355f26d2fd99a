"""GRPO: group relative policy optimisation (DeepSeekMath, arXiv 2402.03300).

Problem. PPO needs a critic as large as the policy, and for one reward at the end of a text the critic learns little.
Idea. Sample a group of G responses to each prompt and let the group be its own baseline:
    A_i = (r_i - mean(r)) / (std(r) + epsilon)                        copied to every token of response i
    L = mean over tokens of  max(-A w, -A clip(w, 1 - low, 1 + high)),   w = exp(log p - log p_old)
    optionally + beta * k3, the pull towards the frozen reference, in the loss.
Pick it as the default for verifiable rewards. Pick another when most groups have one reward throughout (no signal: `dapo`, `ngrpo`), or when
response length drifts (`dr-grpo` removes the two biases of normalisation).

The original averages each response's tokens first (`objective.aggregation=sequence_mean`); the library's default is the token mean that
later work settled on. Conventions (sample deviation, 1e-6): verl and TRL.
"""

from volvelle.core.parts import method

from ..recipe import LanguageRecipe

grpo = method("grpo", LanguageRecipe(), title="Group relative policy optimisation", source="arXiv 2402.03300")
