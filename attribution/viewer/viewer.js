// The page's state and events: the selected, hovered and pinned nodes, and how many nodes and edges are shown.

const STARTING_NODES = 150;
const STARTING_EDGES = 120;
const MOST_EDGES = 2000;
const SCROLLBAR = 18;

window.addEventListener("error", (event) => report(`Error in this page: ${event.message}`, true));

function report(message, isError = false) {
  const notice = document.getElementById("notice");
  notice.textContent = message;
  notice.hidden = message === "";
  if (isError) document.body.dataset.error = message;
}

const model = buildModel(readDocument());
const state = { selected: null, hovered: null, pinned: new Set(), mode: "paths", view: null };
const control = (id) => document.getElementById(id);

function start() {
  drawHeader(model);
  drawLegend(model);
  drawPictures(model);
  drawPrompt(model);
  setUpSlider("node-slider", model.inner.length, STARTING_NODES, redraw);
  setUpSlider("edge-slider", Math.min(model.links.length, MOST_EDGES), STARTING_EDGES, showOverall);
  listen();
  readAddress();
  redraw();
  showSelected();
  document.body.dataset.nodes = state.view.groups.size;
  document.body.dataset.ready = "true";
}

function setUpSlider(id, most, startingValue, onChange) {
  const slider = control(id);
  slider.max = most;
  slider.value = Math.min(most, startingValue);
  slider.addEventListener("input", onChange);
}

// Lays out and draws everything that depends on the set of visible nodes.
function redraw() {
  const shown = Number(control("node-slider").value);
  const kept = new Set(model.inner.slice(0, shown));
  for (const node of [state.selected, ...state.pinned]) if (node && isInner(node)) kept.add(node);
  const canvas = control("canvas");
  const focused = canvas.contains(document.activeElement) ? nodeUnder({ target: document.activeElement }) : null;
  // Where the canvas grows with the drawing (narrow windows), its own least height is measured.
  control("drawing").setAttribute("height", 0);
  const layout = layOut(model, [...kept], canvas.offsetWidth - SCROLLBAR, canvas.offsetHeight - 4);
  state.view = drawGraph(model, layout);
  control("node-count").textContent = `${kept.size} of ${model.inner.length}`;
  const tabStop = state.selected ?? model.nodes.find((node) => node.kind === "logit");
  state.view.groups.get(tabStop).setAttribute("tabindex", 0);
  if (focused) state.view.groups.get(focused)?.focus();
  showOverall();
  showFocus();
  drawDetails(model, state.selected, state.pinned);
}

// Scrolls sideways until the selected node is in view.
function showSelected() {
  const canvas = control("canvas");
  const at = state.view.layout.positions.get(state.selected);
  if (at) canvas.scrollLeft = at.x - canvas.clientWidth + 45;
}

function showOverall() {
  const wanted = Number(control("edge-slider").value);
  const strongest = model.links.slice(0, wanted).reverse();
  const drawn = drawEdges(state.view.background, state.view.layout, strongest, (link) => link.score);
  const hidden = drawn < wanted ? `, ${wanted - drawn} of them at hidden nodes` : "";
  control("edge-count").textContent = `${wanted} of ${model.links.length}${hidden}`;
}

// Hovering over a patch or token shows its edges but keeps the highlights of the selected node.
function showFocus() {
  const node = state.hovered ?? state.selected;
  showNode(state.view, node, state.selected, state.pinned);
  highlightInputs(model, state.hovered?.inputs.length ? state.hovered : state.selected, state.mode);
  control("status").textContent = node
    ? `${fullName(model, node)}: ${node.inputs.length} inputs, ${node.outputs.length} outputs` : "No node selected.";
}

function select(node) {
  state.selected = node;
  state.hovered = null;
  writeAddress();
  if (node && !state.view.groups.has(node)) return redraw();
  showFocus();
  return drawDetails(model, node, state.pinned);
}

function hover(node) {
  if (node === state.hovered) return;
  state.hovered = node;
  showFocus();
}

function togglePin(node) {
  if (!node) return;
  if (!state.pinned.delete(node)) state.pinned.add(node);
  writeAddress();
  showFocus();
  drawDetails(model, state.selected, state.pinned);
}

// The address holds the selection, so that a view can be linked: #node=<id>&pin=<id>,<id>.
function addressOfState() {
  const parts = [];
  if (state.selected) parts.push(`node=${encodeURIComponent(state.selected.node_id)}`);
  const pins = [...state.pinned].map((node) => encodeURIComponent(node.node_id));
  if (pins.length) parts.push(`pin=${pins.join(",")}`);
  return `#${parts.join("&")}`;
}

function isCurrentAddress() {
  return addressOfState() === (location.hash || "#");
}

function writeAddress() {
  report("");
  if (!isCurrentAddress()) location.hash = addressOfState();
}

function readAddress() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const pins = (parameters.get("pin") ?? model.qParams.pinnedIds.join(",")).split(",");
  const wanted = location.hash ? parameters.get("node") : model.qParams.clickedId;
  state.pinned = new Set(pins.map((id) => model.byId.get(id)).filter(Boolean));
  state.selected = model.byId.get(wanted) ?? null;
  report(wanted && !state.selected ? `No node ${wanted} on this page.` : "");
}

function nodeUnder(event) {
  const holder = event.target.closest("[data-id]");
  return holder ? model.byId.get(holder.dataset.id) ?? null : null;
}

function listen() {
  document.addEventListener("click", (event) => {
    if (event.target.closest(".pin")) togglePin(state.selected);
    const node = nodeUnder(event);
    if (node) select(node === state.selected && event.target.closest(".node, .patch") ? null : node);
  });
  for (const id of ["canvas", "pictures", "details", "prompt"]) {
    control(id).addEventListener("mouseover", (event) => hover(nodeUnder(event)));
    control(id).addEventListener("mouseleave", () => hover(null));
  }
  control("drawing").addEventListener("focusin", (event) => hover(nodeUnder(event)));
  control("drawing").addEventListener("focusout", () => hover(null));
  document.addEventListener("keydown", onKey);
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => { state.mode = radio.value; showFocus(); });
  }
  window.addEventListener("hashchange", () => {
    if (isCurrentAddress()) return;
    readAddress();
    redraw();
  });
  window.addEventListener("resize", redraw);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") select(null);
  const holder = event.target.closest(".node, .patch");
  if (!holder) return;
  const node = model.byId.get(holder.dataset.id) ?? null;
  if (event.key === "Enter" || event.key === " ") select(node === state.selected ? null : node);
  else if (event.key === "p" || event.key === "P") togglePin(node);
  else if (event.key.startsWith("Arrow")) moveFocus(holder, node, event.key);
  else return;
  event.preventDefault();
}

function moveFocus(holder, node, key) {
  let next = null;
  if (holder.classList.contains("patch")) next = patchBeside(holder, key);
  else next = state.view.groups.get(neighbourOf(state.view, node, key));
  if (!next) return;
  holder.setAttribute("tabindex", -1);
  next.setAttribute("tabindex", 0);
  next.focus();
}

start();
