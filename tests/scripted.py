"""A policy whose next-token probabilities are written down as a function of the prompt and the tokens so far."""

import torch

from volvelle.language.policies import Policy
from volvelle.language.records import Prompt


class Scripted(Policy):
    """probs(prompt number, prefix) -> {token: probability}; token 0 ends a text. Text: the ids with spaces between."""

    context, end_ids = 10_000, (0,)

    def __init__(self, probs, vocabulary: int = 64):
        self.probs, self.vocabulary = probs, vocabulary

    def encode(self, prompt):
        return [int(prompt.id)]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def stepper(self, prompts, members, max_tokens):
        return ScriptedStepper(self, [p for p, m in zip(prompts, members) for _ in range(m)])


class ScriptedStepper:
    def __init__(self, policy, prompts):
        self.policy, self.texts = policy, [(p[0], ()) for p in prompts]
        self._look()

    def _look(self):
        rows = torch.full((len(self.texts), self.policy.vocabulary), -torch.inf)
        for i, (prompt, prefix) in enumerate(self.texts):
            for token, p in self.policy.probs(prompt, prefix).items():
                rows[i, token] = torch.tensor(float(p)).log()
        self.logits = rows

    def select(self, index):
        assert (torch.tensor([t[0] for t in self.texts])[index].diff() >= 0).all(), "branches must stay in order of prompt"
        self.texts, self.logits = [self.texts[i] for i in index.tolist()], self.logits[index]

    def advance(self, tokens):
        self.texts = [(p, (*prefix, int(t))) for (p, prefix), t in zip(self.texts, tokens)]
        self._look()


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(i), text=str(i)) for i in range(count)]
