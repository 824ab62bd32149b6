"`brainseg app` with uploads of 1 MB at most, in a process that notes every address it uses: watched_app.py LOG ARGUMENTS..."
import functools, sys

log = open(sys.argv[1], 'a', buffering=1)
def watch(event, args):
    if event in ('socket.connect','socket.bind','socket.sendto') and isinstance(args[1], tuple): log.write(f'{event} {args[1][0]}\n')
    elif event in ('socket.getaddrinfo','socket.gethostbyname'): log.write(f'{event} {args[0]}\n')
sys.addaudithook(watch)

from brainseg_fastai import app
from brainseg_fastai.cli import main
app.launch_app = functools.partial(app.launch_app, max_mb=1)
sys.exit(main(sys.argv[2:]))
