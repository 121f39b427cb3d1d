"use strict";
// All text reaches the page as text nodes and attributes, never as HTML.
const atlas = JSON.parse(document.getElementById("data").textContent);
const SHAPES = ["M0-5A5 5 0 1 0 0 5A5 5 0 1 0 0-5Z", "M0-6L6 0L0 6L-6 0Z", "M0-6L6 5L-6 5Z", "M-5-5H5V5H-5Z"];
const $ = (id) => document.getElementById(id);
const key = (latent) => `${latent.group}/${latent.id}`;
const byKey = new Map(atlas.latents.map((latent) => [key(latent), latent]));
const groups = new Map(atlas.groups.map((group, n) => [group.name, { ...group, shape: SHAPES[n % SHAPES.length] }]));
const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)} %`;
const signed = (x, digits = 4) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
const colour = (latent) => atlas.colours[latent.first_cycle];

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "rect", "g"].includes(tag) || attributes.svg;
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "svg" || value === null || value === false) continue;
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}
const label = (x, y, text, more = {}) => make("text", { svg: true, x, y, ...more }, text);

function contextText(context) {
  const row = atlas.text[context.row];
  return context.values.map((_, i) => atlas.tokens[row[context.start + i]]);
}
for (const latent of atlas.latents)
  latent.searched = latent.contexts.map((context) => contextText(context).join("").toLowerCase());

// ---- filter, sort, list -------------------------------------------------------------------------------------

const SORTS = {
  "share of attribution": (latent) => -latent.share,
  "how often it fires": (latent) => -latent.frequency,
  "loss without it": (latent) => (latent.ablation ? -latent.ablation.change : 1e9),
  "cycle of origin": (latent) => (latent.first_cycle ?? 1e9) - latent.share,
};
function armName(group) {
  const core = group.role === "core" ? `${group.kind} core` : "free latents";
  return `${group.chain}: ${core}`;
}
function options(select, values) {
  for (const [value, text] of values) select.append(make("option", { value }, text));
}
options($("arm"), [["", "all"], ...[...groups.values()].map((group) => [group.name, armName(group)])]);
const origins = [...new Set(atlas.latents.map((latent) => latent.first_cycle))].sort((a, b) => (a ?? 1e9) - (b ?? 1e9));
options($("cycle"), [["", "any cycle"], ...origins.map((t) => [String(t), t === null ? "never" : `cycle ${t}`])]);
options($("sort"), Object.keys(SORTS).map((name) => [name, name]));

let shown = [];
const sought = () => $("search").value.trim().toLowerCase();
const hits = (latent, words) => latent.searched.filter((text) => text.includes(words)).length;

function filtered() {
  const words = sought(), arm = $("arm").value, cycle = $("cycle").value;
  const fits = (latent) =>
    (!arm || latent.group === arm) && (!cycle || String(latent.first_cycle) === cycle) &&
    (!words || key(latent).includes(words) || hits(latent, words));
  const by = SORTS[$("sort").value];
  return atlas.latents.filter(fits).sort((a, b) => by(a) - by(b));
}
function sign(latent, size) {
  const box = make("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true", width: size, height: size });
  box.append(mark(latent));
  return box;
}
function mark(latent) {
  const never = latent.first_cycle === null;
  return make("path", { d: groups.get(latent.group).shape, class: never ? "mark never" : "mark", fill: never ? null : colour(latent) });
}
function renderList() {
  shown = filtered();
  const words = sought(), chosen = current(), list = $("list"), visible = new Set(shown);
  list.replaceChildren(...shown.map((latent) => {
    const preview = words && hits(latent, words) ? `${hits(latent, words)} contexts` : latent.by_token.slice(0, 5).map((one) => one[0].trim()).join(" · ");
    const parts = [sign(latent, 16), make("span", { class: "id" }, make("b", {}, latent.id), latent.group === "main" ? "" : ` ${latent.group}`),
      make("span", { title: "share of attribution" }, percent(latent.share, 2)),
      make("span", { class: "rate", title: "fires on" }, percent(latent.frequency, 0)), make("em", {}, preview)];
    return make("li", {}, make("a", { href: `#${key(latent)}`, "aria-current": latent === chosen ? "true" : null }, ...parts));
  }));
  $("count").textContent = `${shown.length} of ${atlas.latents.length} latents: id, share of the attribution, share of tokens, tokens with its highest means`;
  for (const [latent, path] of marks) {
    path.classList.toggle("off", !visible.has(latent));
    path.classList.toggle("on", latent === chosen);
  }
}

