"""transformers is quiet in tests, and its warnings about tiny configs are no part of them."""

import pytest

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
