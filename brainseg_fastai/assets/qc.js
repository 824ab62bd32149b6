document.documentElement.classList.add('js');
const table = document.querySelector('table.qc'), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const say = document.getElementById('say'), all = document.getElementById('all');
function sortBy(th) {
  const i = th.cellIndex, now = th.getAttribute('aria-sort'), first = th.dataset.first || 'ascending';
  const to = !now || now === 'none' ? first : now === 'ascending' ? 'descending' : 'ascending';
  const sign = to === 'ascending' ? 1 : -1, text = th.dataset.sort === 'text';
  const value = r => r.cells[i].dataset.v;
  const rows = [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return sign * (text ? x.localeCompare(y, 'en', {numeric: true}) : x - y);
  });
  body.append(...rows);
  heads.forEach(o => o.dataset.sort && o.setAttribute('aria-sort', o === th ? to : 'none'));
  say.textContent = 'Sorted by ' + th.textContent + ', ' + to;
}
heads.forEach(th => {
  if (!th.dataset.sort) return;
  const b = document.createElement('button');
  b.type = 'button'; b.textContent = th.textContent; b.onclick = () => sortBy(th);
  th.replaceChildren(b);
});
function show(button, on) {
  button.setAttribute('aria-pressed', on);
  const cell = button.closest('td');
  if (cell) cell.querySelector('.over').hidden = !on;
}
const on = b => b.getAttribute('aria-pressed') === 'true', flips = [...document.querySelectorAll('.flip')];
function flipAll() { const to = !on(all); show(all, to); flips.forEach(b => show(b, to)); }
flips.forEach(b => {
  b.onclick = () => show(b, !on(b));
  b.closest('td').querySelector('.pic').onclick = b.onclick;
});
all.onclick = flipAll;
document.addEventListener('keydown', e => {
  if (e.key.toLowerCase() === 'c' && !e.ctrlKey && !e.metaKey && !e.altKey && !e.repeat) flipAll();
});
