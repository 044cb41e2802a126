"""Read before any test file is."""

import os

# Before torch is loaded, and for the processes that tests start: on small matrices a second thread only waits.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
