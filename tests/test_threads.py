"Workers × threads stay within the cores"
import os, subprocess, sys
from pathlib import Path

import pytest

def test_workers_share_the_cores(tmp_path):
    pytest.importorskip('xdist')
    (tmp_path/'conftest.py').write_text((Path(__file__).parent/'conftest.py').read_text(encoding='utf-8'),
                                        encoding='utf-8')
    (tmp_path/'test_it.py').write_text('import os\ndef test_it(): assert os.environ.get("OMP_NUM_THREADS")==str(max(1, os.cpu_count()//2))\n')
    env = {k: v for k,v in os.environ.items() if not k.startswith(('OMP','PYTEST'))}
    r = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-n2', '-p', 'no:cacheprovider', '.'], cwd=tmp_path,
                       env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-1000:]
