"Fast tests first; figures are drawn to nowhere; workers and threads together stay within the cores"
import os

os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.pop('PYTHONDONTWRITEBYTECODE', None) # every notebook and command is a process of its own: compiling the libraries once is enough
if 'PYTEST_XDIST_WORKER_COUNT' in os.environ: # before torch is imported; notebooks inherit it. The process that starts the workers must not set it for them
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//int(os.environ['PYTEST_XDIST_WORKER_COUNT']))))

try:
    from hypothesis import HealthCheck, settings
    settings.register_profile('house', deadline=None, suppress_health_check=[HealthCheck.too_slow]) # a busy machine is no failure
    settings.load_profile('house')
except ImportError: pass # the environment of the newest releases has pytest only

def pytest_collection_modifyitems(items): items.sort(key=lambda o: 'slow' in o.keywords)
