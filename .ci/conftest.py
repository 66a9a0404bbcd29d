"""Hard cases use the helpers and fixtures of the lessons."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_seed import few_shapes, one_thread, quick, teacher_file  # noqa: E402
from test_seed import same_random_numbers_in_each_test  # noqa: E402

__all__ = ["few_shapes", "one_thread", "quick", "same_random_numbers_in_each_test", "teacher_file"]
