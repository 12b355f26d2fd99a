from functools import cached_property
import numpy as np, torch
from typing import ClassVar
from volvelle.core.parts import part
from volvelle.core.statistics import pass_at_k
from ..slots import LanguageTask
from ..records import Prompt
@part("tree")
class Tree(LanguageTask):
    prompts: int = 128
    vocabulary: int = 8
    depth: int = 3
    winners: int = 1
    seed: int = 0
    max_tokens: int = 3
    default_model: ClassVar[str] = "tabular"
    gives = frozenset({"binary_rewards"})
    @cached_property
    def wins(self): 
        r=np.random.default_rng(self.seed); return torch.from_numpy(np.stack([r.permutation(self.vocabulary**self.depth)[:self.winners] for _ in range(self.prompts)]))
    @cached_property
    def _p(self): return [Prompt(f"t{i}", text=str(i), row={"index":i}) for i in range(self.prompts)]
    def split(self, name): return self._p
    def score(self, p, text):
        c=0
        for t in text.split(): c=c*self.vocabulary+int(t)
        return float(c in self.wins[p.row["index"]].tolist())
    def exact_pass_at_k(self, leaf, ks):
        q=leaf.gather(1,self.wins).sum(1)
        return {f"pass@{k}": float((1-(1-q)**k).mean()) for k in ks}|{"solved": float((q>.5).float().mean())}