// ---- the map ------------------------------------------------------------------------------------------------

const marks = new Map();
function renderMap() {
  const W = 600, H = 380, left = 52, bottom = 38, top = 52, right = 12;
  const shares = atlas.latents.map((latent) => latent.share).filter((share) => share > 0);
  const low = Math.log10(Math.min(...shares) || 1e-6) - .05, high = Math.log10(Math.max(...shares) || 1) + .05;
  const x = (frequency) => left + (W - left - right) * frequency;
  const y = (share) => H - bottom - (H - bottom - top) * ((share > 0 ? Math.log10(share) : low) - low) / (high - low || 1);
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Map of all latents: frequency against share of attribution. The list below holds the same latents." });
  for (let t = 0; t <= 4; t++) {
    svg.append(make("line", { class: "grid", x1: x(t / 4), x2: x(t / 4), y1: top, y2: H - bottom }));
    svg.append(label(x(t / 4), H - bottom + 15, `${25 * t} %`, { "text-anchor": t === 4 ? "end" : "middle" }));
  }
  for (let decade = Math.floor(low); decade <= high; decade++)
    for (const step of [1, 2, 5]) {
      const share = step * 10 ** decade;
      if (Math.log10(share) < low || Math.log10(share) > high) continue;
      svg.append(make("line", { class: "grid", x1: left, x2: W - right, y1: y(share), y2: y(share) }));
      svg.append(label(left - 6, y(share) + 4, `${Number((100 * share).toPrecision(2))} %`, { "text-anchor": "end" }));
    }
  svg.append(label((W + left) / 2, H - 5, "fires on this share of tokens", { "text-anchor": "middle" }));
  svg.append(label(left - 46, top - 10, "share of the attribution"));
  for (const latent of [...atlas.latents].reverse()) {
    const path = mark(latent);
    path.setAttribute("transform", `translate(${x(latent.frequency).toFixed(1)} ${y(latent.share).toFixed(1)})`);
    const text = `${key(latent)}: fires on ${percent(latent.frequency)}, ${percent(latent.share, 2)} of the attribution`;
    path.append(make("title", { svg: true }, text));
    marks.set(latent, path);
    svg.append(make("a", { svg: true, href: `#${key(latent)}`, tabindex: "-1", "aria-hidden": "true" }, path));
  }
  const step = Math.min(26, 230 / atlas.colours.length);
  svg.append(label(left, 14, "first selected in cycle"));
  atlas.colours.forEach((fill, t) => {
    svg.append(make("rect", { x: left + 140 + t * step, y: 4, width: step - 1, height: 12, fill }));
    if (t === 0 || t === atlas.colours.length - 1) svg.append(label(left + 140 + (t + .5) * step - .5, 28, String(t), { "text-anchor": "middle" }));
  });
  const key_ = make("svg", { viewBox: `0 0 600 22`, "aria-hidden": "true" });
  [...groups.values()].forEach((group, n) => {
    const at = 10 + n * 590 / groups.size, free = group.role === "free";
    key_.append(make("path", { d: group.shape, class: free ? "mark never" : "mark", fill: free ? null : "var(--muted)", transform: `translate(${at} 11)` }));
    key_.append(label(at + 11, 15, armName(group)));
  });
  $("map").replaceChildren(svg, key_);
}

// ---- a card -------------------------------------------------------------------------------------------------

const fact = (name, value, more = "") => make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, more)));
const link = (latent, text = latent.id) => make("a", { href: `#${key(latent)}` }, text);

