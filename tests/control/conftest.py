import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # toy_envs.py, also by name: env:toy_envs:make_counter
