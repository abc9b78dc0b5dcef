const packed = Uint8Array.from(atob(document.getElementById("data").textContent), letter => letter.charCodeAt(0));
const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
const data = await new Response(unpacked).json();
const dark = matchMedia("(prefers-color-scheme: dark)");

/* Lines of at most so many letters. */
function wrapped(text, letters) {
  return [text].flat().join(" ").match(new RegExp(`.{1,${Math.floor(letters)}}(\\s|$)|\\S+`, "g")) ?? [];
}

/* A figure as wide as its place: one column and the legend below on a narrow screen. */
function fitted(spec, width) {
  const copy = structuredClone(spec), narrow = width < 760;
  const panels = copy.concat ?? [copy];
  const columns = narrow ? 1 : Math.min(copy.columns ?? 1, panels.length);
  const legend = narrow ? 75 : 190;
  const inner = Math.max(160, Math.min(panels.length > 1 ? 420 : 920, Math.floor(width / columns) - legend));
  copy.columns = columns;
  copy.config = { ...copy.config, background: null, view: { continuousWidth: inner, continuousHeight: 210 } };
  if (narrow) copy.config.legend = { orient: "bottom", columns: 2, labelLimit: 140 };
  copy.config.axis = { ...copy.config.axis, gridOpacity: dark.matches ? 0.25 : 1 };
  if (copy.title?.text) copy.title = { ...copy.title, text: wrapped(copy.title.text, width / 9), subtitle: wrapped(copy.title.subtitle, width / 7) };
  for (const panel of panels) if (panel.width) panel.width = narrow ? inner : Math.min(panel.width, inner);
  return copy;
}

function draw(place) {
  const width = place.clientWidth;
  if (!width) return;  // hidden: drawn when it is shown
  place.dataset.width = width;
  const options = { actions: false, theme: dark.matches ? "dark" : undefined, renderer: "svg" };
  return embed(place, fitted(place.spec ?? data.figures[place.dataset.figure], width), options);
}

const seen = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "300px" });

function redraw() {
  for (const place of document.querySelectorAll(".plot[data-width]")) draw(place);
}

/* The leaderboard: accuracy against cost of every method of one scenario; the line joins those that nothing beats. */
function leaderboard() {
  const place = document.getElementById("leaders"), choice = document.getElementById("scenario");
  if (!place) return;
  const values = data.leaders.filter(point => point.scenario === choice.value);
  const x = { field: "seconds", type: "quantitative", title: data.clock, scale: { type: "log", nice: false } };
  const names = values.map(point => point.method);
  const color = { field: "method", type: "nominal", title: null, sort: names, legend: { symbolLimit: 60, symbolOpacity: 1 },
                  scale: { domain: names, range: values.map(point => point.colour) } };
  const shape = { ...color, scale: { domain: names, range: values.map(point => point.shape) } };
  const y = { field: "accuracy", type: "quantitative", title: "accuracy", scale: { zero: false } };
  const told = ["method", "about", "accuracy", "deviation", "seconds", "share", "seeds", "commit", "configuration"];
  place.spec = {
    data: { values },
    layer: [
      { transform: [{ filter: "datum.method === 'plain'" }], mark: { type: "rule", strokeDash: [4, 3], color: "#888" }, encoding: { y } },
      { transform: [{ filter: "datum.best" }], mark: { type: "line", color: "#888", interpolate: "step-after" }, encoding: { x, y } },
      { mark: { type: "rule", opacity: 0.6 }, encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color } },
      {
        mark: { type: "point", filled: true, size: 90, opacity: 1 },
        encoding: { x, y, color, shape,
                    tooltip: told.map(field => ({ field, type: "nominal" })) },
      },
    ],
    height: 320, config: {},
  };
  draw(place);
}

/* Cards with all words, and sections with such cards; few are opened, none is said. */
function filter(words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean), found = [];
  for (const card of document.querySelectorAll("[data-words]")) {
    const text = card.dataset.words, whole = wanted.every(word => text.includes(word));
    let any = false;
    for (const row of card.querySelectorAll("tbody tr")) {
      row.hidden = !whole && !wanted.every(word => (text + " " + row.textContent.toLowerCase()).includes(word));
      any ||= !row.hidden;
    }
    card.hidden = !any && !whole;
    if (!card.hidden) found.push(card);
  }
  for (const part of [...document.querySelectorAll("details:not([data-words]), section")].reverse()) {
    const cards = [...part.querySelectorAll("[data-words]")];
    if (cards.length) part.hidden = cards.every(card => card.hidden);
    else part.hidden = wanted.length > 0;
  }
  if (wanted.length && found.length <= 12) found.forEach(reveal);
  document.getElementById("none").hidden = found.length > 0;
}

/* Whatever it is folded into is opened. */
function reveal(part) {
  for (let fold = part.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
}

/* An address leads to a table or a figure, or with scenario=NAME to a scenario of the leaderboard. */
function follow() {
  const address = decodeURIComponent(location.hash.slice(1)), choice = document.getElementById("scenario");
  if (address.startsWith("scenario=") && choice) {
    choice.value = address.slice("scenario=".length);
    leaderboard();
    document.getElementById("leaderboard").scrollIntoView();
    return;
  }
  const part = address && document.getElementById(address);
  if (part) { reveal(part); part.scrollIntoView(); }
}

function sort(heading) {
  const table = heading.closest("table"), column = heading.cellIndex, body = table.tBodies[0];
  const up = heading.getAttribute("aria-sort") !== "ascending";
  const value = row => row.cells[column].textContent, number = text => parseFloat(text.replace(/[,±].*$/, ""));
  const compare = (a, b) => number(a) - number(b) || a.localeCompare(b);
  const empty = text => Number.isNaN(number(text)) && /^[–-]?$/.test(text.trim());
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    return empty(x) - empty(y) || (up ? 1 : -1) * compare(x, y);
  });
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows);
}

/* What a word of a heading, or a method at the beginning of a line, means. */
function hint(event) {
  const cell = event.target.closest?.("th button, td:first-child");
  const meaning = cell && data.hints[cell.textContent.trim()];
  if (meaning) cell.title = meaning;
}

/* Every figure, also the folded ones: printing does not wait. */
async function drawAll() {
  for (const fold of document.querySelectorAll("details:has(> .figures)")) fold.open = true;
  await Promise.all([...document.querySelectorAll(".plot[data-figure]")].map(draw));
}

for (const place of document.querySelectorAll(".plot[data-figure]")) seen.observe(place);
document.getElementById("filter").addEventListener("input", event => filter(event.target.value));
document.getElementById("print").addEventListener("click", async () => { await drawAll(); print(); });
document.getElementById("scenario")?.addEventListener("change", event => {
  history.replaceState(null, "", "#scenario=" + encodeURIComponent(event.target.value));
  leaderboard();
});
document.addEventListener("click", event => { const heading = event.target.closest("th"); if (heading) sort(heading); });
for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, hint);
addEventListener("hashchange", follow);
dark.addEventListener("change", redraw);
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 200); });
leaderboard();
follow();
globalThis.drawAll = drawAll;
document.body.dataset.ready = "yes";
