from volvelle.core.parts import part
from .slots import Curriculum
@part("shuffle")
class Shuffle(Curriculum):
    def start(self, run): return _L(run)
class _L:
    def __init__(self, run): self.p=run.config.task.split("train"); self.rng=run.rng("curriculum")
    def draw(self,n): return [self.p[i] for i in self.rng.permutation(len(self.p))[:n]]
