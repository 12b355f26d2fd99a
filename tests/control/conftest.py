import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # toys.py, also by name: env:toys:make_counter
