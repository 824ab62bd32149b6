"Fast tests first; figures are drawn to nowhere; workers and threads together stay within the cores"
import os

os.environ.setdefault('MPLBACKEND', 'agg')
workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//workers))) # before torch is imported; notebooks inherit it

def pytest_collection_modifyitems(items): items.sort(key=lambda o: 'slow' in o.keywords)
