import torch
from volvelle.core.parts import part
from .slots import Reward
@part("verifier")
class Verifier(Reward):
    def start(self, run): return _V(run.config.task)
class _V:
    def __init__(self,t): self.t=t
    def score(self, rs): return {"verifier": torch.tensor([self.t.score(r.prompt,r.text) for r in rs])}
    def total(self, s, m, step): return s["verifier"]
