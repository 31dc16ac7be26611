"""Makes standard input the controlling terminal, then becomes the given command: `on_terminal.py COMMAND …`."""

import fcntl
import os
import sys
import termios

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