function facts(latent) {
  const same = atlas.latents.filter((other) => groups.get(other.group).chain === groups.get(latent.group).chain);
  const rank = 1 + same.filter((other) => other.share > latent.share).length, cut = latent.ablation;
  const parts = [fact("Share of the attribution", percent(latent.share, 2), `number ${rank} of the ${same.length} of this SAE shown`),
    fact("Fires on", percent(latent.frequency), `of ${latent.tokens.toLocaleString("en")} test tokens`)];
  if (cut) {
    const range = cut.interval ? `95 %: ${signed(cut.interval[0])} to ${signed(cut.interval[1])}` : "the same in every context";
    parts.push(fact("Loss without it", `${signed(cut.change)} nats`, range));
  }
  for (const near of latent.nearest) {
    const other = byKey.get(`${near.group}/${near.id}`);
    const where = near.group === latent.group ? "of its own core" : `in ${near.group}`;
    parts.push(fact(`Nearest ${where}`, link(other), `cosine ${signed(near.cosine, 2)}`));
  }
  return make("dl", { class: "facts" }, ...parts);
}
function lineage(latent) {
  if (!latent.history.length) return make("p", {}, "No cycle selected it: it is free, and trained anew in the last cycle.");
  const most = Math.max(...latent.history.map((one) => one.share));
  const cells = atlas.colours.map((_, t) => {
    const one = latent.history.find((entry) => entry.cycle === t);
    const bar = one ? make("i", { "--h": (one.share / most).toFixed(3), "--c": colour(latent) }) : "";
    const said = one ? `cycle ${t}: ${percent(one.share, 2)} of the attribution, fires on ${percent(one.frequency)}` : `cycle ${t}: not there`;
    return make("li", { title: said }, make("div", { class: "bar" }, bar), String(t));
  });
  return make("ol", { class: "lineage", "aria-label": `selected in cycles ${latent.history.map((one) => one.cycle).join(", ")}` }, ...cells);
}
function histogram(latent) {
  const W = 360, H = 110, floor = 88, most = Math.max(...latent.histogram, 1), n = latent.histogram.length;
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `Histogram of its ${latent.active} activations, from 0 to ${latent.max}` });
  latent.histogram.forEach((count, i) => {
    const height = (floor - 8) * count / most, range = `${(i * latent.max / n).toPrecision(3)} to ${((i + 1) * latent.max / n).toPrecision(3)}: ${count}`;
    svg.append(make("rect", { x: i * W / n + .5, y: floor - height, width: W / n - 1, height, fill: "rgb(var(--act))" }, make("title", { svg: true }, range)));
  });
  for (const ends of latent.tenths)
    if (ends) svg.append(make("line", { class: "grid", x1: W * ends[0] / latent.max, x2: W * ends[0] / latent.max, y1: floor + 1, y2: floor + 7 }));
  svg.append(make("line", { class: "grid", x1: 0, x2: W, y1: floor, y2: floor }), label(0, H - 4, "0"), label(W, H - 4, String(latent.max), { "text-anchor": "end" }));
  return svg;
}
function table(rows, digits) {
  return make("table", {}, make("tbody", {}, ...rows.map(([text, value, n]) =>
    make("tr", {}, make("td", {}, make("code", {}, text)), make("td", {}, digits ? signed(value, digits) : `${value} × ${n}`)))));
}
function contexts(latent) {
  const words = sought(), parts = [];
  let tenth = 0;
  latent.contexts.forEach((context, n) => {
    if (context.tenth !== tenth) {
      tenth = context.tenth;
      const [low, high] = latent.tenths[tenth - 1], named = { 10: ", the strongest", 1: ", the weakest" }[tenth] ?? "";
      parts.push(make("p", { class: "tenth" }, `Tenth ${tenth} of 10${named}: ${low} to ${high}`));
    }
    const tokens = contextText(context).map((text, i) => {
      const value = context.values[i], at = context.start + i === context.at;
      return make("span", { "--a": (value / (latent.max || 1)).toFixed(3), class: at ? "at" : null, title: `${text.trim()}: ${value}` }, text);
    });
    const hit = words && latent.searched[n].includes(words);
    parts.push(make("div", { class: hit ? "context hit" : "context" }, make("span", {}, String(context.values[context.at - context.start])), make("div", { class: "text" }, ...tokens)));
  });
  return parts.length ? parts : [make("p", {}, "It fires nowhere in the test split.")];
}
function renderCard(latent) {
  const at = shown.indexOf(latent), group = groups.get(latent.group);
  const steps = make("nav", { class: "steps", "aria-label": "Latents" }, make("a", { href: "#" }, "← all latents"),
    at > 0 ? link(shown[at - 1], `previous: ${shown[at - 1].id}`) : "", at >= 0 && at < shown.length - 1 ? link(shown[at + 1], `next: ${shown[at + 1].id}`) : "");
  const note = atlas.notes.find((one) => one.key === key(latent));
  const left = make("div", {}, make("h3", {}, "Lineage ", make("small", {}, "share of the attribution, by cycle")), lineage(latent),
    make("h3", {}, "Activations ", make("small", {}, `${latent.active} of them; ticks: tenths`)), histogram(latent),
    make("h3", {}, "Tokens with its highest means ", make("small", {}, "mean activation × occurrences")), table(latent.by_token));
  const right = make("div", {}, make("h3", {}, "Raises directly ", make("small", {}, "logits per unit of activation")), table(latent.logits.raises, 2),
    make("h3", {}, "Lowers directly"), table(latent.logits.lowers, 2));
  $("card").replaceChildren(steps, make("h2", {}, sign(latent, 20), ` ${latent.id} `), make("p", {}, make("small", {}, `${armName(group)} · latent ${latent.index} of its SAE`)),
    note ? make("p", { class: "note" }, make("strong", {}, "What it seems to do. "), note.text) : "", facts(latent), make("div", { class: "two" }, left, right),
    make("h3", {}, "Contexts from every tenth of its activations ", make("small", {}, "shaded by the activation at each token; at the left that of the framed one")), ...contexts(latent));
}
function renderStart(missing) {
  const notes = atlas.notes.map((one) => make("li", {}, link(byKey.get(one.key), one.key.replace(/^main\//, "")), ": ", one.text));
  $("card").replaceChildren(missing ? make("p", { role: "alert" }, `There is no latent ${missing} here.`) : "",
    notes.length ? make("h2", {}, "To start from") : "", notes.length ? make("ul", { class: "notes" }, ...notes) : "",
    make("h2", {}, "What the words mean"), $("words").content.cloneNode(true));
}

// ---- links and keys -----------------------------------------------------------------------------------------

function wanted() {
  try { return decodeURIComponent(location.hash.slice(1)); } catch { return location.hash.slice(1); }
}
const current = () => byKey.get(wanted());
function go() {
  const latent = current(), moved = document.activeElement !== $("search");
  document.body.classList.toggle("chosen", Boolean(latent));
  renderList();
  if (latent) renderCard(latent);
  else renderStart(wanted() && wanted() !== "list" ? wanted() : "");
  document.title = `${latent ? `${key(latent)} · ` : ""}Core atlas · ${atlas.title}`;
  $("list").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  if (latent && moved) { $("card").focus({ preventScroll: true }); scrollTo(0, 0); }
}
addEventListener("hashchange", go);
$("controls").addEventListener("input", () => { renderList(); if (current()) renderCard(current()); });
$("controls").addEventListener("submit", (event) => event.preventDefault());
addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT"].includes(document.activeElement?.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { document.activeElement?.blur(); location.hash = ""; }
  else if (typing) return;
  else if (event.key === "/") { event.preventDefault(); $("search").focus(); }
  else if ("jk".includes(event.key) && shown.length) {
    const at = shown.indexOf(current()), to = event.key === "j" ? at + 1 : Math.max(at - 1, 0);
    location.hash = key(shown[Math.min(to, shown.length - 1)]);
  }
});
renderMap();
go();
