"Fast tests first; figures are drawn to nowhere"
import os

os.environ.setdefault('MPLBACKEND', 'agg')

def pytest_collection_modifyitems(items): items.sort(key=lambda o: 'slow' in o.keywords)
