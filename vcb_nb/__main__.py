"`python -m vcb_nb` is `vcb`, for machines where scripts are not on the path, and for torchrun."
import sys

from vcb_nb.cli import main

if __name__ == "__main__": sys.exit(main())
