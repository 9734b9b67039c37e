"""`python -m spairkit` is `spairkit`."""

import os

from spairkit.cli.main import main

try:
    main()
except SystemExit as ended:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise
    # gloo's threads outlive a training by torchrun, and one that frees a tensor while Python shuts
    # down would abort the process
    os._exit(int(ended.code or 0))
