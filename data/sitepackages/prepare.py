"""
The source code of the packages installed beside this Python: a longer text than the standard library, from your disk.

    python data/sitepackages/prepare.py                    # BPE with 4,096 ids, as data/pystdlib has
    python data/sitepackages/prepare.py --vocab_size=16384 --out_dir=data/sitepackages_16k

It is as long as what is installed: 62M tokens in 70 seconds with all that requirements.txt and requirements-dev.txt
name. Each package is a source. Files that several packages carry count once, tests are left out. The text keeps its
licences, and it stays on your disk.
"""

import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data import common  # noqa: E402
from data.pystdlib import prepare as pystdlib  # noqa: E402


def main():
    root = sysconfig.get_paths()['purelib']
    pystdlib.main(__doc__, str(HERE), root=root, name='sitepackages', once=True)


if __name__ == '__main__':
    common.run(main)
