"""Where the process begins: Ctrl-C while the command line is still being imported is no traceback either."""

import sys

try:
    from millrace.server.cli import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
