"""`python -m loscar_deploy` is `loscar`."""

import sys

from loscar_deploy.entry import main

if __name__ == "__main__":
    sys.exit(main())
