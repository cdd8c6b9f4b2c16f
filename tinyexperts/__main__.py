"""python -m tinyexperts"""

from tinyexperts.cli import main

main()
